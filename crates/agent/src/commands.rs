//! The verbs of the command line.

use crate::args::{Cli, Command, Common, LogFormat, Output};
use crate::config::{AGENT_VARIABLE, Configuration, ConfigurationError, ONBOARDING_VARIABLE, Sources};
use crate::run::{self, Settings};
use crate::sidecar::{self, IstioWay, PilotAgent};
use crate::status::Status;
use crate::store::{Store, with_source};
use crate::trust::{ROOT_CERTS_FILE, ROOT_CERTS_VARIABLE, Trust};
use crate::{check, hosts, manual};
use anyhow::Context;
use clap::{CommandFactory, Parser};
use jiff::Timestamp;
use onboarding_kinds::agent::SidecarKind;
use onboarding_runtime::{logs, shutdown};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// `EX_CONFIG` of sysexits.h: starting again is of no use before somebody has edited a file. The unit names it in
/// `RestartPreventExitStatus`.
const UNCONFIGURED: u8 = 78;

/// Parses, does what is asked, and says what went wrong on standard error.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command.unwrap_or(Command::Run) {
        Command::Run => runtime().and_then(|runtime| runtime.block_on(run(&cli.common))),
        Command::Check { output } => runtime().and_then(|runtime| runtime.block_on(check(&cli.common, output))),
        Command::Hosts { remove: true, hosts_file, .. } => unhosted(&hosts_file),
        Command::Hosts { write, hosts_file, .. } => hosts(&cli.common, write, &hosts_file),
        Command::Status { output } => status(&cli.common, output),
        Command::Ready => runtime().and_then(|runtime| runtime.block_on(ready(&cli.common))),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "onboarding-agent", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Manual => manual::print(&mut std::io::stdout()).map(|()| ExitCode::SUCCESS).map_err(Into::into),
    };
    result.unwrap_or_else(|error| {
        // Standard error is all there is to say it on.
        let _ = writeln!(std::io::stderr(), "onboarding-agent: {}", with_source(error.as_ref()));
        match error.is::<ConfigurationError>() {
            true => ExitCode::from(UNCONFIGURED),
            false => ExitCode::FAILURE,
        }
    })
}

/// One thread: the agent waits far more than it computes, and each thread costs memory.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

async fn run(common: &Common) -> anyhow::Result<ExitCode> {
    let format = match common.log_format {
        LogFormat::Text => logs::Format::Text,
        LogFormat::Json => logs::Format::Json,
    };
    logs::init(format, "info");
    let stop = shutdown::on_signal().context("can't wait for signals")?;
    let configuration = Configuration::read(&sources(common)).inspect_err(|error| {
        let text = error.to_string();
        run::tell_service_manager(&format!("not started: {}", text.lines().next().unwrap_or_default()));
    })?;
    let settings = Settings {
        istio: istio_way(common, &configuration),
        configuration,
        trust: trust()?,
        state_directory: state_directory(common),
        binary: envoy_binary(common),
        admin: common.envoy_admin,
    };
    run::run(settings, stop).await?;
    Ok(ExitCode::SUCCESS)
}

