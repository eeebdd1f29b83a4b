//! The signed repository, as apt and dnf of Debian use it: in roots of their own, over HTTPS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use onboarding_kinds::recipe;
use onboarding_packages::build::{Places, Source, Version};
use onboarding_packages::key::SigningKey;
use onboarding_packages::library::Library;
use onboarding_packages::name::{Architecture, Format, Package, Product, Revision};
use onboarding_packages::published::{self, Outcome};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use support::*;

/// A repository, its key, and a place for recipes.
struct World {
    repository: Repository,
    key: SigningKey,
}

const RECIPE: &str = "
summary: a package for a test
description: It has a file.
licence: Apache-2.0
maintainer: Onboarding <onboarding@example.org>
section: net
files: [{to: /usr/share/NAME/content, from: content}]
";

impl World {
    fn new() -> Self {
        let repository = Repository::start(&[]);
        fs::create_dir_all(repository.packages()).unwrap();
        let path = repository.dir.path().join("key.asc");
        let (key, _) = SigningKey::load_or_make(&path, &repository.packages(), now()).unwrap();
        Self { repository, key }
    }

    /// Builds it, with this many bytes that can't be compressed, and publishes.
    fn publish(&self, name: &str, revision: Option<&str>, version: &str, bytes: usize) -> Outcome {
        self.publish_by(&self.key, name, revision, version, bytes)
    }

    fn publish_by(&self, key: &SigningKey, name: &str, revision: Option<&str>, version: &str, bytes: usize) -> Outcome {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("content"), noise(bytes, version.len() as u64 + bytes as u64)).unwrap();
        let recipe = recipe::read("r", &format!("name: {name}{}", RECIPE.replace("NAME", name))).unwrap();
        let places = Places { root: dir.path().to_owned(), folder: dir.path().to_owned() };
        let version = Version::parse(version).unwrap();
        let product = Product::parse(name, revision.map(|it| Revision::parse(it).unwrap())).unwrap();
        let source = Source::read(&recipe, &places, &version, Architecture::Amd64, 1_767_225_600).unwrap();
        let packages = Format::ALL.map(|format| {
            let package = Package { product: product.clone(), format, architecture: Architecture::Amd64 };
            (package, source.pack(format).unwrap())
        });
        let library = Library::open(&self.repository.packages()).unwrap();
        library.put(&packages).unwrap();
        published::publish(&library, key, now()).unwrap()
    }

    /// The only file below `directory` whose path ends so.
    fn find(&self, directory: &str, end: &str) -> PathBuf {
        let found = walk(&self.repository.packages().join(directory));
        let found: Vec<_> = found.into_iter().filter(|path| path.to_str().unwrap().ends_with(end)).collect();
        assert_eq!(found.len(), 1, "{end}: {found:?}");
        found.into_iter().next().unwrap()
    }
}

fn walk(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { walk(&path) } else { vec![path] }).collect()
}

fn now() -> u32 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

/// Changes one byte in the middle, by a rename: other links to the file stay as they are.
fn tamper(path: &Path) {
    let mut content = fs::read(path).unwrap();
    let place = content.len() / 2;
    content[place] ^= 1;
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    // HTTP's times are in seconds: within the same one it would not be another file.
    let later = fs::metadata(path).unwrap().modified().unwrap() + Duration::from_secs(2);
    fs::File::options().append(true).open(&new).unwrap().set_modified(later).unwrap();
    fs::rename(new, path).unwrap();
}

fn all(output: &Output) -> String {
    format!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// apt with a root of its own, where this version of the agent is installed, if any.
struct Apt<'a> {
    world: &'a World,
    root: tempfile::TempDir,
}

impl<'a> Apt<'a> {
    fn new(world: &'a World, suite: &str, installed: Option<&str>) -> Self {
        Self::with_key(world, suite, installed, &world.repository.packages().join("onboarding.asc"))
    }

