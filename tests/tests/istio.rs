//! The plane in a cluster, VMs in a mesh of Istio: real API server, real istiod, a real gateway as the one way in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_testkit::application::Answer;
use onboarding_testkit::cluster::Istiod;
use onboarding_testkit::gateway;
use onboarding_testkit::process::{Mark, Process};
use onboarding_tests::mesh::POD_NETWORK;
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::{always, until};
use onboarding_tests::vm::{Evidence, Vm};
use onboarding_tests::world::{Pair, Setup, World, binary, envoy};
use onboarding_wire::onboarding as pb;
use prost::Message;
use std::process::ExitCode;
use std::time::Duration;

/// The first makes the pair of VMs, with certificates of seconds.
const SCENARIOS: &[Scenario] = &[
    ("certificates_and_tokens_for_them_are_renewed_while_vms_talk", renewal),
    ("vms_join_through_the_gateway_and_call_each_other", join),
    ("kubectl_shows_who_is_there", kubectl_shows),
    ("an_unready_application_gets_no_requests", unready),
    ("a_workload_whose_revision_is_missing_is_told_so_until_it_is_put_right", missing_revision),
    ("a_war_that_is_deleted_comes_back", deleted_war),
    ("pilot_agent_and_envoy_alone_are_live_after_a_power_cycle_without_the_plane", power_cycles),
    ("a_token_that_expired_while_a_vm_was_away_is_replaced_before_its_sidecar_starts", away_for_days),
    ("workloads_of_a_revision_are_configured_by_its_istiod", revision),
    ("a_vm_calls_a_pod_of_another_network_through_the_way_in_and_is_called_by_it", pods),
    ("a_policy_that_is_deleted_ends_what_lived_by_it", policy_deleted),
    ("a_group_that_is_deleted_ends_what_lived_by_it", group_deleted),
];

