//! A plane whose disk is full says so, admits nobody, loses nothing, and recovers by itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::ensure;
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::{always, until};
use onboarding_tests::vm::Evidence;
use onboarding_tests::world::{Setup, World};
use std::process::ExitCode;
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[("a_full_disk_admits_nobody_and_loses_nobody", full_disk)];

fn main() -> ExitCode {
    run(Setup { data_size: Some("4m"), ..Setup::default() }, SCENARIOS)
}

fn full_disk(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let ballast = world.data_dir().join("ballast");
    let fill = format!("head -c 100m /dev/zero >{} 2>/dev/null; true", ballast.display());
    world.plane_machine.check("sh", ["-c", &fill])?;

    let mut late = world.vm("late", 13, "productpage", Evidence::jwt("late"))?;
    late.start_agent()?;
    late.agent()?.wait_for_line(Duration::from_secs(15), |line| line.contains("registry"))?;
    ensure!(world.connected(&late.registration()).is_err(), "it was registered on a full disk");
    always("traffic flows", Duration::from_secs(1), || pair.productpage.call("ratings.bookinfo:8080").map(drop))?;
    ensure!(world.plane()?.status().is_none(), "the plane ended");

    world.plane_machine.check("rm", [ballast])?;
    late.wait_live(Duration::from_secs(40))?;
    world.kill_plane();
    world.start_plane()?;
    for vm in [&pair.ratings, &pair.productpage, &late] {
        until("it is connected again", Duration::from_secs(40), || world.connected(&vm.registration()))?;
    }
    world.keep(pair);
    Ok(())
}
