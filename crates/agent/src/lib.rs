//! The Workload Onboarding Agent: proves the host, registers it, runs its sidecar, and leaves in order.
//!
//! `machine` decides (no I/O), the other rooms do. No policy and no registry lives here.

pub mod boot;
pub mod sidecar;
