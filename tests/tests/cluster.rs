//! `dev/cluster`, as a person uses it: up, looked at, down, and killed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

use anyhow::{Context, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use onboarding_testkit::process::{self, Ended, Process};
use onboarding_tests::until::until;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

const UP_WITHIN: Duration = Duration::from_secs(180);

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let unavailable = if arguments.list { None } else { unavailable() };
    if let Some(why) = unavailable {
        println!("{}: {why}", if std::env::var_os("CI").is_some() { "failed" } else { "skipped" });
        return if std::env::var_os("CI").is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    }
    let trial = |name: &str, test: fn() -> anyhow::Result<()>| {
        Trial::test(name, move || test().map_err(|error| Failed::from(format!("{error:#}"))))
    };
    let trials = vec![
        trial("what_is_not_up_is_said_with_the_way_out", not_up),
        trial("a_directory_of_somebody_else_is_refused", not_ours),
        trial("killed_it_leaves_nothing_and_the_next_clears_its_directory", killed),
        trial("up_and_played_with_and_down", played_with),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Why there can be no lab here, in the words of the program.
fn unavailable() -> Option<String> {
    let machines = Machines::new().ok()?;
    let process = machines.up().ok()?;
    let line = process.wait_for_line(UP_WITHIN, |line| line.contains("start ...") || line.contains("can't be made"));
    line.ok().filter(|line| line.contains("can't be made"))
}

/// A cluster of its own.
struct Machines(tempfile::TempDir);

impl Machines {
    fn new() -> anyhow::Result<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn state(&self) -> PathBuf {
        self.0.path().join("state")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_onboarding-cluster"));
        command.args(arguments).env("ONBOARDING_CLUSTER_STATE", self.state());
        command
    }

    fn up(&self) -> anyhow::Result<Process> {
        Process::start("dev/cluster up", self.command(&["up"]), None)
    }

    fn run(&self, arguments: &[&str]) -> anyhow::Result<Ended> {
        process::run(self.command(arguments), Duration::from_secs(90))
    }

    /// Standard output of what must succeed.
    fn check(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let ended = self.run(arguments)?;
        ensure!(ended.status.success(), "{arguments:?}: {ended:?}");
        Ok(ended.stdout)
    }

    /// What must fail, with these words on standard error.
    fn refuse(&self, arguments: &[&str], code: i32, words: &str) -> anyhow::Result<()> {
        let ended = self.run(arguments)?;
        ensure!(ended.status.code() == Some(code) && ended.stderr.contains(words), "{arguments:?}: {ended:?}");
        Ok(())
    }
}

fn not_up() -> anyhow::Result<()> {
    let cluster = Machines::new()?;
    let status = cluster.run(&["status"])?;
    ensure!(status.status.code() == Some(3) && status.stdout.contains("dev/cluster up"), "{status:?}");
    for verb in
        [&["kubectl", "get", "pods"][..], &["vm", "vm1"], &["logs"], &["shell", "true"], &["enter", "vm1", "true"]]
    {
        cluster.refuse(verb, 1, "it isn't up: start it with `dev/cluster up`")?;
    }
    cluster.refuse(&["vm", "Far-too-long-a-name"], 2, "at most 8 characters")?;
    ensure!(cluster.check(&["down"])?.contains("It wasn't up."), "down");
    Ok(())
}

fn not_ours() -> anyhow::Result<()> {
    let cluster = Machines::new()?;
    std::fs::create_dir(cluster.state())?;
    std::fs::set_permissions(cluster.state(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    cluster.refuse(&["up"], 1, "isn't a directory that is this user's alone")?;
    ensure!(cluster.state().is_dir(), "it is left as it was");
    Ok(())
}

fn killed() -> anyhow::Result<()> {
    let cluster = Machines::new()?;
    let up = cluster.up()?;
    up.wait_for_line(UP_WITHIN, |line| line.contains("start ..."))?;
    let lab = until("its servers start", UP_WITHIN, || of_lab(up.pid()))?;
    up.kill();
    until("nothing of it runs, and no file is left", Duration::from_secs(20), || {
        let left = naming(&lab)?;
        ensure!(left.is_empty(), "{left:?}");
        ensure!(!Path::new(&lab).exists(), "{lab} is there");
        Ok(())
    })?;
    ensure!(cluster.check(&["down"])?.contains("what a killed one had left is cleared"), "down");
    ensure!(!cluster.state().exists(), "its directory is gone");
    Ok(())
}

/// The lab's directory, once one of its servers runs.
fn of_lab(up: i32) -> anyhow::Result<String> {
    let lab = format!("{}/onboarding-lab-{up}", std::env::temp_dir().display());
    ensure!(naming(&lab)?.iter().any(|line| line.contains("etcd")), "no etcd yet");
    Ok(lab)
}

/// Command lines that name this, but for those of the program that removes it.
fn naming(what: &str) -> anyhow::Result<Vec<String>> {
    let lines = std::fs::read_dir("/proc")?.flatten().filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).replace('\0', " "))
    });
    Ok(lines.filter(|line| line.contains(what)).collect())
}

