//! Steps that the demo takes in both meshes, told in the same words.

use crate::story::{Story, because, count};
use crate::until::{until, was_prompt};
use crate::vm::{Evidence, Vm};
use crate::world::World;
use anyhow::ensure;
use onboarding_testkit::process::Mark;
use std::time::{Duration, Instant};

/// Until the calls of VM 2 reach this application.
pub fn answers(vm2: &Vm, application: &str) -> anyhow::Result<()> {
    until(&format!("{application} answers"), Duration::from_secs(40), || {
        let answer = vm2.call("ratings.bookinfo:8080")?;
        ensure!(answer.application == application, "{answer:?}");
        Ok(())
    })
}

/// The admission of VM 1 was withdrawn: its session ends within a second. How long it took, and what its log says.
pub fn session_ends(vm1: &Vm, mark: Mark, withdrawn: Instant) -> anyhow::Result<(Duration, String)> {
    let ended = vm1
        .agent()?
        .wait_for_line_since(mark, Duration::from_secs(20), |line| line.to_lowercase().contains("withdrawn"))?;
    let took = withdrawn.elapsed();
    was_prompt("the session's end", took, || (0..10).try_for_each(|_| vm1.machine.check("true", [""; 0]).map(drop)))?;
    Ok((took, because(&ended)))
}

/// The policy is applied again by `restore`: VM 1 joins by itself, and answers.
pub fn comes_back(
    story: &mut Story,
    (vm1, vm2): (&Vm, &Vm),
    mark: Mark,
    restore: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    // Or the sidecar that is on its way out could be the one that answers below.
    vm1.agent()?.wait_for_line_since(mark, Duration::from_secs(20), |line| line.contains("the sidecar is stopped"))?;
    restore()?;
    let restored = Instant::now();
    answers(vm2, "ratings on vm1")?;
    story.tell(format!(
        "The policy is back: VM 1 joined again and answers, {} ms after.",
        restored.elapsed().as_millis()
    ));
    Ok(())
}

/// A second instance takes its share of the calls, and is stopped under load without one that fails.
pub fn stops_under_load(story: &mut Story, world: &World, vm2: &Vm) -> anyhow::Result<Vm> {
    let mut vm4 = world.vm("vm4", 14, "ratings", Evidence::ec2("i-00000000000000004", "ratings-role"))?;
    let took = vm4.join()?;
    let load = vm2.load("ratings.bookinfo:8080", "/", 200)?;
    let before = count(&vm4)?;
    until("VM 4 serves the load", Duration::from_secs(15), || {
        ensure!(count(&vm4)? > before + 20, "not yet");
        Ok(())
    })?;
    story.tell(format!(
        "VM 4, a second instance of ratings, joined in {} ms and takes its share of the calls.",
        took.as_millis()
    ));
    let took = vm4.stop_agent()?;
    let outcome = load.stop()?;
    ensure!(outcome.failed == 0, "{} of {} requests failed: {:?}", outcome.failed, outcome.sent, outcome.failures);
    let answered: Vec<_> = outcome.answered_by.iter().map(|(who, count)| format!("{who} answered {count}")).collect();
    story.tell(format!(
        "VM 4's agent was stopped under load ({} ms: unregistered, waited, drained): {} requests were sent meanwhile, {} failed; {}.",
        took.as_millis(),
        outcome.sent,
        outcome.failed,
        answered.join(", ")
    ));
    Ok(vm4)
}
