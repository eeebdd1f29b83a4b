//! The main job on real parts, told step by step. `dev/demo` builds it and runs it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it tells people what it does")]

use anyhow::{Context, ensure};
use clap::Parser;
use onboarding_testkit::application::Answer;
use onboarding_testkit::netns::{Lab, inside};
use onboarding_tests::steps;
use onboarding_tests::story::{Story, because, first_answer, over_mutual_tls, proven};
use onboarding_tests::until::until;
use onboarding_tests::vm::{Evidence, Vm};
use onboarding_tests::walkthrough;
use onboarding_tests::world::{ENDPOINT, Setup, World, http_status};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Three VMs join the mesh, and one doesn't.
///
/// Network namespaces are the VMs; agent, plane and Envoy are the real ones. Nothing is left behind, however it ends.
#[derive(Parser, Clone)]
#[command(name = "dev/demo", bin_name = "dev/demo")]
struct Options {
    /// In a real cluster: helm, kubectl, the operator, istiod and an Istio gateway; needs what dev/kubernetes builds
    #[arg(long)]
    istio: bool,
    /// Leave everything up at the end, and say how to enter each VM; Ctrl-C ends it
    #[arg(long)]
    keep: bool,
    /// Also show what the plane and the agents log
    #[arg(short, long)]
    verbose: bool,
}

fn main() -> ExitCode {
    let ran = inside(|lab| match demo(lab, &Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dev/demo: {error:#}");
            ExitCode::FAILURE
        }
    });
    ran.unwrap_or_else(|unavailable| {
        eprintln!("dev/demo: {unavailable}");
        ExitCode::FAILURE
    })
}

fn demo(lab: &Lab, options: &Options) -> anyhow::Result<()> {
    let mut story = Story::start();
    let mut world = World::start(lab, Setup { installed: options.istio, ..Setup::default() })?;
    let mut vms = Vec::new();
    let told = match options.istio {
        true => walkthrough::tell(&mut story, &mut world, &mut vms),
        false => tell(&mut story, &mut world, &mut vms),
    };
    if options.verbose || told.is_err() {
        eprintln!("{}", world.report());
        for vm in &vms {
            eprintln!("{}", vm.report());
        }
    }
    told?;
    println!("\nAll of it happened, in {:.1} s.", story.elapsed().as_secs_f64());
    if options.keep {
        keep(&world, &vms);
    } else {
        println!("Nothing of it is left. `dev/demo --keep` leaves it up to look around in.");
    }
    Ok(())
}

