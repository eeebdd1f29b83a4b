//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  onboarding-agent                                    run, with the files under /etc/onboarding-agent
  onboarding-agent --onboarding-config ./onboarding.config.yaml --state-dir ./state
  onboarding-agent check                              is this host ready to join, and if not, why
  onboarding-agent status                             where this host stands
  sudo onboarding-agent hosts --write                 map the mesh's services in /etc/hosts

In a container ONBOARDING_CONFIG and AGENT_CONFIG hold the text of the two files, and
ONBOARDING_AGENT_ROOT_CERTS the CA of the endpoint's certificate in PEM.";

/// Joins this host's workload to an Istio mesh, by what the host can prove of itself.
#[derive(Debug, Parser)]
#[command(name = "onboarding-agent", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    /// Absent: `run`.
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, Clone, Args)]
pub struct Common {
    /// The AgentConfiguration; the file may be absent
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/onboarding-agent/agent.config.yaml")]
    pub agent_config: PathBuf,
    /// The OnboardingConfiguration
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/onboarding-agent/onboarding.config.yaml")]
    pub onboarding_config: PathBuf,
    /// Where the agent keeps its key and what it needs after a reboot
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "STATE_DIRECTORY",
        default_value = "/var/lib/onboarding-agent"
    )]
    pub state_dir: PathBuf,
    /// Envoy; default /usr/local/bin/envoy, else the one on PATH
    #[arg(long, global = true, value_name = "FILE")]
    pub envoy_binary: Option<PathBuf>,
    /// pilot-agent, which runs Envoy in an Istio mesh where it is installed; default /usr/local/bin/pilot-agent
    #[arg(long, global = true, value_name = "FILE")]
    pub pilot_agent_binary: Option<PathBuf>,
    /// pilot-agent's template of Envoy's bootstrap
    #[arg(long, global = true, value_name = "FILE", default_value = "/var/lib/istio/envoy/envoy_bootstrap_tmpl.json")]
    pub bootstrap_template: PathBuf,
    /// Envoy's admin address, which answers /ready
    #[arg(long, global = true, value_name = "IP:PORT", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 15000)))]
    pub envoy_admin: SocketAddr,
    /// How log lines look
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Join the mesh and stay in it (the default)
    Run,
    /// Say whether this host is ready to join, and what to do where it isn't; needs no privileges
    #[command(
        after_help = "Examples:\n  onboarding-agent check\n  onboarding-agent check -o json\n\nExit: 0 nothing failed, 1 something did."
    )]
    Check {
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Print the lines of /etc/hosts that map the mesh's services to the egress listeners
    #[command(
        after_help = "Examples:\n  onboarding-agent hosts\n  sudo onboarding-agent hosts --write\n  sudo onboarding-agent hosts --remove\n\nWithout --write and --remove nothing is changed. With --write the lines stand between # BEGIN onboarding-agent and\n# END onboarding-agent; everything else in the file stays as it is."
    )]
    Hosts {
        /// Keep them in the file
        #[arg(long)]
        write: bool,
        /// Take them out of the file; removing the package does it too
        #[arg(long, conflicts_with = "write")]
        remove: bool,
        #[arg(long, value_name = "FILE", default_value = "/etc/hosts")]
        hosts_file: PathBuf,
    },
    /// Say in a few lines where this host stands, and why
    #[command(
        after_help = "Examples:\n  onboarding-agent status\n  onboarding-agent status -o json\n\nExit: 0 an agent has been here, 1 none has."
    )]
    Status {
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
    /// Say whether the sidecar is up: what a container's health check runs, as its image has no curl
    #[command(after_help = "Example:\n  onboarding-agent ready\n\nExit: 0 it is LIVE, 1 it isn't.")]
    Ready,
    /// Print a completion script
    #[command(after_help = "Example:\n  onboarding-agent completions bash > /etc/bash_completion.d/onboarding-agent")]
    Completions { shell: clap_complete::Shell },
    /// Print the manual page onboarding-agent(8)
    #[command(hide = true)]
    Manual,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_come_before_or_after_the_verb_and_run_is_the_default() {
        let plain = Cli::parse_from(["onboarding-agent", "--agent-config", "a", "--onboarding-config", "b"]);
        assert!(plain.command.is_none());
        assert_eq!(plain.common.onboarding_config, PathBuf::from("b"));
        let check = Cli::parse_from(["onboarding-agent", "check", "--onboarding-config", "b", "-o", "json"]);
        assert!(matches!(check.command, Some(Command::Check { output: Output::Json })));
        assert_eq!(check.common.onboarding_config, PathBuf::from("b"));
    }
}
