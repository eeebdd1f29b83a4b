//! The boot configuration that the agent holds: what came last, put together from differences, kept on disk.

use onboarding_wire::onboarding as pb;
use std::collections::BTreeMap;

/// Complete; what a sidecar is started from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeldBoot {
    pub version: String,
    pub spiffe_id: String,
    pub trust_domain: String,
    pub node_id: String,
    pub cluster: String,
    /// Each resource as protobuf JSON, by type and name.
    pub resources: BTreeMap<(XdsType, String), Vec<u8>>,
    pub probe: Option<pb::Probe>,
    pub host_aliases: Vec<pb::HostAlias>,
    pub ingress: Vec<pb::IngressListener>,
    pub propagation_delay: std::time::Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum XdsType {
    Listener,
    Cluster,
    Endpoint,
    Route,
}
