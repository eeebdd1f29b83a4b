//! The packages of `dev/package` as files: what Debian's and Red Hat's tools say of them, RPMs in a root of their own, and the agent's
//! binary on the oldest and the newest Debian. `ONBOARDING_PACKAGES` says where they are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use anyhow::{Context, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use onboarding_testkit::netns::test_inside;
use onboarding_testkit::process::{self, Ended};
use onboarding_tests::guest::debian;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

type Check = fn(&Path) -> anyhow::Result<()>;

const CHECKS: &[(&str, Check)] = &[
    ("lintian_and_rpmlint_find_no_error", linted),
    ("maintainer_scripts_are_posix_shell_without_faults", scripts),
    ("rpms_are_installed_upgraded_and_erased", rpms),
    ("the_agent_runs_on_the_oldest_and_the_newest_debian", userlands),
];

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        let none = CHECKS.iter().map(|(name, _)| Trial::test(*name, || Ok(()))).collect();
        return libtest_mimic::run(&arguments, none).exit_code();
    }
    // For its mounts: an overlay ends with the lab, whatever becomes of this program.
    test_inside(|lab| {
        let mut arguments = arguments.clone();
        arguments.test_threads = Some(1);
        let trials = CHECKS.iter().map(|(name, check)| {
            let directory = lab.directory().join(name);
            Trial::test(*name, move || {
                std::fs::create_dir_all(&directory).map_err(|error| Failed::from(error.to_string()))?;
                check(&directory).map_err(|error| Failed::from(format!("{error:#}")))
            })
        });
        libtest_mimic::run(&arguments, trials.collect()).exit_code()
    })
}

fn packages() -> anyhow::Result<PathBuf> {
    let set = std::env::var_os("ONBOARDING_PACKAGES");
    Ok(set.context("ONBOARDING_PACKAGES isn't set: run `dev/package -o DIRECTORY` and set it to that directory, as dev/test does")?.into())
}

fn run(program: &str, arguments: &[&Path]) -> anyhow::Result<Ended> {
    let mut command = Command::new(program);
    command.args(arguments);
    process::run(command, Duration::from_secs(240))
}

fn linted(_: &Path) -> anyhow::Result<()> {
    let at = packages()?;
    for package in ["onboarding-agent", "istio-sidecar"] {
        let deb = at.join(format!("deb/amd64/{package}.deb"));
        let ended = run("lintian", &["--fail-on=error".as_ref(), "--allow-root".as_ref(), &deb])?;
        println!("{}", ended.stdout);
        ensure!(ended.status.success(), "lintian: {ended:?}");
        let rpm = at.join(format!("rpm/amd64/{package}.rpm"));
        let config = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/rpmlint.toml"));
        let ended = run("rpmlint", &["--config".as_ref(), config, &rpm])?;
        println!("{}", ended.stdout);
        ensure!(ended.status.success() && ended.stdout.contains(" 0 errors"), "rpmlint: {ended:?}");
    }
    Ok(())
}

fn scripts(_: &Path) -> anyhow::Result<()> {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging"));
    for package in ["onboarding-agent", "istio-sidecar"] {
        for format in ["deb", "rpm"] {
            let files: Vec<PathBuf> = std::fs::read_dir(folder.join(package).join(format))?
                .map(|entry| Ok(entry?.path()))
                .collect::<anyhow::Result<_>>()?;
            ensure!(files.len() >= 3, "{package}, {format}: {files:?}");
            let arguments: Vec<&Path> =
                ["--shell=sh".as_ref()].into_iter().chain(files.iter().map(PathBuf::as_path)).collect();
            let ended = run("shellcheck", &arguments)?;
            ensure!(ended.status.success(), "{}", ended.stdout);
        }
    }
    Ok(())
}

