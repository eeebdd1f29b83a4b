//! The packages of `dev/package` as files: what Debian's and Red Hat's tools say of them, RPMs in a root of their own, and the agent's
//! binary on the oldest and the newest Debian, and for arm64. `ONBOARDING_PACKAGES` says where they are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use anyhow::{Context, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use onboarding_testkit::netns::test_inside;
use onboarding_testkit::process::{self, Ended};
use onboarding_tests::guest::debian;
use onboarding_tests::world::binary;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

type Check = fn(&Path) -> anyhow::Result<()>;

const CHECKS: &[(&str, Check)] = &[
    ("lintian_and_rpmlint_find_no_error", linted),
    ("they_hold_programs_manuals_completions_licences_and_bills_of_materials", contents),
    ("maintainer_scripts_are_posix_shell_without_faults", scripts),
    ("rpms_are_installed_upgraded_and_erased", rpms),
    ("they_are_installed_run_and_are_purged_on_the_oldest_and_the_newest_debian", userlands),
    ("no_program_needs_a_later_glibc_than_its_package_says", glibc),
    ("the_agent_for_arm64_is_one_and_runs", arm64),
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

/// Format, architecture and name of each package that is there: all of amd64, and of arm64 what was made.
fn made() -> anyhow::Result<Vec<(&'static str, &'static str, PathBuf)>> {
    let at = packages()?;
    let mut found = Vec::new();
    for (format, arch) in [("deb", "amd64"), ("rpm", "amd64"), ("deb", "arm64"), ("rpm", "arm64")] {
        for package in ["onboarding-agent", "istio-sidecar"] {
            let file = at.join(format!("{format}/{arch}/{package}.{format}"));
            if file.exists() {
                found.push((format, arch, file));
            } else {
                ensure!(arch == "arm64", "{} isn't there; run `dev/package`", file.display());
            }
        }
    }
    Ok(found)
}

fn linted(_: &Path) -> anyhow::Result<()> {
    for (format, _, file) in made()? {
        let ended = match format {
            "deb" => run("lintian", &["--fail-on=error".as_ref(), "--allow-root".as_ref(), &file])?,
            _ => {
                let config = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/rpmlint.toml"));
                run("rpmlint", &["--config".as_ref(), config, &file])?
            }
        };
        println!("{}", ended.stdout);
        ensure!(ended.status.success(), "{}: {ended:?}", file.display());
        ensure!(format == "deb" || ended.stdout.contains(" 0 errors"), "{}: {ended:?}", file.display());
    }
    Ok(())
}

/// Paths in every package of that name, and more of DEBs and of RPMs.
type Held = [&'static [&'static str]; 3];

const AGENT: Held = [
    &[
        "/usr/bin/onboarding-agent",
        "/usr/lib/systemd/system/onboarding-agent.service",
        "/etc/onboarding-agent/onboarding.config.yaml",
        "/etc/onboarding-agent/agent.config.yaml",
        "/usr/share/man/man8/onboarding-agent.8.gz",
        "/usr/share/man/man5/onboarding.config.yaml.5.gz",
        "/usr/share/man/man5/agent.config.yaml.5.gz",
        "/usr/share/bash-completion/completions/onboarding-agent",
        "/usr/share/fish/vendor_completions.d/onboarding-agent.fish",
        "/usr/share/doc/onboarding-agent/copyright",
        "/usr/share/doc/onboarding-agent/changelog.gz",
        "/usr/share/doc/onboarding-agent/third-party-licences.txt.gz",
        "/usr/share/doc/onboarding-agent/onboarding-agent.cdx.json",
    ],
    &["/usr/share/zsh/vendor-completions/_onboarding-agent"],
    &["/usr/share/zsh/site-functions/_onboarding-agent", "/usr/share/licenses/onboarding-agent/LICENSE"],
];
const SIDECAR: Held = [
    &[
        "/usr/local/bin/envoy",
        "/usr/local/bin/pilot-agent",
        "/usr/local/bin/istio-start.sh",
        "/usr/lib/systemd/system/istio.service",
        "/var/lib/istio/envoy/envoy_bootstrap_tmpl.json",
        "/var/lib/istio/envoy/sidecar.env",
        "/usr/share/doc/istio-sidecar/copyright",
        "/usr/share/doc/istio-sidecar/changelog.gz",
        "/usr/share/doc/istio-sidecar/third-party-licences.txt.gz",
        "/usr/share/doc/istio-sidecar/istio-sidecar.cdx.json",
    ],
    &[],
    &["/usr/share/licenses/istio-sidecar/LICENSE"],
];

