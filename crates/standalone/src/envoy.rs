//! Envoy's configuration of one workload, from the Sidecar that selects it, the services, and the registrations behind them. Pure.
//!
//! What doesn't depend on the workload is rendered once and shared: the endpoints and the cluster of each service port, and all that a
//! Sidecar's egress makes. A workload's own part is its ingress, because that has its address in it.
//! Types and fields are those of Envoy's v3 API, as protobuf JSON.

mod assignment;
pub mod catalog;
mod clusters;
mod http;
mod inbound;
mod names;
mod outbound;
mod resource;
mod tls;

pub use clusters::{Backend, backend};
pub use inbound::{Inbound, inbound};
pub use outbound::{Outbound, outbound};
pub use resource::{Changes, Resource, Resources};

use onboarding_core::group::{WorkloadEntry, WorkloadGroup};
use onboarding_core::label::Labels;
use std::sync::Arc;

/// The domain of Services, whatever the trust domain is called.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

/// A live registration as the mesh sees it.
#[derive(Debug, PartialEq)]
pub struct Member {
    pub entry: WorkloadEntry,
    pub group: Arc<WorkloadGroup>,
    /// Where its ingress listeners are bound unless the Sidecar says otherwise: an address that the host itself has.
    pub listen: String,
    pub ready: bool,
}

impl Member {
    pub fn spiffe_id(&self, trust_domain: &str) -> String {
        crate::ca::spiffe_id(trust_domain, &self.group.name.namespace, &self.entry.service_account)
    }
}

/// Whether every label of the selector is among these. An empty selector selects nothing: a Service without one has its endpoints from elsewhere.
fn selects(selector: &Labels, labels: &Labels) -> bool {
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Whether this registration is one of the upstream's endpoints.
pub fn is_behind(upstream: &catalog::Upstream, member: &Member) -> bool {
    member.group.name.namespace == upstream.namespace
        && upstream.selector().is_some_and(|selector| selects(selector, &member.entry.labels))
}
