//! The server of DEB and RPM packages. It asks nothing of the API server: its account has no permissions and its pod no token.

use super::pod::Pod;
use super::{
    ADMIN_PORT, ANY, HTTPS_PORT, HTTPS_TARGET_PORT, IP_FAMILIES, Objects, Packages, REPOSITORY, ingress_of_cluster,
};
use serde_json::{Value, json};

const CERTIFICATE_DIRECTORY: &str = "/etc/onboarding-repository/tls";
/// Where the repository looks by itself.
const PACKAGES_DIRECTORY: &str = "/var/lib/onboarding-repository/packages";
const GRACE_PERIOD: u32 = 60;

pub(super) fn render(all: &Objects<'_>) -> Vec<Value> {
    let service = json!({"spec": {
        "ipFamilyPolicy": IP_FAMILIES,
        "selector": all.selector(REPOSITORY),
        "ports": [{
            "name": "tls-repository", "port": HTTPS_PORT, "targetPort": HTTPS_TARGET_PORT, "protocol": "TCP",
            "appProtocol": "tls",
        }],
    }});
    let ingress = json!([all.ingress_of_gateway(HTTPS_TARGET_PORT), ingress_of_cluster(&[ADMIN_PORT])]);
    vec![
        all.service_account(REPOSITORY),
        all.object(REPOSITORY, "v1", "Service", REPOSITORY, service),
        all.network_policy(REPOSITORY, ingress, Some(json!([]))),
        deployment(all),
        all.disruption_budget(REPOSITORY),
        all.autoscaler(REPOSITORY),
    ]
}

fn deployment(all: &Objects<'_>) -> Value {
    let mut mounts = vec![json!({"name": "certificate", "mountPath": CERTIFICATE_DIRECTORY, "readOnly": true})];
    // The kubelet replaces the files when the Secret changes.
    let secret = json!({"secretName": all.enabled.onboarding.secret_name, "defaultMode": 0o440});
    let mut volumes = vec![json!({"name": "certificate", "secret": secret})];
    if let Some(mut packages) = packages(all) {
        mounts.push(json!({"name": "packages", "mountPath": PACKAGES_DIRECTORY, "readOnly": true}));
        packages["name"] = "packages".into();
        volumes.push(packages);
    }
    let container = json!({
        "name": REPOSITORY,
        "image": all.settings.repository_image,
        "args": [
            "--listen", format!("{ANY}:{HTTPS_TARGET_PORT}"),
            "--admin-listen", format!("{ANY}:{ADMIN_PORT}"),
            "--certificate-directory", CERTIFICATE_DIRECTORY,
            "--log-format", "json",
        ],
        "ports": [
            {"name": "tls-repository", "containerPort": HTTPS_TARGET_PORT, "protocol": "TCP"},
            {"name": "http-admin", "containerPort": ADMIN_PORT, "protocol": "TCP"},
        ],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": mounts,
    });
    all.our_deployment(Pod {
        name: REPOSITORY,
        labels: Vec::new(),
        annotations: Value::Null,
        container,
        volumes,
        needs_token: false,
        grace_period: GRACE_PERIOD,
    })
}

/// The volume, but for its name.
fn packages(all: &Objects<'_>) -> Option<Value> {
    Some(match &all.settings.packages {
        Packages::InRepositoryImage => return None,
        Packages::Claim(claim) => json!({"persistentVolumeClaim": {"claimName": claim, "readOnly": true}}),
        Packages::Image(image) => match &all.settings.pull_policy {
            Some(policy) => json!({"image": {"reference": image, "pullPolicy": policy}}),
            None => json!({"image": {"reference": image}}),
        },
    })
}