    fn with_key(world: &'a World, suite: &str, installed: Option<&str>, key: &Path) -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for directory in [
            "etc/apt/apt.conf.d",
            "etc/apt/preferences.d",
            "etc/apt/sources.list.d",
            "etc/apt/trusted.gpg.d",
            "var/lib/apt/lists/partial",
            "var/cache/apt/archives/partial",
            "var/lib/dpkg",
            "var/log/apt",
        ] {
            fs::create_dir_all(at(directory)).unwrap();
        }
        let status = installed.map(|version| {
            format!("Package: onboarding-agent\nStatus: install ok installed\nVersion: {version}\nArchitecture: amd64\nMaintainer: x\nDescription: x\n\n")
        });
        fs::write(at("var/lib/dpkg/status"), status.unwrap_or_default()).unwrap();
        let source =
            format!("deb [signed-by={}] {} {suite} main\n", key.display(), world.repository.local("/install/apt"));
        fs::write(at("etc/apt/sources.list"), source).unwrap();
        let ca = world.repository.dir.path().join("ca.pem");
        let configuration = format!(
            "Dir \"{root}\"; Dir::State::status \"{root}/var/lib/dpkg/status\"; Acquire::https::CAInfo \"{}\"; \
             APT::Architecture \"amd64\"; APT::Architectures {{ \"amd64\"; }}; APT::Sandbox::User \"root\"; \
             Acquire::Languages \"none\"; Acquire::Retries \"0\";",
            ca.display(),
            root = root.path().display()
        );
        fs::write(at("apt.conf"), configuration).unwrap();
        Self { world, root }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut apt = Command::new("apt-get");
        apt.args(arguments).current_dir(self.root.path()).env("APT_CONFIG", self.root.path().join("apt.conf"));
        apt.env("LC_ALL", "C").output().unwrap()
    }

    #[track_caller]
    fn works(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}\n{}", all(&output), self.world.repository.log());
        all(&output)
    }

    /// Without the leave to go on with what it had.
    #[track_caller]
    fn refuses(&self, arguments: &[&str], why: &str) {
        let output = self.run(&[&["-o", "APT::Update::Error-Mode=any"], arguments].concat());
        let said = all(&output);
        assert!(!output.status.success() && said.contains(why), "{arguments:?}: {why}: {said}");
    }
}

#[test]
fn apt_installs_upgrades_and_resumes_and_refuses_what_was_tampered_with() {
    let world = World::new();
    let first = world.publish("onboarding-agent", None, "1.0.0", 300_000);
    assert!(matches!(first, Outcome::Published { .. }), "{first:?}");
    let apt = Apt::new(&world, "stable", None);
    let said = apt.works(&["update"]);
    assert!(!said.contains("W:") && !said.contains("E:"), "{said}");
    // apt takes indexes by their digests.
    world.repository.logs("/by-hash/SHA256/");

    // A download that broke off goes on where it was.
    let whole = fs::read(world.repository.packages().join("deb/amd64/onboarding-agent.deb")).unwrap();
    let file = "onboarding-agent_1.0.0_amd64.deb";
    fs::write(apt.root.path().join("var/cache/apt/archives/partial").join(file), &whole[..100_000]).unwrap();
    apt.works(&["install", "--yes", "--download-only", "onboarding-agent"]);
    assert!(fs::read(apt.root.path().join("var/cache/apt/archives").join(file)).unwrap() == whole);
    world.repository.logs("\"status\":206");

    // A machine that has 1.0.0, and an index of then, while the next version comes.
    let machine = Apt::new(&world, "stable", Some("1.0.0"));
    machine.works(&["update"]);
    world.publish("onboarding-agent", None, "1.0.1", 310_000);
    assert!(!machine.works(&["--simulate", "upgrade"]).contains("(1.0.1 "));
    // The old index still leads to the old package.
    apt.works(&["download", "onboarding-agent=1.0.0"]);
    machine.works(&["update"]);
    let said = machine.works(&["--simulate", "upgrade"]);
    assert!(said.contains("Inst onboarding-agent [1.0.0] (1.0.1 "), "{said}");

    // A package that isn't what the index says.
    tamper(&world.find("apt/pool", "onboarding-agent_1.0.1_amd64.deb"));
    machine.refuses(&["download", "onboarding-agent"], "Hash Sum mismatch");
    // An index that isn't what was signed; the machine keeps what it had.
    tamper(&world.repository.packages().join("apt/dists/stable/InRelease"));
    fs::remove_file(world.repository.packages().join("apt/dists/stable/Release")).unwrap();
    machine.refuses(&["update"], "E:");
    let said = machine.works(&["--simulate", "upgrade"]);
    assert!(said.contains("Inst onboarding-agent [1.0.0] (1.0.1 "), "{said}");

    // All of that is said to whoever runs the repository, and mended by publishing again.
    let problems = published::verify(&world.repository.packages()).unwrap().concat();
    assert!(problems.contains("apt/pool/") && problems.contains("apt/dists/stable/InRelease"), "{problems}");
    let library = Library::open(&world.repository.packages()).unwrap();
    assert!(matches!(published::publish(&library, &world.key, now()).unwrap(), Outcome::Published { .. }));
    assert_eq!(published::publish(&library, &world.key, now()).unwrap(), Outcome::Unchanged);
    assert_eq!(published::verify(&world.repository.packages()).unwrap(), Vec::<String>::new());
    machine.works(&["update"]);
    machine.works(&["download", "onboarding-agent"]);
}

