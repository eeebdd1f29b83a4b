//! The commands of `docs/quick-start.md`, run as they stand there, in a machine of their own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "a test")]

use onboarding_testkit::netns::{Lab, inside};
use onboarding_testkit::process;
use onboarding_tests::world::{binary, envoy};
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--list") {
        println!("quick_start: test");
        return ExitCode::SUCCESS;
    }
    let show = std::env::args().any(|argument| argument == "--nocapture");
    let ran = inside(|lab| match run(lab) {
        Ok(output) => {
            if show {
                println!("{output}");
            }
            println!("quick_start: ok");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("quick_start: {error:#}");
            ExitCode::FAILURE
        }
    });
    match ran {
        Ok(code) => code,
        Err(unavailable) if std::env::var_os("CI").is_none() => {
            println!("quick_start: skipped: {unavailable}");
            ExitCode::SUCCESS
        }
        Err(unavailable) => {
            println!("quick_start: {unavailable}");
            ExitCode::FAILURE
        }
    }
}

fn run(lab: &Lab) -> anyhow::Result<String> {
    let machine = lab.machine("newcomer", 11)?;
    let script = machine.directory().join("quick-start.sh");
    std::fs::write(&script, format!("set -euxo pipefail\ncd {}\n{}", machine.directory().display(), commands()))?;
    let mut command = machine.command("bash");
    let programs = binary("onboarding-agent")?;
    let path = format!(
        "{}:{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        programs.parent().unwrap().display(),
        envoy()?.parent().unwrap().display()
    );
    command.arg(&script).env("PATH", path);
    let ended = process::run(command, Duration::from_secs(90))?;
    let output = format!("{}\n{}", ended.stderr, ended.stdout);
    anyhow::ensure!(ended.status.success(), "the commands ended with {}:\n{output}", ended.status);
    for expected in [
        "LIVE",
        "hello from behind the sidecar\nhello from behind the sidecar",
        "127.0.0.2 hello.demo hello.demo.svc hello.demo.svc.cluster.local",
        "hello-jwt-quick-start--my-machine",
        "the agent has left the mesh and ends",
    ] {
        anyhow::ensure!(output.contains(expected), "the output lacks {expected:?}:\n{output}");
    }
    Ok(output)
}

/// The blocks of the page that are marked `sh`.
fn commands() -> String {
    let page = include_str!("../../docs/quick-start.md");
    let blocks = page.split("```sh\n").skip(1).filter_map(|rest| rest.split("```\n").next());
    blocks.collect()
}
