//! Stops, crashes and reboots: of an agent, of a VM, of the plane.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use anyhow::ensure;
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::vm::{Evidence, Vm};
use onboarding_tests::world::{Setup, World};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::process::ExitCode;
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[
    ("an_agent_that_is_stopped_under_load_fails_no_request", stopped_under_load),
    ("a_plane_that_is_restarted_under_load_fails_no_request", restarted_plane_under_load),
    ("a_vm_that_reboots_while_the_plane_is_away_serves", reboot_without_plane),
    ("a_plane_that_is_killed_during_joins_loses_nothing_it_acknowledged", killed_plane),
];

fn main() -> ExitCode {
    run(Setup::default(), SCENARIOS)
}

fn stopped_under_load(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let mut second = world.vm("vm4", 14, "ratings", Evidence::ec2("i-00000000000000004", "ratings-role"))?;
    second.join()?;
    let load = pair.productpage.load("ratings.bookinfo:8080", "/slow?ms=20", 200)?;
    until("the second VM serves", Duration::from_secs(10), || {
        let count: u64 = second.curl(&["http://127.0.0.1:8080/count"])?.trim().parse()?;
        ensure!(count > 50, "{count} requests");
        Ok(())
    })?;
    let took = second.stop_agent()?;
    let outcome = load.stop()?;
    ensure!(outcome.failed == 0, "{outcome:?}");
    ensure!(outcome.answered_by.len() == 2 && outcome.sent > 100, "{outcome:?}");
    // Otherwise it can't have waited for the mesh to learn of it; and systemd would not have waited much longer.
    ensure!(took > Duration::from_secs(2) && took < Duration::from_secs(15), "stopping took {took:?}");
    ensure!(second.pids("/envoy")?.is_empty(), "its Envoy is still there");
    ensure!(world.connected(&second.registration()).is_err(), "it is still registered");
    world.keep(pair);
    Ok(())
}

/// Both ways: with a goodbye to the agents, and without.
fn restarted_plane_under_load(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let names = [pair.ratings.registration(), pair.productpage.registration()];
    let load = pair.productpage.load("ratings.bookinfo:8080", "/", 200)?;
    for killed in [false, true] {
        if killed {
            world.kill_plane();
        } else {
            world.stop_plane()?;
        }
        world.start_plane()?;
        for name in &names {
            until("the agent is connected again", Duration::from_secs(40), || world.connected(name))?;
        }
    }
    let outcome = load.stop()?;
    ensure!(outcome.failed == 0 && outcome.sent > 100, "{outcome:?}");
    world.keep(pair);
    Ok(())
}

fn reboot_without_plane(world: &mut World) -> anyhow::Result<()> {
    let mut pair = world.pair()?;
    world.stop_plane()?;
    pair.ratings.power_cycle(world)?;
    ensure!(pair.productpage.call("ratings.bookinfo:8080").is_err(), "it answers although it is off");
    pair.ratings.start_agent()?;
    pair.ratings.wait_live(Duration::from_secs(40))?;
    until("it serves without a plane", Duration::from_secs(15), || {
        let answer = pair.productpage.call("ratings.bookinfo:8080")?;
        ensure!(answer.caller.is_some(), "{answer:?}");
        Ok(())
    })?;
    until("it calls without a plane", Duration::from_secs(15), || {
        pair.ratings.call("productpage.bookinfo:8080").map(drop)
    })?;
    world.start_plane()?;
    for vm in [&pair.ratings, &pair.productpage] {
        until("it is connected again", Duration::from_secs(40), || world.connected(&vm.registration()))?;
    }
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

/// A few VMs join while the plane is killed; then all that an agent was told is true, and everybody gets in.
fn killed_plane(world: &mut World) -> anyhow::Result<()> {
    for round in 0..4 {
        let mut vms = (0..4)
            .map(|n| {
                world.vm(&format!("vm{round}{n}"), 20 + n, "productpage", Evidence::jwt(&format!("vm-{round}-{n}")))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        for vm in &mut vms {
            vm.start_agent()?;
        }
        // The last rounds hit the moment that matters most: the first answer has just been given, others are on their way.
        let (since, most) = match round {
            0 | 1 => ("the start of the agents", 700),
            _ => ("the first registration", 30),
        };
        if round > 1 {
            until("the first VM is registered", Duration::from_secs(20), || {
                ensure!(vms.iter().any(registered), "none is");
                Ok(())
            })?;
        }
        let delay = Duration::from_millis(RandomState::new().build_hasher().finish() % most);
        println!("    round {round}: the plane is killed {delay:?} after {since}");
        // Waits for nothing: the moment of the kill is meant to be any, so that rounds and runs hit different places.
        std::thread::sleep(delay);
        world.kill_plane();
        let acknowledged: Vec<_> = vms.iter().filter(|vm| registered(vm)).map(Vm::registration).collect();
        world.start_plane()?;
        let wars = world.registrations()?;
        for name in &acknowledged {
            ensure!(
                wars.iter().any(|war| war["metadata"]["name"] == name.as_str()),
                "{name} was acknowledged and is lost: {wars:?}"
            );
        }
        for war in &wars {
            ensure!(
                war["spec"]["identity"].is_object() && war["spec"]["registration"].is_object(),
                "half a registration: {war}"
            );
        }
        for vm in &vms {
            until(&format!("{} is in", vm.name()), Duration::from_secs(40), || world.connected(&vm.registration()))?;
            vm.wait_live(Duration::from_secs(40))?;
        }
        let mine = |war: &&serde_json::Value| {
            war["metadata"]["name"].as_str().is_some_and(|name| name.contains(&format!("--vm-{round}-")))
        };
        let count = world.registrations()?.iter().filter(mine).count();
        ensure!(count == vms.len(), "{count} registrations of {} VMs", vms.len());
    }
    Ok(())
}

/// Whether the agent was told so.
fn registered(vm: &Vm) -> bool {
    vm.agent().is_ok_and(|agent| agent.lines_since(Default::default()).iter().any(|line| line.contains("registered")))
}
