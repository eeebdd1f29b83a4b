//! The requirement walked through in a real cluster, from an empty API server to requests answered, and what an operator sees then:
//! what `dev/demo --istio` tells, and a test.

use crate::installed::Installed;
use crate::steps;
use crate::story::{Story, first_answer, over_mutual_tls, proven};
use crate::until::until;
use crate::vm::{Evidence, Vm};
use crate::world::{ENDPOINT, World};
use anyhow::{Context, ensure};
use std::time::{Duration, Instant};

/// From the empty cluster of this world to the last step.
pub fn tell(story: &mut Story, world: &mut World, vms: &mut Vec<Vm>) -> anyhow::Result<()> {
    enable(story, world)?;
    join(story, world, vms)?;
    let [vm1, vm2] = vms.as_mut_slice() else { unreachable!() };
    shown(story, world, vm1, vm2)?;
    call(story, world, vm1, vm2)?;
    refused(story, world)?;
    war_deleted(story, world, vm1, vm2)?;
    policy_deleted(story, world, vm1, vm2)?;
    stopped_under_load(story, world, vm2)
}

/// The requirement's "Enable Workload Onboarding".
fn enable(story: &mut Story, world: &World) -> anyhow::Result<()> {
    let installed = world.installed()?;
    story.tell("An empty cluster is up: etcd, kube-apiserver, its controllers, and istiod.");
    installed.install()?;
    story.tell("`helm install onboarding deploy/chart/onboarding` brought the CustomResourceDefinitions and the operator, which runs.");
    world.apply_demo("controlplane.yaml")?;
    let words = installed.wait_condition("EndpointCertificate", "SecretAbsent")?;
    story.tell(format!("The ControlPlane enables onboarding; its status says what is missing: {words}"));
    world.create_endpoint_secret()?;
    installed.cluster.apply(include_str!("../istio/accounts.yaml"))?;
    installed.wait_enabled()?;
    let address = "jsonpath={.status.loadBalancer.ingress[0].ip}";
    let address = installed.kubectl(&["get", "svc", "vmgateway", "-n", "istio-system", "-o", address])?;
    story.tell(format!(
        "`kubectl create secret tls onboarding-endpoint-tls ...`: the ControlPlane is Ready, and vmgateway, onboarding-plane and onboarding-repository are Available; {ENDPOINT} is vmgateway's {address}."
    ));
    for file in ["ratings.yaml", "productpage.yaml", "example-org.yaml"] {
        world.apply_demo(file)?;
    }
    let accepted = until("both policies are accepted", Duration::from_secs(10), || {
        let table = installed.kubectl(&["get", "op", "-n", "bookinfo"])?;
        let all = table.lines().filter(|line| line.split_whitespace().nth(1) == Some("True")).count();
        ensure!(all == 2, "{table}");
        Ok(table)
    })?;
    story.tell(format!(
        "The requirement's WorkloadGroup, OnboardingPolicy and Sidecar are applied, and those of productpage. `kubectl get op -n bookinfo`:\n{}",
        indented(&accepted)
    ));
    Ok(())
}

fn join(story: &mut Story, world: &World, vms: &mut Vec<Vm>) -> anyhow::Result<()> {
    let mut vm1 = world.vm("vm1", 11, "ratings", Evidence::ec2("i-1234567890abcdef0", "ratings-role"))?;
    let mut vm2 = world.vm("vm2", 12, "productpage", Evidence::jwt("us-east-datacenter1-vm007"))?;
    let started = Instant::now();
    vm1.start_agent()?;
    vm2.start_agent()?;
    let joined = |vm: &Vm| vm.wait_live(Duration::from_secs(30)).map(|()| started.elapsed().as_millis());
    let took = joined(&vm1)?;
    story.tell(format!(
        "VM 1, an EC2 instance, joined through {ENDPOINT}:15443: {}. Sidecar LIVE after {took} ms.",
        proven(world, &vm1)?
    ));
    let took = joined(&vm2)?;
    story
        .tell(format!("VM 2, on premises with a JWT, joined: {}. Sidecar LIVE after {took} ms.", proven(world, &vm2)?));
    vms.push(vm1);
    vms.push(vm2);
    Ok(())
}

