//! A machine with systemd, onboarded with the commands of the requirement: installation, the unedited sample, joining, ports below 1024,
//! a reboot without a plane, upgrades under load, removal, purge; with DEBs, and with RPMs by dnf. Packages come from `ONBOARDING_PACKAGES`, which `dev/package` makes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_testkit::process;
use onboarding_tests::guest::{Guest, configure};
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::world::{ENDPOINT, Pair, Setup, World, binary};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[
    ("the_commands_of_the_requirement_bring_a_vm_into_the_mesh", onboarded),
    ("the_application_may_have_a_port_below_1024", low_port),
    ("a_vm_that_boots_while_the_plane_is_away_starts_its_sidecar_by_itself", rebooted),
    ("upgrades_of_both_packages_fail_no_request_and_keep_configuration_and_identity", upgraded),
    ("onboard_sh_installs_joins_and_keeps_current_and_is_undone_as_documented", scripted),
    ("removing_the_packages_leaves_the_mesh_and_purging_leaves_nothing", removed),
    ("a_machine_with_rpms_is_onboarded_upgraded_and_left_as_it_was", red_hat),
];
const NAME: &str = "vm8";
const SUBJECT: &str = "us-east-datacenter1-vm008";
const REGISTRATION: &str = "productpage-jwt-my-corp--us-east-datacenter1-vm008";
const SERVICE: &str = "productpage.bookinfo:8080";
const CONFIG: &str = "etc/onboarding-agent/onboarding.config.yaml";
/// What ends the sample in a later version of the agent.
const NEWER_SAMPLE: &str = "# A newer sample.\n";
/// As docs/vm.md has it.
const UNATTENDED: &str = "apt-get -o Dpkg::Options::=--force-confold upgrade -y";

/// The VM between scenarios.
static VM: Mutex<Option<Vm>> = Mutex::new(None);

struct Vm {
    guest: Guest,
    /// What was on its disk before the packages.
    before: BTreeMap<String, String>,
}

fn main() -> ExitCode {
    // The repository is where a plane of one machine has it: `packages` of the data directory, port 443.
    let code = run(Setup::default(), SCENARIOS);
    // It must be gone before the lab is; nothing drops what is static.
    drop(VM.lock().unwrap_or_else(PoisonError::into_inner).take());
    code
}

