//! `onboardctl completions`: what a shell needs to complete this command.

use crate::cli::Cli;
use crate::outcome::Outcome;
use clap::CommandFactory;
use clap_complete::Shell;

/// Print a shell's completion script
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl completions bash > /etc/bash_completion.d/onboardctl
  onboardctl completions zsh > \"${fpath[1]}/_onboardctl\"")]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "onboardctl", &mut script);
        Ok(Outcome::text(String::from_utf8(script)?))
    }
}
