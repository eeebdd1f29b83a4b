//! What is built is what dpkg and rpm read out of it.
#![cfg(feature = "make")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

use onboarding_kinds::recipe::{self, Recipe};
use onboarding_packages::build::{Error, Places, Source, Version};
use onboarding_packages::described::{Described, check_content};
use onboarding_packages::name::{Architecture, Format};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const RECIPE: &str = "\
name: onboarding-agent
summary: joins a mesh
description: |
  First line.

  Second paragraph.
licence: Apache-2.0
maintainer: Onboarding <onboarding@example.org>
homepage: https://example.org/
section: net
depends: {deb: ['libc6 (>= 2.17)', adduser], rpm: ['glibc >= 2.17', shadow-utils]}
recommends: {deb: [istio-sidecar], rpm: [istio-sidecar]}
conflicts: {deb: [other], rpm: [other < 2]}
files:
- {to: /usr/bin/onboarding-agent, from: agent, mode: '0755'}
- {to: /etc/onboarding-agent, directory: true}
- {to: /etc/onboarding-agent/agent.config.yaml, from: agent.config.yaml, mode: '0640', group: onboarding-agent, config: true}
- {to: /var/lib/onboarding-agent, directory: true, mode: '0700', owner: onboarding-agent, group: onboarding-agent}
- {to: /usr/share/onboarding-agent/link, link: ../../bin/onboarding-agent}
- {to: /usr/share/man/man8/onboarding-agent.8.gz, from: agent.8, gzip: true}
- {to: /usr/share/for-debian/agent, from: agent, only: deb}
- {to: /usr/share/licenses/onboarding-agent/LICENSE, from: agent, only: rpm}
- {to: /usr/share/doc/onboarding-agent/notes, from: notes-that-are-not-there, optional: true}
- {to: /usr/share/onboarding-agent/a-directory-with-a-name-that-is-quite-long/and-another-one-below-it/so-that-no-header-holds-it, from: agent}
scripts:
  deb: {postinst: postinst}
  rpm: {post: post, postun: post}
";

struct World {
    dir: tempfile::TempDir,
    recipe: Recipe,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (root, folder) = (dir.path().join("root"), dir.path().join("folder"));
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&folder).unwrap();
        fs::write(root.join("agent"), b"\x7fELF the binary").unwrap();
        fs::write(root.join("agent.8"), b".TH x 8\n").unwrap();
        fs::write(folder.join("agent.config.yaml"), b"kind: AgentConfiguration\n").unwrap();
        fs::write(folder.join("postinst"), b"#!/bin/sh\nset -e\ntrue\n").unwrap();
        fs::write(folder.join("post"), b"#!/bin/sh\nexit 0\n").unwrap();
        Self { dir, recipe: recipe::read("recipe.yaml", RECIPE).unwrap() }
    }

    fn places(&self) -> Places {
        Places { root: self.dir.path().join("root"), folder: self.dir.path().join("folder") }
    }

    fn pack(&self, format: Format, version: &str, time: u32) -> Result<Vec<u8>, Error> {
        let version = Version::parse(version).unwrap();
        Source::read(&self.recipe, &self.places(), &version, Architecture::Amd64, time)?.pack(format)
    }

    fn file(&self, format: Format) -> PathBuf {
        let path = self.dir.path().join(format!("built.{}", format.name()));
        fs::write(&path, self.pack(format, "1.2.3~rc1-4", 1_793_491_200).unwrap()).unwrap();
        path
    }
}