/// The recipes let some of it be absent, for builds of one's own; `dev/package` must not.
fn contents(_: &Path) -> anyhow::Result<()> {
    for (format, _, file) in made()? {
        let ended = match format {
            "deb" => run("dpkg-deb", &["-c".as_ref(), &file])?,
            _ => run("rpm", &["-qlvp".as_ref(), &file])?,
        };
        ensure!(ended.status.success(), "{}: {ended:?}", file.display());
        // Mode, owner, size and times in columns, the path as the last; `./` before it in a DEB.
        let size = if format == "deb" { 2 } else { 4 };
        let held: Vec<&str> = ended
            .stdout
            .lines()
            .filter(|line| line.starts_with('-') && line.split_whitespace().nth(size) != Some("0"))
            .filter_map(|line| line.split_whitespace().last())
            .map(|path| path.trim_start_matches('.'))
            .collect();
        let [both, deb, rpm] = if file.ends_with(format!("onboarding-agent.{format}")) { AGENT } else { SIDECAR };
        let missing: Vec<_> =
            both.iter().chain(if format == "deb" { deb } else { rpm }).filter(|path| !held.contains(path)).collect();
        ensure!(missing.is_empty(), "{} has no {missing:?}, or nothing in it:\n{}", file.display(), ended.stdout);
    }
    Ok(())
}

