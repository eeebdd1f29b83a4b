//! Certificates of the mesh are renewed while they are in use.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::vm::Vm;
use onboarding_tests::world::{Setup, World};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const SCENARIOS: &[Scenario] = &[
    ("tokens_and_certificates_are_renewed_under_load_and_fail_no_request", renewed_under_load),
    ("a_vm_that_died_is_gone_after_the_grace_period", dead_vm),
];

fn main() -> ExitCode {
    let flags = ["--certificate-life", "60s", "--grace-period", "4s"];
    run(Setup { plane_flags: flags.map(str::to_owned).to_vec(), ..Setup::default() }, SCENARIOS)
}

/// As Envoy has it in use.
fn serial(vm: &Vm) -> anyhow::Result<String> {
    let certificates: serde_json::Value = serde_json::from_str(&vm.curl(&["http://localhost:15000/certs"])?)?;
    let chains = certificates["certificates"].as_array().context("no certificates")?;
    let chain = chains.iter().find_map(|certificate| certificate["cert_chain"][0]["serial_number"].as_str());
    Ok(chain.context("no certificate chain")?.to_owned())
}

fn renewed_under_load(world: &mut World) -> anyhow::Result<()> {
    let short = world.manifest("controlplane.yaml")?.replace("expiration: 1h", "expiration: 20s");
    world.write_manifest("controlplane.yaml", &short)?;
    let pair = world.pair()?;
    let load = pair.productpage.load("ratings.bookinfo:8080", "/", 100)?;
    let before = [serial(&pair.ratings)?, serial(&pair.productpage)?];
    // At half their life, which is a minute at least.
    until("both have new certificates", Duration::from_secs(50), || {
        let now = [serial(&pair.ratings)?, serial(&pair.productpage)?];
        ensure!(now.iter().zip(&before).all(|(now, before)| now != before), "still {now:?}");
        Ok(())
    })?;
    let outcome = load.stop()?;
    ensure!(outcome.failed == 0 && outcome.sent > 500, "{outcome:?}");
    for vm in [&pair.ratings, &pair.productpage] {
        let lines = vm.agent()?.lines_since(Default::default());
        let tokens = lines.iter().filter(|line| line.contains("Workload Onboarding Token")).count();
        ensure!(tokens >= 2, "{}: {tokens} tokens of 20 s in half a minute", vm.name());
        let sessions = lines.iter().filter(|line| line.contains("the session is open")).count();
        ensure!(sessions == 1, "{}: {sessions} sessions: renewing ended one", vm.name());
    }
    world.keep(pair);
    Ok(())
}

fn dead_vm(world: &mut World) -> anyhow::Result<()> {
    let mut pair = world.pair()?;
    let name = pair.ratings.registration();
    pair.ratings.set_link(false)?;
    let mut connected = Instant::now();
    // Nobody says goodbye on a cable that was pulled: the plane has to notice by itself.
    until("the plane notices", Duration::from_secs(60), || {
        let asked = Instant::now();
        if world.connected(&name).is_err() {
            return Ok(());
        }
        connected = asked;
        anyhow::bail!("it is said to be connected")
    })?;
    until("its entry is gone", Duration::from_secs(20), || {
        let wars = world.registrations()?;
        ensure!(wars.iter().all(|war| war["metadata"]["name"] != name.as_str()), "it is still there");
        Ok(())
    })?;
    ensure!(connected.elapsed() > Duration::from_secs(3), "the grace period was not waited for");
    let unanswered = || pair.productpage.call_unanswered("ratings.bookinfo:8080");
    until("nobody answers any more", Duration::from_secs(20), unanswered)?;
    pair.ratings.set_link(true)?;
    until("it is back", Duration::from_secs(60), || world.connected(&name))?;
    pair.wait_reachable()?;
    pair.ratings.stop_agent()?;
    Ok(())
}
