//! `onboardctl packages`, as an operator runs it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod tool;

use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use tool::{Dir, Ended};

const RECIPE: &str = "\
name: NAME
summary: a package for a test
description: It has two files.
licence: Apache-2.0
maintainer: Onboarding <onboarding@example.org>
section: net
depends: {rpm: [glibc >= 2.17]}
files:
- {to: /usr/bin/NAME, from: binary, mode: '0755'}
- {to: /etc/NAME.yaml, from: NAME.yaml, config: true}
";

/// Recipes of both products, and what they are made of.
fn world() -> Dir {
    let dir = Dir::new();
    for name in ["onboarding-agent", "istio-sidecar"] {
        dir.write(
            &format!("recipes/{name}.yaml"),
            RECIPE.replace("from: NAME.yaml", "from: x.yaml").replace("NAME", name),
        );
    }
    dir.write("recipes/x.yaml", "kind: X\n");
    dir.write("root/binary", b"\x7fELF");
    dir
}

fn build(dir: &Dir, name: &str, more: &[&str]) -> Ended {
    let recipe = format!("recipes/{name}.yaml");
    let arguments = ["packages", "build", &recipe, "--root", "root", "--arch", "amd64", "--version", "1.2.3"];
    dir.run(&[&arguments, more].concat())
}

fn on(dir: &Dir, verb: &[&str]) -> Ended {
    dir.run(&[&["packages"], verb, &["--packages", "packages"]].concat())
}

