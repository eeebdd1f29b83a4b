//! `onboarding-plane`: picks a backend, starts an endpoint on it, waits.

mod args;
mod kubernetes;
mod serve;
mod standalone;

use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let ended = match Args::parse().command {
        Command::Standalone(args) => standalone::run(*args),
        Command::Kubernetes(args) => kubernetes::run(*args),
        Command::Completions { shell } => {
            args::completions(shell);
            Ok(())
        }
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("the plane ends: {error:#}");
            ExitCode::FAILURE
        }
    }
}
