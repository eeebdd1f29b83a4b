//! The Workload Onboarding Agent: proves the host, registers it, runs its sidecar, and leaves in order.
//!
//! `machine` decides (no I/O), the other rooms do. No policy and no registry lives here.

pub mod args;
pub mod boot;
pub mod check;
pub mod commands;
pub mod config;
pub mod host;
pub mod hosts;
pub mod keeper;
pub mod key;
pub mod machine;
pub mod manual;
pub mod mesh;
pub mod probe;
pub mod run;
pub mod session;
pub mod sidecar;
pub mod status;
pub mod store;
pub mod trust;
pub mod version;
