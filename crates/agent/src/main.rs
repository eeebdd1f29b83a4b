//! `onboarding-agent`: the command line to the verbs.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    onboarding_agent::commands::main()
}
