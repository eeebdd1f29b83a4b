//! What the grace period is for: networks that part for less and for longer, and a thousand registrations whose time is over together.

use crate::crowd::Crowd;
use crate::writes::Writes;
use anyhow::{Context, ensure};
use onboarding_tests::until::until;
use onboarding_tests::vm::Evidence;
use onboarding_tests::world::World;
use serde_json::Value;
use std::time::{Duration, Instant};

const AGENTS: u32 = 1000;
/// Each registration that ends by time: the lost connection, its end, its memory, its entry, its war.
const WRITES_OF_AN_END: u64 = 5;
/// Each that begins: the war, its session, its entry; and once more where the first status came before the session.
const WRITES_OF_A_JOIN: u64 = 4;
/// Of a newcomer while a thousand others are given up.
const JOIN_WITHIN: Duration = Duration::from_secs(30);

pub fn passes(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let mut brief = world.vm("brief", 15, "productpage", Evidence::jwt("us-east-datacenter1-brief"))?;
    let mut long = world.vm("long", 16, "productpage", Evidence::jwt("us-east-datacenter1-long"))?;
    for vm in [&mut brief, &mut long] {
        vm.start_agent()?;
    }
    for vm in [&brief, &long] {
        vm.wait_live(Duration::from_secs(30))?;
        until("the VM is healthy", Duration::from_secs(20), || {
            healthy(&get(world, "workloadentry", &vm.registration())?)
        })?;
    }
    until("nobody else is left of before", Duration::from_secs(90), || {
        let wars = world.registrations()?;
        let names: Vec<_> = wars.iter().filter_map(|war| war["metadata"]["name"].as_str()).collect();
        ensure!(names.len() == 4, "{names:?}");
        Ok(())
    })?;
    let mut crowd = Crowd::new(world, "thousand")?;
    let mut late = Crowd::new(world, "late")?;
    let started = Instant::now();
    crowd.grow(AGENTS);
    crowd.wait_connected(Duration::from_secs(240))?;
    println!("  {AGENTS} agents joined in {:?}", started.elapsed());
    until_there(&crowd, world, AGENTS as usize, Duration::from_secs(120))?;
    println!("  their entries were there after {:?}", started.elapsed());
    let before = [&brief, &long]
        .map(|vm| (get(world, "war", &vm.registration()), get(world, "workloadentry", &vm.registration())));
    let [(brief_war, brief_entry), (long_war, _)] = before;
    let (brief_war, brief_entry, long_war) = (brief_war?, brief_entry?, long_war?);

    // All at once: two cables are pulled, and a thousand machines lose their power.
    let writes = Writes::now(world)?;
    brief.set_link(false)?;
    long.set_link(false)?;
    let cut = Instant::now();
    crowd.vanish(|_| true);
    let asked = Instant::now();
    late.grow(1);
    late.wait_connected(JOIN_WITHIN)?;
    println!("  a newcomer joined in {:?} while {AGENTS} were given up", asked.elapsed());
    until_there(&late, world, 1, Duration::from_secs(30))?;
    println!("  its entry was there after {:?}", asked.elapsed());

    // Nobody says goodbye on a cable that was pulled: the plane notices, and the entry stays as it was.
    until("the plane notices", Duration::from_secs(60), || {
        ensure!(world.connected(&brief.registration()).is_err(), "it is said to be connected");
        Ok(())
    })?;
    println!("  the plane noticed after {:?}", cut.elapsed());
    brief.set_link(true)?;
    until("it is connected again", Duration::from_secs(60), || world.connected(&brief.registration()))?;
    println!("  who came back in time was connected after {:?}", cut.elapsed());
    ensure!(uid(&get(world, "war", &brief.registration())?) == uid(&brief_war), "it is another war");
    let entry = get(world, "workloadentry", &brief.registration())?;
    ensure!(entry["metadata"]["uid"] == brief_entry["metadata"]["uid"], "it is another entry");
    ensure!(entry["spec"] == brief_entry["spec"], "{entry:#} instead of {brief_entry:#}");
    // istiod takes the health of a proxy that it hasn't seen for ten seconds away, and the plane says it again.
    until("it is healthy", Duration::from_secs(60), || healthy(&get(world, "workloadentry", &brief.registration())?))?;

    until("a thousand registrations are gone", Duration::from_secs(240), || {
        let (wars, entries) = (crowd.wars(world)?.len(), crowd.entries(world)?.len());
        ensure!((wars, entries) == (0, 0), "{wars} wars and {entries} entries are left");
        Ok(())
    })?;
    println!("  a thousand registrations were gone after {:?}", cut.elapsed());
    for kind in ["war", "workloadentry"] {
        until("who didn't come back in time is gone", Duration::from_secs(60), || {
            ensure!(get(world, kind, &long.registration()).is_err(), "its {kind} is there");
            Ok(())
        })?;
    }
    println!("  who didn't come back in time was gone after {:?}", cut.elapsed());
    let now = Writes::now(world)?;
    let made = now.since(&writes);
    println!("  written meanwhile: {made:?}");
    let most = u64::from(AGENTS) * WRITES_OF_AN_END;
    ensure!(made.values().sum::<u64>() < most + most / 10, "{made:?}");
    long.set_link(true)?;

    let writes = now;
    let again = Instant::now();
    crowd.come_back();
    crowd.wait_connected(Duration::from_secs(240))?;
    println!("  {AGENTS} agents joined anew in {:?}", again.elapsed());
    until_there(&crowd, world, AGENTS as usize, Duration::from_secs(120))?;
    let now = Writes::now(world)?;
    let made = now.since(&writes);
    println!("  written meanwhile: {made:?}");
    let most = u64::from(AGENTS) * WRITES_OF_A_JOIN;
    ensure!(made.values().sum::<u64>() < most + most / 10, "{made:?}");

    until("the other one is back by itself", Duration::from_secs(90), || world.connected(&long.registration()))?;
    ensure!(uid(&get(world, "war", &long.registration())?) != uid(&long_war), "it is the war of before");
    until("it reaches the mesh", Duration::from_secs(30), || long.call("ratings.bookinfo:8080"))?;
    for vm in [&mut brief, &mut long] {
        vm.stop_agent()?;
    }
    crowd.leave(world)?;
    late.leave(world)?;
    world.keep(pair);
    Ok(())
}

fn until_there(crowd: &Crowd, world: &World, wanted: usize, within: Duration) -> anyhow::Result<()> {
    until("the entries are there", within, || {
        let there = crowd.entries(world)?.len();
        ensure!(there == wanted, "{there} entries");
        Ok(())
    })
}

fn get(world: &World, kind: &str, name: &str) -> anyhow::Result<Value> {
    let text = world.mesh()?.cluster.kubectl(["get", kind, name, "-n", "bookinfo", "-o", "json"])?;
    Ok(serde_json::from_str(&text)?)
}

fn uid(object: &Value) -> &str {
    object["metadata"]["uid"].as_str().unwrap_or_default()
}

fn healthy(entry: &Value) -> anyhow::Result<()> {
    let conditions = entry["status"]["conditions"].as_array().context("it has no conditions")?;
    let healthy = conditions.iter().any(|is| is["type"] == "Healthy" && is["status"] == "True");
    ensure!(healthy, "{}", entry["status"]);
    Ok(())
}
