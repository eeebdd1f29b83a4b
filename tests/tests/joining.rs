//! Who joins, who doesn't, and what happens to those who have when the manifests change.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use onboarding_testkit::process::Process;
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::steps::session_ends;
use onboarding_tests::until::{always, until};
use onboarding_tests::vm::Evidence;
use onboarding_tests::world::{Setup, World, binary};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Of what may wait for its turn on a busy machine.
const WITHIN: Duration = Duration::from_secs(20);

const SCENARIOS: &[Scenario] = &[
    ("an_ec2_instance_and_a_host_with_a_jwt_join_and_call_each_other", join_and_call),
    ("a_host_is_recognised_by_the_metadata_that_answer_there", recognised),
    ("tcp_goes_over_the_mesh_and_a_name_of_dns_out_of_it", tcp_and_dns),
    ("a_workload_that_no_policy_admits_is_told_why_and_joins_once_one_does", refused_then_admitted),
    ("a_withdrawn_policy_ends_session_and_entry_within_a_second", withdrawn),
    ("a_policy_that_cannot_be_read_ends_sessions_and_spares_traffic", broken_then_mended),
    ("another_key_for_a_live_identity_is_refused_until_the_registration_is_deleted", two_agents_one_identity),
    ("an_application_that_is_not_ready_gets_no_traffic", unready),
    ("a_sidecar_that_crashes_is_started_again", crashed_sidecar),
    ("a_configuration_that_envoy_refuses_is_told_to_both_ends_and_costs_nothing", refused_configuration),
    ("a_new_certificate_of_the_endpoint_is_used_and_drops_nobody", endpoint_certificate),
];

fn main() -> ExitCode {
    run(Setup::default(), SCENARIOS)
}

fn join_and_call(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let vm2 = &pair.productpage;
    let written = vm2.agent_verb(&["hosts", "--write"])?;
    ensure!(written.status.success(), "{written:?}");
    let once = vm2.machine.hosts()?;
    ensure!(once.contains("127.0.0.2") && once.starts_with("127.0.0.1 localhost"), "{once}");
    ensure!(
        vm2.agent_verb(&["hosts", "--write"])?.status.success() && vm2.machine.hosts()? == once,
        "written twice differs"
    );
    for name in ["ratings.bookinfo", "ratings.bookinfo.svc", "ratings.bookinfo.svc.cluster.local"] {
        let answer = vm2.get(&format!("http://{name}:8080/some/path"))?;
        ensure!(answer.application == "ratings on vm1" && answer.path == "/some/path", "{answer:?}");
        ensure!(answer.caller.as_deref() == Some("spiffe://cluster.local/ns/bookinfo/sa/productpage-vm"), "{answer:?}");
        ensure!(answer.server.as_deref() == Some("spiffe://cluster.local/ns/bookinfo/sa/ratings-vm"), "{answer:?}");
    }
    let answer = vm2.get("http://example.org:8080/")?;
    ensure!(answer.application == "example.org" && answer.caller.is_none(), "{answer:?}");
    let forged =
        ["-H", "x-forwarded-client-cert: By=spiffe://cluster.local/ns/a/sa/b;URI=spiffe://cluster.local/ns/c/sa/d"];
    let answer = vm2.get_with("http://ratings.bookinfo:8080/", &forged)?;
    ensure!(answer.caller.as_deref() == Some("spiffe://cluster.local/ns/bookinfo/sa/productpage-vm"), "{answer:?}");
    let around = vm2.curl(&[&format!("http://{}:8080/", pair.ratings.machine.address())]);
    ensure!(around.is_err(), "plain text was answered: {around:?}");
    let wars = world.registrations()?;
    for vm in [&pair.ratings, &pair.productpage] {
        let war = wars.iter().find(|war| war["metadata"]["name"] == vm.registration().as_str());
        let war = war.with_context(|| format!("{} isn't among {wars:?}", vm.registration()))?;
        ensure!(
            war["spec"]["registration"]["host"]["addresses"][0]["ip"] == vm.machine.address().to_string().as_str(),
            "{war}"
        );
    }
    world.keep(pair);
    Ok(())
}

