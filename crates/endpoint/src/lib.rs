//! The Workload Onboarding Endpoint.
pub mod backend;
