//! `onboardctl status`: is the plane ready, and if not, what is missing.

use crate::outcome::{FAILED, Format, Outcome, json, printable};
use crate::socket::Socket;
use serde_json::Value;
use std::fmt::Write;

/// Say whether the plane is ready, and what it is missing
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl status
  onboardctl status -o json --data-dir /srv/onboarding

Exit codes: 0 ready; 1 not ready, or the plane can't be asked.")]
pub struct Status {
    /// How to say it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Status {
    pub fn run(&self, socket: &Socket) -> anyhow::Result<Outcome> {
        let status = socket.get("/v1/status")?;
        let ready = status.get("ready").and_then(Value::as_bool).unwrap_or(false);
        let out = match self.output {
            Format::Json => json(&status),
            Format::Text => say(&status, ready),
        };
        Ok(Outcome { out, notes: Vec::new(), code: if ready { 0 } else { FAILED } })
    }
}

fn say(status: &Value, ready: bool) -> String {
    let mut out = format!("The plane is {}.\n", if ready { "ready" } else { "not ready" });
    for missing in texts(status, "missing") {
        let _ = writeln!(out, "  missing: {missing}");
    }
    let mut fact = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "{name:14} {value}");
        }
    };
    fact("UID", texts(status, "uid").join(""));
    fact("Hosts", texts(status, "hosts").join(", "));
    fact("Sessions", texts(status, "sessions").join(""));
    fact("Configuration", texts(status, "generation").iter().map(|it| format!("generation {it}")).collect());
    if status.get("policyUnreadable").and_then(Value::as_bool).unwrap_or(false) {
        out.push_str("A policy can't be read: sessions are suspended, and entries end with the grace period.\n");
    }
    let faults = texts(status, "faults");
    if !faults.is_empty() {
        let _ = writeln!(out, "Faults of the configuration:");
    }
    for fault in faults {
        let _ = writeln!(out, "  {fault}");
    }
    out
}

/// A list of texts, or one text or number as a list.
fn texts(status: &Value, field: &str) -> Vec<String> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(printable(text)),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    match status.get(field) {
        Some(Value::Array(values)) => values.iter().filter_map(text).collect(),
        value => value.and_then(text).into_iter().collect(),
    }
}
