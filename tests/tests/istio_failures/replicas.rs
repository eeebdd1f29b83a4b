//! Two planes, and one of them dies.

use crate::crowd::{Crowd, Racer};
use anyhow::{Context, ensure};
use nix::sys::signal::Signal;
use onboarding_testkit::netns::Machine;
use onboarding_testkit::process::Process;
use onboarding_tests::until::until;
use onboarding_tests::world::World;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tonic::Code;

const AGENTS: usize = 200;
const RACES: u32 = 20;
pub const SECOND: &str = "onboarding-plane-1";
pub const FIRST: &str = "onboarding-plane-0";

pub fn one_is_killed(world: &mut World) -> anyhow::Result<()> {
    let outcome = with_two(world);
    world.mesh()?.route_to_planes(&[world.plane_machine.address()])?;
    if world.plane.is_none() {
        world.start_plane()?;
    }
    outcome
}

/// It runs and is ready; the way in doesn't lead to it yet.
fn launch_second(world: &World) -> anyhow::Result<(Machine, Process)> {
    let machine = world.lab().machine("plane1", 7)?;
    let second = world.launch_replica(&machine, SECOND)?;
    until("the second plane is ready", Duration::from_secs(30), || {
        let (status, said) = world.admin_of(&machine, "/readyz")?;
        ensure!(status == 200, "{said}");
        Ok(())
    })?;
    Ok((machine, second))
}

/// Hosts that say the same of themselves, each with a key of its own, come to both planes at the same moment.
pub fn first_keys_race(world: &mut World) -> anyhow::Result<()> {
    let (machine, second) = launch_second(world)?;
    let crowd = Crowd::new(world, "race")?;
    let planes = [world.plane_machine.address(), machine.address()].map(|address| (address, 15443).into());
    crowd.wait_admitted(&planes)?;
    // Each winner's session goes on, so that its registration is there to be looked at.
    let (mut winners, mut won) = (Vec::new(), [0, 0]);
    for round in 0..RACES {
        let (winner, session, loser, refused) = match crowd.race(round, planes)? {
            [Racer { thumbprint, outcome: Ok(session) }, Racer { thumbprint: loser, outcome: Err(refused) }] => {
                won[0] += 1;
                (thumbprint, session, loser, refused)
            }
            [Racer { thumbprint: loser, outcome: Err(refused) }, Racer { thumbprint, outcome: Ok(session) }] => {
                won[1] += 1;
                (thumbprint, session, loser, refused)
            }
            [one, other] => {
                anyhow::bail!("round {round}: {:?} and {:?}", one.outcome.map(drop), other.outcome.map(drop))
            }
        };
        let words = format!("this identity is registered with another key ({winner}, this one is {loser})");
        ensure!(
            refused.code() == Code::FailedPrecondition && refused.message().starts_with(&words),
            "round {round}: the other was told {refused:?} and not {words:?}"
        );
        winners.push((crowd.name(round), winner, session));
    }
    println!("  of {RACES} races the first plane's agent won {}, the second's {}", won[0], won[1]);
    let wars = crowd.wars(world)?;
    ensure!(wars.len() == winners.len(), "{} wars for {} identities", wars.len(), winners.len());
    for (name, winner, _) in &winners {
        let war = wars.get(name).with_context(|| format!("no war {name}"))?.to_string();
        ensure!(war.contains(winner), "{winner} has won, and the war is {war}");
    }
    drop(winners);
    second.terminate(Duration::from_secs(30)).context("stopping the second plane")?;
    crowd.leave(world)
}