/// A Debian that may be written to, at `$ROOT`, for a script; packages are at `$PACKAGES`.
fn in_root(directory: &Path, suite: &str, script: &str) -> anyhow::Result<Ended> {
    let prepare = r#"set -eu
        for part in upper work root; do mkdir -p "$DIRECTORY/$part"; done
        ROOT=$DIRECTORY/root
        mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$DIRECTORY/upper,workdir=$DIRECTORY/work" "$ROOT"
        "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-c", &format!("{prepare}{script}")]);
    command.env("DIRECTORY", directory).env("LOWER", debian(suite)?).env("PACKAGES", packages()?);
    process::run(command, Duration::from_secs(240))
}

fn rpms(directory: &Path) -> anyhow::Result<()> {
    // The database of this root knows no Red Hat, so that what is depended on can't be looked for.
    let ended = in_root(
        directory,
        "bookworm",
        r#"rpm() { command rpm --root "$ROOT" --nodeps "$@"; }
        install() { rpm -U --replacepkgs "$PACKAGES/rpm/amd64/istio-sidecar.rpm" "$PACKAGES/rpm/amd64/onboarding-agent.rpm"; }
        is() { # EXPECTED PATH
            seen=$(chroot "$ROOT" stat -c '%A %U:%G' "$2")
            [ "$seen" = "$1" ] || { echo "$2: $seen instead of $1" >&2; exit 1; }
        }
        install
        is '-rwxr-xr-x root:root' /usr/bin/onboarding-agent
        is '-rw-r--r-- root:root' /etc/onboarding-agent/onboarding.config.yaml
        is '-rw-r----- root:onboarding-agent' /etc/onboarding-agent/agent.config.yaml
        is 'drwxr-xr-x onboarding-agent:onboarding-agent' /var/lib/onboarding-agent
        is '-rwxr-xr-x root:root' /usr/local/bin/envoy
        chroot "$ROOT" /usr/bin/onboarding-agent --version
        chroot "$ROOT" /usr/local/bin/envoy --version
        rpm -V onboarding-agent istio-sidecar

        echo '# mine' >> "$ROOT/etc/onboarding-agent/onboarding.config.yaml"
        echo key > "$ROOT/var/lib/onboarding-agent/agent.key"
        install
        tail -n 1 "$ROOT/etc/onboarding-agent/onboarding.config.yaml"
        cat "$ROOT/var/lib/onboarding-agent/agent.key"

        rpm -e onboarding-agent istio-sidecar
        echo left: $(cd "$ROOT" && find etc/onboarding-agent etc/istio var/lib/onboarding-agent var/lib/istio usr/bin/onboarding-agent usr/local/bin \
            usr/lib/systemd/system/onboarding-agent.service usr/share/doc/onboarding-agent -type f -o -type l 2>/dev/null | sort)"#,
    )?;
    ensure!(ended.status.success(), "{ended:?}");
    let lines: Vec<_> = ended.stdout.lines().collect();
    ensure!(lines.contains(&"# mine") && lines.contains(&"key"), "an upgrade keeps them: {ended:?}");
    // What was edited is kept aside, and the key nobody can give again; an RPM has no purge.
    let left = "left: etc/onboarding-agent/onboarding.config.yaml.rpmsave var/lib/onboarding-agent/agent.key";
    ensure!(lines.contains(&left), "{ended:?}");
    Ok(())
}

fn userlands(directory: &Path) -> anyhow::Result<()> {
    for suite in ["bullseye", "sid"] {
        let directory = directory.join(suite);
        let ended = in_root(
            &directory,
            suite,
            r#"dpkg-deb -x "$PACKAGES/deb/amd64/onboarding-agent.deb" "$ROOT"
            chroot "$ROOT" /usr/bin/onboarding-agent --version
            chroot "$ROOT" /usr/bin/onboarding-agent check || true
            dpkg-deb -x "$PACKAGES/deb/amd64/istio-sidecar.deb" "$ROOT"
            chroot "$ROOT" /usr/local/bin/envoy --version"#,
        )?;
        ensure!(ended.status.success() && ended.stdout.contains("onboarding-agent "), "{suite}: {ended:?}");
        // It reads its files, and says what is wrong with them.
        ensure!(ended.stdout.contains("is a placeholder"), "{suite}: {ended:?}");
    }
    Ok(())
}
