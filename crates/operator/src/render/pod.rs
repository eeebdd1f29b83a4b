//! What all pods have: restricted security, probes, spread.

use super::{ADMIN_PORT, Objects};
use serde_json::{Value, json};

/// User and group of our images.
const USER: u32 = 65532;

/// The pods of a Deployment, which has the same name.
pub(super) struct Pod {
    pub name: &'static str,
    /// Besides those that all have.
    pub labels: Vec<(&'static str, String)>,
    pub annotations: Value,
    /// The container, without what all have.
    pub container: Value,
    pub volumes: Vec<Value>,
    /// Whether it talks to the API server.
    pub needs_token: bool,
    /// Seconds from SIGTERM to SIGKILL.
    pub grace_period: u32,
}

impl Objects<'_> {
    /// `replicas` isn't in it: that is the autoscaler's.
    pub(super) fn deployment(&self, pod: Pod) -> Value {
        let selector = self.selector(pod.name);
        let mut labels = self.labels(pod.name);
        labels.extend(selector.as_object().cloned().unwrap_or_default());
        labels.extend(pod.labels.into_iter().map(|(key, value)| (key.to_owned(), value.into())));
        let mut container = pod.container;
        container["securityContext"] = json!({
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]},
            "privileged": false,
            "readOnlyRootFilesystem": true,
            "runAsNonRoot": true,
        });
        if let Some(policy) = &self.settings.pull_policy {
            container["imagePullPolicy"] = policy.as_str().into();
        }
        let spread = |key: &str| {
            json!({
                "maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector},
            })
        };
        let mut spec = json!({
            "serviceAccountName": pod.name,
            "automountServiceAccountToken": pod.needs_token,
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "terminationGracePeriodSeconds": pod.grace_period,
            "topologySpreadConstraints": [spread("kubernetes.io/hostname"), spread("topology.kubernetes.io/zone")],
            "containers": [container],
        });
        if !pod.volumes.is_empty() {
            spec["volumes"] = pod.volumes.into();
        }
        let pull_secrets = &self.settings.pull_secrets;
        if !pull_secrets.is_empty() {
            spec["imagePullSecrets"] = pull_secrets.iter().map(|name| json!({"name": name})).collect();
        }
        let spec = json!({
            "selector": {"matchLabels": selector},
            // A replica is there before another goes.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {"metadata": {"labels": labels, "annotations": pod.annotations}, "spec": spec},
        });
        self.object(pod.name, "apps/v1", "Deployment", pod.name, json!({"spec": spec}))
    }

    /// Of a program of ours: it ends its clients' TLS itself, so nobody else is to; alive while it answers at all, ready when nothing is missing.
    pub(super) fn our_deployment(&self, mut pod: Pod) -> Value {
        pod.labels.push(("sidecar.istio.io/inject", "false".to_owned()));
        pod.annotations = json!({
            "prometheus.io/scrape": "true",
            "prometheus.io/port": ADMIN_PORT.to_string(),
            "prometheus.io/path": "/metrics",
        });
        let probe = |path: &str, failures: u32| {
            json!({
                "httpGet": {"path": path, "port": ADMIN_PORT},
                "periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": failures,
            })
        };
        pod.container["startupProbe"] = probe("/healthz", 24);
        pod.container["livenessProbe"] = probe("/healthz", 6);
        pod.container["readinessProbe"] = probe("/readyz", 2);
        let mut deployment = self.deployment(pod);
        let context = &mut deployment["spec"]["template"]["spec"]["securityContext"];
        for field in ["runAsUser", "runAsGroup", "fsGroup"] {
            context[field] = USER.into();
        }
        deployment
    }
}
