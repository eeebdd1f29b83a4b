//! The backend in a cluster: configuration from an API server, registrations as objects in it, sidecars of an Istio mesh.
//!
//! What is never here: authorization (the endpoint asks the core), the agents' TLS, files of manifests, what the operator renders.
//! See `docs/kubernetes.md`.

pub mod istio;
pub mod names;
pub mod registry;