/// What an operator of the cluster sees.
fn shown(story: &mut Story, world: &World, vm1: &Vm, vm2: &Vm) -> anyhow::Result<()> {
    let installed = world.installed()?;
    let wars = until("kubectl shows both as connected", Duration::from_secs(10), || {
        world.connected(&vm1.registration())?;
        world.connected(&vm2.registration())?;
        installed.kubectl(&["get", "war", "-n", "bookinfo"])
    })?;
    story.tell(format!("`kubectl get war -n bookinfo`:\n{}", indented(&wars)));
    let entry = |vm: &Vm| -> anyhow::Result<String> {
        let output = "jsonpath={.spec.address} {.spec.serviceAccount} {.metadata.ownerReferences[0].kind}";
        let text = installed.kubectl(&["get", "workloadentry", &vm.registration(), "-n", "bookinfo", "-o", output])?;
        let wanted = format!("{} {}-vm WorkloadAutoRegistration", vm.machine.address(), vm.group);
        ensure!(text == wanted, "the WorkloadEntry says {text:?}, not {wanted:?}");
        Ok(format!("{} of {}-vm", vm.machine.address(), vm.group))
    };
    story.tell(format!(
        "`kubectl get workloadentry -n bookinfo`: {}, {}; each is owned by its registration.",
        entry(vm1)?,
        entry(vm2)?
    ));
    let synced = until("istiod has sent both proxies their configuration", Duration::from_secs(15), || {
        let status = installed.sync_status()?;
        [vm1, vm2].iter().map(|vm| synced(&status, vm)).collect::<anyhow::Result<Vec<_>>>()
    })?;
    story.tell(format!(
        "istiod's sync status has the proxies {}, with what it last sent them acknowledged.",
        synced.join(" and ")
    ));
    Ok(())
}

/// A proxy that istiod knows by its registration's name, and that took what it was sent.
fn synced(status: &serde_json::Value, vm: &Vm) -> anyhow::Result<String> {
    let name = format!("{}.bookinfo", vm.registration());
    let proxy = status.as_array().into_iter().flatten().find(|one| one["proxy"] == name.as_str());
    let proxy = proxy.with_context(|| format!("istiod doesn't know {name}"))?;
    for kind in ["cluster", "listener"] {
        let (sent, acked) = (&proxy[format!("{kind}_sent")], &proxy[format!("{kind}_acked")]);
        ensure!(sent.as_str().is_some_and(|sent| !sent.is_empty()) && sent == acked, "{name}: {proxy}");
    }
    Ok(name)
}

fn call(story: &mut Story, world: &World, vm1: &Vm, vm2: &Vm) -> anyhow::Result<()> {
    let written = vm2.agent_verb(&["hosts", "--write"])?;
    ensure!(written.status.success(), "onboarding-agent hosts --write: {}{}", written.stdout, written.stderr);
    let (answer, took) = first_answer(vm2, "http://ratings.bookinfo.svc:8080/", &[])?;
    let (caller, server) = over_mutual_tls(&answer, "ratings on vm1")?;
    story.tell(format!("VM 2 called ratings.bookinfo.svc:8080: VM 1's application answered in {took} ms, over mutual TLS: {caller} -> {server}."));
    // Without a protocol istiod makes a listener that has one route, `*`, to the oldest Service of the port.
    let port =
        r#"[{"op":"replace","path":"/spec/egress/0/port","value":{"number":8080,"name":"http","protocol":"HTTP"}}]"#;
    let sidecar = ["patch", "sidecar", "bookinfo-ratings-no-iptables", "-n", "bookinfo", "--type=json", "-p", port];
    world.installed()?.kubectl(&sidecar)?;
    let (answer, took) = until("VM 1 gets an answer of VM 2", Duration::from_secs(15), || {
        let started = Instant::now();
        let answer = vm1.call("productpage.bookinfo:8080")?;
        ensure!(answer.application == "productpage on vm2", "{answer:?}");
        Ok((answer, started.elapsed().as_millis()))
    })?;
    let (caller, server) = (answer.caller.context("no caller")?, answer.server.context("no server")?);
    ensure!(caller.ends_with("/sa/ratings-vm") && server.ends_with("/sa/productpage-vm"), "{caller} -> {server}");
    story.tell(format!("And the other way, VM 2's application answered VM 1 in {took} ms: {caller} -> {server}. (For this VM 1's Sidecar says `protocol: HTTP` at its egress port: istiod leads a port without it to one Service alone.)"));
    let around = vm2.curl(&["-f", &format!("http://{}:8080/", vm1.machine.address())]);
    story.tell(match around {
        Ok(_) => "Plain text to VM 1's address reaches its sidecar (Istio's default is PERMISSIVE), never the application itself, which listens on 127.0.0.1.",
        Err(_) => "Without a certificate of the mesh nobody reaches VM 1's application.",
    });
    Ok(())
}

