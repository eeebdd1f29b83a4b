//! The requirement walked through with helm and kubectl, from an empty API server to a request answered; then what its parts do when
//! they are replaced, and when onboarding is disabled again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::ensure;
use onboarding_testkit::process;
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::story::Story;
use onboarding_tests::until::until;
use onboarding_tests::walkthrough;
use onboarding_tests::world::{ENDPOINT, Pair, Setup, World};
use std::process::ExitCode;
use std::time::Duration;

/// In this order: each goes on from where the one before left the cluster.
const SCENARIOS: &[Scenario] = &[
    ("from_an_empty_api_server_to_requests_answered", walk),
    ("the_repository_is_behind_443_of_the_gateway", repository),
    ("external_dns_finds_the_endpoints_name_on_vmgateway", external_dns),
    ("a_plane_that_is_deleted_is_replaced_and_agents_come_back", replaced),
    ("a_certificate_that_is_renewed_in_its_secret_is_served", renewed),
    ("disabling_ends_what_runs_and_leaves_the_rest", disabled),
];

fn main() -> ExitCode {
    run(Setup { installed: true, ..Setup::default() }, SCENARIOS)
}

fn walk(world: &mut World) -> anyhow::Result<()> {
    let ours = world.installed()?.kubectl(&["get", "crd", "-o", "name"])?;
    ensure!(!ours.contains("tetrate.io"), "the cluster isn't empty: {ours}");
    let mut vms = Vec::new();
    walkthrough::tell(&mut Story::start(), world, &mut vms)?;
    let (Some(productpage), Some(ratings)) = (vms.pop(), vms.pop()) else { unreachable!() };
    world.keep(Pair { ratings, productpage });
    Ok(())
}

/// The repository's certificate is the endpoint's.
fn repository(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let ca = world.lab().directory().join("endpoint-ca.pem");
    std::fs::write(&ca, world.ca_certificate())?;
    let there = format!("{ENDPOINT}:443:{}", world.way_in());
    let url = format!("https://{ENDPOINT}/install/deb/amd64/onboarding-agent.deb");
    let ca = ca.to_str().unwrap();
    let curl = ["-sS", "-m", "3", "--cacert", ca, "--resolve", &there, "-w", "%{http_code} %{http_version}", &url];
    until("the repository answers", Duration::from_secs(30), || {
        let answer = pair.productpage.machine.check("curl", curl)?;
        ensure!(answer.contains("The repository has no packages yet") && answer.ends_with("404 2"), "{answer}");
        Ok(())
    })?;
    world.keep(pair);
    Ok(())
}

/// The real external-dns, whose provider keeps records in memory and says in its log which it makes.
fn external_dns(world: &mut World) -> anyhow::Result<()> {
    let installed = world.installed()?;
    let mut command = installed.control.command(installed.cluster.binary("external-dns"));
    command.arg(format!("--kubeconfig={}", installed.cluster.kubeconfig().display()));
    command.args(["--source=service", "--provider=inmemory", "--inmemory-zone=your-company.corp", "--registry=noop"]);
    command.args(["--namespace=istio-system", "--once", "--log-level=debug", "--metrics-address=127.0.0.1:0"]);
    let ended = process::run(command, Duration::from_secs(60))?;
    ensure!(ended.status.success(), "{ended:?}");
    let record = format!("{ENDPOINT} 0 IN A  {}", world.way_in());
    let made = ended.stderr.lines().any(|line| line.contains("CREATE: ") && line.contains(&record));
    ensure!(made, "no record {record:?} is made: {}", ended.stderr);
    Ok(())
}

fn replaced(world: &mut World) -> anyhow::Result<()> {
    let mut pair = world.pair()?;
    let installed = world.installed()?;
    let name = pair.ratings.registration();
    let connected_to = || {
        let output = "jsonpath={.status.activeAgentConnection.connectedTo}";
        installed.kubectl(&["get", "war", &name, "-n", "bookinfo", "-o", output])
    };
    let before = connected_to()?;
    let load = pair.productpage.load("ratings.bookinfo:8080", "/", 50)?;
    installed.kubectl(&["delete", "pod", &before, "-n", "istio-system"])?;
    until("the agent is connected to another replica", Duration::from_secs(60), || {
        world.connected(&name)?;
        let now = connected_to()?;
        ensure!(!now.is_empty() && now != before, "it is connected to {now}");
        Ok(())
    })?;
    let outcome = load.stop()?;
    ensure!(outcome.failed == 0, "{} of {} requests failed: {:?}", outcome.failed, outcome.sent, outcome.failures);
    ensure!(pair.ratings.agent.as_mut().is_some_and(|agent| agent.status().is_none()), "the agent ended");
    world.keep(pair);
    Ok(())
}

fn renewed(world: &mut World) -> anyhow::Result<()> {
    let serial = |world: &World| {
        let script = "openssl s_client -connect \"$0:15443\" -servername \"$1\" </dev/null 2>/dev/null | openssl x509 -noout -serial";
        let (way_in, name) = (world.way_in().to_string(), ENDPOINT);
        world.cloud.check("sh", ["-c", script, &way_in, name])
    };
    let before = serial(world)?;
    world.installed()?.kubectl(&["delete", "secret", "onboarding-endpoint-tls", "-n", "istio-system"])?;
    world.create_endpoint_secret()?;
    until("the new certificate is served", Duration::from_secs(20), || {
        let now = serial(world)?;
        ensure!(now.starts_with("serial=") && now != before, "{now}");
        Ok(())
    })
}

fn disabled(world: &mut World) -> anyhow::Result<()> {
    let installed = world.installed()?;
    let remove = r#"[{"op":"remove","path":"/spec/meshExpansion/onboarding"}]"#;
    let patch = ["patch", "controlplane", "controlplane", "-n", "istio-system", "--type=json", "-p", remove];
    installed.kubectl(&patch)?;
    until("nothing runs but the operator", Duration::from_secs(90), || {
        let pods = installed.node().pods();
        ensure!(pods.iter().all(|pod| pod.program == "onboarding-operator"), "{pods:?}");
        let left = installed.kubectl(&["get", "deployments,services", "-n", "istio-system", "-o", "name"])?;
        ensure!(left.trim() == "service/istiod", "{left}");
        Ok(())
    })?;
    let kept = installed.kubectl(&["get", "op,workloadgroup", "-n", "bookinfo", "-o", "name"])?;
    ensure!(kept.lines().count() == 4, "policies and groups are others' and stay: {kept}");
    installed.helm(&["uninstall", "onboarding", "--wait"])?;
    until("the operator is gone", Duration::from_secs(30), || {
        ensure!(installed.node().pods().is_empty());
        Ok(())
    })
}
