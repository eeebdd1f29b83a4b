//! The plane in a cluster, VMs in a mesh of Istio: real API server, real istiod, a real gateway as the one way in.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use libtest_mimic::{Arguments, Failed, Trial};
use onboarding_testkit::netns::inside;
use onboarding_tests::mesh::Mesh;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let ran = inside(|lab| {
        let mut arguments = arguments.clone();
        arguments.test_threads = Some(1);
        let lab = lab.clone();
        let trials = vec![Trial::test("the_gateway_passes_what_is_for_istiod", move || {
            the_gateway_passes_what_is_for_istiod(&lab).map_err(|error| Failed::from(format!("{error:#}")))
        })];
        libtest_mimic::run(&arguments, trials).exit_code()
    });
    match ran {
        Ok(code) => code,
        Err(unavailable) => {
            println!("{}: {unavailable}", if std::env::var_os("CI").is_none() { "skipped" } else { "failed" });
            if std::env::var_os("CI").is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
    }
}

fn the_gateway_passes_what_is_for_istiod(lab: &onboarding_testkit::netns::Lab) -> anyhow::Result<()> {
    let plane = lab.machine("plane", 2)?;
    let mesh = Mesh::start(lab, plane.address())?;
    let subject = plane.check(
        "sh",
        [
            "-c",
            &format!(
                "openssl s_client -connect {}:15443 -servername istiod.istio-system.svc </dev/null 2>/dev/null | openssl x509 -noout -ext subjectAltName",
                mesh.gateway.address()
            ),
        ],
    )?;
    anyhow::ensure!(subject.contains("istiod.istio-system.svc"), "{subject}\n{}", mesh.gateway_log());
    println!("{}", mesh.sync_status()?);
    Ok(())
}
