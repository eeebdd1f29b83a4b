//! `onboard.sh`, run by a real shell with real downloads; only what would change this machine is stood in for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use support::*;

/// A repository with both packages, its script, and a directory of commands that only say what they were asked.
fn setup() -> Repository {
    let (agent, sidecar) = (deb(b"agent"), deb(b"sidecar"));
    let repository = Repository::start(&[
        ("deb/amd64/onboarding-agent.deb", &agent),
        ("deb/amd64/istio-sidecar.deb", &sidecar),
        ("rpm/amd64/onboarding-agent.rpm", &rpm(b"agent")),
        ("rpm/amd64/istio-sidecar.rpm", &rpm(b"sidecar")),
        ("rpm/arm64/onboarding-agent.rpm", &rpm(b"agent")),
        ("rpm/arm64/istio-sidecar.rpm", &rpm(b"sidecar")),
        ("deb/arm64/onboarding-agent.deb", &agent),
        ("deb/arm64/istio-sidecar.deb", &sidecar),
        ("istio-sidecar/1-28/deb/amd64/istio-sidecar.deb", &deb(b"1.28")),
        ("istio-sidecar/1-28/deb/arm64/istio-sidecar.deb", &deb(b"1.28")),
    ]);
    let script = repository.curl().arg("-f").arg(repository.local("/install/onboard.sh")).output().unwrap();
    assert!(script.status.success(), "{script:?}");
    std::fs::write(repository.work().join("onboard.sh"), script.stdout).unwrap();
    let commands = repository.work().join("bin");
    std::fs::create_dir(&commands).unwrap();
    stand_in(&commands, "apt-get", INSTALLS);
    stand_in(&commands, "systemctl", "echo systemctl \"$@\"");
    repository
}

/// Says its name and arguments, but the digests of those that are files.
const INSTALLS: &str = r#"said=${0##*/}
for word; do
    if [ -f "$word" ]; then echo "${word##*/}" $(sha256sum <"$word"); else said="$said $word"; fi
done
echo "$said""#;

fn stand_in(commands: &Path, name: &str, does: &str) {
    let file = commands.join(name);
    std::fs::write(&file, format!("#!/bin/sh\n{does}\n")).unwrap();
    std::fs::set_permissions(file, PermissionsExt::from_mode(0o755)).unwrap();
}

/// In the place of apt-get this package manager, and of the machine's own programs those that the script needs and no more.
fn of_red_hat(repository: &Repository, manager: &str) {
    let commands = repository.work().join("bin");
    std::fs::remove_file(commands.join("apt-get")).unwrap();
    stand_in(&commands, manager, INSTALLS);
    for tool in [
        "sh",
        "curl",
        "cut",
        "cat",
        "chmod",
        "cmp",
        "cp",
        "id",
        "install",
        "mkdir",
        "mktemp",
        "mv",
        "rm",
        "sha256sum",
        "stat",
        "uname",
    ] {
        let path = Command::new("sh").args(["-c", &format!("command -v {tool}")]).output().unwrap();
        let path = String::from_utf8(path.stdout).unwrap();
        std::os::unix::fs::symlink(path.trim(), commands.join(tool)).unwrap();
    }
}

/// In a mount namespace where /etc is empty, as a root who lets nobody read; what is in /etc/onboarding-agent afterwards is printed.
fn run(repository: &Repository, arguments: &str) -> Output {
    run_with(repository, "$PWD/bin:$PATH", arguments)
}

fn run_with(repository: &Repository, path: &str, arguments: &str) -> Output {
    let script = format!(
        "mount -t tmpfs -o mode=755 tmpfs /etc && PATH={path} && umask 077 && sh onboard.sh {arguments} && cd / && \
         for file in /etc/onboarding-agent/*; do [ -e \"$file\" ] && echo \"== $file $(stat -c %a \"$file\")\" && cat \"$file\"; done; exit"
    );
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--user", "--map-root-user", "sh", "-c", &script]);
    unshare.env("CURL_CA_BUNDLE", repository.dir.path().join("ca.pem")).current_dir(repository.work());
    unshare.output().unwrap()
}

#[test]
fn it_installs_both_and_joins_the_group() {
    let repository = setup();
    let output = run(&repository, "--group bookinfo/ratings");
    let said = String::from_utf8_lossy(&output.stdout);
    for line in [
        "istio-sidecar.deb: OK",
        "onboarding-agent.deb: OK",
        "apt-get -o DPkg::Lock::Timeout=600 -o Dpkg::Options::=--force-confold install -y",
        &format!("istio-sidecar.deb {} -", sha256(&deb(b"sidecar"))),
        &format!("onboarding-agent.deb {} -", sha256(&deb(b"agent"))),
        "systemctl enable onboarding-agent",
        "systemctl restart onboarding-agent",
        "== /etc/onboarding-agent/onboarding.config.yaml 644",
        "  host: \"127.0.0.1\"",
        "  namespace: \"bookinfo\"",
        "  name: \"ratings\"",
    ] {
        assert!(said.lines().any(|said| said == line), "{line:?} is not in {output:?}");
    }
    // By content.
    repository.logs("/install/sha256/");
    // The CA that curl was told of is the agent's too.
    let ca = std::fs::read_to_string(repository.dir.path().join("ca.pem")).unwrap();
    assert!(said.contains(&format!("== /etc/onboarding-agent/root-certs.pem 644\n{ca}")), "{output:?}");
    let own = "--group bookinfo/ratings";
    let path =
        "$PWD/bin:$PATH && mkdir -m 755 /etc/onboarding-agent && echo mine >/etc/onboarding-agent/root-certs.pem";
    let said = run_with(&repository, path, own);
    assert!(
        String::from_utf8_lossy(&said.stdout).contains("/root-certs.pem 644\nmine\n"),
        "what is there stays: {said:?}"
    );
}

