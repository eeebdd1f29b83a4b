//! Manifests and configuration files as people write them, and the conversions that are their validation.
//!
//! A typed value of this crate is valid: reading a document reports every fault, each with file, line and the field's path,
//! or gives the value. No Kubernetes client, no file system, no decision.

pub mod agent;
pub mod control_plane;
#[cfg(feature = "crd")]
pub mod crd;
pub mod fault;
mod group;
pub mod identity;
pub mod manifest;
pub mod mesh;
mod node;
pub mod policy;
mod reader;
pub mod recipe;
mod syntax;
pub mod war;

pub use syntax::{duration, label_key, label_value};
