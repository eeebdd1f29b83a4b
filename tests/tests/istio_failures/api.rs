//! The API server is killed and stays away. Who is in the mesh goes on; who wants to join is told to wait, and waits.

use crate::crowd::Crowd;
use crate::replicas::{FIRST, connected_to, held, uids};
use anyhow::{Context, ensure};
use onboarding_tests::until::{always, until};
use onboarding_tests::world::{Pair, World};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const AGENTS: usize = 40;
const NEWCOMERS: usize = 5;
/// Longer than the lease by which planes know of each other, and shorter than the grace period.
const AWAY: Duration = Duration::from_secs(20);
const WITHIN: Duration = Duration::from_secs(60);
const ENDED: &str = "onboarding_sessions_ended_total";

pub fn is_killed(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let mut crowd = Crowd::new(world, "before")?;
    let mut newcomers = Crowd::new(world, "newcomer")?;
    crowd.grow(AGENTS as u32);
    crowd.wait_connected(WITHIN)?;
    until("all are registered, with their entries", WITHIN, || {
        let (connected, entries) = (held(&crowd.wars(world)?, FIRST), crowd.entries(world)?.len());
        ensure!((connected, entries) == (AGENTS, AGENTS), "{connected} are connected, {entries} entries");
        Ok(())
    })?;
    let before = objects(world, &crowd, &pair)?;
    let (sessions, ended) = (crowd.sessions(), world.metric(ENDED)?);
    let loads = [
        pair.productpage.load("ratings.bookinfo:8080", "/", 50)?,
        pair.productpage.load("productpage.bookinfo:8080", "/", 50)?,
    ];

    world.mesh()?.cluster.kill_api()?;
    let killed = Instant::now();
    newcomers.grow(NEWCOMERS as u32);
    let outcome = while_it_is_away(world, &crowd, &newcomers, ended);
    world.mesh()?.cluster.start_api()?;
    outcome?;
    println!("  the API server was away for {:?}", killed.elapsed());

    let back = Instant::now();
    newcomers.wait_connected(WITHIN)?;
    println!("  who had to wait had joined {:?} after it was back", back.elapsed());
    for words in newcomers.refusals().keys() {
        ensure!(words.starts_with("Unavailable: "), "a newcomer was told {words:?}");
    }
    until("every war says who holds its session", WITHIN, || {
        let of_newcomers = held(&newcomers.wars(world)?, FIRST);
        ensure!(of_newcomers == NEWCOMERS, "{of_newcomers} of {NEWCOMERS} newcomers");
        let of_before = held(&crowd.wars(world)?, FIRST);
        ensure!(of_before == AGENTS, "{of_before} of {AGENTS} that were there");
        Ok(())
    })?;
    for vm in [&pair.ratings, &pair.productpage] {
        world.connected(&vm.registration())?;
    }
    until("the newcomers have their entries", WITHIN, || {
        let entries = newcomers.entries(world)?.len();
        ensure!(entries == NEWCOMERS, "{entries} entries");
        Ok(())
    })?;
    crowd.is_connected()?;
    ensure!(crowd.sessions() == sessions, "{} sessions were opened anew", crowd.sessions() - sessions);
    ensure!(world.metric(ENDED)? == ended, "sessions have ended");
    ensure!(objects(world, &crowd, &pair)? == before, "other wars or entries than before");
    for load in loads {
        let outcome = load.stop()?;
        ensure!(outcome.failed == 0 && outcome.sent > 500, "{outcome:?}");
    }
    // What happens in the cluster is heard of again.
    crowd.leave(world)?;
    newcomers.leave(world)?;
    world.keep(pair);
    Ok(())
}

fn while_it_is_away(world: &World, crowd: &Crowd, newcomers: &Crowd, ended: f64) -> anyhow::Result<()> {
    until("who wants to join is told to wait", WITHIN, || {
        let refused = newcomers.refusals();
        ensure!(refused.keys().any(|words| words.contains("the registry is unavailable")), "{refused:?}");
        Ok(())
    })?;
    always("sessions go on", AWAY, || {
        crowd.is_connected()?;
        ensure!(world.metric(ENDED)? == ended, "one has ended");
        ensure!(newcomers.connected() == 0, "a newcomer has a session that can't be on record");
        Ok(())
    })
}

/// The identities of all objects of the crowd and the pair.
fn objects(world: &World, crowd: &Crowd, pair: &Pair) -> anyhow::Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    let mut add = |kind: &str, objects: &BTreeMap<String, Value>| {
        all.extend(objects.keys().zip(uids(objects)).map(|(name, uid)| (format!("{kind} {name}"), uid.to_owned())));
    };
    add("war", &crowd.wars(world)?);
    add("entry", &crowd.entries(world)?);
    for (kind, vm) in
        ["war", "workloadentry"].into_iter().flat_map(|kind| [(kind, &pair.ratings), (kind, &pair.productpage)])
    {
        let name = vm.registration();
        let text = world.mesh()?.cluster.kubectl(["get", kind, &name, "-n", "bookinfo", "-o", "json"])?;
        let object: Value = serde_json::from_str(&text)?;
        if kind == "war" {
            ensure!(connected_to(&object) == Some(FIRST), "{object:#}");
        }
        let uid = object["metadata"]["uid"].as_str().context("an object has a uid")?.to_owned();
        all.insert(format!("{kind} {name}"), uid);
    }
    Ok(all)
}