fn scripts(_: &Path) -> anyhow::Result<()> {
    let tree = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let mut scripts = vec![tree.join("crates/repository/src/onboard.sh")];
    for package in ["onboarding-agent", "istio-sidecar"] {
        for format in ["deb", "rpm"] {
            let before = scripts.len();
            for entry in std::fs::read_dir(tree.join("packaging").join(package).join(format))? {
                scripts.push(entry?.path());
            }
            ensure!(scripts.len() >= before + 3, "{package}, {format}: {scripts:?}");
        }
    }
    for script in &scripts {
        let ended = run("sh", &["-n".as_ref(), script])?;
        ensure!(ended.status.success(), "{}: {}", script.display(), ended.stderr);
    }
    let arguments: Vec<&Path> =
        ["--shell=sh".as_ref()].into_iter().chain(scripts.iter().map(PathBuf::as_path)).collect();
    let ended = run("shellcheck", &arguments)?;
    ensure!(ended.status.success(), "{}", ended.stdout);
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

/// The sidecar with the next packaging revision. Its programs are short scripts: packing Envoy takes minutes.
fn next_sidecar(directory: &Path) -> anyhow::Result<()> {
    let root = directory.join("next-root");
    std::fs::create_dir_all(&root)?;
    for program in ["envoy", "pilot-agent"] {
        std::fs::write(root.join(program), format!("#!/bin/sh\necho the next {program}\n"))?;
    }
    std::fs::write(root.join("envoy_bootstrap_tmpl.json"), "{}\n")?;
    std::fs::write(root.join("sidecar.env"), "# of the next one\n")?;
    let now = packages()?.join("rpm/amd64/istio-sidecar.rpm");
    let version = run("rpm", &["-qp".as_ref(), "--qf=%{VERSION}".as_ref(), &now])?.stdout;
    let mut command = Command::new(binary("onboardctl")?);
    command
        .args(["packages", "build"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/istio-sidecar.yaml"))
        .arg("--root")
        .arg(root)
        .args(["--arch", "amd64", "--format", "rpm", "--version", &format!("{version}-2"), "-o"])
        .arg(directory.join("next"));
    process::output(command, Duration::from_secs(60)).map(drop)
}

fn rpms(directory: &Path) -> anyhow::Result<()> {
    next_sidecar(directory)?;
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
        # Of what isn't rpm's own, and of useradd's.
        list() { (cd "$ROOT" && find . -xdev -path ./root/.rpmdb -prune -o -path './etc/*-' -o -path ./etc/.pwd.lock -o -printf '%P %y\n' | sort); }
        list > "$DIRECTORY/before"
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

        echo '# mine' >> "$ROOT/var/lib/istio/envoy/sidecar.env"
        rpm -U "$DIRECTORY/next/rpm/amd64/istio-sidecar.rpm"
        command rpm --root "$ROOT" -q --qf 'sidecar: %{RELEASE}\n' istio-sidecar
        chroot "$ROOT" /usr/local/bin/envoy
        tail -n 1 "$ROOT/var/lib/istio/envoy/sidecar.env.rpmnew"
        grep -qx '# mine' "$ROOT/var/lib/istio/envoy/sidecar.env"
        [ ! -e "$ROOT/usr/local/bin/istio-start.sh" ]
        is 'drwxr-xr-x istio-proxy:istio-proxy' /etc/certs
        is 'drwxr-xr-x istio-proxy:istio-proxy' /var/log/istio
        [ "$(readlink "$ROOT/etc/istio")" = /var/lib/istio ]

        rpm -e onboarding-agent istio-sidecar
        list > "$DIRECTORY/after"
        echo gone: $(comm -23 "$DIRECTORY/before" "$DIRECTORY/after")
        echo left: $(comm -13 "$DIRECTORY/before" "$DIRECTORY/after")"#,
    )?;
    ensure!(ended.status.success(), "{ended:?}");
    let lines: Vec<_> = ended.stdout.lines().collect();
    ensure!(lines.contains(&"# mine") && lines.contains(&"key"), "an upgrade keeps them: {ended:?}");
    for line in ["sidecar: 2", "the next envoy", "# of the next one"] {
        ensure!(lines.contains(&line), "{line}: {ended:?}");
    }
    // What was edited is kept aside, and the key nobody can give again; an RPM has no purge.
    let left = "left: etc/onboarding-agent d etc/onboarding-agent/onboarding.config.yaml.rpmsave f \
        var/lib/istio d var/lib/istio/envoy d var/lib/istio/envoy/sidecar.env.rpmnew f var/lib/istio/envoy/sidecar.env.rpmsave f \
        var/lib/onboarding-agent d var/lib/onboarding-agent/agent.key f";
    ensure!(lines.contains(&left) && lines.contains(&"gone:"), "{ended:?}");
    Ok(())
}

/// The highest `GLIBC_2.x` of an ELF file, where it has any.
fn newest_symbol(program: &Path) -> anyhow::Result<Option<u32>> {
    let ended = run("readelf", &["-VW".as_ref(), program])?;
    ensure!(ended.status.success(), "{ended:?}");
    let versions = ended.stdout.split("GLIBC_2.").skip(1);
    Ok(versions.filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()).max())
}

fn glibc(directory: &Path) -> anyhow::Result<()> {
    for (_, arch, deb) in made()?.into_iter().filter(|(format, ..)| *format == "deb") {
        let ended = run("dpkg-deb", &["-f".as_ref(), &deb, "Depends".as_ref()])?;
        let (_, said) = ended.stdout.split_once("libc6 (>= 2.").context("it depends on no libc6")?;
        let said: u32 = said.split(')').next().unwrap_or_default().parse()?;
        let _ = std::fs::remove_dir_all(directory);
        std::fs::create_dir_all(directory)?;
        ensure!(run("dpkg-deb", &["-x".as_ref(), &deb, directory])?.status.success(), "{}", deb.display());
        let mut seen = 0;
        for (program, most) in [("usr/bin/onboarding-agent", 17), ("usr/local/bin/envoy", 30)] {
            let path = directory.join(program);
            if path.exists() {
                let needs = newest_symbol(&path)?.context("it has no symbol of glibc")?;
                println!("{program} for {arch}: GLIBC_2.{needs}, and libc6 (>= 2.{said}) is depended on");
                ensure!(needs <= said && said == most, "{program} for {arch} needs GLIBC_2.{needs}");
                seen += 1;
            }
        }
        ensure!(seen == 1, "{}: {seen} programs", deb.display());
    }
    Ok(())
}

fn arm64(directory: &Path) -> anyhow::Result<()> {
    let at = packages()?;
    for format in ["deb", "rpm"] {
        let file = at.join(format!("{format}/arm64/onboarding-agent.{format}"));
        ensure!(
            file.exists(),
            "{} isn't there; run `dev/setup --arm64` and `dev/package --arch arm64 --only onboarding-agent`, as dev/test does",
            file.display()
        );
        let (program, arguments, arch) = match format {
            "deb" => ("dpkg-deb", vec!["-f".as_ref(), file.as_path(), "Architecture".as_ref()], "arm64"),
            _ => ("rpm", vec!["-qp".as_ref(), "--qf=%{ARCH}".as_ref(), file.as_path()], "aarch64"),
        };
        let ended = run(program, &arguments)?;
        ensure!(ended.stdout.trim() == arch, "{ended:?}");
    }
    let deb = at.join("deb/arm64/onboarding-agent.deb");
    ensure!(run("dpkg-deb", &["-x".as_ref(), &deb, directory])?.status.success(), "{}", deb.display());
    let program = directory.join("usr/bin/onboarding-agent");
    let header = run("readelf", &["-h".as_ref(), &program])?;
    ensure!(header.stdout.contains("AArch64"), "{header:?}");
    // It reads a file, too.
    for (argument, wanted) in [("--version", "onboarding-agent "), ("check", "onboarding.config.yaml")] {
        let libraries = Path::new("/usr/aarch64-linux-gnu");
        let ended = run("qemu-aarch64-static", &["-L".as_ref(), libraries, &program, argument.as_ref()])?;
        ensure!(ended.stdout.contains(wanted), "{argument}: {ended:?}");
    }
    Ok(())
}

fn userlands(directory: &Path) -> anyhow::Result<()> {
    for suite in ["bullseye", "sid"] {
        let directory = directory.join(suite);
        let ended = in_root(
            &directory,
            suite,
            r#"cp "$PACKAGES"/deb/amd64/*.deb "$ROOT/root/"
            export DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin
            chroot "$ROOT" sh -c 'dpkg -i /root/istio-sidecar.deb /root/onboarding-agent.deb'
            chroot "$ROOT" /usr/bin/onboarding-agent --version
            chroot "$ROOT" /usr/bin/onboarding-agent check || true
            chroot "$ROOT" /usr/local/bin/envoy --version
            chroot "$ROOT" stat -c '%n %U:%G %a' /etc/onboarding-agent/agent.config.yaml /var/lib/onboarding-agent /var/log/istio
            chroot "$ROOT" dpkg --purge onboarding-agent istio-sidecar
            chroot "$ROOT" find /etc /var /usr \( -name '*onboarding-agent*' -o -name '*istio*' \) ! -path '/var/lib/dpkg/*' -printf 'left: %p\n'"#,
        )?;
        ensure!(ended.status.success() && ended.stdout.contains("onboarding-agent "), "{suite}: {ended:?}");
        for owned in [
            "/etc/onboarding-agent/agent.config.yaml root:onboarding-agent 640",
            "/var/lib/onboarding-agent onboarding-agent:onboarding-agent 755",
            "/var/log/istio istio-proxy:istio-proxy 755",
        ] {
            ensure!(ended.stdout.lines().any(|line| line == owned), "{suite}: {owned}: {ended:?}");
        }
        ensure!(!ended.stdout.contains("left: "), "{suite}: {ended:?}");
        // It reads its files, and says what is wrong with them.
        ensure!(ended.stdout.contains("is a placeholder"), "{suite}: {ended:?}");
    }
    Ok(())
}