#[test]
fn where_there_is_no_apt_it_installs_by_dnf_or_by_yum() {
    for manager in ["dnf", "yum"] {
        let repository = setup();
        put(&repository.packages(), "onboarding.asc", b"key");
        of_red_hat(&repository, manager);
        let arguments = "--group bookinfo/ratings --keep-current && cat /etc/yum.repos.d/onboarding.repo \
            && stat -c '%a %n' /etc/pki/onboarding/* /etc/yum.repos.d/*";
        let output = run_with(&repository, "$PWD/bin", arguments);
        let said = String::from_utf8_lossy(&output.stdout);
        for line in [
            "onboarding-agent.rpm: OK",
            &format!("{manager} install -y"),
            &format!("istio-sidecar.rpm {} -", sha256(&rpm(b"sidecar"))),
            &format!("onboarding-agent.rpm {} -", sha256(&rpm(b"agent"))),
            "systemctl restart onboarding-agent",
            "[onboarding]",
            &format!("baseurl={}", repository.local("/install/yum/$basearch")),
            "gpgcheck=1",
            "repo_gpgcheck=1",
            "gpgkey=file:///etc/pki/onboarding/onboarding.asc",
            "sslcacert=/etc/pki/onboarding/ca.pem",
            "644 /etc/pki/onboarding/ca.pem",
            "644 /etc/pki/onboarding/onboarding.asc",
            "644 /etc/yum.repos.d/onboarding.repo",
        ] {
            assert!(said.lines().any(|said| said == line), "{manager}: {line:?} is not in {output:?}");
        }
    }
}

#[test]
fn where_there_is_no_package_manager_it_says_what_to_do() {
    let repository = setup();
    of_red_hat(&repository, "dnf");
    std::fs::remove_file(repository.work().join("bin/dnf")).unwrap();
    let output = run_with(&repository, "$PWD/bin", "--group bookinfo/ratings");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("there is no apt-get, dnf or yum"), "{output:?}");
}

#[test]
fn it_only_installs_without_a_group_and_takes_a_revision() {
    let repository = setup();
    let output = run(&repository, "--revision 1-28");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(&format!("istio-sidecar.deb {} -", sha256(&deb(b"1.28")))), "{output:?}");
    assert!(!said.contains("systemctl enable onboarding-agent\n") && !said.contains("== /etc"), "{output:?}");
}

/// What `keep_current` wrote is in the same mount namespace, so the script's end prints it.
#[test]
fn it_makes_a_signed_repository_known_and_no_other() {
    let repository = setup();
    let output = run(&repository, "--keep-current");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("the repository is not signed"), "{output:?}");
    put(&repository.packages(), "onboarding.asc", b"key");
    let show = "--keep-current --revision 1-28 && cat /etc/apt/sources.list.d/onboarding.list /etc/apt/keyrings/*";
    let output = run(&repository, show);
    let said = String::from_utf8_lossy(&output.stdout);
    let line = format!(
        "deb [signed-by=/etc/apt/keyrings/onboarding.asc] {} istio-1-28 main\nkey",
        repository.local("/install/apt")
    );
    assert!(said.contains(&line), "{output:?}");
}

#[test]
fn it_says_what_is_wrong_and_does_nothing() {
    let repository = setup();
    for (arguments, words) in [
        ("--group ratings", "--group is NAMESPACE/NAME"),
        ("--group 'bookinfo/rat\"ings'", "--group is NAMESPACE/NAME"),
        ("--group", "--group needs a value"),
        ("--namespace x", "--namespace is unknown"),
        ("--revision 1.28/..", "--revision is that of an Istio"),
        ("--revision 1-29", "says what there is"),
    ] {
        let output = run(&repository, arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(words), "{arguments}: {output:?}");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("apt-get"), "{arguments}: {output:?}");
    }
}

#[test]
fn a_script_that_was_cut_off_does_nothing() {
    let repository = setup();
    let file = repository.work().join("onboard.sh");
    let whole = std::fs::read_to_string(&file).unwrap();
    let end = whole.rfind("main \"$@\"").unwrap();
    std::fs::write(&file, &whole[..end]).unwrap();
    let output = run(&repository, "--group bookinfo/ratings");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{output:?}");
}
