//! `onboardctl status`: is the plane ready, and if not, what is missing.

use crate::manifests;
use crate::outcome::{FAILED, Format, Outcome, json as pretty, printable};
use crate::plane::cluster::{Cluster, Problem};
use crate::plane::objects::{
    CONFIG_MAPS, CONTROL_PLANES, DEPLOYMENTS, ISTIO_SYSTEM, POLICIES, WARS, condition, failing, is_true, name, text,
};
use crate::plane::{Access, Plane};
use onboarding_kinds::control_plane::Onboarding;
use onboarding_kinds::manifest::Object;
use serde_json::{Value, json};
use std::fmt::Write;

/// Say whether the plane is ready, and what it is missing
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl status
  onboardctl status -o json --data-dir /srv/onboarding
  onboardctl status --context production

In a cluster it is read from the ControlPlane, the Deployments and the policies; onboardctl
doctor looks further.

Exit codes: 0 ready; 1 not ready, or the plane can't be asked.")]
pub struct Status {
    /// How to say it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Status {
    pub fn run(&self, access: &Access) -> anyhow::Result<Outcome> {
        let (status, notes) = match access.plane()? {
            Plane::Socket(socket) => (socket.get("/v1/status")?, Vec::new()),
            Plane::Cluster(cluster) => of_cluster(&cluster)?,
        };
        let ready = status.get("ready").and_then(Value::as_bool).unwrap_or(false);
        let out = match self.output {
            Format::Json => pretty(&status),
            Format::Text => say(&status, ready),
        };
        Ok(Outcome { out, notes, code: if ready { 0 } else { FAILED } })
    }
}

/// What can't be asked is a note; the ControlPlane has to be known.
fn of_cluster(cluster: &Cluster) -> anyhow::Result<(Value, Vec<String>)> {
    let mut notes = Vec::new();
    let planes = cluster.list(&CONTROL_PLANES, Some(ISTIO_SYSTEM))?;
    let mut known = |asked: Result<Vec<Value>, Problem>| {
        asked.map_err(|problem| notes.push(format!("warning: not known: {problem}"))).ok()
    };
    let deployments = known(cluster.list(&DEPLOYMENTS, Some(ISTIO_SYSTEM)));
    let policies = known(cluster.list(&POLICIES, None));
    let wars = known(cluster.list(&WARS, None));
    let config = known(cluster.get(&CONFIG_MAPS, ISTIO_SYSTEM, PLANE_CONFIG).map(|it| it.into_iter().collect()));
    let config = config.unwrap_or_default().pop();
    let found = Found { planes, deployments, policies, wars, config };
    Ok((found.status(), notes))
}

/// The ConfigMap with the plane's UID where the ControlPlane names none.
const PLANE_CONFIG: &str = "onboarding-plane-config";

/// `None`: isn't known.
struct Found {
    planes: Vec<Value>,
    deployments: Option<Vec<Value>>,
    policies: Option<Vec<Value>>,
    wars: Option<Vec<Value>>,
    config: Option<Value>,
}

impl Found {
    /// As a plane says it of itself.
    fn status(&self) -> Value {
        let loaded = manifests::of_objects(&self.planes);
        let mut faults: Vec<String> = loaded.faults.iter().map(|fault| fault.of_object()).collect();
        let enabled: Vec<Onboarding> = loaded
            .items
            .into_iter()
            .filter_map(|item| match item.object {
                Object::ControlPlane(plane) => plane.onboarding,
                _ => None,
            })
            .collect();
        let mut missing: Vec<String> = Vec::new();
        if enabled.len() != 1 {
            missing.push(match enabled.len() {
                0 => "no ControlPlane of istio-system enables onboarding (spec.meshExpansion.onboarding)".to_owned(),
                count => format!("{count} ControlPlanes enable onboarding, and one may"),
            });
        }
        for condition in self.planes.iter().flat_map(failing) {
            missing.push(format!("{}: {}", text(condition, "/type"), text(condition, "/message")));
        }
        let deployments = self.deployments.iter().flatten();
        for wanted in ["onboarding-plane", "vmgateway"] {
            let found = deployments.clone().find(|it| name(it) == wanted);
            match found {
                _ if self.deployments.is_none() => {}
                None => missing.push(format!("the Deployment {wanted}")),
                Some(found) if is_true(found, "Available") => {}
                Some(found) => {
                    let why = condition(found, "Available").map_or("", |condition| text(condition, "/message"));
                    missing.push(format!("the Deployment {wanted} isn't available: {why}"));
                }
            }
        }
        let read = manifests::of_objects(self.policies.as_deref().unwrap_or_default());
        faults.extend(read.faults.iter().map(|fault| fault.of_object()));
        let connected = self.wars.as_ref().map(|wars| wars.iter().filter(|war| is_true(war, "AgentConnected")).count());
        let plane = enabled.first().filter(|_| enabled.len() == 1);
        json!({
            "ready": missing.is_empty(),
            "missing": missing,
            "faults": faults,
            "policyUnreadable": !read.faults.is_empty(),
            "sessions": connected,
            "uid": plane.and_then(|plane| plane.uid.clone()).or_else(|| self.config.as_ref().and_then(uid)),
            "hosts": plane.map(|plane| &plane.hosts),
        })
    }
}

/// Of the ConfigMap.
pub fn uid(config: &Value) -> Option<String> {
    let config: Value = serde_yaml_ng::from_str(config["data"]["config.yaml"].as_str()?).ok()?;
    config["uid"].as_str().map(str::to_owned)
}

fn say(status: &Value, ready: bool) -> String {
    let mut out = format!("The plane is {}.\n", if ready { "ready" } else { "not ready" });
    for missing in texts(status, "missing") {
        let _ = writeln!(out, "  missing: {missing}");
    }
    let mut fact = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(out, "{name:14} {value}");
        }
    };
    fact("UID", texts(status, "uid").join(""));
    fact("Hosts", texts(status, "hosts").join(", "));
    fact("Sessions", texts(status, "sessions").join(""));
    fact("Configuration", texts(status, "generation").iter().map(|it| format!("generation {it}")).collect());
    if status.get("policyUnreadable").and_then(Value::as_bool).unwrap_or(false) {
        out.push_str("A policy can't be read: sessions are suspended, and entries end with the grace period.\n");
    }
    let faults = texts(status, "faults");
    if !faults.is_empty() {
        let _ = writeln!(out, "Faults of the configuration:");
    }
    for fault in faults {
        let _ = writeln!(out, "  {fault}");
    }
    out
}

/// A list of texts, or one text or number as a list.
fn texts(status: &Value, field: &str) -> Vec<String> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(printable(text)),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    };
    match status.get(field) {
        Some(Value::Array(values)) => values.iter().filter_map(text).collect(),
        value => value.and_then(text).into_iter().collect(),
    }
}
