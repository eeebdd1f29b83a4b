//! The WorkloadGroups of the cluster as the registry needs them: who owns a war, and what an entry is made of.

use aws_lc_rs::digest;
use onboarding_core::group::{Probe, ProbeAction, WorkloadGroup};
use onboarding_core::name::GroupName;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;

/// All that can be read; replaced whole.
pub type Groups = HashMap<GroupName, GroupObject>;

#[derive(Debug, Clone, PartialEq)]
pub struct GroupObject {
    pub group: Arc<WorkloadGroup>,
    /// `metadata.uid`
    pub uid: String,
    /// `metadata.generation`
    pub generation: i64,
}

/// What of a group a sidecar takes in only with a new boot configuration. Kept with the session that was given it
/// (`status.lease.boot`), so that a later change of the group can be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Boot {
    service_account: String,
    /// Digest of `spec.metadata.annotations`, where the proxy's own settings are.
    annotations: String,
    /// Digest of `spec.probe`.
    probe: String,
}

impl Boot {
    pub(crate) fn of(group: &WorkloadGroup) -> Self {
        Self {
            service_account: group.service_account.clone(),
            annotations: short_digest(json!(group.workload_annotations).to_string().as_bytes()),
            probe: group.probe.as_ref().map_or_else(String::new, |it| short_digest(probe(it).to_string().as_bytes())),
        }
    }

    /// What the group has become, for people; empty if nothing that matters here.
    pub(crate) fn differences(&self, now: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        if self.service_account != now.service_account {
            differences.push(format!(
                "its service account is {:?}, the sidecar runs as {:?}",
                now.service_account, self.service_account
            ));
        }
        if self.annotations != now.annotations {
            differences.push("its annotations (proxy settings) changed".to_owned());
        }
        if self.probe != now.probe {
            differences.push("its probe changed".to_owned());
        }
        differences
    }
}

fn probe(probe: &Probe) -> serde_json::Value {
    let action = match &probe.action {
        ProbeAction::HttpGet { path, port, host, https, headers } => {
            json!({"path": path, "port": port, "host": host, "https": https, "headers": headers})
        }
        ProbeAction::TcpSocket { host, port } => json!({"host": host, "tcp": port}),
        ProbeAction::Exec { command } => json!(command),
    };
    json!({
        "initialDelay": probe.initial_delay,
        "timeout": probe.timeout,
        "period": probe.period,
        "success": probe.success_threshold,
        "failure": probe.failure_threshold,
        "action": action,
    })
}

/// 32 hexadecimal digits of SHA-256.
pub(crate) fn short_digest(bytes: &[u8]) -> String {
    digest::digest(&digest::SHA256, bytes).as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group() -> WorkloadGroup {
        WorkloadGroup {
            name: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
            labels: [].into(),
            workload_labels: [("app".to_owned(), "ratings".to_owned())].into(),
            workload_annotations: [].into(),
            service_account: "ratings-vm".to_owned(),
            network: None,
            locality: None,
            weight: None,
            ports: [].into(),
            address: None,
            probe: None,
        }
    }

    #[test]
    fn only_what_needs_a_new_boot_configuration_is_told() {
        let then = Boot::of(&group());
        let told = |change: fn(&mut WorkloadGroup)| {
            let mut group = group();
            change(&mut group);
            then.differences(&Boot::of(&group)).join("; ")
        };
        assert_eq!(told(|group| group.weight = Some(5)), "");
        assert_eq!(told(|group| group.workload_labels.clear()), "");
        assert!(told(|group| group.service_account = "other".to_owned()).contains("\"other\""));
        assert!(
            told(|group| drop(group.workload_annotations.insert("a".to_owned(), "b".to_owned())))
                .contains("annotations")
        );
    }
}