fn main() -> ExitCode {
    let flags = ["--istio-token-renewal", "10s"].map(str::to_owned).to_vec();
    run(Setup { istio: true, plane_flags: flags, ..Setup::default() }, SCENARIOS)
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

/// What its probe finds reaches istiod by the entry's condition. It calls itself: its listener alone tells services apart by name.
fn unready(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let vm = &pair.productpage;
    let own = format!("productpage on {}", vm.name());
    for ready in [true, false, true] {
        vm.set_application_ready(ready)?;
        until(&format!("ready: {ready}"), Duration::from_secs(20), || match ready {
            true => {
                let answer = vm.call("productpage.bookinfo:8080")?;
                ensure!(answer.application == own, "{answer:?}");
                Ok(())
            }
            false => vm.call_unanswered("productpage.bookinfo:8080"),
        })?;
    }
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
    until("the status says so", Duration::from_secs(10), || {
        let status = pair.ratings.agent_verb(&["status"])?;
        ensure!(status.stdout.contains(told) && status.stdout.contains("goes on with what it has"), "{status:?}");
        Ok(())
    })?;
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

fn policy_deleted(world: &mut World) -> anyhow::Result<()> {
    let policy = ["delete", "op", "allow-narrow-subset-of-aws-ec2-instances", "-n", "bookinfo"];
    ends_what_lived(world, &policy, "to join WorkloadGroup bookinfo/ratings")
}

fn group_deleted(world: &mut World) -> anyhow::Result<()> {
    let group = ["delete", "workloadgroup", "ratings", "-n", "bookinfo"];
    ends_what_lived(world, &group, "there is no WorkloadGroup bookinfo/ratings")
}

/// kubectl takes away what `ratings` is admitted by: its session and its entry go within a second, and it comes back by itself.
/// `told`: why it isn't let in meanwhile.
fn ends_what_lived(world: &mut World, by: &[&str], told: &str) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let name = pair.ratings.registration();
    let whole = world.manifest("ratings.yaml")?;
    let agent = pair.ratings.agent()?;
    let before = agent.mark();
    let mesh = world.mesh()?;
    mesh.cluster.kubectl(by)?;
    mesh.takes_effect("the end of what lived by it", || {
        let lines = agent.lines_since(before);
        ensure!(lines.iter().any(|line| line.contains("the plane ended the session")), "its session goes on");
        for kind in ["war", "workloadentry"] {
            let there = mesh.cluster.kubectl(["get", kind, "-n", "bookinfo", "-o", "name"])?;
            ensure!(!there.contains(&name), "its {kind} is there");
        }
        Ok(())
    })?;
    agent.wait_for_line_since(before, Duration::from_secs(30), |line| {
        line.contains("Not authorized by OnboardingPolicy") && line.contains(told)
    })?;
    until("its sidecar has left too", Duration::from_secs(20), || {
        ensure!(pair.ratings.pids("/envoy")?.is_empty(), "Envoy runs on");
        Ok(())
    })?;
    world.connected(&pair.productpage.registration())?;
    pair.productpage.call_unanswered(&pair.ratings.service())?;
    world.write_manifest("ratings.yaml", &whole)?;
    until("it is back", Duration::from_secs(60), || world.connected(&name))?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

/// Two of `productpage` call each other, by mutual TLS. Of `ratings` nobody calls others by name: the Sidecar of the requirement says of no
/// protocol on its egress listener, so Istio takes it for one of TCP.
fn talk(one: &Vm, other: &Vm) -> anyhow::Result<()> {
    const IDENTITY: Option<&str> = Some("spiffe://cluster.local/ns/bookinfo/sa/productpage-vm");
    for (from, to) in [(one, other), (other, one)] {
        let name = format!("productpage on {}", to.name());
        until(&format!("{name} answers {}", from.name()), Duration::from_secs(40), || {
            let answer = from.call("productpage.bookinfo:8080")?;
            ensure!(answer.application == name, "{answer:?}");
            ensure!((answer.caller.as_deref(), answer.server.as_deref()) == (IDENTITY, IDENTITY), "{answer:?}");
            Ok(())
        })?;
    }
    Ok(())
}

/// A second one of `productpage`, with pilot-agent.
fn with_pilot_agent(world: &World, settings: &str) -> anyhow::Result<Vm> {
    let mut vm = world.vm("vm3", 13, "productpage", Evidence::jwt("us-east-datacenter1-vm003"))?;
    vm.use_pilot_agent(world, settings)?;
    vm.join()?;
    Ok(vm)
}

fn renewal(world: &mut World) -> anyhow::Result<()> {
    world.mesh()?.set_proxy_config("proxyMetadata:\n  SECRET_TTL: 40s\n")?;
    let outcome = renewed_while_they_talk(world);
    world.mesh()?.set_proxy_config("")?;
    let mut pair = outcome?;
    // Who is started anew is told of what the mesh says now.
    for vm in [&mut pair.ratings, &mut pair.productpage] {
        vm.stop_agent()?;
        vm.join()?;
        until("certificates are long again", Duration::from_secs(30), || {
            let left = certificates(vm)?.last().context("no certificate")?.duration_since(jiff::Timestamp::now());
            ensure!(left.as_hours() > 20, "{}: {left}", vm.name());
            Ok(())
        })?;
    }
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

fn renewed_while_they_talk(world: &mut World) -> anyhow::Result<Pair> {
    let pair = world.pair()?;
    let both = [&pair.ratings, &pair.productpage];
    let loads = [
        pair.productpage.load("ratings.bookinfo:8080", "/", 50)?,
        pair.productpage.load("productpage.bookinfo:8080", "/", 50)?,
    ];
    until("each has renewed its certificate and the token for it twice", Duration::from_secs(120), || {
        for vm in both {
            let (certificates, tokens) = (certificates(vm)?.len(), istio_tokens(vm)?.len());
            ensure!(certificates >= 3 && tokens >= 3, "{}: {certificates} certificates, {tokens} tokens", vm.name());
        }
        Ok(())
    })?;
    for load in loads {
        let outcome = load.stop()?;
        ensure!(outcome.failed == 0 && outcome.sent > 1000, "{outcome:?}");
    }
    for vm in both {
        // None had run out before the next one came, and Envoy is the one that was started with the first.
        let ends = certificates(vm)?;
        ensure!(ends.iter().all(|end| end.duration_since(jiff::Timestamp::now()).as_secs() < 60), "{ends:?}");
        let starts = count(vm, "starting the sidecar")? + count(vm, "the sidecar is restarted")?;
        ensure!(starts == 1 && count(vm, "the session is open")? == 1, "{}: {starts} starts", vm.name());
        ensure!(count(vm, "no certificate of istiod")? == 0, "{}: istiod refused", vm.name());
    }
    Ok(pair)
}

fn count(vm: &Vm, words: &str) -> anyhow::Result<usize> {
    Ok(vm.agent()?.lines_since(Mark::default()).iter().filter(|line| line.contains(words)).count())
}

/// When those end that its agent got of istiod.
fn certificates(vm: &Vm) -> anyhow::Result<Vec<jiff::Timestamp>> {
    told_of(vm, "got a certificate of istiod", "expires_at=")
}

/// When those end that the plane sent.
fn istio_tokens(vm: &Vm) -> anyhow::Result<Vec<jiff::Timestamp>> {
    told_of(vm, "got a boot configuration of an Istio mesh", "token_expires_at=")
}

fn told_of(vm: &Vm, words: &str, field: &str) -> anyhow::Result<Vec<jiff::Timestamp>> {
    let lines = vm.agent()?.lines_since(Mark::default());
    let told = lines.iter().filter(|line| line.contains(words)).map(|line| {
        let value = line.split_whitespace().find_map(|word| word.strip_prefix(field));
        Ok(value.with_context(|| format!("{line:?} has no {field}"))?.parse()?)
    });
    told.collect()
}

fn power_cycles(world: &mut World) -> anyhow::Result<()> {
    let mut pair = world.pair()?;
    let mut pilot = with_pilot_agent(world, "{}")?;
    ensure!(!pilot.pids("/pilot-agent")?.is_empty(), "no pilot-agent runs");
    ensure!(pair.productpage.pids("/pilot-agent")?.is_empty(), "Envoy was to be alone");
    world.connected(&pilot.registration())?;
    talk(&pilot, &pair.productpage)?;

    world.stop_plane()?;
    for vm in [&mut pair.productpage, &mut pilot] {
        vm.power_cycle(world)?;
        vm.start_agent()?;
    }
    let live = live_without_the_plane(&pair, &pilot);
    world.start_plane()?;
    live?;
    for vm in [&pair.productpage, &pilot] {
        until("it is connected again", Duration::from_secs(60), || world.connected(&vm.registration()))?;
        ensure!(count(vm, "starting the sidecar")? == 1, "{}: its sidecar was started again", vm.name());
    }
    talk(&pilot, &pair.productpage)?;
    pilot.stop_agent()?;
    world.keep(pair);
    Ok(())
}

fn live_without_the_plane(pair: &Pair, pilot: &Vm) -> anyhow::Result<()> {
    for vm in [&pair.productpage, pilot] {
        vm.wait_live(Duration::from_secs(40))?;
    }
    talk(pilot, &pair.productpage)?;
    for vm in [&pair.productpage, pilot] {
        until("it reaches who was there all the time", Duration::from_secs(20), || vm.call("ratings.bookinfo:8080"))?;
        ensure!(count(vm, "the session is open")? == 0, "{}: a plane has helped", vm.name());
    }
    Ok(())
}

fn away_for_days(world: &mut World) -> anyhow::Result<()> {
    let mut pair = world.pair()?;
    let mut pilot = with_pilot_agent(world, "{}")?;
    world.stop_plane()?;
    for vm in [&mut pair.productpage, &mut pilot] {
        vm.power_cycle(world)?;
        days_pass(vm)?;
        vm.start_agent()?;
    }
    let waited = [&pair.productpage, &pilot].into_iter().try_for_each(wait_without_sidecar);
    world.start_plane()?;
    waited?;
    for vm in [&pair.productpage, &pilot] {
        vm.wait_live(Duration::from_secs(60))?;
        let lines = vm.agent()?.lines_since(Mark::default());
        let place = |words: &str| lines.iter().position(|line| line.contains(words)).context(words.to_owned());
        let (token, start) = (place("got a boot configuration of an Istio mesh")?, place("starting the sidecar")?);
        ensure!(token < start, "{}: it was started by the old token", vm.name());
    }
    talk(&pilot, &pair.productpage)?;
    pilot.stop_agent()?;
    world.keep(pair);
    Ok(())
}

/// It asks for the plane again and again; what it ran to know the sidecar's version has ended by then.
fn wait_without_sidecar(vm: &Vm) -> anyhow::Result<()> {
    until("it has tried to onboard, and again", Duration::from_secs(20), || {
        let tries = count(vm, "onboarding is tried again")?;
        ensure!(tries >= 2, "{}: {tries} tries", vm.name());
        Ok(())
    })?;
    always("no sidecar runs", Duration::from_secs(2), || no_sidecar(vm))
}

fn no_sidecar(vm: &Vm) -> anyhow::Result<()> {
    for program in ["/envoy", "/pilot-agent"] {
        let pids = vm.pids(program)?;
        ensure!(pids.is_empty(), "{}: {program} runs: {pids:?}", vm.name());
    }
    Ok(())
}

/// As after a week without power: the token for istiod's CA has expired, and no certificate is valid. The agent isn't running.
fn days_pass(vm: &Vm) -> anyhow::Result<()> {
    let state = vm.state_dir();
    let kept = std::fs::read(state.join("boot"))?;
    // After its SHA-256.
    let mut boot = pb::BootConfiguration::decode(kept.get(32..).context("a boot configuration is longer")?)?;
    let Some(pb::boot_configuration::Sidecar::Istio(istio)) = &mut boot.sidecar else { anyhow::bail!("{boot:?}") };
    let now = jiff::Timestamp::now().as_second();
    istio.token_expires_at = Some(prost_types::Timestamp { seconds: now - 7 * 24 * 3600, nanos: 0 });
    let boot = boot.encode_to_vec();
    let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &boot);
    std::fs::write(state.join("boot"), [sum.as_ref(), &boot].concat())?;
    let certificates = ["istiod-identity.json", "sidecar/etc/certs/cert-chain.pem", "sidecar/etc/certs/key.pem"];
    let mut removed = 0;
    for certificate in certificates {
        match std::fs::remove_file(state.join(certificate)) {
            Ok(()) => removed += 1,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(removed > 0, "{} had no certificate", vm.name());
    Ok(())
}

fn revision(world: &mut World) -> anyhow::Result<()> {
    let mut pair = world.pair()?;
    let mesh = world.mesh()?;
    let (_process, canary) = mesh.start_revision("canary")?;
    let proxies = |istiod: Istiod| -> anyhow::Result<String> { Ok(mesh.sync_status_of(istiod)?.to_string()) };

    // By the agent's configuration, with pilot-agent.
    let mut pilot = with_pilot_agent(world, "{revision: canary}")?;
    configured_by(&pilot, &proxies, canary, mesh.istiod)?;
    talk(&pilot, &pair.productpage)?;

    // By the label of the group, with Envoy alone: who is there moves when it is started again.
    configured_by(&pair.productpage, &proxies, mesh.istiod, canary)?;
    let label = |value: &str| mesh.cluster.kubectl(["label", "workloadgroup", "productpage", "-n", "bookinfo", value]);
    label("istio.io/rev=canary")?;
    up_to_date(world, &pair.productpage.registration(), "False")?;
    let moved = pair.productpage.stop_agent().and_then(|_| pair.productpage.join());
    let moved = moved.and_then(|_| configured_by(&pair.productpage, &proxies, canary, mesh.istiod));
    let moved = moved.and_then(|()| talk(&pilot, &pair.productpage));
    label("istio.io/rev-")?;
    moved?;
    pair.productpage.stop_agent()?;
    pair.productpage.join()?;
    configured_by(&pair.productpage, &proxies, mesh.istiod, canary)?;
    pilot.stop_agent()?;
    mesh.cluster.kubectl(["delete", "configmap", "istio-canary", "-n", "istio-system"])?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

fn pods(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let mesh = world.mesh()?;
    let machine = world.lab().machine("pod", 60)?;
    let objects = include_str!("../istio/pod.yaml")
        .replace("POD_IP", &machine.address().to_string())
        .replace("GATEWAY_IP", &mesh.gateway.address().to_string());
    mesh.cluster.apply(&objects)?;
    let mut application = machine.command(binary("onboarding-testkit")?);
    application.args(["application", "--name", "details in a pod", "--listen", "127.0.0.1:8080"]);
    let _application = Process::start("details", application, None)?;
    let details = ("bookinfo", "details");
    let sidecar = gateway::start_sidecar(&mesh.cluster, mesh.istiod, &machine, &envoy()?, details, Some(POD_NETWORK))?;

    // The VM knows no way to the pod itself.
    let vm = &pair.productpage.machine;
    vm.check("ip", ["route", "add", "unreachable", &format!("{}/32", machine.address())])?;
    until("the VM gets an answer of the pod", Duration::from_secs(60), || {
        ensure!(sidecar.status().is_none(), "its sidecar ended:\n{}", sidecar.tail());
        let answer = pair.productpage.call("details.bookinfo:8080")?;
        ensure!(answer.application == "details in a pod", "{answer:?}");
        let caller = Some("spiffe://cluster.local/ns/bookinfo/sa/productpage-vm");
        let server = Some("spiffe://cluster.local/ns/bookinfo/sa/details");
        ensure!((answer.caller.as_deref(), answer.server.as_deref()) == (caller, server), "{answer:?}");
        Ok(())
    })?;
    // Who is of the VM's own network is called as before.
    pair.wait_reachable()?;
    vm.check("ip", ["route", "del", "unreachable", &format!("{}/32", machine.address())])?;
    // The other way there is no gateway: the pod calls the VM's own address.
    let name = format!("productpage on {}", pair.productpage.name());
    until("the pod gets an answer of the VM", Duration::from_secs(30), || {
        let call = ["-fsS", "-m", "5", "-H", "Host: productpage.bookinfo:8080", "http://127.0.0.2:8080/"];
        let answer: Answer = serde_json::from_str(&machine.check("curl", call)?)?;
        ensure!(answer.application == name, "{answer:?}");
        let caller = Some("spiffe://cluster.local/ns/bookinfo/sa/details");
        let server = Some("spiffe://cluster.local/ns/bookinfo/sa/productpage-vm");
        ensure!((answer.caller.as_deref(), answer.server.as_deref()) == (caller, server), "{answer:?}");
        Ok(())
    })?;
    for object in ["sidecar/details", "workloadentry/details", "service/details", "serviceaccount/details"] {
        mesh.cluster.kubectl(["delete", object, "-n", "bookinfo"])?;
    }
    mesh.cluster.kubectl(["delete", "service/vmgateway", "-n", "istio-system"])?;
    world.keep(pair);
    Ok(())
}

/// Until its proxy is connected to the one istiod, and not to the other.
fn configured_by(
    vm: &Vm,
    proxies: &impl Fn(Istiod) -> anyhow::Result<String>,
    by: Istiod,
    not_by: Istiod,
) -> anyhow::Result<()> {
    let proxy = format!("{}.bookinfo", vm.registration());
    until("its istiod knows the proxy, and the other doesn't", Duration::from_secs(60), || {
        let (there, elsewhere) = (proxies(by)?, proxies(not_by)?);
        ensure!(there.contains(&proxy), "{proxy} isn't among {there}");
        ensure!(!elsewhere.contains(&proxy), "{proxy} is with the other istiod: {elsewhere}");
        Ok(())
    })
}
