//! The backend in a cluster: configuration from an API server, registrations as objects in it, sidecars of an Istio mesh.
//!
//! What is never here: authorization (the endpoint asks the core), the agents' TLS, files of manifests, what the operator renders.
//! See `docs/kubernetes.md`.

pub mod fleet;
pub mod istio;
pub mod keys;
pub mod names;
pub mod notices;
pub mod policies;
pub mod registry;
pub mod source;
