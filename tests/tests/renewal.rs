//! Certificates of the mesh are renewed while they are in use.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::vm::Vm;
use onboarding_tests::world::{Setup, World};
use std::process::ExitCode;
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[("certificates_are_renewed_under_load_and_fail_no_request", renewed_under_load)];

fn main() -> ExitCode {
    run(Setup { plane_flags: vec!["--certificate-life".to_owned(), "60s".to_owned()], ..Setup::default() }, SCENARIOS)
}

/// As Envoy has it in use.
fn serial(vm: &Vm) -> anyhow::Result<String> {
    let certificates: serde_json::Value = serde_json::from_str(&vm.curl(&["http://localhost:15000/certs"])?)?;
    let chains = certificates["certificates"].as_array().context("no certificates")?;
    let chain = chains.iter().find_map(|certificate| certificate["cert_chain"][0]["serial_number"].as_str());
    Ok(chain.context("no certificate chain")?.to_owned())
}

fn renewed_under_load(world: &mut World) -> anyhow::Result<()> {
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
    world.keep(pair);
    Ok(())
}
