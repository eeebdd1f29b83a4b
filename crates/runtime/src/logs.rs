//! Log lines: a constant sentence with facts in fields, on standard error.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

/// To be called once, first. `RUST_LOG` overrides `default_filter` (as in `info,onboarding_agent=debug`).
///
/// Levels by module and no more: what filters by fields of spans brings an engine for regular expressions with it, which would be a tenth
/// of the agent.
pub fn init(format: Format, default_filter: &str) {
    let filter = std::env::var("RUST_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let filter = filter
        .or_else(|| default_filter.parse().ok())
        .unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        // They would go to standard error too, with a panic where that can't be written: whoever reads the log may end before us.
        .log_internal_errors(false)
        .with_target(false)
        .with_span_events(FmtSpan::NONE);
    let lines = match format {
        Format::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        Format::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(lines).with(filter).init();
}