fn said(program: &str, arguments: &[&str], file: &Path) -> String {
    let output = Command::new(program).args(arguments).arg(file).env("TZ", "UTC").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{program} {arguments:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn dpkg_reads_what_the_recipe_says() {
    let world = World::new();
    let file = world.file(Format::Deb);
    let control = said("dpkg-deb", &["-f"], &file);
    assert_eq!(
        control,
        "Package: onboarding-agent\nVersion: 1.2.3~rc1-4\nArchitecture: amd64\nMaintainer: Onboarding <onboarding@example.org>\n\
         Installed-Size: 8\nDepends: libc6 (>= 2.17), adduser\nRecommends: istio-sidecar\nConflicts: other\nSection: net\n\
         Priority: optional\nHomepage: https://example.org/\nDescription: joins a mesh\n First line.\n .\n Second paragraph.\n"
    );
    // Columns are as wide as the longest before them.
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let content = said("dpkg-deb", &["-c"], &file).lines().map(|line| words(line) + "\n").collect::<String>();
    for line in [
        "drwxr-xr-x root/root 0 2026-11-01 00:00 ./\n",
        "drwxr-xr-x root/root 0 2026-11-01 00:00 ./usr/bin/\n",
        "-rwxr-xr-x root/root 15 2026-11-01 00:00 ./usr/bin/onboarding-agent\n",
        "-rw-r----- root/onboarding-agent 25 2026-11-01 00:00 ./etc/onboarding-agent/agent.config.yaml\n",
        "drwx------ onboarding-agent/onboarding-agent 0 2026-11-01 00:00 ./var/lib/onboarding-agent/\n",
        "./usr/share/onboarding-agent/link -> ../../bin/onboarding-agent\n",
        "/so-that-no-header-holds-it\n",
    ] {
        assert!(content.contains(line), "{line:?}\n{content}");
    }
    assert!(content.contains("./usr/share/for-debian/agent\n"), "{content}");
    assert!(!content.contains("/licenses/") && !content.contains("/notes"), "{content}");
    let unpacked = world.dir.path().join("unpacked");
    let status = Command::new("dpkg-deb").arg("-R").arg(&file).arg(&unpacked).status().unwrap();
    assert!(status.success());
    let control = |name: &str| fs::read_to_string(unpacked.join("DEBIAN").join(name)).unwrap();
    assert_eq!(control("conffiles"), "/etc/onboarding-agent/agent.config.yaml\n");
    assert!(!control("md5sums").contains("agent.config.yaml"), "configuration changes");
    assert_eq!(control("postinst"), "#!/bin/sh\nset -e\ntrue\n");
    let mode = fs::metadata(unpacked.join("DEBIAN/postinst")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
    let sums = Command::new("md5sum").args(["--check", "--quiet", "DEBIAN/md5sums"]).current_dir(&unpacked).status();
    assert!(sums.unwrap().success());
    let page = Command::new("zcat").arg(unpacked.join("usr/share/man/man8/onboarding-agent.8.gz")).output().unwrap();
    assert_eq!(page.stdout, b".TH x 8\n");
}

#[test]
fn rpm_reads_what_the_recipe_says() {
    let world = World::new();
    let file = world.file(Format::Rpm);
    let tags = "%{NAME} %{VERSION} %{RELEASE} %{ARCH} %{BUILDTIME} %{PAYLOADCOMPRESSOR} %{LICENSE} %{BUILDHOST}\n";
    let tags = said("rpm", &["-qp", "--nosignature", "--qf", tags], &file);
    assert_eq!(tags, "onboarding-agent 1.2.3~rc1 4 x86_64 1793491200 xz Apache-2.0 localhost\n");
    let requires = said("rpm", &["-qp", "--nosignature", "--requires"], &file);
    for wanted in [
        "/bin/sh",
        "glibc >= 2.17",
        "shadow-utils",
        "rpmlib(PayloadIsXz) <= 5.2-1",
        "rpmlib(TildeInVersions) <= 4.10.0-1",
    ] {
        assert!(requires.lines().any(|line| line == wanted), "{wanted}\n{requires}");
    }
    assert_eq!(said("rpm", &["-qp", "--nosignature", "--conflicts"], &file), "other < 2\n");
    assert!(said("rpm", &["-qp", "--nosignature", "--recommends"], &file).contains("istio-sidecar\n"));
    // `rpm -qplv` cuts long names of users.
    let files = "[%{FILEMODES:perms} %{FILEUSERNAME} %{FILEGROUPNAME} %{FILENAMES}\n]";
    let list = said("rpm", &["-qp", "--nosignature", "--qf", files], &file);
    for wanted in [
        "-rwxr-xr-x root root /usr/bin/onboarding-agent",
        "-rw-r----- root onboarding-agent /etc/onboarding-agent/agent.config.yaml",
        "drwx------ onboarding-agent onboarding-agent /var/lib/onboarding-agent",
    ] {
        assert!(list.lines().any(|line| line == wanted), "{wanted}\n{list}");
    }
    assert_eq!(said("rpm", &["-qpc", "--nosignature"], &file), "/etc/onboarding-agent/agent.config.yaml\n");
    let flags = said("rpm", &["-qp", "--nosignature", "--qf", "[%{FILENAMES} %{FILEFLAGS:fflags}\n]"], &file);
    assert!(flags.contains("agent.config.yaml cn\n"), "config(noreplace): {flags}");
    assert!(flags.contains("/usr/share/licenses/onboarding-agent/LICENSE l\n"), "{flags}");
    assert!(!flags.contains("/for-debian") && !flags.contains("/notes"), "{flags}");
    let scripts = said("rpm", &["-qp", "--nosignature", "--scripts"], &file);
    assert!(scripts.contains("postinstall scriptlet (using /bin/sh):\nexit 0"), "{scripts}");
    assert!(said("rpm", &["-K", "--nosignature"], &file).contains("digests OK"));
}

#[test]
fn the_same_input_gives_the_same_bytes_and_nothing_else_does() {
    let (world, again) = (World::new(), World::new());
    for format in Format::ALL {
        let built = world.pack(format, "1.0", 1).unwrap();
        assert!(built == again.pack(format, "1.0", 1).unwrap(), "{format:?}");
        assert!(built != again.pack(format, "1.0", 2).unwrap(), "{format:?}: the time");
        assert!(built != again.pack(format, "1.1", 1).unwrap(), "{format:?}: the version");
    }
}

#[test]
fn it_says_of_itself_what_was_built_and_whether_it_was_changed() {
    let world = World::new();
    for format in Format::ALL {
        let built = world.pack(format, "1.0-2", 1).unwrap();
        let described = Described::read(&built).unwrap();
        assert_eq!((described.name.as_str(), described.version.as_str()), ("onboarding-agent", "1.0-2"));
        assert_eq!((described.architecture, described.format()), (Architecture::Amd64, format));
        check_content(&built).unwrap();
        let mut changed = built.clone();
        let place = changed.len() - 40;
        changed[place] ^= 1;
        assert!(check_content(&changed).is_err(), "{format:?}");
        assert!(check_content(&built[..built.len() - 40]).is_err(), "{format:?}");
    }
    for (bytes, said) in [(b"#!/bin/sh\n".as_slice(), "neither a deb nor an rpm"), (b"!<arch>\n", "has no control.tar")]
    {
        assert!(Described::read(bytes).err().unwrap().to_string().contains(said));
    }
}

#[test]
fn what_belongs_to_others_is_refused_by_its_name() {
    let mut world = World::new();
    world.recipe.name = "curl".to_owned();
    for format in Format::ALL {
        let fault = Described::read(&world.pack(format, "1.0-2", 1).unwrap()).err().unwrap().to_string();
        assert!(fault.contains("it is curl 1.0-2 for"), "{fault}");
    }
}

#[test]
fn a_file_that_is_missing_is_named_with_where_it_was_looked_for() {
    let world = World::new();
    fs::remove_file(world.dir.path().join("root/agent")).unwrap();
    let fault = world.pack(Format::Deb, "1", 1).unwrap_err().to_string();
    assert!(
        fault.contains("agent: neither") && fault.contains("root/agent") && fault.contains("folder/agent"),
        "{fault}"
    );
    let world = World::new();
    fs::write(world.dir.path().join("folder/postinst"), b"true\n").unwrap();
    let fault = world.pack(Format::Deb, "1", 1).unwrap_err().to_string();
    assert!(fault.contains("for postinst, is no script"), "{fault}");
}
