//! `onboarding-operator`: brings a cluster to what its ControlPlane says of onboarding.
//!
//! Rendering is pure (`render`); a pass applies it (`reconcile`). No decision about a workload is made here.

mod args;
mod certificate;
mod config;
mod objects;
mod reconcile;
mod render;
mod run;
mod seen;
mod status;
mod watch;

use args::{Args, Command};
use clap::Parser;
use onboarding_runtime::logs;
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let Args { command, serve } = Args::parse();
    if let Some(Command::Completions { shell }) = command {
        args::completions(shell);
        return ExitCode::SUCCESS;
    }
    logs::init(serve.log_format(), "info");
    match run::run(serve.options(), serve.admin_listen).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("the operator ends: {error:#}");
            ExitCode::FAILURE
        }
    }
}