async fn check(common: &Common, output: Output) -> anyhow::Result<ExitCode> {
    let configuration = Configuration::read(&sources(common));
    let subject = check::Subject {
        istio: configuration.as_ref().ok().map(|configuration| istio_way(common, configuration)),
        configuration,
        trust: trust(),
        store: Store::at(&state_directory(common)),
        binary: envoy_binary(common),
    };
    let findings = check::check(&subject).await;
    let text = match output {
        Output::Text => findings.iter().map(|finding| format!("{finding}\n")).collect(),
        Output::Json => serde_json::to_string_pretty(&findings)? + "\n",
    };
    std::io::stdout().write_all(text.as_bytes())?;
    let failed = findings.iter().any(|finding| finding.verdict == check::Verdict::Fail);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn ready(common: &Common) -> anyhow::Result<ExitCode> {
    match sidecar::ready(common.envoy_admin).await {
        Ok(()) => std::io::stdout().write_all(b"LIVE\n")?,
        Err(why) => anyhow::bail!("the sidecar isn't up: {why}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn hosts(common: &Common, write: bool, file: &Path) -> anyhow::Result<ExitCode> {
    let store = Store::at(&state_directory(common));
    let boot = store.boot().with_context(|| {
        format!(
            "no boot configuration can be read in {}: the agent gets it when it joins (see `onboarding-agent status`), and only its own user and root may read it",
            state_directory(common).display()
        )
    })?;
    let lines = hosts::lines(&boot.host_aliases);
    if write {
        let changed = hosts::write(file, &lines)?;
        let what = if changed { "written to" } else { "already in" };
        writeln!(std::io::stdout(), "{} lines {what} {}", lines.len(), file.display())?;
    } else {
        let mut out = std::io::stdout().lock();
        lines.iter().try_for_each(|line| writeln!(out, "{line}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Needs no boot configuration: the package is on its way out.
fn unhosted(file: &Path) -> anyhow::Result<ExitCode> {
    let what = if hosts::write(file, &[])? { "taken out of" } else { "not in" };
    writeln!(std::io::stdout(), "lines of onboarding-agent are {what} {}", file.display())?;
    Ok(ExitCode::SUCCESS)
}

fn status(common: &Common, output: Output) -> anyhow::Result<ExitCode> {
    let directory = state_directory(common);
    let Some(status) = Status::read(&Store::at(&directory))? else {
        anyhow::bail!(
            "no agent has written its status to {}; is it started (`systemctl start onboarding-agent`), and is --state-dir right?",
            directory.display()
        );
    };
    let text = match output {
        Output::Text => status.describe(Timestamp::now()),
        Output::Json => serde_json::to_string_pretty(&status)? + "\n",
    };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn sources(common: &Common) -> Sources {
    Sources {
        onboarding_file: common.onboarding_config.clone(),
        agent_file: common.agent_config.clone(),
        onboarding_text: variable(ONBOARDING_VARIABLE),
        agent_text: variable(AGENT_VARIABLE),
    }
}

fn trust() -> Result<Trust, crate::trust::TrustError> {
    Trust::load(variable(ROOT_CERTS_VARIABLE).as_deref(), Path::new(ROOT_CERTS_FILE))
}

/// An empty one is as good as none: container definitions leave them so.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.trim().is_empty())
}

/// Absolute: Envoy is told paths in it, and may have another working directory.
fn state_directory(common: &Common) -> PathBuf {
    std::path::absolute(&common.state_dir).unwrap_or_else(|_| common.state_dir.clone())
}

/// As configured; else with pilot-agent where it is installed.
fn istio_way(common: &Common, configuration: &Configuration) -> IstioWay {
    let packaged = PathBuf::from("/usr/local/bin/pilot-agent");
    let named = common.pilot_agent_binary.clone();
    let template = common.bootstrap_template.clone();
    match &configuration.agent.sidecar.kind {
        Some(SidecarKind::Envoy) => IstioWay::Envoy,
        Some(SidecarKind::Istio { revision }) => {
            // The package of a revision may stand beside another.
            let of_revision = revision.as_deref().map(sidecar::pilot_agent_of);
            let binary = named.or(of_revision.filter(|path| path.is_file())).unwrap_or(packaged);
            IstioWay::PilotAgent(PilotAgent { binary, template })
        }
        None => match named.unwrap_or(packaged) {
            binary if binary.is_file() => IstioWay::PilotAgent(PilotAgent { binary, template }),
            _ => IstioWay::Envoy,
        },
    }
}

/// Where the istio-sidecar package puts it, or what PATH finds.
fn envoy_binary(common: &Common) -> PathBuf {
    let packaged = PathBuf::from("/usr/local/bin/envoy");
    if let Some(binary) = &common.envoy_binary {
        return binary.clone();
    }
    if packaged.is_file() {
        return packaged;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join("envoy"))
        .find(|path| path.is_file())
        .unwrap_or(packaged)
}
