//! `onboarding-bench`: measures, prints a table, writes JSON. `dev/bench` builds what it needs and starts it.
#![allow(clippy::print_stdout, reason = "it prints a table, and what it is doing")]

use anyhow::Context;
use clap::Parser;
use onboarding_bench::figures::{Bench, Name};
use onboarding_bench::machine;
use std::path::PathBuf;
use std::time::Instant;

/// Figures of the plane and the agent, each beside its floor or its peer.
#[derive(Debug, Parser)]
#[command(
    name = "dev/bench",
    after_help = "Examples:
  dev/bench                                  everything, about twelve minutes
  dev/bench --figure join --repeat 5
  dev/bench --figure join --one-core         as the peers of docs/performance.md were measured
  dev/bench --quick --json figures.json"
)]
struct Args {
    #[command(subcommand)]
    only: Option<Only>,
    /// Which ones; absent: all.
    #[arg(long, value_enum, num_args = 1.., value_name = "NAME")]
    figure: Vec<Name>,
    /// Small counts: whether it works, rather than how well.
    #[arg(long)]
    quick: bool,
    /// The plane on the first core, the load on the others.
    #[arg(long)]
    one_core: bool,
    /// Also writes the samples there; `dev/bench` itself asks for bench.json in the target directory.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each is measured.
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=100))]
    repeat: u8,
    /// Where planes keep their data; absent: the directory of temporary files.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

#[derive(Debug, clap::Subcommand)]
enum Only {
    /// What `--figure join` starts for its floor.
    #[command(hide = true)]
    BareServer { directory: PathBuf },
    /// What `--figure memory` starts for the TLS library's own.
    #[command(hide = true)]
    TlsState { connections: usize },
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let descriptors = machine::raise_limit()?;
    if args.one_core && args.only.is_none() {
        machine::keep_to_other_cores()?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match args.only {
        Some(Only::BareServer { directory }) => return runtime.block_on(onboarding_bench::bare::serve(&directory)),
        Some(Only::TlsState { connections }) => return onboarding_bench::floor::print_tls_state(connections),
        None => {}
    }
    let own = std::env::current_exe().context("finding this program")?;
    let bench = Bench {
        quick: args.quick,
        one_core: args.one_core,
        descriptors: usize::try_from(descriptors)?,
        repeat: usize::from(if args.quick { 1 } else { args.repeat }),
        binaries: own.parent().context("finding this program's directory")?.to_owned(),
        directory: args.directory.unwrap_or_else(std::env::temp_dir),
    };
    println!("{}; {descriptors} files may be open", machine::describe());
    let asked = |name: &Name| args.figure.is_empty() || args.figure.contains(name);
    let names = Name::ALL.into_iter().filter(asked);
    let (started, mut all) = (Instant::now(), Vec::new());
    for name in names {
        println!("\n== {name:?} ({:.0} s)", started.elapsed().as_secs_f64());
        let figures = runtime.block_on(name.run(&bench)).with_context(|| format!("measuring {name:?}"))?;
        println!();
        figures.iter().for_each(|figure| print!("{}", figure.lines()));
        all.extend(figures);
    }
    println!("\n{} figures in {:.0} s", all.len(), started.elapsed().as_secs_f64());
    if let Some(file) = args.json {
        let document = serde_json::json!({ "machine": machine::describe(), "quick": bench.quick, "oneCore": bench.one_core, "figures": all });
        std::fs::write(&file, serde_json::to_vec_pretty(&document)?)
            .with_context(|| format!("writing {}", file.display()))?;
        println!("every sample is in {}", file.display());
    }
    Ok(())
}
