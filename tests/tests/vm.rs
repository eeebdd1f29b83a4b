//! A machine with systemd, onboarded with the commands of the requirement: installation, the unedited sample, joining, ports below 1024,
//! a reboot without a plane, upgrades under load, removal, purge. Packages come from `ONBOARDING_PACKAGES`, which `dev/package` makes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_testkit::process;
use onboarding_tests::guest::Guest;
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::world::{ENDPOINT, Pair, Setup, World};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[
    ("the_commands_of_the_requirement_bring_a_vm_into_the_mesh", onboarded),
    ("the_application_may_have_a_port_below_1024", low_port),
    ("a_vm_that_boots_while_the_plane_is_away_starts_its_sidecar_by_itself", rebooted),
    ("upgrades_of_both_packages_fail_no_request_and_keep_configuration_and_identity", upgraded),
    ("removing_the_packages_leaves_the_mesh_and_purging_leaves_nothing", removed),
];
const NAME: &str = "vm8";
const SUBJECT: &str = "us-east-datacenter1-vm008";
const REGISTRATION: &str = "productpage-jwt-my-corp--us-east-datacenter1-vm008";
const SERVICE: &str = "productpage.bookinfo:8080";

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
    with_vm(world, |_, vm| vm.guest.sh("systemctl is-active onboarding-agent").map(drop))
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
    publish(world)?;
    let mut guest = Guest::new(world, NAME, 18, SUBJECT)?;
    guest.boot()?;
    guest.sh("update-ca-certificates && systemctl enable --now application@8080 application@80")?;
    let before = guest.files()?;
    let vm = Vm { guest, before };
    join(world, &vm.guest).map_err(|error| error.context(vm.guest.report()))?;
    Ok(vm)
}

fn join(world: &mut World, guest: &Guest) -> anyhow::Result<()> {
    for package in ["istio-sidecar", "onboarding-agent"] {
        let [download, install] = requirement(package);
        let said = guest.sh(&download)?;
        ensure!(said.contains(&format!("{package}.deb: OK")), "{said}");
        guest.sh(&install)?;
    }
    ensure!(guest.sh("ls /root")?.is_empty(), "the downloads are still there");
    ensure!(guest.try_sh("systemctl is-enabled onboarding-agent")?.stdout.trim() == "disabled", "enabled by itself");
    refuses_the_sample(guest)?;

    guest.sh(&format!(
        "sed -i -e 's/<onboarding-endpoint-dns-name>/{ENDPOINT}/' -e 's/<namespace>/bookinfo/' -e 's/<workload-group>/productpage/' \
            /etc/onboarding-agent/onboarding.config.yaml
        cat > /etc/onboarding-agent/agent.config.yaml <<'END'\n{AGENT}END
        systemctl enable --now onboarding-agent"
    ))?;
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
        "agent and Envoy: {journal}"
    );
    world.keep(pair);
    Ok(())
}

const AGENT: &str = "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1
kind: AgentConfiguration
host:
  custom:
    credential:
    - plugin:
        name: my-jwt
";

/// Its words, with the host's name in the place of `<onboarding-endpoint-dns-name>`.
fn requirement(package: &str) -> [String; 2] {
    let download = format!(
        r#"set -e; cd /root
curl -fLO "https://{ENDPOINT}/install/deb/amd64/{package}.deb"
curl -fLO "https://{ENDPOINT}/install/deb/amd64/{package}.deb.sha256"
sha256sum --check {package}.deb.sha256"#
    );
    let install = format!(
        r#"set -e; cd /root
sudo apt-get install -y ./{package}.deb
rm {package}.deb {package}.deb.sha256"#
    );
    [download, install]
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
        let kept = "sha256sum /etc/onboarding-agent/*.yaml /var/lib/onboarding-agent/agent.key; stat -c '%a %U:%G %n' /etc/onboarding-agent/*";
        let before = guest.sh(kept)?;
        for package in ["onboarding-agent", "istio-sidecar"] {
            let old = guest.sh("systemctl show -p MainPID --value onboarding-agent")?;
            publish_newer(world, package)?;
            let [download, install] = requirement(package);
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
        world.keep(pair);
        Ok(())
    })
}

fn removed(world: &mut World) -> anyhow::Result<()> {
    with_vm(world, |world, vm| {
        let guest = &vm.guest;
        guest.sh("apt-get remove -y onboarding-agent")?;
        let gone = world.registrations()?.iter().all(|war| war["metadata"]["name"] != REGISTRATION);
        ensure!(gone, "it is still registered");
        ensure!(
            guest.try_sh("pgrep -af '^/usr/(local/)?bin/(onboarding-agent|envoy|pilot-agent)'")?.stdout.is_empty(),
            "something of it still runs"
        );
        // The identity stays for whoever installs it again.
        guest.sh("test -s /var/lib/onboarding-agent/agent.key -a -s /etc/onboarding-agent/onboarding.config.yaml")?;
        guest.sh("apt-get purge -y onboarding-agent istio-sidecar")?;
        let after = guest.files()?;
        let changed: Vec<_> = after.iter().filter(|(path, is)| vm.before.get(*path) != Some(is)).collect();
        ensure!(changed.is_empty(), "left behind or changed: {changed:?}");
        let missing: Vec<_> = vm.before.keys().filter(|path| !after.contains_key(*path)).collect();
        ensure!(missing.is_empty(), "taken away: {missing:?}");
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

/// Into the repository of the plane.
fn publish(world: &World) -> anyhow::Result<()> {
    let from = PathBuf::from(std::env::var_os("ONBOARDING_PACKAGES").context(
        "ONBOARDING_PACKAGES isn't set: run `dev/package -o DIRECTORY` and set it to that directory, as dev/test does",
    )?);
    let to = repository(world);
    std::fs::create_dir_all(&to)?;
    for package in ["onboarding-agent.deb", "istio-sidecar.deb"] {
        let file = from.join("deb/amd64").join(package);
        std::fs::copy(&file, to.join(package))
            .with_context(|| format!("copying {}; run `dev/package`", file.display()))?;
    }
    Ok(())
}

fn repository(world: &World) -> PathBuf {
    world.data_dir().join("packages/deb/amd64")
}

/// The same with a later version, put in the place of the old one as documented: by a rename.
fn publish_newer(world: &World, package: &str) -> anyhow::Result<()> {
    let (folder, deb) = (repository(world).join("next"), repository(world).join(format!("{package}.deb")));
    let _ = std::fs::remove_dir_all(&folder);
    let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
        let mut command = Command::new(program);
        command.args(arguments);
        process::output(command, Duration::from_secs(120))
    };
    run("dpkg-deb", &["-R".as_ref(), deb.as_os_str(), folder.as_os_str()])?;
    let control = folder.join("DEBIAN/control");
    let text = std::fs::read_to_string(&control)?;
    let newer = text.lines().map(|line| match line.starts_with("Version: ") {
        true => format!("{line}+next\n"),
        false => format!("{line}\n"),
    });
    std::fs::write(&control, newer.collect::<String>())?;
    let part = repository(world).join("part");
    run("dpkg-deb", &["-Znone".as_ref(), "-b".as_ref(), folder.as_os_str(), part.as_os_str()])?;
    std::fs::remove_dir_all(&folder)?;
    Ok(std::fs::rename(part, deb)?)
}
