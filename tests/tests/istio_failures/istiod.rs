//! istiod goes and comes again, while tokens of seconds are renewed, and nobody who talks notices either.

use anyhow::{Context, ensure};
use onboarding_testkit::process::Mark;
use onboarding_tests::until::until;
use onboarding_tests::vm::{Evidence, Vm};
use onboarding_tests::world::{Pair, World};
use std::time::{Duration, Instant};

const LONG: &str = "expiration: 1h";
/// Of the agent's log, for each that it gets.
const TOKEN: &str = "Workload Onboarding Token";
/// Renewed when two thirds are over: the rest has to do for one that is refused because the plane was renamed meanwhile, and asks again.
const SHORT: &str = "expiration: 24s";

pub fn restarts(world: &mut World) -> anyhow::Result<()> {
    let plane = world.manifest("controlplane.yaml")?;
    ensure!(plane.contains(LONG), "{plane}");
    world.write_manifest("controlplane.yaml", &plane.replace(LONG, SHORT))?;
    let outcome = while_they_talk(world);
    world.write_manifest("controlplane.yaml", &plane)?;
    let pair = outcome?;
    until("tokens are long again", Duration::from_secs(30), || {
        for vm in [&pair.ratings, &pair.productpage] {
            let lines = vm.agent()?.lines_since(Mark::default());
            let last = lines.into_iter().rev().find(|line| line.contains(TOKEN)).context("no token")?;
            let expires = last.split_once("expires_at=").context("the token's end")?.1;
            let expires: jiff::Timestamp = expires.split_whitespace().next().unwrap_or_default().parse()?;
            ensure!(expires.duration_since(jiff::Timestamp::now()).as_secs() > 600, "{last}");
        }
        Ok(())
    })?;
    world.keep(pair);
    Ok(())
}

fn while_they_talk(world: &mut World) -> anyhow::Result<Pair> {
    let pair = world.pair()?;
    let both = [&pair.ratings, &pair.productpage];
    let began = [Mark::default(), Mark::default()];
    let loads = [
        pair.productpage.load("ratings.bookinfo:8080", "/", 50)?,
        pair.ratings.load("productpage.bookinfo:8080", "/", 50)?,
    ];

    let gone = Instant::now();
    world.mesh()?.cluster.restart_istiod(|| {
        // Without it nothing changes in the mesh, and what is there goes on.
        for (from, to) in [(&pair.productpage, &pair.ratings), (&pair.ratings, &pair.productpage)] {
            from.call(&to.service())?;
        }
        Ok(())
    })?;
    println!("  istiod was there again after {:?}", gone.elapsed());
    let mut third = world.vm("vm3", 13, "ratings", Evidence::ec2("i-00000000000000003", "ratings-role"))?;
    let took = third.join()?;
    println!("  a VM that joined then was live after {took:?}");
    until("the new VM is called", Duration::from_secs(30), || {
        let count: u64 = third.curl(&["http://127.0.0.1:8080/count"])?.trim().parse()?;
        ensure!(count > 0, "nobody called it");
        Ok(())
    })?;
    third.call("productpage.bookinfo:8080")?;

    // Tokens are for the plane's name and by its terms, and it is given others.
    let plane = world.manifest("controlplane.yaml")?;
    let renamed = plane.replace("onboarding:\n", "onboarding:\n      uid: its-other-name\n");
    let renamed = renamed.replace("propagationDelay: 2s", "propagationDelay: 3s");
    ensure!(renamed.contains("uid: its-other-name") && renamed.contains("Delay: 3s"), "{renamed}");
    let before = [pair.ratings.agent()?.mark(), pair.productpage.agent()?.mark()];
    world.write_manifest("controlplane.yaml", &renamed)?;
    until("each has renewed its token twice under the plane's new name", Duration::from_secs(120), || {
        for (vm, mark) in both.into_iter().zip(before) {
            let tokens = count(vm, mark, TOKEN)?;
            ensure!(tokens >= 2, "{}: {tokens} tokens", vm.name());
        }
        Ok(())
    })?;
    until("each has renewed its token three times", Duration::from_secs(120), || {
        for (vm, mark) in both.into_iter().zip(began) {
            let tokens = count(vm, mark, TOKEN)?;
            ensure!(tokens >= 4, "{}: {tokens} tokens", vm.name());
        }
        Ok(())
    })?;
    for (vm, mark) in both.into_iter().zip(began) {
        let sessions = count(vm, mark, "the session is open")?;
        ensure!(sessions == 1, "{}: {sessions} sessions: renewing ended one", vm.name());
    }
    for load in loads {
        let outcome = load.stop()?;
        ensure!(outcome.failed == 0 && outcome.sent > 100, "{outcome:?}");
    }
    let (_, metrics) = world.admin("/metrics")?;
    let expired =
        metrics.lines().find(|line| line.starts_with("onboarding_sessions_ended_total{reason=\"token_expired\""));
    ensure!(expired.is_none_or(|line| line.ends_with(" 0")), "{expired:?}");
    third.stop_agent()?;
    Ok(pair)
}

fn count(vm: &Vm, since: Mark, words: &str) -> anyhow::Result<usize> {
    Ok(vm.agent()?.lines_since(since).iter().filter(|line| line.contains(words)).count())
}