/// Whoever holds the repository, and not the key: everything in it fits together, and is signed by another.
#[test]
fn what_another_key_signed_is_refused_by_apt_and_dnf() {
    let world = World::new();
    world.publish("onboarding-agent", None, "1.0.0", 1000);
    let packages = world.repository.packages();
    let known = world.repository.dir.path().join("known.asc");
    fs::copy(packages.join("onboarding.asc"), &known).unwrap();
    let apt = Apt::with_key(&world, "stable", Some("1.0.0"), &known);
    let dnf = Dnf::with_key(&world, &format!("file://{}", known.display()));
    apt.works(&["update"]);
    dnf.works(&["install", "onboarding-agent"]);
    let keys = tempfile::tempdir().unwrap();
    assert!(rpmkeys(keys.path(), &["--import"], &known).status.success());
    let package = packages.join("rpm/amd64/onboarding-agent.rpm");
    assert!(rpmkeys(keys.path(), &["-K"], &package).status.success(), "what its own key signed");

    let (other, _) =
        SigningKey::load_or_make(&world.repository.dir.path().join("other.asc"), &packages, now()).unwrap();
    world.publish_by(&other, "onboarding-agent", None, "1.0.1", 2000);
    assert!(fs::read(packages.join("onboarding.asc")).unwrap() != fs::read(&known).unwrap());
    assert_eq!(published::verify(&packages).unwrap(), Vec::<String>::new(), "nothing is broken");
    apt.refuses(&["update"], "NO_PUBKEY");
    assert!(!apt.works(&["--simulate", "upgrade"]).contains("1.0.1"));
    dnf.refuses(&["install", "onboarding-agent-1.0.1"], "repomd.xml GPG signature verification error");
    assert_eq!(dnf.installed(), "onboarding-agent-1.0.0-1.x86_64");

    // The package alone, for whoever downloads it by its own URI.
    let checked = rpmkeys(keys.path(), &["-K", "-v"], &package);
    assert!(!checked.status.success() && all(&checked).contains("NOKEY"), "{checked:?}");
}

#[test]
fn each_revision_is_a_suite_with_the_agent_and_its_own_sidecar() {
    let world = World::new();
    world.publish("onboarding-agent", None, "1.0.0", 1000);
    world.publish("istio-sidecar", None, "1.29.0", 2000);
    world.publish("istio-sidecar", Some("1-28"), "1.28.2", 3000);
    for (suite, sidecar) in [("stable", "1.29.0"), ("istio-1-28", "1.28.2")] {
        let apt = Apt::new(&world, suite, None);
        apt.works(&["update"]);
        let said = apt.works(&["--simulate", "install", "onboarding-agent", "istio-sidecar"]);
        assert!(said.contains(&format!("Inst istio-sidecar ({sidecar} ")), "{suite}: {said}");
        assert!(said.contains("Inst onboarding-agent (1.0.0 "), "{suite}: {said}");
    }
    // With its last package goes the suite.
    let library = Library::open(&world.repository.packages()).unwrap();
    for format in Format::ALL {
        let product = Product::Sidecar(Revision::parse("1-28"));
        assert!(library.remove(&Package { product, format, architecture: Architecture::Amd64 }).unwrap());
    }
    published::publish(&library, &world.key, now()).unwrap();
    assert_eq!(world.repository.get("/install/apt/dists/istio-1-28/InRelease", &[]).status, "404");
    assert_eq!(world.repository.get("/install/apt/dists/stable/InRelease", &[]).status, "200");
}

/// dnf with a root of its own.
struct Dnf<'a> {
    world: &'a World,
    root: tempfile::TempDir,
}

impl<'a> Dnf<'a> {
    /// With what an administrator is told to write down.
    fn new(world: &'a World) -> Self {
        Self::with_key(world, &world.repository.local("/install/onboarding.asc"))
    }