fn played_with() -> anyhow::Result<()> {
    let cluster = Machines::new()?;
    let up = cluster.up()?;
    // Before, the second may be the first to have the directory.
    up.wait_for_line(UP_WITHIN, |line| line.contains("start ..."))?;
    cluster.refuse(&["up"], 1, "it is up already")?;
    let ready = up.wait_for_line(UP_WITHIN, |line| line.starts_with("Ready."));
    ready.with_context(|| format!("{}\n{}", up.tail(), String::from_utf8_lossy(&log(&cluster, "node"))))?;

    let pods = cluster.check(&["kubectl", "get", "pods", "-A", "--no-headers"])?;
    ensure!(pods.lines().count() == 4 && pods.lines().all(|pod| pod.contains("1/1")), "{pods}");
    // As a person's own kubectl reaches it, from outside of all namespaces.
    let own = cluster.check(&["shell", "sh", "-c", "kubectl get op -A && helm list -n onboarding-system -q"])?;
    ensure!(own.ends_with("onboarding\n"), "{own}");
    let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/manifests");
    for file in ["ratings.yaml", "productpage.yaml"] {
        cluster.check(&["kubectl", "apply", "-f", &format!("{manifests}/{file}")])?;
    }
    let joined = cluster.check(&["vm", "vm1"])?;
    ensure!(joined.contains("joined") && joined.contains("LIVE"), "{joined}");
    let refused = cluster.check(&["vm", "vm3", "--role", "details-role"])?;
    ensure!(
        refused.contains("It isn't admitted") && refused.contains("Not authorized by OnboardingPolicy"),
        "{refused}"
    );
    cluster.check(&["vm", "vm2", "--group", "productpage"])?;
    cluster.refuse(&["vm", "vm2"], 1, "there is a VM vm2 already: `dev/cluster rm vm2`")?;
    until("vm2 gets an answer of vm1", Duration::from_secs(20), || {
        let call =
            ["enter", "vm2", "curl", "-sSf", "-m", "5", "-H", "Host: ratings.bookinfo:8080", "http://127.0.0.2:8080/"];
        let answer = cluster.check(&call)?;
        ensure!(answer.contains("ratings on vm1"), "{answer}");
        Ok(())
    })?;
    let status = cluster.check(&["status"])?;
    ensure!(
        status.contains("onboarding-plane-") && status.contains("vm1") && status.contains("AgentConnected"),
        "{status}"
    );
    ensure!(cluster.check(&["logs", "vm3"])?.contains("details-role"), "the log of vm3");
    ensure!(
        cluster.check(&["logs", "onboarding-operator"])?.contains("starting"),
        "the log of a pod by its Deployment"
    );
    cluster.refuse(&["logs", "nobody"], 1, "there is no log nobody; there are: ")?;
    cluster.refuse(&["enter", "nobody", "true"], 1, "there is no machine nobody; there are: ")?;
    let doctor = cluster.run(&["onboardctl", "doctor"])?;
    ensure!(doctor.status.success(), "{doctor:?}");
    ensure!(doctor.stdout.contains("onboarding-endpoint.your-company.corp"), "{doctor:?}");
    ensure!(cluster.check(&["rm", "vm1"])?.contains("vm1 left the mesh"), "rm");
    until("its registration is gone", Duration::from_secs(20), || {
        let wars = cluster.check(&["kubectl", "get", "war", "-n", "bookinfo", "-o", "name"])?;
        ensure!(wars.lines().count() == 1, "{wars}");
        Ok(())
    })?;

    let lab = of_lab(up.pid())?;
    ensure!(cluster.check(&["down"])?.contains("nothing of it is left"), "down");
    up.wait(Duration::from_secs(5))?;
    let left = naming(&lab)?;
    ensure!(left.is_empty() && !cluster.state().exists(), "{left:?}");
    Ok(())
}

fn log(cluster: &Machines, name: &str) -> Vec<u8> {
    cluster.run(&["logs", name]).map(|ended| ended.stdout.into_bytes()).unwrap_or_default()
}