#[test]
fn what_is_built_is_indexed_listed_verified_and_removed() {
    let dir = world();
    build(&dir, "onboarding-agent", &["-o", "packages"]).is(0).says("packages/deb/amd64/onboarding-agent.deb\n");
    build(&dir, "istio-sidecar", &["-o", "packages", "--revision", "1-28", "--format", "rpm"])
        .is(0)
        .says("packages/istio-sidecar/1-28/rpm/amd64/istio-sidecar.rpm\n");
    assert!(!dir.path("packages/istio-sidecar/1-28/deb").exists(), "--format rpm");
    assert!(!dir.path("packages.signing-key.asc").exists(), "building signs nothing");

    // Twice the same: the same bytes, wherever.
    build(&dir, "onboarding-agent", &["-o", "again"]).is(0);
    for file in ["deb/amd64/onboarding-agent.deb", "rpm/amd64/onboarding-agent.rpm"] {
        let [first, second] = ["packages", "again"].map(|at| std::fs::read(dir.path(&format!("{at}/{file}"))).unwrap());
        assert!(first == second, "{file}");
    }

    on(&dir, &["verify"]).is(1).says("onboarding.asc: there is no public key");
    on(&dir, &["index", "--host", "onboarding.corp", "--revision", "1-28"])
        .is(0)
        .complains("made the signing key")
        .complains("signed istio-sidecar/1-28/rpm/amd64/istio-sidecar.rpm")
        .complains("published stable, istio-1-28")
        .says("deb [signed-by=/etc/apt/keyrings/onboarding.asc] https://onboarding.corp/install/apt istio-1-28 main")
        .says("baseurl=https://onboarding.corp/install/yum/istio-1-28/$basearch\n");
    let key = dir.path("packages.signing-key.asc");
    assert_eq!(std::fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    on(&dir, &["verify"]).is(0).silent();
    on(&dir, &["index"]).is(0).complains("everything is published already");

    // As gpgv has it, which knows nothing of ours.
    let keyring = dir.path("keyring.gpg");
    let mut dearmor = Command::new("gpg");
    dearmor.args(["--dearmor", "-o"]).arg(&keyring).arg(dir.path("packages/onboarding.asc"));
    let dearmored = dearmor.env("GNUPGHOME", dir.path("")).output().unwrap();
    assert!(dearmored.status.success(), "{dearmored:?}");
    for signed in [
        &["apt/dists/stable/InRelease"] as &[&str],
        &["apt/dists/stable/Release.gpg", "apt/dists/stable/Release"],
        &["yum/istio-1-28/x86_64/repodata/repomd.xml.asc", "yum/istio-1-28/x86_64/repodata/repomd.xml"],
    ] {
        let files: Vec<_> = signed.iter().map(|file| dir.path(&format!("packages/{file}"))).collect();
        let checked = Command::new("gpgv").arg("--keyring").arg(&keyring).args(&files).output().unwrap();
        assert!(checked.status.success(), "{signed:?}: {checked:?}");
        // And as sqv, with which apt verifies since Debian 13: it also asks whether the key might sign at that time.
        if let [signature, data] = &files[..] {
            let keyring = dir.path("packages/onboarding.asc");
            let checked = Command::new("sqv").arg("--keyring").arg(keyring).args([signature, data]).output().unwrap();
            assert!(checked.status.success(), "{signed:?}: {checked:?}");
        }
    }

    let listed = on(&dir, &["list", "-o", "json"]).is(0).json();
    let paths: Vec<_> = listed["items"].as_array().unwrap().iter().map(|item| item["path"].as_str().unwrap()).collect();
    let wanted = [
        "deb/amd64/onboarding-agent.deb",
        "rpm/amd64/onboarding-agent.rpm",
        "istio-sidecar/1-28/rpm/amd64/istio-sidecar.rpm",
    ];
    assert_eq!(paths, wanted);
    let sidecar = &listed["items"][2];
    assert_eq!((&sidecar["name"], &sidecar["version"]), (&json!("istio-sidecar"), &json!("1.2.3-1")));
    let file = std::fs::metadata(dir.path("packages/istio-sidecar/1-28/rpm/amd64/istio-sidecar.rpm")).unwrap();
    assert_eq!((&sidecar["arch"], &sidecar["size"]), (&json!("amd64"), &json!(file.len())));
    on(&dir, &["list"]).is(0).says("PATH").says("deb/amd64/onboarding-agent.deb");

    on(&dir, &["remove", "istio-sidecar/1-28/rpm/amd64/istio-sidecar.rpm"]).is(0).complains("published stable,");
    on(&dir, &["remove", "istio-sidecar/1-28/rpm/amd64/istio-sidecar.rpm"]).is(1).complains("is not there");
    on(&dir, &["remove", "../packages.signing-key.asc"]).is(1).complains("is no package's path");
    on(&dir, &["verify"]).is(0).silent();

    // Changed behind its back: said by list and by verify.
    let deb = dir.path("packages/deb/amd64/onboarding-agent.deb");
    let whole = std::fs::read(&deb).unwrap();
    std::fs::write(&deb, &whole[..whole.len() - 10]).unwrap();
    on(&dir, &["list"]).is(1).complains("was cut off");
    on(&dir, &["verify"])
        .is(1)
        .says("deb/amd64/onboarding-agent.deb: it is")
        .says("InRelease: it isn't of the packages");
    on(&dir, &["index"]).is(1).complains("can't be published");
}

#[test]
fn what_is_imported_is_what_it_says_itself_or_refused() {
    let dir = world();
    build(&dir, "onboarding-agent", &["-o", "built"]).is(0);
    build(&dir, "istio-sidecar", &["-o", "built"]).is(0);
    // Whatever they are called.
    for (at, to) in [("deb/amd64/onboarding-agent.deb", "a"), ("rpm/amd64/istio-sidecar.rpm", "b")] {
        std::fs::copy(dir.path(&format!("built/{at}")), dir.path(to)).unwrap();
    }
    on(&dir, &["import", "a", "b", "--revision", "1-28"])
        .is(0)
        .says("deb/amd64/onboarding-agent.deb 1.2.3\n")
        .says("istio-sidecar/1-28/rpm/amd64/istio-sidecar.rpm 1.2.3-1\n");
    on(&dir, &["verify"]).is(0).silent();

    let whole = std::fs::read(dir.path("a")).unwrap();
    dir.write("cut", &whole[..whole.len() - 50]);
    let mut changed = whole.clone();
    let place = changed.len() - 50;
    changed[place] ^= 1;
    dir.write("changed", &changed);
    dir.write("text", "#!/bin/sh\n");
    for (file, said) in [
        ("cut", "cut: it is broken"),
        ("changed", "changed: it is broken"),
        ("text", "text: it is neither a deb nor an rpm"),
    ] {
        let before = on(&dir, &["list"]).is(0).stdout;
        on(&dir, &["import", "b", file]).is(1).complains(said);
        assert_eq!(on(&dir, &["list"]).is(0).stdout, before, "nothing was imported");
    }
    on(&dir, &["import", "a", "a"]).is(1).complains("another of these files is deb/amd64/onboarding-agent.deb too");
    on(&dir, &["import", "a", "--revision", "1-28"]).is(1).complains("none of these files is one");
    let below = dir.path("packages/key.asc").display().to_string();
    on(&dir, &["import", "a", "--signing-key", &below]).is(1).complains("lies in the directory of packages");
}

/// Packages of other makers' tools, however those compress.
#[test]
fn what_dpkg_and_rpmbuild_made_is_imported_but_a_deb_in_zstd() {
    let dir = world();
    let made = |command: &mut Command| {
        let output = command.current_dir(dir.path("")).env("HOME", dir.path("")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    dir.write(
        "tree/DEBIAN/control",
        "Package: istio-sidecar\nVersion: 1.28.2\nArchitecture: amd64\nMaintainer: x <x@example.org>\nDescription: x\n",
    );
    dir.write("tree/usr/local/bin/envoy", b"\x7fELF");
    for compression in ["gzip", "xz", "none"] {
        made(Command::new("dpkg-deb").arg(format!("-Z{compression}")).args(["-b", "tree", "made.deb"]));
        on(&dir, &["import", "made.deb"]).is(0);
        on(&dir, &["verify"]).is(0).silent();
        let imported = std::fs::read(dir.path("packages/deb/amd64/istio-sidecar.deb")).unwrap();
        assert!(imported == std::fs::read(dir.path("made.deb")).unwrap(), "{compression}");
    }
    made(Command::new("dpkg-deb").args(["-Zzstd", "-b", "tree", "made.deb"]));
    on(&dir, &["import", "made.deb"])
        .is(1)
        .complains("compressed in a way that old systems and this program don't read");

    dir.write(
        "spec",
        "Name: istio-sidecar\nVersion: 1.28.2\nRelease: 1\nSummary: x\nLicense: x\n%description\nx\n\
         %install\nmkdir -p %{buildroot}/usr/local/bin\necho envoy > %{buildroot}/usr/local/bin/envoy\n%files\n/usr/local/bin/envoy\n",
    );
    for payload in ["w6.gzdio", "w6.xzdio", "w3.zstdio", "w.ufdio"] {
        let mut rpmbuild = Command::new("rpmbuild");
        rpmbuild.args(["-bb", "--target", "x86_64", "--define", &format!("_binary_payload {payload}")]);
        rpmbuild.arg("--define").arg(format!("_topdir {}", dir.path("rpmbuild").display()));
        made(rpmbuild.arg("spec"));
        let package = "rpmbuild/RPMS/x86_64/istio-sidecar-1.28.2-1.x86_64.rpm";
        on(&dir, &["import", package]).is(0).complains("signed rpm/amd64/istio-sidecar.rpm");
        on(&dir, &["verify"]).is(0).silent();
        let mut checked = Command::new("rpm");
        let file = dir.path("packages/rpm/amd64/istio-sidecar.rpm");
        let checked = checked.args(["-K", "--nosignature"]).arg(file).output().unwrap();
        assert!(String::from_utf8_lossy(&checked.stdout).contains("digests OK"), "{payload}: {checked:?}");
    }
}

#[test]
fn a_recipe_with_faults_builds_nothing_and_says_each() {
    let dir = world();
    let recipe = RECIPE.replace("NAME", "onboarding-agent").replace("'0755'", "'755'").replace("section:", "sektion:");
    dir.write("recipes/onboarding-agent.yaml", recipe);
    build(&dir, "onboarding-agent", &["-o", "packages"])
        .is(1)
        .says("recipes/onboarding-agent.yaml:6: recipe: sektion: is unknown here; did you mean section?")
        .says("files[0].mode: must be four octal digits");
    assert!(!dir.path("packages").exists());
    for (arguments, said) in [
        (&["-o", "p", "--arch", "x86"] as &[&str], "must be amd64 or arm64"),
        (&["-o", "p", "--version", "v1"], "beginning with a digit"),
        (&["-o", "p", "--format", "apk"], "must be deb or rpm"),
        (&["-o", "p", "--revision", "1.28"], "must be a revision of Istio"),
    ] {
        let all = ["packages", "build", "recipes/istio-sidecar.yaml", "--root", "root"];
        let rest: &[&str] = match arguments[2] {
            "--arch" => &["--version", "1"],
            "--version" => &["--arch", "amd64"],
            _ => &["--version", "1", "--arch", "amd64"],
        };
        dir.run(&[&all, rest, arguments].concat()).is(1).complains(said);
    }
    dir.write("recipes/curl.yaml", RECIPE.replace("NAME", "curl"));
    build(&dir, "curl", &["-o", "p"]).is(1).complains("this recipe's name is curl");
}

/// The recipes that are shipped.
#[test]
fn the_recipes_of_the_tree_have_no_fault() {
    let packaging = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging");
    for name in ["onboarding-agent", "istio-sidecar"] {
        let file = packaging.join(format!("{name}.yaml"));
        let recipe = onboarding_kinds::recipe::read(name, &std::fs::read_to_string(file).unwrap());
        assert_eq!(recipe.unwrap_or_else(|faults| panic!("{faults:#?}")).name, name);
    }
}
