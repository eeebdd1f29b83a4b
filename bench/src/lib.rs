//! Every figure of docs/performance.md, beside its floor or its peer; and the load that they are measured under.
//!
//! What may never be here: anything that a product depends on, a limit that a test asserts in time. What [`crowd`] does is what real
//! agents do; what is measured is the real `onboarding-plane`, as a process of its own.
#![allow(clippy::print_stdout, reason = "it prints a table, and what it is doing")]

pub mod bare;
pub mod crowd;
pub mod figures;
pub mod floor;
pub mod istio;
pub mod machine;
pub mod plane;
pub mod table;