fn onboarded(world: &mut World) -> anyhow::Result<()> {
    with_vm(world, |_, vm| {
        let guest = &vm.guest;
        guest.sh("systemctl is-active onboarding-agent")?;
        // What Envoy itself says comes to the journal beside the agent's words; that it is told to end it always says.
        guest.sh("pkill -TERM -x envoy")?;
        until("Envoy is in the journal", Duration::from_secs(10), || {
            let journal = guest.sh("journalctl -u onboarding-agent -o cat --no-pager")?;
            let of_envoy = |line: &str| line.contains(r#"the sidecar says sidecar="envoy" text="caught ENVOY_SIGTERM"#);
            ensure!(journal.lines().any(of_envoy), "{journal}");
            Ok(())
        })?;
        live(guest)
    })
}

/// The VM, onboarded where it isn't yet.
fn with_vm(world: &mut World, scenario: impl FnOnce(&mut World, &mut Vm) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let kept = VM.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut vm = match kept {
        Some(vm) => vm,
        None => onboard(world)?,
    };
    scenario(world, &mut vm).map_err(|error| error.context(vm.guest.report()))?;
    *VM.lock().unwrap_or_else(PoisonError::into_inner) = Some(vm);
    Ok(())
}

fn onboard(world: &mut World) -> anyhow::Result<Vm> {
    world.publish_packages()?;
    let mut guest = Guest::new(world, "bookworm", NAME, 18, SUBJECT)?;
    guest.boot()?;
    guest.sh("update-ca-certificates && systemctl enable --now application@8080 application@80")?;
    let before = guest.files()?;
    let vm = Vm { guest, before };
    join(world, &vm.guest).map_err(|error| error.context(vm.guest.report()))?;
    Ok(vm)
}

fn join(world: &mut World, guest: &Guest) -> anyhow::Result<()> {
    for package in ["istio-sidecar", "onboarding-agent"] {
        let [download, install] = requirement(package, DEB);
        let said = guest.sh(&download)?;
        ensure!(said.contains(&format!("{package}.deb: OK")), "{said}");
        guest.sh(&install)?;
    }
    ensure!(guest.sh("ls /root")?.is_empty(), "the downloads are still there");
    ensure!(guest.try_sh("systemctl is-enabled onboarding-agent")?.stdout.trim() == "disabled", "enabled by itself");
    is_whose_it_should_be(guest)?;
    exposure(guest)?;
    refuses_the_sample(guest)?;

    guest.sh(&configure())?;
    // `Type=notify`: when that returns the sidecar is up, or has been refused.
    let status = guest.sh("systemctl --no-pager status onboarding-agent")?;
    ensure!(status.contains("active (running)"), "{status}");
    live(guest)?;
    println!("    {}", status.lines().find(|line| line.contains("Status:")).unwrap_or_default().trim());
    until("the VM is registered", Duration::from_secs(20), || world.connected(REGISTRATION))?;

    let pair = world.pair()?;
    serves(&pair)?;
    // The other way, and as the agent's own user: nothing of it runs as root.
    guest.sh("curl -fsS -m 5 -H 'Host: ratings.bookinfo:8080' http://127.0.0.2:8080/")?;
    let users = guest.sh("ps -o user:20= -C onboarding-agent,envoy | sort -u")?;
    ensure!(users.trim() == "onboarding-agent", "{users}");
    let seen = guest.sh("sudo -u nobody onboarding-agent status")?;
    ensure!(seen.contains("Connected") && seen.contains("Live"), "{seen}");
    let journal = guest.sh("journalctl -u onboarding-agent -o cat --no-pager")?;
    ensure!(
        journal.contains("the agent starts") && journal.contains("the sidecar is live"),
        "the agent isn't in the journal: {journal}"
    );
    world.keep(pair);
    Ok(())
}

/// The format's name, and the program that installs.
type Commands = [&'static str; 2];
const DEB: Commands = ["deb", "apt-get"];
const RPM: Commands = ["rpm", "yum"];

/// Its words, with the host's name in the place of `<onboarding-endpoint-dns-name>`.
fn requirement(package: &str, [format, program]: Commands) -> [String; 2] {
    let download = format!(
        r#"set -e; cd /root
curl -fLO "https://{ENDPOINT}/install/{format}/amd64/{package}.{format}"
curl -fLO "https://{ENDPOINT}/install/{format}/amd64/{package}.{format}.sha256"
sha256sum --check {package}.{format}.sha256"#
    );
    let install = format!(
        r#"set -e; cd /root
sudo {program} install -y ./{package}.{format}
rm {package}.{format} {package}.{format}.sha256"#
    );
    [download, install]
}

/// Owners and modes, as docs/vm.md has them.
fn is_whose_it_should_be(guest: &Guest) -> anyhow::Result<()> {
    let seen = guest.sh(
        "stat -c '%n %U:%G %a' /etc/onboarding-agent /etc/onboarding-agent/* /var/lib/onboarding-agent /usr/bin/onboarding-agent \
            /usr/local/bin/envoy /usr/local/bin/pilot-agent /usr/local/bin/istio-start.sh /var/lib/istio/envoy/* /etc/certs",
    )?;
    let wanted = "\
/etc/onboarding-agent root:root 755
/etc/onboarding-agent/agent.config.yaml root:onboarding-agent 640
/etc/onboarding-agent/onboarding.config.yaml root:root 644
/var/lib/onboarding-agent onboarding-agent:onboarding-agent 755
/usr/bin/onboarding-agent root:root 755
/usr/local/bin/envoy root:root 755
/usr/local/bin/pilot-agent root:root 755
/usr/local/bin/istio-start.sh root:root 755
/var/lib/istio/envoy/envoy_bootstrap_tmpl.json root:root 644
/var/lib/istio/envoy/sidecar.env root:root 644
/etc/certs istio-proxy:istio-proxy 755
";
    ensure!(seen == wanted, "{seen}");
    Ok(())
}

/// What systemd says of the unit is what docs/vm.md says that it says.
fn exposure(guest: &Guest) -> anyhow::Result<()> {
    let said = guest.sh("systemd-analyze --no-pager security onboarding-agent")?;
    let figure = said.rsplit_once("onboarding-agent.service: ").context("no figure")?.1;
    let figure: Vec<&str> = figure.split_whitespace().take(2).collect();
    let page = document("docs/vm.md")?;
    ensure!(page.contains(&format!("says **{}**", figure.join(" "))), "docs/vm.md doesn't have {figure:?}:\n{said}");
    Ok(())
}

fn document(path: &str) -> anyhow::Result<String> {
    Ok(std::fs::read_to_string(PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path))?)
}

/// Started as it is installed, it says what is to be edited, and stays down.
fn refuses_the_sample(guest: &Guest) -> anyhow::Result<()> {
    let started = guest.try_sh("systemctl start onboarding-agent")?;
    ensure!(!started.status.success(), "it starts with the unedited sample");
    let status = guest.try_sh("systemctl --no-pager --full status onboarding-agent")?.stdout;
    let sentence = r#"OnboardingConfiguration: onboardingEndpoint.host: "<onboarding-endpoint-dns-name>" is a placeholder; replace it with"#;
    ensure!(status.contains("/etc/onboarding-agent/onboarding.config.yaml:") && status.contains(sentence), "{status}");
    ensure!(status.contains("status=78/CONFIG"), "{status}");
    let shown = guest.sh("systemctl show -p ActiveState,NRestarts onboarding-agent")?;
    ensure!(shown.contains("ActiveState=failed") && shown.contains("NRestarts=0"), "{shown}");
    Ok(())
}

fn live(guest: &Guest) -> anyhow::Result<()> {
    until("the sidecar is live", Duration::from_secs(20), || {
        let ready = guest.sh("curl -fsS -m 3 http://localhost:15000/ready")?;
        ensure!(ready.trim() == "LIVE", "{ready}");
        Ok(())
    })
}

/// Requests of a workload elsewhere reach the application on the VM.
fn serves(pair: &Pair) -> anyhow::Result<()> {
    until("the VM answers through the mesh", Duration::from_secs(20), || {
        let answer = pair.ratings.call(SERVICE)?;
        ensure!(answer.application == "guest", "{answer:?}");
        ensure!(answer.caller.as_deref() == Some("spiffe://cluster.local/ns/bookinfo/sa/ratings-vm"), "{answer:?}");
        Ok(())
    })
}

fn low_port(world: &mut World) -> anyhow::Result<()> {
    with_vm(world, |world, vm| {
        let manifest = world.manifest("productpage.yaml")?;
        let ingress =
            "  - defaultEndpoint: 127.0.0.1:80\n    port: {name: http-low, number: 80, protocol: HTTP}\n  egress:";
        world.write_manifest("productpage.yaml", &manifest.replacen("  egress:", ingress, 1))?;
        let own = vm.guest.machine.address();
        let seen = until("the sidecar listens on port 80", Duration::from_secs(20), || {
            let listeners = vm.guest.sh("ss -Hltnp 'sport = :80'")?;
            let mine = listeners.lines().any(|line| line.contains(&format!("{own}:80 ")) && line.contains("envoy"));
            ensure!(mine, "{listeners}");
            Ok(())
        });
        world.write_manifest("productpage.yaml", &manifest)?;
        seen
    })
}

fn rebooted(world: &mut World) -> anyhow::Result<()> {
    with_vm(world, |world, vm| {
        let pair = world.pair()?;
        world.stop_plane()?;
        vm.guest.power_off()?;
        vm.guest.boot()?;
        live(&vm.guest)?;
        serves(&pair)?;
        world.start_plane()?;
        until("the VM is connected again", Duration::from_secs(70), || world.connected(REGISTRATION))?;
        for of_pair in [&pair.ratings, &pair.productpage] {
            until("it is connected again", Duration::from_secs(40), || world.connected(&of_pair.registration()))?;
        }
        world.keep(pair);
        Ok(())
    })
}

fn upgraded(world: &mut World) -> anyhow::Result<()> {
    with_vm(world, |world, vm| {
        let pair = world.pair()?;
        let guest = &vm.guest;
        serves(&pair)?;
        let kept = "sha256sum /etc/onboarding-agent/*.yaml /var/lib/onboarding-agent/agent.key; stat -c '%a %U:%G %n' /etc/onboarding-agent/*.yaml";
        let before = guest.sh(kept)?;
        for package in ["onboarding-agent", "istio-sidecar"] {
            let old = guest.sh("systemctl show -p MainPID --value onboarding-agent")?;
            publish_newer(world, package)?;
            let [download, install] = requirement(package, DEB);
            // One from the signed repository, one as the requirement has it.
            let (download, install) = match package {
                "onboarding-agent" => (known_to_apt(world)?, format!("apt-get update && {UNATTENDED}")),
                _ => (download, install),
            };
            guest.sh(&download)?;
            let load = pair.ratings.load(SERVICE, "/slow?ms=20", 50)?;
            until("the VM serves", Duration::from_secs(10), || {
                let count: u64 = guest.sh("curl -fsS -m 5 http://127.0.0.1:8080/count")?.trim().parse()?;
                ensure!(count > 20, "{count} requests");
                Ok(())
            })?;
            guest.sh(&install)?;
            let version = guest.sh(&format!("dpkg-query -W -f '${{Version}}' {package}"))?;
            ensure!(version.ends_with("+next"), "{version}");
            ensure!(
                guest.sh("systemctl show -p MainPID --value onboarding-agent")? != old,
                "{package}: the old agent goes on"
            );
            live(guest)?;
            until("the VM is connected again", Duration::from_secs(40), || world.connected(REGISTRATION))?;
            serves(&pair)?;
            let outcome = load.stop()?;
            ensure!(
                outcome.failed == 0 && outcome.sent > 100 && outcome.answered_by.len() == 2,
                "{package}: {outcome:?}"
            );
        }
        ensure!(guest.sh(kept)? == before, "an upgrade changed {before}");
        ensure!(guest.read(&format!("{CONFIG}.dpkg-dist"))?.ends_with(NEWER_SAMPLE), "the new sample isn't beside it");
        ensure!(document("docs/vm.md")?.contains(&format!("`{UNATTENDED}`")), "docs/vm.md has another command");
        world.keep(pair);
        Ok(())
    })
}

fn removed(world: &mut World) -> anyhow::Result<()> {
    with_vm(world, |world, vm| {
        let guest = &vm.guest;
        without_a_sidecar(world, guest)?;
        guest.sh("onboarding-agent hosts --write && grep -q '^127.0.0.2 .*ratings.bookinfo' /etc/hosts")?;
        guest.sh("apt-get remove -y onboarding-agent")?;
        let hosts = guest.read("etc/hosts")?;
        ensure!(!hosts.contains("onboarding-agent") && hosts.contains("127.0.0.1 localhost"), "{hosts}");
        has_left(world, guest, REGISTRATION)?;
        // The identity stays for whoever installs it again.
        guest.sh("test -s /var/lib/onboarding-agent/agent.key -a -s /etc/onboarding-agent/onboarding.config.yaml")?;
        guest.sh("test -s /etc/onboarding-agent/root-certs.pem")?;
        guest.sh("apt-get purge -y onboarding-agent istio-sidecar")?;
        is_as_before(&vm.before, &guest.files()?)?;
        let failed = guest.sh("systemctl list-units --all --no-legend 'onboarding*' 'istio*'")?;
        ensure!(failed.trim().is_empty(), "systemd still knows {failed}");
        // Debian's way: a user that is gone could be given, with its files, to somebody else.
        guest.sh("getent passwd onboarding-agent")?;
        Ok(())
    })?;
    // Whoever comes next gets a new one.
    drop(VM.lock().unwrap_or_else(PoisonError::into_inner).take());
    Ok(())
}

/// Without a sidecar the agent stops; nothing that is installed then starts it, and somebody does.
fn without_a_sidecar(world: &World, guest: &Guest) -> anyhow::Result<()> {
    guest.sh("apt-get remove -y istio-sidecar")?;
    has_left(world, guest, REGISTRATION)?;
    publish_newer(world, "onboarding-agent")?;
    for package in ["istio-sidecar", "onboarding-agent"] {
        let [download, install] = requirement(package, DEB);
        guest.sh(&download)?;
        guest.sh(&install.replace("apt-get ", "apt-get -o Dpkg::Options::=--force-confold "))?;
        let state = guest.try_sh("systemctl is-active onboarding-agent")?.stdout;
        ensure!(state.trim() == "inactive", "{package} is installed, and the agent is {state}");
    }
    guest.sh("cp /usr/local/share/ca-certificates/your-company.crt /etc/onboarding-agent/root-certs.pem")?;
    guest.sh("systemctl start onboarding-agent")?;
    live(guest)?;
    until("the VM is registered", Duration::from_secs(20), || world.connected(REGISTRATION))
}

/// Nothing of it runs, and the mesh knows it no more.
fn has_left(world: &World, guest: &Guest, registration: &str) -> anyhow::Result<()> {
    let gone = world.registrations()?.iter().all(|war| war["metadata"]["name"] != registration);
    ensure!(gone, "it is still registered");
    let runs = guest.try_sh("pgrep -af '^/usr/(local/)?bin/(onboarding-agent|envoy|pilot-agent)'")?.stdout;
    ensure!(runs.is_empty(), "something of it still runs: {runs}");
    Ok(())
}

fn is_as_before(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> anyhow::Result<()> {
    let changed: Vec<_> = after.iter().filter(|(path, is)| before.get(*path) != Some(is)).collect();
    ensure!(changed.is_empty(), "left behind or changed: {changed:?}");
    let missing: Vec<_> = before.keys().filter(|path| !after.contains_key(*path)).collect();
    ensure!(missing.is_empty(), "taken away: {missing:?}");
    Ok(())
}

fn scripted(world: &mut World) -> anyhow::Result<()> {
    with_vm(world, |world, vm| {
        let guest = &vm.guest;
        // What somebody edited is still there, as it is on a machine that had the agent once.
        guest.sh(&format!("apt-get remove -y onboarding-agent istio-sidecar && rm -f /{CONFIG}.dpkg-dist"))?;
        // With another sample again, of which dpkg would ask.
        publish_newer(world, "onboarding-agent")?;
        let script = format!(
            r#"set -e; cd /root
curl -fLO "https://{ENDPOINT}/install/onboard.sh"
sudo sh onboard.sh --group bookinfo/productpage --keep-current
rm onboard.sh onboard.sh.* 2>/dev/null || true"#
        );
        let said = guest.sh(&script)?;
        ensure!(said.contains("onboard.sh: the agent runs;"), "{said}");
        live(guest)?;
        until("the VM is registered", Duration::from_secs(20), || world.connected(REGISTRATION))?;
        ensure!(guest.sh("systemctl is-enabled onboarding-agent")?.trim() == "enabled", "{said}");
        let config = guest.read("etc/onboarding-agent/onboarding.config.yaml")?;
        ensure!(config.contains(&format!("host: \"{ENDPOINT}\"")), "{config}");
        ensure!(guest.read(&format!("{CONFIG}.dpkg-dist"))?.ends_with(NEWER_SAMPLE), "the new sample isn't beside it");
        let policy = guest.sh("apt-get update && apt-cache policy onboarding-agent istio-sidecar")?;
        let known = policy.matches(&format!("https://{ENDPOINT}/install/apt stable/main")).count();
        ensure!(known >= 2, "{policy}");

        guest.sh(&format!("set -e\n{}", undoing()?))?;
        let left = guest.sh("find /etc/apt /etc/pki -name '*onboarding*' 2>/dev/null || true")?;
        ensure!(left.is_empty(), "{left}");
        ensure!(!guest.sh("apt-get update && apt-cache policy onboarding-agent")?.contains(ENDPOINT), "apt still asks");
        Ok(())
    })
}

/// The commands of docs/repository.md for Debian.
fn undoing() -> anyhow::Result<String> {
    let page = document("docs/repository.md")?;
    let (_, section) = page.split_once("**Undoing").context("docs/repository.md has no such section")?;
    let (_, block) = section.split_once("```sh\n").context("it has no commands")?;
    let (commands, _) = block.split_once("```").context("they have no end")?;
    let lines = commands.lines().skip_while(|line| !line.starts_with("# Debian")).take_while(|line| !line.is_empty());
    Ok(lines.map(|line| format!("{line}\n")).collect())
}

/// What a machine of Red Hat's has, and this one has from Debian: for the names that our packages depend on.
const SYSTEM: &str = "\
Name: system
Version: 1
Release: 1
Summary: what the machine has
License: none
BuildArch: noarch
Provides: /bin/sh, glibc = 2.36, shadow-utils, ca-certificates, systemd
%description
It is installed by other means.
%files
";

fn red_hat(world: &mut World) -> anyhow::Result<()> {
    const OWN: &str = "productpage-jwt-my-corp--us-east-datacenter1-vm010";
    world.publish_packages()?;
    let mut guest = Guest::new(world, "dnf", "vm10", 20, "us-east-datacenter1-vm010")?;
    let system = rpm_of_the_system(world)?;
    guest.boot()?;
    guest.copy(&system, "root/system.rpm")?;
    guest.sh("update-ca-certificates && systemctl enable --now application@8080
        ln -s dnf /usr/bin/yum && rpm -i /root/system.rpm && rm /root/system.rpm")?;
    let before = guest.files()?;
    let ended = (|| {
        for package in ["istio-sidecar", "onboarding-agent"] {
            let [download, install] = requirement(package, RPM);
            let said = guest.sh(&download)?;
            ensure!(said.contains(&format!("{package}.rpm: OK")), "{said}");
            println!("{}", guest.sh(&install)?);
        }
        ensure!(
            guest.try_sh("systemctl is-enabled onboarding-agent")?.stdout.trim() == "disabled",
            "enabled by itself"
        );
        is_whose_it_should_be(&guest)?;
        guest.sh("rpm -V onboarding-agent istio-sidecar")?;
        refuses_the_sample(&guest)?;
        guest.sh(&configure())?;
        live(&guest)?;
        until("the VM is registered", Duration::from_secs(20), || world.connected(OWN))?;
        guest.sh("onboarding-agent hosts --write && grep -q '^127.0.0.2 ' /etc/hosts")?;

        let kept = "sha256sum /etc/onboarding-agent/*.yaml /var/lib/onboarding-agent/agent.key";
        let (configured, pid) = (guest.sh(kept)?, guest.sh("systemctl show -p MainPID --value onboarding-agent")?);
        publish_newer_rpm(world)?;
        let [download, install] = requirement("onboarding-agent", RPM);
        guest.sh(&download)?;
        println!("{}", guest.sh(&install)?);
        ensure!(guest.sh("rpm -q onboarding-agent")?.trim() == "onboarding-agent-99.0.0-1.x86_64", "not upgraded");
        ensure!(guest.sh("systemctl show -p MainPID --value onboarding-agent")? != pid, "the old agent goes on");
        live(&guest)?;
        until("the VM is connected again", Duration::from_secs(40), || world.connected(OWN))?;
        ensure!(guest.sh(kept)? == configured, "an upgrade changed {configured}");
        ensure!(guest.read(&format!("{CONFIG}.rpmnew"))?.ends_with(NEWER_SAMPLE), "the new sample isn't beside it");

        println!("{}", guest.sh("yum remove -y onboarding-agent istio-sidecar")?);
        has_left(world, &guest, OWN)?;
        ensure!(!guest.read("etc/hosts")?.contains("onboarding-agent"), "/etc/hosts");
        let left = guest.sh("cd /; find etc/onboarding-agent -type f | sort; ls var/lib/onboarding-agent/agent.key")?;
        let saved = format!("etc/onboarding-agent/agent.config.yaml.rpmsave\n{CONFIG}.rpmnew\n{CONFIG}.rpmsave\n");
        ensure!(left == format!("{saved}var/lib/onboarding-agent/agent.key\n"), "{left}");
        guest.sh("rm -r /etc/onboarding-agent /var/lib/onboarding-agent")?;
        is_as_before(&before, &guest.files()?)
    })();
    ended.map_err(|error: anyhow::Error| error.context(guest.report()))
}

fn rpm_of_the_system(world: &World) -> anyhow::Result<PathBuf> {
    let folder = world.lab().directory().join("system");
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("system.spec"), SYSTEM)?;
    let mut command = Command::new("rpmbuild");
    command.arg("-bb").arg("--define").arg(format!("_topdir {}", folder.display())).arg(folder.join("system.spec"));
    process::output(command, Duration::from_secs(60))?;
    Ok(folder.join("RPMS/noarch/system-1-1.noarch.rpm"))
}

/// What `onboardctl packages index` prints for an administrator of Debian.
fn known_to_apt(world: &World) -> anyhow::Result<String> {
    let mut command = Command::new(binary("onboardctl")?);
    command.args(["packages", "index", "--host", ENDPOINT, "--packages"]).arg(world.repository());
    let said = process::output(command, Duration::from_secs(120))?;
    let lines = said.lines().skip_while(|line| !line.starts_with("# Debian")).take_while(|line| !line.is_empty());
    Ok(lines.map(|line| format!("{line}\n")).collect())
}

/// The same with a later version, as DEB; the agent has another sample, too.
fn publish_newer(world: &World, package: &str) -> anyhow::Result<()> {
    let folder = world.lab().directory().join("next");
    let deb = world.repository().join(format!("deb/amd64/{package}.deb"));
    let _ = std::fs::remove_dir_all(&folder);
    unpack(&["-R".as_ref(), deb.as_os_str(), folder.as_os_str()])?;
    let control = folder.join("DEBIAN/control");
    let text = std::fs::read_to_string(&control)?;
    let newer = text.lines().map(|line| match line.starts_with("Version: ") {
        true => format!("{line}+next\n"),
        false => format!("{line}\n"),
    });
    std::fs::write(&control, newer.collect::<String>())?;
    if package == "onboarding-agent" {
        newer_sample(&folder.join(CONFIG))?;
    }
    let packed = world.lab().directory().join("next.deb");
    unpack(&["-Zgzip".as_ref(), "-z1".as_ref(), "-b".as_ref(), folder.as_os_str(), packed.as_os_str()])?;
    std::fs::remove_dir_all(&folder)?;
    world.import_packages(&[packed])
}

fn newer_sample(path: &Path) -> anyhow::Result<()> {
    Ok(std::fs::write(path, std::fs::read_to_string(path)? + NEWER_SAMPLE)?)
}

/// The agent with a later version and another sample, as RPM: built of its program by the recipe.
fn publish_newer_rpm(world: &World) -> anyhow::Result<()> {
    let (root, out) = (world.lab().directory().join("rpm-root"), world.lab().directory().join("rpm-next"));
    let deb = world.repository().join("deb/amd64/onboarding-agent.deb");
    unpack(&["-x".as_ref(), deb.as_os_str(), root.as_os_str()])?;
    std::fs::create_dir_all(root.join("completions"))?;
    std::fs::rename(root.join("usr/bin/onboarding-agent"), root.join("onboarding-agent"))?;
    for (arguments, file) in [
        (["manual"].as_slice(), "onboarding-agent.8"),
        (&["completions", "bash"], "completions/onboarding-agent.bash"),
        (&["completions", "zsh"], "completions/_onboarding-agent"),
        (&["completions", "fish"], "completions/onboarding-agent.fish"),
    ] {
        let mut command = Command::new(root.join("onboarding-agent"));
        command.args(arguments);
        std::fs::write(root.join(file), process::output(command, Duration::from_secs(20))?)?;
    }
    let recipes = world.lab().directory().join("packaging");
    let mut command = Command::new("cp");
    command.arg("-r").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging")).arg(&recipes);
    process::output(command, Duration::from_secs(20))?;
    newer_sample(&recipes.join("onboarding-agent/onboarding.config.yaml"))?;
    let mut command = Command::new(binary("onboardctl")?);
    command
        .args(["packages", "build"])
        .arg(recipes.join("onboarding-agent.yaml"))
        .arg("--root")
        .arg(&root)
        .args(["--arch", "amd64", "--version", "99.0.0", "--format", "rpm", "-o"])
        .arg(&out);
    process::output(command, Duration::from_secs(240))?;
    world.import_packages(&[out.join("rpm/amd64/onboarding-agent.rpm")])
}

fn unpack(arguments: &[&std::ffi::OsStr]) -> anyhow::Result<()> {
    let mut command = Command::new("dpkg-deb");
    command.args(arguments);
    process::output(command, Duration::from_secs(120)).map(drop)
}
