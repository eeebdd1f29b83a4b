//! Writes `deploy/crds/*.yaml`: `cargo run -p onboarding-kinds --example crds`. Prints what it wrote.
#![allow(clippy::print_stdout, reason = "it prints")]

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds");
    for (name, definition) in onboarding_kinds::crd::all() {
        let file = directory.join(name).with_extension("yaml");
        std::fs::write(&file, serde_yaml_ng::to_string(&definition)?)?;
        println!("{}", file.display());
    }
    Ok(())
}
