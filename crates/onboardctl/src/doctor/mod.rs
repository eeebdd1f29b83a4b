//! `onboardctl doctor`: what of onboarding in a cluster is wrong, and the way out of it.
//!
//! `gather` asks, `checks` is pure: facts in, findings out.

mod checks;
mod endpoint;
mod facts;
mod gather;
mod material;

use crate::outcome::{FAILED, Format, Outcome, json as pretty, printable};
use crate::plane::Access;
use facts::{Finding, Level};
use serde_json::json;
use std::fmt::Write;

/// Look for what is wrong with onboarding in a cluster
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl doctor
  onboardctl doctor --context production -o json

Each line of the answer is
  ok|warn|FAIL WHAT: what was found; the way out
What you may not ask the cluster for is a warning that says what to ask for. The endpoint is
asked from this machine: where VMs reach it by another way, so must you.

Exit codes: 0 no FAIL; 1 a FAIL, or there is no cluster to ask.")]
pub struct Doctor {
    /// How to say it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Doctor {
    pub fn run(&self, access: &Access) -> anyhow::Result<Outcome> {
        let findings = checks::all(&gather::facts(&access.cluster()?));
        let failed = findings.iter().any(|finding| finding.level == Level::Fail);
        let out = match self.output {
            Format::Json => pretty(&json!({
                "ok": !failed,
                "findings": findings.iter().map(Finding::to_json).collect::<Vec<_>>(),
            })),
            Format::Text => say(&findings),
        };
        Ok(Outcome { out, notes: Vec::new(), code: if failed { FAILED } else { 0 } })
    }
}

fn say(findings: &[Finding]) -> String {
    let mut out = String::new();
    for Finding { level, what, words, way_out } in findings {
        let way_out = if way_out.is_empty() { String::new() } else { format!("; {way_out}") };
        let _ = writeln!(out, "{:4} {}", level.word(), printable(&format!("{what}: {words}{way_out}")));
    }
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let _ = writeln!(out, "{} failed, {} warnings, {} ok", count(Level::Fail), count(Level::Warn), count(Level::Ok));
    out
}
