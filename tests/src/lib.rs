//! Scenarios across agent, plane and Envoy; nothing but tests and the demo lives here.
//!
//! Nothing is imported from a product: what a scenario knows of one is what a user knows, its command line, its files, its answers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "all of it is tests")]

mod cloud;
pub mod forward;
pub mod guest;
pub mod image;
pub mod installed;
pub mod mesh;
pub mod node;
pub mod scenario;
pub mod steps;
pub mod story;
pub mod until;
pub mod vm;
pub mod walkthrough;
pub mod world;
