//! The verbs that ask a cluster which is up, from another process.

use crate::state::State;
use anyhow::{Context, bail, ensure};
use onboarding_testkit::cluster::BINARIES;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// As `grep` and `systemctl status` have it: not an error, and not a yes.
const NOT_UP: u8 = 3;

#[derive(Debug, Serialize, Deserialize)]
pub enum Question {
    Status,
    Vm(Vm),
    Remove { name: String, now: bool },
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Progress(String),
    Done(String),
    Failed(String),
    Status(Box<Status>),
}

/// A VM as it is asked for
#[derive(Debug, Serialize, Deserialize, clap::Args)]
pub struct Vm {
    /// At most 8 letters, digits and `-`
    #[arg(value_parser = name)]
    pub name: String,
    /// WorkloadGroup of the namespace bookinfo
    #[arg(long, default_value = "ratings")]
    pub group: String,
    /// IAM role of the EC2 instance
    #[arg(long, default_value = "ratings-role", conflicts_with = "jwt")]
    pub role: String,
    /// Proves itself with a JWT of `https://mycompany.corp`, not as an EC2 instance; the default for the group productpage
    #[arg(long)]
    pub jwt: bool,
    /// Subject of the JWT; the VM's name where it isn't said
    #[arg(long)]
    pub subject: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Status {
    pub pods: Vec<String>,
    pub vms: Vec<String>,
    /// The process that keeps each machine, as it is numbered inside.
    pub machines: BTreeMap<String, i32>,
    pub directories: BTreeMap<String, PathBuf>,
    pub logs: BTreeMap<String, PathBuf>,
    /// As seen inside.
    pub kubeconfig: PathBuf,
    pub ca: PathBuf,
}

/// A machine's name, with room for what the lab puts before it.
fn name(text: &str) -> Result<String, String> {
    let good = !text.is_empty()
        && text.len() <= 8
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && text.starts_with(|first: char| first.is_ascii_lowercase());
    let taken = ["plane", "cloud", "external", "control", "terminal"].contains(&text) || text.starts_with("pod-");
    match (good, taken) {
        (false, _) => Err("at most 8 characters: small letters, digits and `-`, the first a letter".to_owned()),
        (_, true) => Err("a machine of the cluster has this name".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// Prints what comes before the last answer, and gives that.
fn ask(question: &Question) -> anyhow::Result<Answer> {
    let state = State::find();
    let pid = state.require()?;
    let mut socket = UnixStream::connect(state.socket())
        .with_context(|| format!("it is up (process {pid}) but isn't ready yet; wait until it says so"))?;
    writeln!(socket, "{}", serde_json::to_string(question)?)?;
    for line in BufReader::new(socket).lines() {
        match serde_json::from_str(&line?)? {
            Answer::Progress(text) => println!("{text}"),
            Answer::Failed(text) => bail!("{text}"),
            last => return Ok(last),
        }
    }
    bail!("it ended before it answered")
}

fn ask_status() -> anyhow::Result<Status> {
    match ask(&Question::Status)? {
        Answer::Status(status) => Ok(*status),
        other => bail!("an unexpected answer: {other:?}"),
    }
}

fn tell(question: &Question) -> anyhow::Result<ExitCode> {
    if let Answer::Done(text) = ask(question)? {
        println!("{text}");
    }
    Ok(ExitCode::SUCCESS)
}

pub fn vm(vm: Vm) -> anyhow::Result<ExitCode> {
    tell(&Question::Vm(vm))
}

pub fn remove(name: String, now: bool) -> anyhow::Result<ExitCode> {
    tell(&Question::Remove { name, now })
}

pub fn status() -> anyhow::Result<ExitCode> {
    let state = State::find();
    let Some(pid) = state.up()? else {
        println!("It isn't up: `dev/cluster up`.");
        return Ok(ExitCode::from(NOT_UP));
    };
    println!("Up: process {pid}; `export KUBECONFIG={}`", state.kubeconfig().display());
    let Status { pods, vms, .. } = ask_status()?;
    let none = |lines: &[String]| if lines.is_empty() { "  none" } else { "" }.to_owned();
    println!("Pods:{}", none(&pods));
    pods.iter().for_each(|pod| println!("  {pod}"));
    println!("VMs:{}", none(&vms));
    vms.iter().for_each(|vm| println!("  {vm}"));
    Ok(ExitCode::SUCCESS)
}

pub fn kubectl(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let state = State::find();
    state.require()?;
    let mut command = Command::new(binaries()?.join("kubectl"));
    command.arg("--kubeconfig").arg(state.kubeconfig()).args(arguments);
    replace(command)
}

pub fn shell(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let state = State::find();
    state.require()?;
    let own = std::env::current_exe()?;
    let ours = own.parent().context("the program's folder")?;
    let mut path = std::env::join_paths([binaries()?.as_path(), ours])?;
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    let mut command = command_or_shell(arguments);
    command.env("KUBECONFIG", state.kubeconfig()).env("PATH", path);
    if arguments.is_empty() && std::io::stdin().is_terminal() {
        println!(
            "kubectl, helm and onboardctl are the cluster's administrator's here; `exit` leaves the cluster running."
        );
    }
    replace(command)
}

pub fn enter(machine: &str, arguments: &[String]) -> anyhow::Result<ExitCode> {
    let status = ask_status()?;
    let holder = status.machines.get(machine).copied();
    let known = || status.machines.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let holder = holder.with_context(|| format!("there is no machine {machine}; there are: {}", known()))?;
    let mut inside = vec![OsString::from("nsenter"), "--target".into(), holder.to_string().into()];
    // Where its files are: configuration, state, logs.
    let directory = status.directories.get(machine).cloned().unwrap_or_else(|| "/".into());
    inside.extend(["--net", "--mount", "--uts", "--", "sh", "-c", r#"cd "$0" && exec "$@""#].map(OsString::from));
    inside.push(directory.into());
    inside.extend(if arguments.is_empty() { vec!["bash".into()] } else { arguments.iter().map(Into::into).collect() });
    replace(in_the_lab(&inside)?)
}

pub fn onboardctl(arguments: &[String]) -> anyhow::Result<ExitCode> {
    let status = ask_status()?;
    let holder = status.machines.get("terminal").copied().context("there is no machine `terminal`")?;
    let own = std::env::current_exe()?.with_file_name("onboardctl");
    let mut inside: Vec<OsString> = vec!["nsenter".into(), "--target".into(), holder.to_string().into()];
    inside.extend(["--net", "--mount", "--uts", "--", "env"].map(OsString::from));
    let variable = |name: &str, value: &Path| {
        let mut variable = OsString::from(name);
        variable.push("=");
        variable.push(value);
        variable
    };
    inside.push(variable("KUBECONFIG", &status.kubeconfig));
    inside.push(variable("SSL_CERT_FILE", &status.ca));
    inside.push(own.into());
    inside.extend(arguments.iter().map(Into::into));
    replace(in_the_lab(&inside)?)
}

pub fn logs(name: Option<&str>, follow: bool) -> anyhow::Result<ExitCode> {
    let logs = ask_status()?.logs;
    let Some(name) = name else {
        println!("dev/cluster logs NAME prints one of them, with -f as it is written:");
        logs.keys().for_each(|name| println!("  {name}"));
        return Ok(ExitCode::SUCCESS);
    };
    // A pod may be called by its Deployment's name.
    let found = logs
        .get(name)
        .or_else(|| logs.iter().find(|(key, _)| key.starts_with(&format!("{name}-"))).map(|(_, log)| log));
    let known = || logs.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let log = found.with_context(|| format!("there is no log {name}; there are: {}", known()))?;
    let mut command: Vec<OsString> = vec!["tail".into(), "-n".into(), "+1".into()];
    if follow {
        command.push("-F".into());
    }
    command.push(log.into());
    replace(in_the_lab(&command)?)
}

/// A command that runs where the lab's processes and files are seen.
fn in_the_lab(command: &[OsString]) -> anyhow::Result<Command> {
    let up = State::find().require()?;
    let mut nsenter = Command::new("nsenter");
    if !nix::unistd::geteuid().is_root() {
        nsenter.args(["--user", "--preserve-credentials"]);
    }
    nsenter.args(["--target", &first_of_lab(up)?.to_string(), "--pid", "--mount", "--"]).args(command);
    Ok(nsenter)
}

/// The child of `up` that is the first process of the lab: the one in another process namespace than ours.
fn first_of_lab(up: i32) -> anyhow::Result<i32> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid"));
    let own = namespace("self")?;
    let children = std::fs::read_to_string(format!("/proc/{up}/task/{up}/children"))?;
    let first = children.split_whitespace().find(|pid| namespace(pid).is_ok_and(|other| other != own));
    first.context("what is up has no lab yet")?.parse().context("reading its children")
}

fn command_or_shell(arguments: &[String]) -> Command {
    match arguments {
        [] => Command::new(std::env::var_os("SHELL").unwrap_or_else(|| "/bin/sh".into())),
        [program, rest @ ..] => {
            let mut command = Command::new(program);
            command.args(rest);
            command
        }
    }
}

fn binaries() -> anyhow::Result<PathBuf> {
    let directory = std::env::var_os(BINARIES).map(PathBuf::from);
    let directory = directory.with_context(|| format!("{BINARIES} isn't set; call dev/cluster, which sets it"))?;
    ensure!(directory.is_dir(), "{} isn't a directory; dev/kubernetes makes one", directory.display());
    Ok(directory)
}

/// This process becomes that one.
fn replace(mut command: Command) -> anyhow::Result<ExitCode> {
    let error = command.exec();
    Err(error).with_context(|| format!("starting {:?}", command.get_program()))
}
