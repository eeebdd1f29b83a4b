//! The rules of onboarding: identities, names, policies, the lease of a registration, the claims of a token.
//!
//! Everything here is a pure function of its arguments. What may never live here: I/O, a clock, a task or a
//! socket, a log line, a serialization format, Kubernetes, Istio, or anything that knows which backend runs.

pub mod group;
pub mod identity;
pub mod label;
pub mod name;
pub mod policy;
pub mod registration;
pub mod token;