fn refused(story: &mut Story, world: &World) -> anyhow::Result<()> {
    let mut vm3 = world.vm("vm3", 13, "ratings", Evidence::ec2("i-0fedcba9876543210", "details-role"))?;
    vm3.start_agent()?;
    vm3.agent()?.wait_for_line(Duration::from_secs(15), |line| line.contains("Not authorized by OnboardingPolicy"))?;
    let installed = world.installed()?;
    let event = until("an Event says so", Duration::from_secs(15), || {
        let field = "--field-selector=regarding.kind=WorkloadGroup,regarding.name=ratings,type=Warning";
        let output = "jsonpath={range .items[*]}{.reason}: {.note}{\"\\n\"}{end}";
        let events = installed.kubectl(&["get", "events.events.k8s.io", "-n", "bookinfo", field, "-o", output])?;
        let event = events.lines().find(|line| line.contains("details-role")).map(str::to_owned);
        event.with_context(|| format!("events: {events:?}"))
    })?;
    story.tell(format!(
        "VM 3 has another IAM role and is refused. `kubectl describe workloadgroup ratings` has the Event {event}"
    ));
    vm3.stop_agent().map(drop)
}

fn war_deleted(story: &mut Story, world: &World, vm1: &Vm, vm2: &Vm) -> anyhow::Result<()> {
    let (installed, name) = (world.installed()?, vm1.registration());
    let uid = || {
        installed.kubectl(&[
            "get",
            "war",
            &name,
            "-n",
            "bookinfo",
            "--ignore-not-found",
            "-o",
            "jsonpath={.metadata.uid}",
        ])
    };
    let before = uid()?;
    installed.kubectl(&["delete", "war", &name, "-n", "bookinfo"])?;
    let deleted = Instant::now();
    until("the registration is a new one", Duration::from_secs(30), || {
        let now = uid()?;
        ensure!(!now.is_empty() && now != before, "its uid is {now:?}");
        world.connected(&name)
    })?;
    let took = deleted.elapsed();
    steps::answers(vm2, "ratings on vm1")?;
    story.tell(format!(
        "`kubectl delete war {name}`: the agent onboarded again, {} ms after, and VM 1 answers.",
        took.as_millis()
    ));
    Ok(())
}

fn policy_deleted(story: &mut Story, world: &World, vm1: &Vm, vm2: &Vm) -> anyhow::Result<()> {
    let installed = world.installed()?;
    let mark = vm1.agent()?.mark();
    let policy = "allow-narrow-subset-of-aws-ec2-instances";
    // From when kubectl is called: it returns after the API server has the change.
    let asked = Instant::now();
    installed.kubectl(&["delete", "op", policy, "-n", "bookinfo"])?;
    let (_, why) = steps::session_ends(vm1, mark, Instant::now())?;
    story.tell(format!(
        "`kubectl delete op {policy}`: VM 1's session ended {} ms after kubectl was called, within a second of its answer. Its log: {why}",
        asked.elapsed().as_millis()
    ));
    steps::comes_back(story, (vm1, vm2), mark, || world.apply_demo("ratings.yaml"))
}

fn stopped_under_load(story: &mut Story, world: &World, vm2: &Vm) -> anyhow::Result<()> {
    let vm4 = steps::stops_under_load(story, world, vm2)?;
    gone(world.installed()?, &vm4)
}

/// Who said goodbye has no entry any more.
fn gone(installed: &Installed, vm: &Vm) -> anyhow::Result<()> {
    until("its entry is gone", Duration::from_secs(10), || {
        let left = installed.kubectl(&["get", "war,workloadentry", "-n", "bookinfo", "-o", "name"])?;
        ensure!(!left.contains(&vm.registration()), "{left}");
        Ok(())
    })
}

fn indented(table: &str) -> String {
    table.lines().map(|line| format!("             {line}")).collect::<Vec<_>>().join("\n")
}
