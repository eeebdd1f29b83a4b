//! Hosts whose network is of IPv6 alone, or of both kinds.

use anyhow::{Context, ensure};
use onboarding_testkit::process::Process;
use onboarding_tests::until::until;
use onboarding_tests::vm::{Evidence, Vm};
use onboarding_tests::world::{ENDPOINT, World, binary};
use serde_json::Value;
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

/// In the lab's network: `fd00:99::<host>`.
fn address(host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, host.into())
}

pub fn of_ipv6(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    // The load balancer in front of a gateway, and of the company's issuer, whose own networks are of IPv4.
    let ip = std::process::Command::new("ip")
        .args(["-6", "addr", "add", &format!("{}/64", address(1)), "dev", "lab", "nodad"])
        .status()?;
    ensure!(ip.success(), "ip: {ip}");
    forward(15443, (world.way_in(), 15443).into())?;
    forward(443, (world.cloud.address(), 443).into())?;

    let mut six = world.vm("six", 17, "productpage", Evidence::jwt("us-east-datacenter1-six"))?;
    let mut both = world.vm("both", 18, "productpage", Evidence::jwt("us-east-datacenter1-both"))?;
    for (vm, host) in [(&six, 17), (&both, 18)] {
        vm.machine.check("ip", ["-6", "addr", "add", &format!("{}/64", address(host)), "dev", "eth0", "nodad"])?;
    }
    six.machine.check("ip", ["-4", "addr", "flush", "dev", "eth0"])?;
    six.machine.check("ip", ["-6", "route", "add", "default", "via", &address(1).to_string()])?;
    // In place: it is mounted into the machine.
    std::fs::write(
        six.file("hosts"),
        format!("127.0.0.1 localhost\n::1 localhost\n{0} {ENDPOINT}\n{0} mycompany.corp\n", address(1)),
    )?;
    // Istio takes `127.0.0.1` of a Sidecar for `::1` on such a host.
    let mut application = six.machine.command(binary("onboarding-testkit")?);
    application.args(["application", "--name", "productpage on six", "--listen", "[::1]:8080"]);
    let application = Process::start("six: application", application, None)?;
    application.wait_for_line(Duration::from_secs(10), |line| line.starts_with("listening on"))?;
    for vm in [&mut six, &mut both] {
        vm.start_agent()?;
    }
    for vm in [&six, &both] {
        vm.wait_live(Duration::from_secs(60))?;
    }

    ensure!(
        registered(world, &six)? == (vec![address(17).into()], address(17).into()),
        "{:?}",
        registered(world, &six)?
    );
    // IPv4 before IPv6, as they are reached by both.
    let (all, chosen) = registered(world, &both)?;
    ensure!(all == [both.machine.address().into(), IpAddr::from(address(18))], "{all:?}");
    ensure!(chosen == both.machine.address(), "{chosen}");

    // Each way: who has only one kind of address, who has both.
    until("the dual host gets an answer of the one of IPv6", Duration::from_secs(30), || {
        let answer = both.call("productpage.bookinfo:8080")?;
        ensure!(answer.application.ends_with("on six"), "{answer:?}");
        Ok(())
    })?;
    until("the dual host gets an answer of one of IPv4", Duration::from_secs(30), || {
        both.call("ratings.bookinfo:8080")
    })?;
    until("one of IPv4 gets an answer of the dual host", Duration::from_secs(30), || {
        let answer = pair.productpage.call("productpage.bookinfo:8080")?;
        ensure!(answer.application.ends_with("on both"), "{answer:?}");
        Ok(())
    })?;
    until("the one of IPv6 gets an answer of itself through the mesh", Duration::from_secs(30), || {
        let answer = six.call("productpage.bookinfo:8080")?;
        ensure!(answer.application.ends_with("on six"), "{answer:?}");
        Ok(())
    })?;
    for vm in [&mut six, &mut both] {
        vm.stop_agent()?;
    }
    world.keep(pair);
    Ok(())
}

/// The addresses of its war, and the one of its entry.
fn registered(world: &World, vm: &Vm) -> anyhow::Result<(Vec<IpAddr>, IpAddr)> {
    let cluster = &world.mesh()?.cluster;
    let get = |kind: &str| -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&cluster.kubectl([
            "get",
            kind,
            &vm.registration(),
            "-n",
            "bookinfo",
            "-o",
            "json",
        ])?)?)
    };
    let war = get("war")?;
    let all = war["spec"]["registration"]["host"]["addresses"].as_array().context("it has no addresses")?;
    let all: Vec<IpAddr> = all
        .iter()
        .map(|one| Ok(one["ip"].as_str().context("an IP is text")?.parse()?))
        .collect::<anyhow::Result<_>>()?;
    let entry = get("workloadentry")?;
    Ok((all, entry["spec"]["address"].as_str().context("the entry has no address")?.parse()?))
}

/// Carries connections over to `to`, until the test ends.
fn forward(port: u16, to: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind((address(1), port)).context("listening on the lab's IPv6 address")?;
    std::thread::spawn(move || {
        for from in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let to = TcpStream::connect(to)?;
                let (back_from, back_to) = (to.try_clone()?, from.try_clone()?);
                let back = std::thread::spawn(move || carry(back_from, back_to));
                carry(from, to)?;
                let _ = back.join();
                std::io::Result::Ok(())
            });
        }
    });
    Ok(())
}

fn carry(mut from: TcpStream, mut to: TcpStream) -> std::io::Result<()> {
    let _ = std::io::copy(&mut from, &mut to);
    to.shutdown(Shutdown::Write)
}
