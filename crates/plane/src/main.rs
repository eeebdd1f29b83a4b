//! `onboarding-plane`: picks a backend, starts an endpoint on it, waits.

mod args;
mod standalone;

use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Standalone(args) => match standalone::run(*args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!("the plane ends: {error:#}");
                ExitCode::FAILURE
            }
        },
        Command::Completions { shell } => {
            args::completions(shell);
            ExitCode::SUCCESS
        }
    }
}