fn tell(story: &mut Story, world: &mut World, vms: &mut Vec<Vm>) -> anyhow::Result<()> {
    let certificate = endpoint_certificate(world)?;
    story.tell(format!("The plane serves TLS on 15443; its certificate is verified for {certificate}."));

    // Both at once: starting a sidecar is mostly waiting.
    let mut vm1 = world.vm("vm1", 11, "ratings", Evidence::ec2("i-1234567890abcdef0", "ratings-role"))?;
    let mut vm2 = world.vm("vm2", 12, "productpage", Evidence::jwt("us-east-datacenter1-vm007"))?;
    let started = Instant::now();
    vm1.start_agent()?;
    vm2.start_agent()?;
    let joined = |vm: &Vm| vm.wait_live(Duration::from_secs(20)).map(|()| started.elapsed().as_millis());
    let took = joined(&vm1)?;
    story.tell(format!("VM 1, an EC2 instance, joined: {}. Sidecar LIVE after {took} ms.", proven(world, &vm1)?));
    let took = joined(&vm2)?;
    story
        .tell(format!("VM 2, on premises with a JWT, joined: {}. Sidecar LIVE after {took} ms.", proven(world, &vm2)?));
    vms.push(vm1);
    vms.push(vm2);
    let [vm1, vm2] = vms.as_mut_slice() else { unreachable!() };

    let (answer, took) = until("VM 2 gets an answer by its proxy", Duration::from_secs(10), || {
        let started = Instant::now();
        let text = vm2.machine.check(
            "env",
            ["http_proxy=http://127.0.0.2:8080", "curl", "-sSf", "-m", "5", "http://ratings.bookinfo.svc:8080/"],
        )?;
        Ok((serde_json::from_str::<Answer>(&text)?, started.elapsed().as_millis()))
    })?;
    let (caller, server) = over_mutual_tls(&answer, "ratings on vm1")?;
    story.tell(format!(
        "VM 2 called ratings.bookinfo.svc:8080 with http_proxy=http://127.0.0.2:8080, and VM 1's application answered in {took} ms, over mutual TLS: {caller} -> {server}."
    ));

    let written = vm2.agent_verb(&["hosts", "--write"])?;
    ensure!(written.status.success(), "onboarding-agent hosts --write: {}{}", written.stdout, written.stderr);
    let mut answers = Vec::new();
    for name in ["ratings.bookinfo", "ratings.bookinfo.svc", "ratings.bookinfo.svc.cluster.local"] {
        let (answer, took) = first_answer(vm2, &format!("http://{name}:8080/"), &[])?;
        over_mutual_tls(&answer, "ratings on vm1")?;
        answers.push(format!("{name}:8080 ({took} ms)"));
    }
    story.tell(format!(
        "With the lines of `onboarding-agent hosts --write` in /etc/hosts it called {}: the same.",
        answers.join(", ")
    ));
    let (answer, took) = first_answer(vm2, "http://example.org:8080/", &[])?;
    ensure!(answer.application == "example.org" && answer.caller.is_none(), "{answer:?}");
    story.tell(format!(
        "VM 2 called example.org:8080, which is outside the mesh (a ServiceEntry): answered in {took} ms."
    ));
    let around = vm2.curl(&[&format!("http://{}:8080/", vm1.machine.address())]);
    ensure!(around.is_err(), "plain text to the sidecar of VM 1 was answered: {around:?}");
    story.tell("Without a certificate of the mesh nobody reaches VM 1's application: plain text to 10.99.0.11:8080 is refused.");

    let mut vm3 = world.vm("vm3", 13, "ratings", Evidence::ec2("i-0fedcba9876543210", "details-role"))?;
    vm3.start_agent()?;
    let refusal = vm3.agent()?.wait_for_line(Duration::from_secs(10), |line| {
        line.contains("Not authorized by OnboardingPolicy") && line.contains("details-role")
    })?;
    story.tell(format!("VM 3 has another IAM role and is refused. Its log: {}", because(&refusal)));
    vm3.stop_agent()?;
    drop(vm3);

    let mark = vm1.agent()?.mark();
    let whole = world.withdraw("ratings.yaml", "OnboardingPolicy")?;
    let withdrawn = Instant::now();
    let (took, why) = steps::session_ends(vm1, mark, withdrawn)?;
    story.tell(format!("The policy was withdrawn: VM 1's session ended after {} ms. Its log: {why}", took.as_millis()));

    steps::comes_back(story, (vm1, vm2), mark, || world.write_manifest("ratings.yaml", &whole))?;
    steps::stops_under_load(story, world, vm2).map(drop)
}

/// The name for which a client that trusts the company's CA accepts the endpoint.
fn endpoint_certificate(world: &World) -> anyhow::Result<&'static str> {
    let address = format!("{ENDPOINT}:15443:{}", world.plane_machine.address());
    let ca = world.ca_file();
    let ca = ca.to_str().context("a path that isn't text")?;
    // It speaks gRPC only; that curl gets as far as HTTP proves the handshake.
    world.cloud.check(
        "curl",
        [
            "-sS",
            "-m",
            "5",
            "--http2",
            "-o",
            "/dev/null",
            "--cacert",
            ca,
            "--resolve",
            &address,
            &format!("https://{ENDPOINT}:15443/"),
        ],
    )?;
    let plain = http_status(&world.cloud, &format!("http://{}:15443/", world.plane_machine.address()));
    ensure!(plain.is_err(), "the endpoint answered plain text: {plain:?}");
    Ok(ENDPOINT)
}

fn keep(world: &World, vms: &[Vm]) {
    println!("\nEnter a VM from another terminal:");
    for machine in
        [&world.plane_machine, &world.cloud, &world.external].into_iter().chain(vms.iter().map(|vm| &vm.machine))
    {
        println!(
            "  {:<8} nsenter --target \"$(pgrep -f '^onboarding-vm {}$')\" --all --preserve-credentials bash",
            machine.name(),
            machine.name()
        );
    }
    println!("Files and logs are in {} there. Ctrl-C ends it all.", world.lab().directory().display());
    loop {
        std::thread::park();
    }
}