    /// The same with the key from elsewhere.
    fn with_key(world: &'a World, key: &str) -> Self {
        let host = world.repository.local("");
        let told = published::setup(host.trim_start_matches("https://"), None);
        let (_, repository) = told.split_once("/etc/yum.repos.d/onboarding.repo\n").unwrap();
        let repository = repository.replace(&world.repository.local("/install/onboarding.asc"), key);
        let root = tempfile::tempdir().unwrap();
        for directory in ["repos", "log"] {
            fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        fs::write(root.path().join("repos/onboarding.repo"), repository).unwrap();
        Self { world, root }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let at = |path: &str| self.root.path().join(path).display().to_string();
        let mut dnf = Command::new("dnf");
        dnf.arg(format!("--installroot={}", at("installed"))).arg(format!("--setopt=reposdir={}", at("repos")));
        dnf.arg(format!("--setopt=cachedir={}", at("cache"))).arg(format!("--setopt=logdir={}", at("log")));
        // The CA of a test is none that this machine trusts.
        let ca = self.world.repository.dir.path().join("ca.pem");
        dnf.arg(format!("--setopt=sslcacert={}", ca.display())).arg("--setopt=retries=1");
        dnf.args(["--releasever=9", "--forcearch=x86_64", "--assumeyes", "--refresh", "--noplugins"]).args(arguments);
        dnf.env("LC_ALL", "C").env("HOME", self.root.path()).output().unwrap()
    }

    #[track_caller]
    fn works(&self, arguments: &[&str]) {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}\n{}", all(&output), self.world.repository.log());
    }

    #[track_caller]
    fn refuses(&self, arguments: &[&str], why: &str) {
        let output = self.run(arguments);
        let said = all(&output);
        assert!(!output.status.success() && said.contains(why), "{arguments:?}: {why}: {said}");
    }

    fn installed(&self) -> String {
        // Debian's rpm keeps its database in the home directory.
        let mut rpm = Command::new("rpm");
        rpm.env("HOME", self.root.path())
            .arg("--root")
            .arg(self.root.path().join("installed"))
            .args(["-q", "onboarding-agent"]);
        String::from_utf8(rpm.output().unwrap().stdout).unwrap().trim().to_owned()
    }
}

/// With a database of keys of its own.
fn rpmkeys(keys: &Path, arguments: &[&str], path: &Path) -> Output {
    let mut rpmkeys = Command::new("rpmkeys");
    rpmkeys.arg("--dbpath").arg(keys).args(arguments).arg(path).env("LC_ALL", "C").output().unwrap()
}

#[test]
fn dnf_installs_and_upgrades_and_refuses_what_was_tampered_with() {
    let world = World::new();
    world.publish("onboarding-agent", None, "1.0.0", 300_000);
    let dnf = Dnf::new(&world);
    dnf.works(&["install", "onboarding-agent"]);
    assert_eq!(dnf.installed(), "onboarding-agent-1.0.0-1.x86_64");
    world.publish("onboarding-agent", None, "1.0.1", 310_000);
    dnf.works(&["upgrade"]);
    assert_eq!(dnf.installed(), "onboarding-agent-1.0.1-1.x86_64");

    // The signature in the package itself, for whoever downloads it by its own URI.
    let keys = dnf.root.path().join("keys");
    let rpm = |arguments: &[&str], path: &Path| rpmkeys(&keys, arguments, path);
    let package = world.repository.packages().join("rpm/amd64/onboarding-agent.rpm");
    assert!(all(&rpm(&["-K", "-v"], &package)).contains("NOKEY"));
    assert!(rpm(&["--import"], &world.repository.packages().join("onboarding.asc")).status.success());
    // Without the path, which may have any letters.
    let checked = all(&rpm(&["-K", "-v"], &package)).replace(package.to_str().unwrap(), "");
    assert!(
        checked.contains("RSA/SHA256 Signature") && !checked.contains("NOKEY") && !checked.contains("BAD"),
        "{checked}"
    );

    let next = Dnf::new(&world);
    tamper(&world.find("yum/x86_64/pool", "onboarding-agent_1.0.1-1.x86_64.rpm"));
    next.refuses(&["install", "onboarding-agent"], "Error");
    assert!(!next.installed().contains("1.0.1"));
    tamper(&world.repository.packages().join("yum/x86_64/repodata/repomd.xml"));
    let next = Dnf::new(&world);
    next.refuses(&["install", "onboarding-agent"], "Error: Failed to download metadata");
}

