//! A machine with systemd in a mesh of Istio, with the packages: pilot-agent under the unit's restrictions, and Envoy alone where it isn't there.
//! Packages come from `ONBOARDING_PACKAGES`, which `dev/package` makes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_tests::guest::{Guest, configure};
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::world::{Setup, World};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[("the_packages_sidecar_runs_as_its_own_user_in_a_mesh_of_istio", packaged)];
const REGISTRATION: &str = "productpage-jwt-my-corp--us-east-datacenter1-vm008";

fn main() -> ExitCode {
    run(Setup { istio: true, ..Setup::default() }, SCENARIOS)
}

fn packaged(world: &mut World) -> anyhow::Result<()> {
    let mut guest = Guest::new(world, "bookworm", "vm8", 18, "us-east-datacenter1-vm008")?;
    guest.boot()?;
    in_the_mesh(world, &guest).map_err(|error| error.context(guest.report()))
}

fn in_the_mesh(world: &mut World, guest: &Guest) -> anyhow::Result<()> {
    let packages = std::env::var_os("ONBOARDING_PACKAGES").context("ONBOARDING_PACKAGES isn't set, see dev/package")?;
    for package in ["istio-sidecar", "onboarding-agent"] {
        let file = format!("{package}.deb");
        guest.copy(&PathBuf::from(&packages).join("deb/amd64").join(&file), &format!("root/{file}"))?;
        guest.sh(&format!("apt-get install -y /root/{file}"))?;
    }
    guest.sh("update-ca-certificates && systemctl enable --now application@8080")?;
    guest.sh(&configure())?;
    let pair = world.pair()?;
    // Nothing chose a way: where pilot-agent is installed it is taken, else Envoy alone.
    for pilot_agent in [true, false] {
        if !pilot_agent {
            guest.sh("mv /usr/local/bin/pilot-agent /root/ && systemctl restart onboarding-agent")?;
        }
        until("the sidecar is live", Duration::from_secs(40), || {
            let ready = guest.sh("curl -fsS -m 3 http://localhost:15000/ready")?;
            ensure!(ready.trim() == "LIVE", "{ready}");
            world.connected(REGISTRATION)
        })?;
        let users =
            guest.sh("ps -o user:20=,comm= -C onboarding-agent,pilot-agent,envoy | awk '{print $1, $2}' | sort -u")?;
        // What the kernel keeps of a name are 15 bytes.
        let all = ["envoy", "onboarding-agen", "pilot-agent"];
        let wanted: String = all
            .iter()
            .filter(|name| pilot_agent || **name != "pilot-agent")
            .map(|name| format!("onboarding-agent {name}\n"))
            .collect();
        ensure!(users == wanted, "{users}");
        until("the VM answers through the mesh", Duration::from_secs(40), || {
            // The pair's own is another of productpage.
            let answer = pair.productpage.call("productpage.bookinfo:8080")?;
            let caller = Some("spiffe://cluster.local/ns/bookinfo/sa/productpage-vm");
            ensure!((answer.application.as_str(), answer.caller.as_deref()) == ("guest", caller), "{answer:?}");
            Ok(())
        })?;
        until("the VM calls", Duration::from_secs(20), || {
            guest.sh("curl -fsS -m 5 -H 'Host: ratings.bookinfo:8080' http://127.0.0.2:8080/")
        })?;
    }
    guest.sh("systemctl stop onboarding-agent")?;
    world.keep(pair);
    Ok(())
}
