//! The plane in a cluster, VMs in a mesh of Istio: real API server, real istiod, a real gateway as the one way in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::ensure;
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::world::{Setup, World};
use std::process::ExitCode;
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[
    ("vms_join_through_the_gateway_and_call_each_other", join),
    ("kubectl_shows_who_is_there", kubectl_shows),
    ("a_workload_whose_revision_is_missing_is_told_so_until_it_is_put_right", missing_revision),
    ("a_war_that_is_deleted_comes_back", deleted_war),
    ("a_policy_that_is_deleted_ends_what_lived_by_it", withdrawn),
];

fn main() -> ExitCode {
    run(Setup { istio: true, ..Setup::default() }, SCENARIOS)
}

fn join(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    for host in ["ratings.bookinfo:8080", "ratings.bookinfo.svc:8080", "ratings.bookinfo.svc.cluster.local:8080"] {
        let answer = pair.productpage.call(host)?;
        ensure!(answer.application.starts_with("ratings"), "{host}: {answer:?}");
    }
    let hosts = pair.productpage.agent_verb(&["hosts"])?;
    for name in ["ratings.bookinfo", "ratings.bookinfo.svc", "ratings.bookinfo.svc.cluster.local"] {
        let mapped = |line: &str| line.starts_with("127.0.0.2 ") && line.split_whitespace().any(|word| word == name);
        let is_there = hosts.stdout.lines().any(mapped);
        ensure!(is_there, "{name}: {hosts:?}");
    }
    let proxy = format!("{}.bookinfo", pair.ratings.registration());
    until("istiod knows the proxy by its registration", Duration::from_secs(10), || {
        let status = world.mesh()?.sync_status()?;
        ensure!(status.as_array().is_some_and(|all| all.iter().any(|one| one["proxy"] == proxy.as_str())), "{status}");
        Ok(())
    })?;
    world.keep(pair);
    Ok(())
}

fn kubectl_shows(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let name = pair.ratings.registration();
    let table = world.mesh()?.cluster.kubectl(["get", "war", "-n", "bookinfo"])?;
    let mut lines = table.lines();
    let heading: Vec<_> = lines.next().unwrap_or_default().split_whitespace().collect();
    ensure!(heading == ["NAME", "AGENT", "CONNECTED", "AGE"], "{table}");
    let line = lines.find(|line| line.starts_with(&name)).unwrap_or_default();
    ensure!(line.split_whitespace().nth(1) == Some("True"), "{table}");
    up_to_date(world, &name, "True")?;
    let entry = world.mesh()?.cluster.kubectl(["get", "workloadentry", &name, "-n", "bookinfo", "-o", "yaml"])?;
    ensure!(
        entry.contains("serviceAccount: ratings-vm") && entry.contains(&pair.ratings.machine.address().to_string()),
        "{entry}"
    );
    let described = world.mesh()?.cluster.kubectl(["describe", "war", &name, "-n", "bookinfo"])?;
    let said: Vec<String> =
        described.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for wanted in [
        "Reason: AgentEstablishedConnection".to_owned(),
        "Reason: AllowedByPolicy".to_owned(),
        format!("Ip: {}", pair.ratings.machine.address()),
    ] {
        ensure!(said.contains(&wanted), "{wanted:?} isn't in {described}");
    }
    world.keep(pair);
    Ok(())
}

/// Until the condition is that; its reason.
fn up_to_date(world: &World, name: &str, status: &str) -> anyhow::Result<String> {
    let path = |field: &str| format!("jsonpath={{.status.conditions[?(@.type==\"UpToDate\")].{field}}}");
    let get = |field: &str| world.mesh()?.cluster.kubectl(["get", "war", name, "-n", "bookinfo", "-o", &path(field)]);
    until("the condition UpToDate", Duration::from_secs(20), || {
        let now = get("status")?;
        ensure!(now == status, "it is {now:?}: {}", get("message")?);
        Ok(())
    })?;
    get("reason")
}

fn missing_revision(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let name = pair.ratings.registration();
    up_to_date(world, &name, "True")?;
    let label =
        |value: &str| world.mesh()?.cluster.kubectl(["label", "workloadgroup", "ratings", "-n", "bookinfo", value]);
    label("istio.io/rev=canary")?;
    let told = "asks for the Istio revision \"canary\", which isn't in the cluster";
    pair.ratings.agent()?.wait_for_line(Duration::from_secs(10), |line| line.contains("has no boot configuration"))?;
    let status = pair.ratings.agent_verb(&["status"])?;
    ensure!(status.stdout.contains(told) && status.stdout.contains("goes on with what it has"), "{status:?}");
    ensure!(up_to_date(world, &name, "False")? == "NoBootConfiguration");
    until("an Event of the group", Duration::from_secs(10), || {
        let events = world.mesh()?.cluster.kubectl(["describe", "workloadgroup", "ratings", "-n", "bookinfo"])?;
        ensure!(events.contains("NoBootConfiguration") && events.contains(told), "{events}");
        Ok(())
    })?;
    // The sidecar serves on meanwhile.
    pair.wait_reachable()?;
    label("istio.io/rev-")?;
    ensure!(up_to_date(world, &name, "True")? == "AsWanted");
    until("the agent has nothing to complain of", Duration::from_secs(10), || {
        let status = pair.ratings.agent_verb(&["status"])?;
        ensure!(!status.stdout.contains("no boot configuration"), "{status:?}");
        Ok(())
    })?;
    world.keep(pair);
    Ok(())
}

fn deleted_war(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let name = pair.ratings.registration();
    let uid = |world: &World| {
        world.mesh()?.cluster.kubectl(["get", "war", &name, "-n", "bookinfo", "-o", "jsonpath={.metadata.uid}"])
    };
    let before = uid(world)?;
    world.mesh()?.cluster.kubectl(["delete", "war", &name, "-n", "bookinfo"])?;
    until("the war is another", Duration::from_secs(20), || {
        let now = uid(world)?;
        ensure!(!now.is_empty() && now != before, "{now}");
        world.connected(&name)
    })?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

fn withdrawn(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let name = pair.ratings.registration();
    let whole = world.manifest("ratings.yaml")?;
    world.mesh()?.cluster.kubectl(["delete", "op", "--all", "-n", "bookinfo"])?;
    pair.ratings
        .agent()?
        .wait_for_line(Duration::from_secs(10), |line| line.contains("Not authorized by OnboardingPolicy"))?;
    until("the registration is gone", Duration::from_secs(10), || {
        ensure!(world.connected(&name).is_err());
        Ok(())
    })?;
    world.write_manifest("ratings.yaml", &whole)?;
    Ok(())
}