#[test]
fn people_find_the_signed_repository_in_the_pages() {
    let world = World::new();
    let get = |path: &str| world.repository.get(&format!("/install/{path}"), &[]);
    assert!(!get("").text().contains("apt/") && get("apt/").status == "404", "nothing is signed yet");
    world.publish("onboarding-agent", None, "1.0.0", 1000);
    world.publish("istio-sidecar", Some("1-28"), "1.28.2", 3000);
    for (path, links) in [
        ("", vec!["deb/", "apt/", "yum/", "onboarding.asc"]),
        ("apt/", vec!["dists/"]),
        ("apt/dists/", vec!["stable/", "istio-1-28/"]),
        ("apt/dists/stable/", vec!["InRelease"]),
        ("yum/", vec!["x86_64/", "istio-1-28/"]),
        ("yum/istio-1-28/x86_64/repodata/", vec!["repomd.xml"]),
    ] {
        let page = get(path);
        assert_eq!(page.status, "200", "{path}: {}", page.text());
        for link in links {
            assert!(page.text().contains(&format!("<a href=\"{link}\">{link}</a>")), "{path}: {link}: {}", page.text());
            // It leads somewhere.
            assert_eq!(get(&format!("{path}{link}")).status, "200", "{path}{link}");
        }
    }
    for path in
        ["apt/dists/istio-1-29/InRelease", "yum/istio-1-29/x86_64/repodata/repomd.xml", "apt/nonsense", "apt/pool/"]
    {
        let answer = get(path);
        assert_eq!(answer.status, "404", "{path}");
        for there in [
            "onboarding.asc",
            "apt/dists/stable/InRelease",
            "apt/dists/istio-1-28/InRelease",
            "yum/istio-1-28/x86_64/repodata/repomd.xml",
        ] {
            assert!(answer.text().contains(&format!("\n/install/{there}\n")), "{path}: {}", answer.text());
        }
    }
}

/// Clients of an index, and the machine that signs while they ask.
#[test]
fn a_writer_that_is_killed_leaves_a_repository_that_works() {
    let world = World::new();
    world.publish("onboarding-agent", None, "1.0.0", 1000);
    let packages = world.repository.packages();
    // As far as a writer came: a package in its place, an index not, and a file that isn't in its place.
    let new = fs::read(packages.join("deb/amd64/onboarding-agent.deb")).unwrap();
    fs::write(packages.join(".onboardctl-unfinished"), &new[..100]).unwrap();
    fs::remove_file(packages.join("deb/amd64/onboarding-agent.deb")).unwrap();
    let apt = Apt::new(&world, "stable", None);
    apt.works(&["update"]);
    apt.works(&["download", "onboarding-agent"]);
    let problems = published::verify(&packages).unwrap().concat();
    assert!(problems.contains("isn't of the packages that are there now"), "{problems}");
    let library = Library::open(&packages).unwrap();
    assert!(!packages.join(".onboardctl-unfinished").exists());
    assert!(Library::open(&packages).unwrap_err().to_string().contains("by another onboardctl"));
    published::publish(&library, &world.key, now()).unwrap();
    assert_eq!(published::verify(&packages).unwrap(), Vec::<String>::new());
    assert!(Command::new("apt-get").arg("--version").output().is_ok());
}

#[test]
fn what_it_serves_has_types_and_says_whether_it_may_change() {
    let world = World::new();
    world.publish("onboarding-agent", None, "1.0.0", 1000);
    let get = |path: &str| world.repository.get(&format!("/install/{path}"), &[]);
    let key = get("onboarding.asc");
    assert_eq!(key.header("content-type"), Some("application/pgp-keys"));
    assert!(key.text().starts_with("-----BEGIN PGP PUBLIC KEY BLOCK-----"));
    let release = get("apt/dists/stable/InRelease");
    assert_eq!((release.status.as_str(), release.header("cache-control")), ("200", Some("no-cache")));
    let below = |path: &Path| path.strip_prefix(world.repository.packages()).unwrap().to_str().unwrap().to_owned();
    let pooled = get(&below(&world.find("apt/pool", ".deb")));
    assert_eq!(pooled.header("cache-control"), Some("public, max-age=31536000, immutable"));
    assert_eq!(pooled.header("content-type"), Some("application/vnd.debian.binary-package"));
    for path in [".published.json", ".lock", "apt/pool", "../key.asc", "key.asc", "apt/dists/stable/../../../deb/x"] {
        assert_ne!(get(path).status, "200", "{path}");
    }
}
