//! User data of `docs/cloud-init`, run as root on an instance of EC2 that has just booted: the VM is in the mesh when it has ended.
//! Packages come from `ONBOARDING_PACKAGES`, which `dev/package` makes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_tests::guest::Guest;
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::world::{ENDPOINT, Setup, World};
use serde_yaml_ng::Value;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[
    ("the_script_for_aws_brings_an_instance_into_the_mesh", of_aws),
    ("the_user_data_for_cloud_init_brings_an_instance_into_the_mesh", of_cloud_init),
];
/// What stands in the examples for the CA's certificate.
const PLACEHOLDER: &str = "REPLACE WITH THE CA'S CERTIFICATE";

fn main() -> ExitCode {
    run(Setup::default(), SCENARIOS)
}

fn of_aws(world: &mut World) -> anyhow::Result<()> {
    brings_into_the_mesh(world, "vm9", 19, "i-0123456789abcdef0", |guest, certificate| {
        guest.write("root/user-data", &example("user-data.sh", certificate)?)?;
        guest.sh("bash /root/user-data && rm /root/user-data").map(drop)
    })
}

/// No cloud-init is on the machine: its three modules are done here, in its order.
fn of_cloud_init(world: &mut World) -> anyhow::Result<()> {
    brings_into_the_mesh(world, "vm10", 20, "i-0123456789abcdef1", |guest, certificate| {
        let data: Value = serde_yaml_ng::from_str(&example("user-data", certificate)?)?;
        for file in data["write_files"].as_sequence().context("no write_files")? {
            let text = |field: &str| file[field].as_str().with_context(|| format!("no {field}"));
            let path = text("path")?;
            guest.write("root/content", text("content")?)?;
            guest.sh(&format!("install -D -m {} /root/content {path} && rm /root/content", text("permissions")?))?;
        }
        let installed = data["packages"].as_sequence().context("no packages")?.iter();
        for package in installed.map(|name| name.as_str().context("a name of a package")) {
            guest.sh(&format!("dpkg -s {} >/dev/null", package?))?;
        }
        for command in data["runcmd"].as_sequence().context("no runcmd")? {
            let words: Option<Vec<&str>> =
                command.as_sequence().context("no list")?.iter().map(Value::as_str).collect();
            guest.sh(&words.context("a word")?.join(" "))?;
        }
        Ok(())
    })
}

fn brings_into_the_mesh(
    world: &mut World,
    name: &str,
    host: u8,
    instance: &str,
    user_data: impl FnOnce(&Guest, &str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    world.publish_packages()?;
    let mut guest = Guest::new(world, "bookworm", name, host, "nobody")?;
    guest.is_on_ec2(world, instance, "ratings-role")?;
    guest.boot()?;
    // That the CA is known is a part of what is tried.
    let certificate = guest.read("usr/local/share/ca-certificates/your-company.crt")?;
    guest.sh("rm /usr/local/share/ca-certificates/your-company.crt && systemctl enable --now application@8080")?;
    let ended = (|| {
        user_data(&guest, &certificate)?;
        until("it is in the mesh", Duration::from_secs(60), || {
            let status = guest.sh("onboarding-agent status")?;
            ensure!(status.contains("Connected") && status.contains("Live"), "{status}");
            ensure!(status.contains(&format!("-ec2-{instance}")), "{status}");
            Ok(())
        })?;
        let left = guest.sh("find /root /tmp -type f -name '*.deb*'")?;
        ensure!(left.is_empty(), "{left}");
        let pair = world.pair()?;
        until("the instance answers through the mesh", Duration::from_secs(20), || {
            // The pair's own is another of ratings.
            let answer = pair.productpage.call("ratings.bookinfo:8080")?;
            ensure!(answer.application == "guest", "{answer:?}");
            Ok(())
        })?;
        guest.sh("systemctl stop onboarding-agent")?;
        world.keep(pair);
        Ok(())
    })();
    ended.map_err(|error: anyhow::Error| error.context(guest.report()))
}

/// As an administrator edits it: the names are those of this world already.
fn example(name: &str, certificate: &str) -> anyhow::Result<String> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cloud-init")).join(name);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    ensure!(text.contains(ENDPOINT) && text.contains("bookinfo"), "{} is about something else", path.display());
    let at = text.find(PLACEHOLDER).with_context(|| format!("{} has no place for the CA", path.display()))?;
    // The certificate's own lines, as deep as the placeholder is.
    let indent: String = text[..at].chars().rev().take_while(|c| *c == ' ').collect();
    let body: Vec<&str> = certificate.lines().filter(|line| !line.starts_with("-----")).collect();
    Ok(text.replace(PLACEHOLDER, &body.join(&format!("\n{indent}"))))
}
