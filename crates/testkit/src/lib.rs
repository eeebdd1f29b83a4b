//! Real servers and real machines for tests and the demo: EC2 and ECS metadata, STS, an OIDC issuer, an application, network namespaces,
//! a Kubernetes and Istio control plane.
//!
//! What may never be here: anything that a product depends on, or a shortcut through a product. What these servers say is what the
//! real ones say.

pub mod application;
pub mod cluster;
pub mod cms;
pub mod ecs;
pub mod emulator;
pub mod eventually;
pub mod gateway;
pub mod imds;
pub mod netns;
pub mod oidc;
pub mod port;
pub mod process;
pub mod sts;
