//! What people change while workloads join: the endpoint's certificate, policies, groups, Istio's mesh configuration.

use crate::crowd::Crowd;
use anyhow::ensure;
use onboarding_tests::until::until;
use onboarding_tests::world::{ENDPOINT, World};
use std::time::{Duration, Instant};

/// Who joins meanwhile: more than the slowest machine lets in.
const MOST: u32 = 600;
const BETWEEN: Duration = Duration::from_millis(100);
/// Who joins between two changes.
const SOME: usize = 20;
const WITHIN: Duration = Duration::from_secs(60);
const UID: &str = "another-name-of-this-plane";
pub fn while_joining(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let load = pair.productpage.load("ratings.bookinfo:8080", "/", 50)?;
    let mut steady = Crowd::new(world, "steady")?;
    let mut later = Crowd::new(world, "later")?;
    let admits = world.manifest("later.yaml")?;
    world.remove_manifest("later.yaml")?;
    later.grow(1);
    steady.keep_growing(MOST, BETWEEN);
    until("who isn't admitted is told so", WITHIN, || {
        ensure!(
            later.refusals().keys().any(|words| words.contains("Not authorized by OnboardingPolicy")),
            "{:?}",
            later.refusals()
        );
        Ok(())
    })?;

    // Each while others join: between two of these, some do.
    let joined = steady.sessions();
    world.write_manifest("later.yaml", &admits)?;
    let took = world.mesh()?.takes_effect("a policy that is made", || later.is_connected())?;
    println!("  a policy that is made admits after {took:?}");

    more_joined(&steady, joined)?;
    let joined = steady.sessions();
    let before = serial(world)?;
    world.renew_endpoint_certificate()?;
    let took = world.mesh()?.takes_effect("the new certificate", || {
        let now = serial(world)?;
        ensure!(now != before && now.starts_with("serial="), "{now}");
        Ok(())
    })?;
    println!("  a certificate that is renewed is shown after {took:?}");

    more_joined(&steady, joined)?;
    let joined = steady.sessions();
    let group = world.manifest("ratings.yaml")?;
    let weighty = group.replace("    serviceAccount: ratings-vm", "    weight: 7\n    serviceAccount: ratings-vm");
    ensure!(weighty != group, "{group}");
    let there: Vec<_> = steady.entries(world)?.into_keys().collect();
    world.write_manifest("ratings.yaml", &weighty)?;
    let changed = Instant::now();
    until("the group's weight", WITHIN, || {
        let entries = steady.entries(world)?;
        let old = there.iter().filter(|name| entries[*name]["spec"]["weight"] != 7).count();
        ensure!(old == 0, "{old} of {} entries have the old one", there.len());
        Ok(())
    })?;
    println!("  a group's weight is in all of {} entries after {:?}", there.len(), changed.elapsed());

    more_joined(&steady, joined)?;
    let joined = steady.sessions();
    world.mesh()?.set_proxy_config("drainDuration: 7s")?;
    let took = world.mesh()?.takes_effect("the mesh configuration", || {
        ensure!(steady.drains() == Some(7), "sidecars that are started now drain for {:?} s", steady.drains());
        Ok(())
    })?;
    println!("  the mesh's configuration is what sidecars are started with after {took:?}");

    more_joined(&steady, joined)?;
    let joined = steady.sessions();
    ensure!(steady.refusals().is_empty(), "{:?}", steady.refusals());
    let before = world.manifest("controlplane.yaml")?;
    let renamed = before.replace("onboarding:\n", &format!("onboarding:\n      uid: {UID}\n"));
    let renamed = renamed.replace("propagationDelay: 2s", "propagationDelay: 3s");
    ensure!(renamed.contains(UID) && renamed.contains("Delay: 3s"), "{renamed}");
    world.write_manifest("controlplane.yaml", &renamed)?;
    let took = world.mesh()?.takes_effect("the plane's UID", || {
        let now = steady.discover()?.plane_uid;
        ensure!(now == UID, "it is {now}");
        Ok(())
    })?;
    println!("  another UID is what agents are told after {took:?}");

    more_joined(&steady, joined)?;
    world.remove_manifest("later.yaml")?;
    let took = world.mesh()?.takes_effect("a policy that is withdrawn", || {
        ensure!(later.is_connected().is_err(), "its session goes on");
        Ok(())
    })?;
    println!("  a policy that is withdrawn ends a session after {took:?}");
    until("its registration is gone", WITHIN, || {
        ensure!(later.wars(world)?.is_empty() && later.entries(world)?.is_empty(), "it is there");
        Ok(())
    })?;

    let agents = steady.enough(WITHIN)?;
    println!("  {agents} agents joined meanwhile");
    ensure!(steady.sessions() == agents, "{} sessions for {agents} agents", steady.sessions());
    // Whoever was told one name of the plane and came to the other had to ask again.
    ensure!(steady.refusals().keys().all(|words| words.starts_with("Unauthenticated: ")), "{:?}", steady.refusals());
    let outcome = load.stop()?;
    ensure!(outcome.failed == 0 && outcome.sent > 100, "{outcome:?}");
    world.write_manifest("ratings.yaml", &group)?;
    world.write_manifest("controlplane.yaml", &before)?;
    steady.leave(world)?;
    world.keep(pair);
    Ok(())
}

fn more_joined(crowd: &Crowd, before: usize) -> anyhow::Result<()> {
    until("others join", WITHIN, || {
        let others = crowd.sessions() - before;
        ensure!(others >= SOME, "{others} did");
        Ok(())
    })
}

/// Of the certificate that is shown at the gateway.
fn serial(world: &World) -> anyhow::Result<String> {
    let script = format!(
        "openssl s_client -connect {}:15443 -servername {ENDPOINT} -alpn h2 </dev/null 2>/dev/null | openssl x509 -noout -serial",
        world.way_in(),
    );
    world.cloud.check("sh", ["-c", &script])
}