/// `auto`, which is also what happens where no host is named, joins an EC2 instance as one; where one is named nobody is asked.
fn recognised(world: &mut World) -> anyhow::Result<()> {
    let mut instance = world.vm("vm5", 15, "ratings", Evidence::ec2("i-00000000000000005", "ratings-role"))?;
    let elsewhere = world.vm("vm6", 16, "productpage", Evidence::jwt("us-east-datacenter1-vm006"))?;
    const CUSTOM: &str = "host: {custom: {credential: [{plugin: {name: of-nobody}}]}}\n";
    const AUTO: &str = "host: {auto: {}}\n";
    for (vm, host, expected) in [
        (&elsewhere, AUTO, "FAIL  host: no platform was recognised"),
        (&instance, CUSTOM, "OK    host: custom (credential plugins: of-nobody"),
        (&instance, "", "OK    host: AWS EC2 instance"),
        (&instance, AUTO, "OK    host: AWS EC2 instance"),
    ] {
        let configuration = format!(
            "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: AgentConfiguration\n{host}sidecar: {{envoy: {{}}}}\n"
        );
        std::fs::write(vm.file("agent.config.yaml"), configuration)?;
        let said = vm.agent_verb(&["check"])?.stdout;
        ensure!(said.lines().any(|line| line.starts_with(expected)), "{host:?}: no {expected:?} in\n{said}");
    }
    instance.join()?;
    until("it is connected", Duration::from_secs(20), || world.connected(&instance.registration()))?;
    instance.stop_agent().map(drop)
}

/// New listeners and services reach sidecars that run.
fn tcp_and_dns(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    pair.productpage.machine.add_host(world.external.address(), "far.example")?;
    let mut command = pair.ratings.machine.command(binary("onboarding-testkit")?);
    command.args(["echo", "--listen", "127.0.0.1:9000"]);
    let echo = Process::start("echo", command, None)?;
    echo.wait_for_line(Duration::from_secs(10), |line| line.starts_with("listening on"))?;

    let (ratings, productpage) = (world.manifest("ratings.yaml")?, world.manifest("productpage.yaml")?);
    let ingress = "  - defaultEndpoint: 127.0.0.1:9000\n    port: {name: tcp, number: 9000, protocol: TCP}\n  egress:";
    let egress = "  egress:\n  - bind: 127.0.0.3\n    port: {name: tcp, number: 9000, protocol: TCP}\n    hosts: [./*]";
    world.write_manifest("ratings.yaml", &ratings.replacen("  egress:", ingress, 1))?;
    world.write_manifest("productpage.yaml", &productpage.replacen("  egress:", egress, 1))?;
    world.write_manifest("more.yaml", MORE)?;
    let seen = (|| {
        // bash's /dev/tcp: what comes back is what was sent.
        let echo = "exec 3<>/dev/tcp/127.0.0.3/9000; echo 'not HTTP' >&3; head -n 1 <&3";
        until("the echo comes back", WITHIN, || {
            let answer = pair.productpage.machine.check("timeout", ["3", "bash", "-c", echo])?;
            ensure!(answer == "not HTTP\n", "{answer:?}");
            Ok(())
        })?;
        until("the name of DNS is reached", WITHIN, || {
            let answer = pair.productpage.call("api.example.net:8080")?;
            ensure!(answer.application == "example.org" && answer.host.starts_with("api.example.net"), "{answer:?}");
            Ok(())
        })?;
        // Without the mesh's certificate nobody gets to it.
        let around =
            format!("exec 3<>/dev/tcp/{}/9000; echo 'not TLS' >&3; head -n 1 <&3", pair.ratings.machine.address());
        let answer = pair.productpage.machine.check("timeout", ["3", "bash", "-c", &around]).unwrap_or_default();
        ensure!(!answer.contains("not TLS"), "plain TCP reached the application");
        Ok(())
    })();
    world.write_manifest("ratings.yaml", &ratings)?;
    world.write_manifest("productpage.yaml", &productpage)?;
    world.remove_manifest("more.yaml")?;
    seen?;
    until("the listener is gone again", Duration::from_secs(10), || {
        let open = pair.productpage.machine.check("ss", ["-Hltn"])?;
        ensure!(!open.contains("127.0.0.3:9000"), "{open}");
        Ok(())
    })?;
    world.keep(pair);
    Ok(())
}

const MORE: &str = "apiVersion: v1
kind: Service
metadata:
  name: echo
  namespace: bookinfo
spec:
  selector:
    app: ratings
  ports:
  - name: tcp-echo
    port: 9000
---
apiVersion: networking.istio.io/v1beta1
kind: ServiceEntry
metadata:
  name: api-example-net
  namespace: bookinfo
spec:
  hosts:
  - api.example.net
  location: MESH_EXTERNAL
  ports:
  - name: http
    number: 8080
    protocol: HTTP
  resolution: DNS
  endpoints:
  - address: far.example
";

