//! `onboardctl mesh`: the root certificate of a standalone mesh.

use crate::outcome::{Format, Outcome, json as pretty, printable};
use crate::plane::{Access, Plane};
use anyhow::bail;
use serde_json::Value;

/// Show the root certificate of a standalone mesh, or replace it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl mesh root
  onboardctl mesh rotate-root

Replacing takes twice as long as a certificate lives (two days by default) and no request fails
by it: at first the new root is made known beside the old one, then it signs, then the old one
goes. The plane does the steps by itself, and begins by itself half a year before a root ends.

Exit codes: 0; 1 where the plane can't be asked, or is at it already.")]
pub struct Mesh {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Say which root signs, which are trusted, and what happens next
    Root {
        /// How to say it
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
    /// Begin to replace the root by a new one
    RotateRoot {
        /// How to say it
        #[arg(short, long, value_enum, default_value_t)]
        output: Format,
    },
}

const PATH: &str = "/v1/mesh/root";

impl Mesh {
    pub fn run(&self, access: &Access) -> anyhow::Result<Outcome> {
        let Plane::Socket(socket) = access.plane()? else {
            bail!(
                "this is of a standalone mesh; in a cluster the root is istiod's (Istio's documents: Plug in CA Certificates)"
            )
        };
        let (root, output) = match &self.verb {
            Verb::Root { output } => (socket.get(PATH)?, output),
            Verb::RotateRoot { output } => (socket.post(PATH)?, output),
        };
        Ok(Outcome::text(match output {
            Format::Json => pretty(&root),
            Format::Text => say(&root),
        }))
    }
}

fn say(root: &Value) -> String {
    let text = |field: &str| root.get(field).and_then(Value::as_str).map(printable);
    let known = |field: &str| text(field).unwrap_or_else(|| "unknown".to_owned());
    let mut out = format!("Stage  {}\nRoots  {}\nEnds   {}\n", known("stage"), known("roots"), known("endsAt"));
    if let Some(at) = text("nextStepAt") {
        out.push_str(&format!("Next   {at}\n"));
    }
    out
}
