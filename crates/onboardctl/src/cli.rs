//! The command line: which verb, and how it ends.

use crate::outcome::{FAILED, Outcome, complain};
use crate::socket::Socket;
use crate::{attest, completions, explain, lint, plan, status, workloads};
use clap::Parser;
use clap::error::ErrorKind;
use std::ffi::OsString;
use std::process::ExitCode;

/// Checks onboarding policies, explains decisions, and looks after the workloads of a standalone plane
#[derive(Debug, Parser)]
#[command(
    name = "onboardctl",
    version,
    after_help = "Examples:
  onboardctl lint manifests/
  onboardctl explain -f manifests/ --identity identity.yaml --group bookinfo/ratings
  onboardctl workloads -n bookinfo

Exit codes: 0, or 1 for whatever went wrong, wrong usage included; explain and plan have more
(see their --help)."
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    socket: Socket,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Lint(lint::Lint),
    Explain(explain::Explain),
    Plan(plan::Plan),
    Attest(attest::Attest),
    Workloads(workloads::Workloads),
    Status(status::Status),
    Completions(completions::Completions),
}

pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are an answer. Where they can't be written nobody is left to be told.
            let _ = error.print();
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return ExitCode::from(if asked { 0 } else { FAILED });
        }
    };
    match cli.verb.run(&cli.socket) {
        Ok(outcome) => outcome.write(),
        Err(error) => {
            complain(&format!("onboardctl: {error:#}"));
            ExitCode::from(FAILED)
        }
    }
}

impl Verb {
    fn run(&self, socket: &Socket) -> anyhow::Result<Outcome> {
        match self {
            Self::Lint(verb) => verb.run(),
            Self::Explain(verb) => verb.run(),
            Self::Plan(verb) => verb.run(socket),
            Self::Attest(verb) => verb.run(),
            Self::Workloads(verb) => verb.run(socket),
            Self::Status(verb) => verb.run(socket),
            Self::Completions(verb) => verb.run(),
        }
    }
}