fn refused_then_admitted(world: &mut World) -> anyhow::Result<()> {
    let mut vm = world.vm("vm3", 13, "ratings", Evidence::ec2("i-0fedcba9876543210", "details-role"))?;
    vm.start_agent()?;
    let line = vm
        .agent()?
        .wait_for_line(Duration::from_secs(10), |line| line.contains("Not authorized by OnboardingPolicy"))?;
    ensure!(
        line.contains("details-role") && line.contains("ratings-role"),
        "the refusal doesn't say what stood in the way: {line}"
    );
    ensure!(
        world.registrations()?.iter().all(|war| war["metadata"]["name"] != vm.registration().as_str()),
        "it is registered"
    );
    let whole = world.manifest("ratings.yaml")?;
    world.write_manifest(
        "ratings.yaml",
        &whole.replace("- ratings-role #", "- details-role\n          - ratings-role #"),
    )?;
    let joined = vm.wait_live(Duration::from_secs(40));
    world.write_manifest("ratings.yaml", &whole)?;
    joined
}

fn withdrawn(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let mark = pair.ratings.agent()?.mark();
    let whole = world.withdraw("ratings.yaml", "OnboardingPolicy")?;
    let out = (|| {
        session_ends(&pair.ratings, mark, Instant::now())?;
        until("ratings is unreachable", WITHIN, || pair.productpage.call_unanswered("ratings.bookinfo:8080"))?;
        until("its sidecar is out of the mesh", WITHIN, || {
            let ready = pair.ratings.curl(&["http://localhost:15000/ready"]);
            ensure!(ready.as_ref().map_or(true, |body| !body.contains("LIVE")), "{ready:?}");
            Ok(())
        })
    })();
    world.write_manifest("ratings.yaml", &whole)?;
    out?;
    pair.ratings.wait_live(Duration::from_secs(40))?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

fn broken_then_mended(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let mark = pair.ratings.agent()?.mark();
    let whole = world.manifest("ratings.yaml")?;
    world.write_manifest("ratings.yaml", &whole.replace("accounts:", "acounts:"))?;
    let broken = (|| {
        pair.ratings.agent()?.wait_for_line_since(mark, WITHIN, |line| line.contains("PolicyUnreadable"))?;
        let unready = until("the plane says what is wrong", WITHIN, || {
            let faults = world.plane()?.lines_since(Default::default());
            ensure!(
                faults.iter().any(|line| line.contains("acounts") && line.contains("ratings.yaml")),
                "no fault was logged"
            );
            Ok(())
        });
        unready?;
        always("traffic flows", Duration::from_secs(2), || pair.productpage.call("ratings.bookinfo:8080").map(drop))
    })();
    world.write_manifest("ratings.yaml", &whole)?;
    broken?;
    until("the agent is connected again", Duration::from_secs(40), || world.connected(&pair.ratings.registration()))?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

fn two_agents_one_identity(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let mut double = world.vm("double", 14, "ratings", pair.ratings.evidence.clone())?;
    double.start_agent()?;
    let line = double.agent()?.wait_for_line(Duration::from_secs(10), |line| line.contains("another key"))?;
    ensure!(line.contains("onboardctl workloads delete"), "the refusal doesn't name the way out: {line}");
    let answer = pair.productpage.call("ratings.bookinfo:8080")?;
    ensure!(answer.application == "ratings on vm1", "{answer:?}");
    // The host was rebuilt, says the operator; the old one is gone.
    let mut ratings = pair.ratings;
    let productpage = pair.productpage;
    ratings.machine.power_off()?;
    drop(ratings.agent.take());
    let deleted = world.onboardctl(&["workloads", "delete", &format!("bookinfo/{}", ratings.registration())])?;
    ensure!(deleted.status.success(), "{deleted:?}");
    double.wait_live(Duration::from_secs(40))?;
    until("the new host answers", Duration::from_secs(10), || {
        let answer = productpage.call("ratings.bookinfo:8080")?;
        ensure!(answer.application == "ratings on double", "{answer:?}");
        Ok(())
    })?;
    double.stop_agent()?;
    Ok(())
}

fn unready(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    pair.productpage.set_application_ready(false)?;
    until("an unready application gets nothing", Duration::from_secs(10), || {
        pair.ratings.call_unanswered("productpage.bookinfo:8080")
    })?;
    pair.productpage.set_application_ready(true)?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

fn crashed_sidecar(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let before = pair.ratings.pids("/envoy")?;
    ensure!(before.len() == 1, "{before:?}");
    kill(Pid::from_raw(before[0]), Signal::SIGSEGV)?;
    until("another Envoy runs", Duration::from_secs(10), || {
        let now = pair.ratings.pids("/envoy")?;
        ensure!(now.len() == 1 && now != before, "{now:?}, it was {before:?}");
        Ok(())
    })?;
    pair.ratings.wait_live(Duration::from_secs(40))?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

/// A `bind` that isn't an address of the host: only the host can know, so the plane takes it, and Envoy doesn't.
fn refused_configuration(world: &mut World) -> anyhow::Result<()> {
    const WORDS: [&str; 2] = ["192.0.2.1:8080", "Cannot assign requested address"];
    // Of the agent and of the plane, not of Envoy itself.
    let refused = |line: &str| line.contains("the last good one") && WORDS.iter().all(|word| line.contains(word));
    let pair = world.pair()?;
    let vm = &pair.productpage;
    let good = world.manifest("productpage.yaml")?;
    let (agent, plane, rejected) = (vm.agent()?.mark(), world.plane()?.mark(), rejections(world)?);
    let load = vm.load("ratings.bookinfo:8080", "/", 200)?;

    // The listener that the load uses is the one that is to give way.
    world.write_manifest("productpage.yaml", &good.replacen("bind: 127.0.0.2", "bind: 192.0.2.1", 1))?;
    let seen = (|| {
        let said = vm.agent()?.wait_for_line_since(agent, Duration::from_secs(15), refused)?;
        let heard = world.plane()?.wait_for_line_since(plane, WITHIN, refused)?;
        ensure!(version(&said)? == version(&heard)?, "two versions: {said}\n{heard}");
        ensure!(heard.contains(&vm.registration()), "{heard}");
        ensure!(rejections(world)? > rejected, "the plane's metric doesn't count it");
        until("the status says so", WITHIN, || {
            let status = vm.agent_verb(&["status"])?.stdout;
            let line = status.lines().find(|line| line.starts_with("Configuration ")).context(status.clone())?;
            ensure!(line.contains("the last good one stays") && WORDS.iter().all(|word| line.contains(word)), "{line}");
            Ok(())
        })?;
        vm.call(&pair.ratings.service())?;
        pair.ratings.call(&vm.service())?;
        let outcome = load.stop()?;
        ensure!(outcome.failed == 0 && outcome.sent > 0, "the refusal cost requests: {outcome:?}");

        // Another one, which is good, is taken.
        world.write_manifest("productpage.yaml", &good.replacen("bind: 127.0.0.2", "bind: 127.0.0.3", 1))?;
        until("the next configuration is taken", WITHIN, || {
            let host = format!("Host: {}", pair.ratings.service());
            vm.get_with("http://127.0.0.3:8080/", &["-H", &host]).map(drop)
        })?;
        until("the status says nothing of it any more", WITHIN, || {
            let status = vm.agent_verb(&["status"])?.stdout;
            ensure!(!status.contains("Configuration "), "{status}");
            Ok(())
        })
    })();
    world.write_manifest("productpage.yaml", &good)?;
    seen?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

/// Configurations that sidecars refused, as the plane counts them.
fn rejections(world: &World) -> anyhow::Result<f64> {
    let (_, text) = world.admin("/metrics")?;
    let line = text.lines().find(|line| {
        line.starts_with("onboarding_mesh_sidecar_reports_total{") && line.contains("outcome=\"rejected\"")
    });
    Ok(line.and_then(|line| line.rsplit_once(' ')).map_or(Ok(0.0), |(_, count)| count.parse())?)
}

/// The field of a log line.
fn version(line: &str) -> anyhow::Result<&str> {
    let (_, rest) = line.split_once("version=").context("a line without a version")?;
    Ok(rest.split_whitespace().next().unwrap_or_default())
}

fn endpoint_certificate(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let serial = |world: &World| {
        let script = format!(
            "openssl s_client -connect {}:15443 -servername {} -alpn h2 </dev/null 2>/dev/null | openssl x509 -noout -serial",
            world.plane_machine.address(),
            onboarding_tests::world::ENDPOINT
        );
        world.cloud.check("sh", ["-c", &script])
    };
    let before = serial(world)?;
    let marks = [pair.ratings.agent()?.mark(), pair.productpage.agent()?.mark()];
    world.renew_endpoint_certificate()?;
    until("the new certificate is shown", WITHIN, || {
        let now = serial(world)?;
        ensure!(now != before && now.starts_with("serial="), "{now}");
        Ok(())
    })?;
    for (vm, mark) in [&pair.ratings, &pair.productpage].into_iter().zip(marks) {
        always("the session goes on", Duration::from_secs(1), || {
            world.connected(&vm.registration())?;
            let lines = vm.agent()?.lines_since(mark);
            ensure!(!lines.iter().any(|line| line.contains("connect")), "it was dropped: {lines:?}");
            Ok(())
        })?;
    }
    world.keep(pair);
    Ok(())
}
