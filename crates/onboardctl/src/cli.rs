//! The command line: which verb, and how it ends.

use crate::outcome::{FAILED, Outcome, complain};
use crate::plane::Access;
use crate::{attest, completions, doctor, explain, lint, mesh, packages, plan, status, workloads};
use clap::error::ErrorKind;
use clap::{Command, CommandFactory, FromArgMatches, Parser};
use onboarding_core::name::is_resource_name;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

/// Checks onboarding policies, explains decisions, and looks after the workloads of a plane, standalone or in a cluster
#[derive(Debug, Parser)]
#[command(
    name = "onboardctl",
    version,
    after_help = "Examples:
  onboardctl lint manifests/
  onboardctl explain -f manifests/ --identity identity.yaml --group bookinfo/ratings
  onboardctl workloads -n bookinfo
  onboardctl doctor --context production

workloads, plan and status ask the cluster where --kubeconfig or --context is given; else a
standalone plane where its socket is named or there; else the cluster of your kubeconfig.
Installed as kubectl-onboard it is kubectl onboard, which always asks the cluster.

Exit codes: 0, or 1 for whatever went wrong, wrong usage included; explain and plan have more
(see their --help)."
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    access: Access,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Lint(lint::Lint),
    Explain(explain::Explain),
    Plan(plan::Plan),
    Attest(attest::Attest),
    Workloads(workloads::Workloads),
    Status(status::Status),
    Doctor(doctor::Doctor),
    Packages(packages::Packages),
    Mesh(mesh::Mesh),
    Completions(completions::Completions),
}

/// Invoked by this name, kubectl takes it for its own command `kubectl onboard`.
const PLUGIN: &str = "kubectl-onboard";
const NAMES: [&str; 2] = ["onboardctl", "kubectl onboard"];

pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let invoked = arguments.first().and_then(|name| Path::new(name).file_stem());
    let is_plugin = invoked == Some(OsStr::new(PLUGIN));
    let command = if is_plugin { as_plugin(Cli::command()) } else { Cli::command() };
    let parsed = command.try_get_matches_from(arguments).and_then(|matches| Cli::from_arg_matches(&matches));
    let mut cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are an answer. Where they can't be written nobody is left to be told.
            let _ = error.print();
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return ExitCode::from(if asked { 0 } else { FAILED });
        }
    };
    cli.access.always_cluster = is_plugin;
    match cli.verb.run(&cli.access) {
        Ok(outcome) => outcome.write(),
        Err(error) => {
            complain(&format!("{}: {error:#}", NAMES[usize::from(is_plugin)]));
            ExitCode::from(FAILED)
        }
    }
}

/// The same command in the words of `kubectl onboard`, without what is of a standalone plane.
fn as_plugin(command: Command) -> Command {
    let renamed = |text: &clap::builder::StyledStr| text.to_string().replace(NAMES[0], NAMES[1]);
    let after = command.get_after_help().map(renamed);
    let command = match after {
        Some(after) => command.after_help(after),
        None => command,
    };
    let is_top = command.get_name() == NAMES[0];
    let command = match is_top {
        // The name of the usage line; subcommands are called what they are.
        true => command.name(PLUGIN).bin_name(NAMES[1]).mut_args(|argument| match argument.get_id().as_str() {
            "socket" | "data_dir" => argument.hide(true),
            _ => argument,
        }),
        false => command,
    };
    let verbs: Vec<String> = command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    verbs.into_iter().fold(command, |command, verb| command.mut_subcommand(verb, as_plugin))
}

/// `-n`
pub fn namespace(text: &str) -> Result<String, String> {
    match is_resource_name(text) && !text.contains('.') {
        true => Ok(text.to_owned()),
        false => Err("must be the name of a namespace".to_owned()),
    }
}

impl Verb {
    fn run(&self, access: &Access) -> anyhow::Result<Outcome> {
        match self {
            Self::Lint(verb) => verb.run(access),
            Self::Explain(verb) => verb.run(access),
            Self::Plan(verb) => verb.run(access),
            Self::Attest(verb) => verb.run(),
            Self::Workloads(verb) => verb.run(access),
            Self::Status(verb) => verb.run(access),
            Self::Doctor(verb) => verb.run(access),
            Self::Packages(verb) => verb.run(),
            Self::Mesh(verb) => verb.run(access),
            Self::Completions(verb) => verb.run(),
        }
    }
}