fn with_two(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let (machine, second) = launch_second(world)?;
    world.mesh()?.route_to_planes(&[world.plane_machine.address(), machine.address()])?;
    let mut crowd = Crowd::new(world, "crowd")?;
    crowd.wait_admitted(&[world.plane_machine.address(), machine.address()].map(|address| (address, 15443).into()))?;
    let started = Instant::now();
    crowd.grow(AGENTS as u32);
    crowd.wait_connected(Duration::from_secs(90))?;
    println!("  {AGENTS} agents joined two planes in {:?}", started.elapsed());
    let (before, entries) = until("all have their entries", Duration::from_secs(60), || {
        let (wars, entries) = (crowd.wars(world)?, crowd.entries(world)?);
        ensure!((wars.len(), entries.len()) == (AGENTS, AGENTS), "{} wars, {} entries", wars.len(), entries.len());
        Ok((wars, entries))
    })?;
    let (of_first, of_second) = (held(&before, FIRST), held(&before, SECOND));
    ensure!(of_first + of_second == AGENTS && of_first > 20 && of_second > 20, "{of_first} and {of_second}");

    // It leads as well, being the first; and some agents die with it, so that only the leader can say so.
    let dying: Vec<_> = before.iter().filter(|(_, war)| connected_to(war) == Some(FIRST)).take(5).collect();
    let dying: Vec<_> = dying.into_iter().map(|(name, _)| name.clone()).collect();
    let load = pair.productpage.load("ratings.bookinfo:8080", "/", 50)?;
    let sessions = crowd.sessions();
    // It sees nothing of that, and says nothing to anybody.
    world.plane()?.signal(Signal::SIGSTOP)?;
    crowd.vanish(|name| dying.iter().any(|it| it == name));
    world.kill_plane();
    let killed = Instant::now();
    crowd.wait_connected(Duration::from_secs(90))?;
    // Half of all tries have met the dead one until now; then Kubernetes takes it out.
    world.mesh()?.route_to_planes(&[machine.address()])?;
    println!("  those of the plane that was killed were back after {:?}", killed.elapsed());
    until("every war says who holds its session", Duration::from_secs(60), || {
        let now = crowd.wars(world)?;
        let there = held(&now, SECOND);
        ensure!(there == AGENTS - dying.len(), "{there} of {AGENTS} are connected to {SECOND}");
        for name in &dying {
            ensure!(connected_to(&now[name]).is_none(), "{name}, which died: {}", now[name]["status"]);
        }
        Ok(())
    })?;
    println!("  the wars said so after {:?}", killed.elapsed());
    for vm in [&pair.ratings, &pair.productpage] {
        until("the VM's agent is back", Duration::from_secs(90), || {
            let wars = world.registrations()?;
            let war = wars.iter().find(|war| war["metadata"]["name"] == vm.registration().as_str());
            ensure!(war.and_then(connected_to) == Some(SECOND), "{war:?}");
            Ok(())
        })?;
    }
    // The plane has a session on record before its agent hears of it.
    crowd.wait_connected(Duration::from_secs(30))?;
    // Nothing was lost, nothing made twice: the same objects, each session once.
    let now = crowd.wars(world)?;
    ensure!(uids(&now) == uids(&before), "other wars than before: {} of {}", now.len(), before.len());
    ensure!(uids(&crowd.entries(world)?) == uids(&entries), "other entries than before");
    ensure!(sessions_of(world, &machine)? == AGENTS - dying.len() + 2, "{} sessions", sessions_of(world, &machine)?);
    let again = crowd.sessions() - sessions;
    ensure!(
        again == of_first - dying.len(),
        "{again} sessions were opened for {} that were cut off; refused were {:?}",
        of_first - dying.len(),
        crowd.refusals()
    );
    let outcome = load.stop()?;
    ensure!(outcome.failed == 0 && outcome.sent > 100, "{outcome:?}");

    // The first one comes again, and the other is stopped in order: it sends everybody over.
    world.start_plane()?;
    world.mesh()?.route_to_planes(&[world.plane_machine.address(), machine.address()])?;
    crowd.come_back();
    crowd.wait_connected(Duration::from_secs(60))?;
    let stopped = Instant::now();
    second.terminate(Duration::from_secs(30)).context("stopping the second plane")?;
    world.mesh()?.route_to_planes(&[world.plane_machine.address()])?;
    crowd.wait_connected(Duration::from_secs(60))?;
    until("every war says who holds its session", Duration::from_secs(60), || {
        let there = held(&crowd.wars(world)?, FIRST);
        ensure!(there == AGENTS, "{there} of {AGENTS} are connected to {FIRST}");
        Ok(())
    })?;
    println!("  a plane that stopped in order had sent all over after {:?}", stopped.elapsed());
    // Of those that died it doesn't matter whether they were back within the grace period.
    let survivors = |wars: &BTreeMap<String, Value>| -> Vec<Value> {
        wars.iter().filter(|(name, _)| !dying.contains(name)).map(|(_, war)| war["metadata"]["uid"].clone()).collect()
    };
    ensure!(survivors(&crowd.wars(world)?) == survivors(&before), "other wars than before");
    ensure!(
        crowd.refusals().keys().all(|words| words.starts_with("Unavailable") || words.starts_with("Unknown")),
        "{:?}",
        crowd.refusals()
    );
    crowd.leave(world)?;
    world.keep(pair);
    Ok(())
}

pub fn connected_to(war: &Value) -> Option<&str> {
    let conditions = war["status"]["conditions"].as_array()?;
    let connected = conditions.iter().find(|condition| condition["type"] == "AgentConnected")?;
    let to = war["status"]["activeAgentConnection"]["connectedTo"].as_str();
    assert_eq!(connected["status"] == "True", to.is_some(), "{war:#}");
    to
}

pub fn held(wars: &BTreeMap<String, Value>, replica: &str) -> usize {
    wars.values().filter(|war| connected_to(war) == Some(replica)).count()
}

pub fn uids(objects: &BTreeMap<String, Value>) -> Vec<&str> {
    objects.values().filter_map(|object| object["metadata"]["uid"].as_str()).collect()
}

fn sessions_of(world: &World, machine: &Machine) -> anyhow::Result<usize> {
    let (_, metrics) = world.admin_of(machine, "/metrics")?;
    let line = metrics.lines().find_map(|line| line.strip_prefix("onboarding_sessions "));
    Ok(line.context("the metric of sessions")?.parse()?)
}
