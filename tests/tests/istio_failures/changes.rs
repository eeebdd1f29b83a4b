//! What people change while workloads join: the endpoint's certificate, policies, groups, Istio's mesh configuration.

use crate::crowd::Crowd;
use anyhow::ensure;
use onboarding_tests::until::until;
use onboarding_tests::world::{ENDPOINT, World};
use std::time::{Duration, Instant};

const JOINS: u32 = 160;
const WITHIN: Duration = Duration::from_secs(60);
/// Within which a change decides.
const EFFECTIVE: Duration = Duration::from_secs(1);
/// A machine that has other things to do gets so many times what kubectl needs for next to nothing.
const ALLOWANCE: u32 = 15;

pub fn while_joining(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let load = pair.productpage.load("ratings.bookinfo:8080", "/", 50)?;
    let mut steady = Crowd::new(world, "steady")?;
    let mut later = Crowd::new(world, "later")?;
    let admits = world.manifest("later.yaml")?;
    world.remove_manifest("later.yaml")?;
    later.grow(1);
    steady.grow_over(JOINS, Duration::from_secs(12));
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
    let took = effective(world, "a policy that is made", || later.is_connected())?;
    println!("  a policy that is made admits after {took:?}");

    more_joined(&steady, joined)?;
    let joined = steady.sessions();
    let before = serial(world)?;
    world.renew_endpoint_certificate()?;
    let took = effective(world, "the new certificate", || {
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
    let mesh = "{\"data\":{\"mesh\":\"trustDomain: cluster.local\\ndefaultConfig:\\n  discoveryAddress: istiod.istio-system.svc:15012\\n  drainDuration: 7s\\n\"}}";
    world.mesh()?.cluster.kubectl(["patch", "configmap", "istio", "-n", "istio-system", "--type=merge", "-p", mesh])?;
    let took = effective(world, "the mesh configuration", || {
        ensure!(steady.drains() == Some(7), "sidecars that are started now drain for {:?} s", steady.drains());
        Ok(())
    })?;
    println!("  the mesh's configuration is what sidecars are started with after {took:?}");

    more_joined(&steady, joined)?;
    world.remove_manifest("later.yaml")?;
    let took = effective(world, "a policy that is withdrawn", || {
        ensure!(later.is_connected().is_err(), "its session goes on");
        Ok(())
    })?;
    println!("  a policy that is withdrawn ends a session after {took:?}");
    until("its registration is gone", WITHIN, || {
        ensure!(later.wars(world)?.is_empty() && later.entries(world)?.is_empty(), "it is there");
        Ok(())
    })?;

    steady.wait_connected(Duration::from_secs(60))?;
    ensure!(steady.sessions() == JOINS as usize, "{} sessions for {JOINS} agents", steady.sessions());
    ensure!(steady.refusals().is_empty(), "{:?}", steady.refusals());
    let outcome = load.stop()?;
    ensure!(outcome.failed == 0 && outcome.sent > 100, "{outcome:?}");
    world.write_manifest("ratings.yaml", &group)?;
    steady.leave(world)?;
    world.keep(pair);
    Ok(())
}

/// How long it took, from when kubectl was done.
fn effective(world: &World, what: &str, look: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let changed = Instant::now();
    until(what, WITHIN, look)?;
    let took = changed.elapsed();
    let asked = Instant::now();
    world.mesh()?.cluster.kubectl(["get", "--raw", "/version"])?;
    let most = EFFECTIVE + ALLOWANCE * asked.elapsed();
    ensure!(took < most, "{what} took {took:?}, and should have taken {most:?} at most on a machine as busy as this");
    Ok(took)
}

fn more_joined(crowd: &Crowd, before: usize) -> anyhow::Result<()> {
    until("others join", WITHIN, || {
        ensure!(crowd.sessions() > before || crowd.sessions() == JOINS as usize, "nobody did");
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
