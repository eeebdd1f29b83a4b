//! `onboardctl`: what an operator asks about onboarding, at a terminal.
//!
//! One file per verb. A verb reads its inputs and gives an [`outcome::Outcome`]; only `outcome` writes. What may never live here:
//! a decision of its own (policies are core's, evidence is attest's, manifests are kinds'), or what the plane could do itself.

mod attest;
mod cli;
mod completions;
mod doctor;
mod explain;
mod lint;
mod manifests;
mod mesh;
mod outcome;
mod packages;
mod plan;
mod plane;
mod status;
mod workloads;

fn main() -> std::process::ExitCode {
    cli::run(std::env::args_os())
}
