//! What every binary shares: logs, signals, draining, readiness, metrics, listening, the admin server, backoff, batches of what waits.
//!
//! Nothing here knows what onboarding is.

pub mod admin;
pub mod backoff;
pub mod batch;
pub mod descriptors;
pub mod listen;
pub mod logs;
pub mod readiness;
pub mod shutdown;
