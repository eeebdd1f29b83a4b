//! A registration's state as a WorkloadAutoRegistration, and back.
//!
//! What decides is in the spec and in one annotation, which are written in one request; the connection and the health are in the status.
//! A war is believed if its annotation says it is of this name, if the name follows from the identity, and if it belongs to the group that
//! it names: one that was made, copied or renamed by hand is foreign.

use super::standing::BootState;
use crate::names::MANAGED_BY;
use jiff::Timestamp;
use kube::api::{DynamicObject, ObjectMeta};
use onboarding_core::identity::Attested;
use onboarding_core::name::{GroupName, RegistrationName, registration_name};
use onboarding_core::registration::{Connection, DisconnectReason, Ended, Health, KeyMemory, Live, NOT_UP};
use onboarding_kinds::identity::{self, Case};
use onboarding_kinds::war::{self, lease, report};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The annotation with what decides.
pub(crate) const LEASE: &str = "onboarding.tetrate.io/lease";

/// A war as it was read or written.
#[derive(Debug, Clone)]
pub(crate) struct War {
    pub uid: String,
    pub version: u64,
    /// `metadata.deletionTimestamp` is set: somebody deleted it, and a finalizer holds it.
    pub deleting: bool,
    pub meaning: Meaning,
    /// The object as JSON, without `managedFields`: what is written next is made of it, so that others' fields stay.
    pub raw: Box<[u8]>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Meaning {
    Live(Box<LiveWar>),
    /// It ended; the object is about to be deleted.
    Ended {
        ended: Ended,
        after: Option<String>,
    },
    /// It ended, and nothing is to be remembered of it; the object is about to be deleted.
    Forgotten,
    /// Not made by a plane; the words say why.
    Foreign(String),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LiveWar {
    pub live: Live,
    /// The id of the memory that this registration was made in knowledge of; `None`: of none.
    pub after: Option<String>,
    pub group_uid: String,
    /// Its status was written at least once.
    pub has_status: bool,
    pub boot: BootState,
}

/// The annotation's content.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "camelCase")]
enum Written {
    Live(Box<WrittenLive>),
    Ended {
        registration: String,
        after: Option<String>,
        #[serde(flatten)]
        end: WrittenEnd,
    },
    Forgotten {
        registration: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenLive {
    registration: String,
    group: String,
    group_uid: String,
    after: Option<String>,
    /// With what is only claimed.
    identity: Value,
    #[serde(default)]
    claimed_only: Vec<String>,
    issuer_short_name: Option<String>,
    evidence_replay: String,
    key: WrittenKey,
    created_at: String,
    token_expires_at: String,
}

/// An [`Ended`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WrittenEnd {
    key: Option<WrittenKey>,
    at: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct WrittenKey {
    thumbprint: String,
    replay: String,
}

impl WrittenEnd {
    pub(crate) fn new(ended: &Ended) -> Self {
        Self { key: ended.key.as_ref().map(WrittenKey::new), at: ended.at.to_string() }
    }
    pub(crate) fn read(&self) -> Result<Ended, String> {
        let key = self.key.as_ref().map(WrittenKey::read).transpose()?;
        Ok(Ended { key, at: lease::parse_time("at", &self.at)? })
    }
}

impl WrittenKey {
    fn new(key: &KeyMemory) -> Self {
        Self { thumbprint: key.thumbprint.to_string(), replay: lease::replay(key.replay) }
    }
    fn read(&self) -> Result<KeyMemory, String> {
        Ok(KeyMemory {
            thumbprint: self.thumbprint.parse().map_err(|error| format!("key.thumbprint: {error}"))?,
            replay: lease::parse_replay(&self.replay)?,
        })
    }
}

/// `metadata.resourceVersion` as a number: it orders the writes of one object (Kubernetes KEP-5504).
pub(crate) fn version_of(metadata: &ObjectMeta) -> Result<u64, String> {
    let version = metadata.resource_version.as_deref().ok_or("it has no resourceVersion")?;
    version.parse().map_err(|_| format!("its resourceVersion {version:?} is no number"))
}

impl War {
    pub(crate) fn read(name: &RegistrationName, mut object: DynamicObject) -> Result<Self, String> {
        object.metadata.managed_fields = None;
        Ok(Self {
            uid: object.metadata.uid.clone().ok_or("it has no uid")?,
            version: version_of(&object.metadata)?,
            deleting: object.metadata.deletion_timestamp.is_some(),
            meaning: read(name, &object).unwrap_or_else(|problem| Meaning::Foreign(foreign(name, &problem))),
            raw: serde_json::to_vec(&object).map_err(|error| error.to_string())?.into_boxed_slice(),
        })
    }

    pub(crate) fn object(&self) -> Result<DynamicObject, String> {
        serde_json::from_slice(&self.raw).map_err(|error| error.to_string())
    }

    pub(crate) fn live(&self) -> Option<&LiveWar> {
        match &self.meaning {
            Meaning::Live(live) => Some(live),
            _ => None,
        }
    }
}

fn foreign(name: &RegistrationName, problem: &str) -> String {
    format!(
        "the WorkloadAutoRegistration {name} was not made by a plane ({problem}) and is left alone; if nothing needs it: \
         `kubectl delete war -n {} {}`",
        name.namespace, name.name
    )
}

fn read(name: &RegistrationName, object: &DynamicObject) -> Result<Meaning, String> {
    let annotations = object.metadata.annotations.as_ref();
    let text = annotations.and_then(|all| all.get(LEASE)).ok_or_else(|| format!("it has no annotation {LEASE}"))?;
    let written: Written = serde_json::from_str(text).map_err(|error| format!("its annotation {LEASE}: {error}"))?;
    let registration = match &written {
        Written::Live(live) => &live.registration,
        Written::Ended { registration, .. } | Written::Forgotten { registration } => registration,
    };
    if *registration != name.to_string() {
        return Err(format!("its annotation {LEASE} is of {registration:?}"));
    }
    Ok(match written {
        Written::Forgotten { .. } => Meaning::Forgotten,
        Written::Ended { after, end, .. } => Meaning::Ended { ended: end.read()?, after },
        Written::Live(written) => Meaning::Live(Box::new(read_live(name, object, *written)?)),
    })
}

fn read_live(name: &RegistrationName, object: &DynamicObject, written: WrittenLive) -> Result<LiveWar, String> {
    let group = GroupName { namespace: name.namespace.clone(), name: written.group };
    let owned = object.metadata.owner_references.iter().flatten().any(|owner| {
        owner.kind == "WorkloadGroup"
            && owner.api_version.starts_with("networking.istio.io/")
            && owner.name == group.name
            && owner.uid == written.group_uid
    });
    if !owned {
        return Err(format!("it isn't owned by the WorkloadGroup {group} that its annotation {LEASE} names"));
    }
    let identity = identity::from_json(&written.identity, &written.claimed_only)
        .map_err(|problem| format!("the identity in its annotation {LEASE}: {problem}"))?;
    let expected = registration_name(&group, &identity, written.issuer_short_name.as_deref());
    if expected.as_ref() != Ok(name) {
        return Err(format!("its name doesn't follow from the group and the identity in its annotation {LEASE}"));
    }
    let spec = &object.data["spec"];
    if spec["identity"] != identity::to_json(&identity, Case::Camel) {
        return Err(format!("its spec.identity isn't that of its annotation {LEASE}"));
    }
    let report = report::from_json(&spec["registration"]).map_err(|problem| format!("spec.registration: {problem}"))?;
    let created_at = lease::parse_time("createdAt", &written.created_at)?;
    let status = Status::read(&object.data["status"]);
    let has_status = status.is_some();
    let status = status.unwrap_or_else(|| Status {
        connection: Connection::Disconnected { since: created_at, reason: DisconnectReason::NotYetConnected },
        health: Health { ready: false, message: NOT_UP.to_owned() },
        health_since: created_at,
        boot: BootState::default(),
    });
    Ok(LiveWar {
        live: Live {
            group,
            attested: Attested {
                identity,
                issuer_short_name: written.issuer_short_name,
                replay: lease::parse_replay(&written.evidence_replay)?,
            },
            key: written.key.read()?,
            report,
            created_at,
            token_expires_at: lease::parse_time("tokenExpiresAt", &written.token_expires_at)?,
            connection: status.connection,
            health: status.health,
            health_since: status.health_since,
        },
        after: written.after,
        group_uid: written.group_uid,
        has_status,
        boot: status.boot,
    })
}

struct Status {
    connection: Connection,
    health: Health,
    health_since: Timestamp,
    boot: BootState,
}

impl Status {
    /// `None` where it was never written, or isn't whole any more: such an agent is taken for one that never connected.
    fn read(status: &Value) -> Option<Self> {
        let condition = |kind: &str| status["conditions"].as_array()?.iter().find(|it| it["type"] == kind);
        let connected = condition("AgentConnected")?;
        let since = connected["lastTransitionTime"].as_str()?.parse().ok()?;
        let lease = &status["lease"];
        let connection = match (connected["status"].as_str()?, lease["session"].as_str(), lease["reason"].as_str()) {
            ("True", Some(session), None) => Connection::Connected {
                replica: status["activeAgentConnection"]["connectedTo"].as_str()?.to_owned(),
                session: session.to_owned(),
                since,
            },
            ("False", None, Some(reason)) => {
                Connection::Disconnected { since, reason: lease::parse_reason(reason).ok()? }
            }
            _ => return None,
        };
        let healthy = condition("Healthy")?;
        let health = Health {
            ready: healthy["status"] == "True",
            message: healthy["message"].as_str().unwrap_or_default().to_owned(),
        };
        let health_since = healthy["lastTransitionTime"].as_str().and_then(|time| time.parse().ok()).unwrap_or(since);
        let boot = BootState {
            applied: serde_json::from_value(lease["boot"].clone()).ok(),
            behind: serde_json::from_value(lease["behind"].clone()).ok(),
        };
        Some(Self { connection, health, health_since, boot })
    }
}

/// The war to create.
pub(crate) fn new_war(
    name: &RegistrationName,
    live: &Live,
    group_uid: &str,
    after: Option<&str>,
) -> Result<DynamicObject, String> {
    let mut object: DynamicObject =
        serde_json::from_value(war::resource(name, live, Some(group_uid))).map_err(|error| error.to_string())?;
    object.metadata.creation_timestamp = None;
    object.metadata.labels = Some([(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())].into());
    // Goes in by its subresource.
    if let Some(data) = object.data.as_object_mut() {
        data.remove("status");
    }
    annotate(&mut object, &written_live(name, live, group_uid, after))?;
    Ok(object)
}

/// The war with what decides replaced; all else stays.
pub(crate) fn with_live(
    name: &RegistrationName,
    war: &War,
    before: &LiveWar,
    live: &Live,
) -> Result<DynamicObject, String> {
    let mut object = war.object()?;
    object.data["spec"]["identity"] = identity::to_json(&live.attested.identity, Case::Camel);
    object.data["spec"]["registration"] = report::to_json(&live.report);
    annotate(&mut object, &written_live(name, live, &before.group_uid, before.after.as_deref()))?;
    Ok(object)
}

/// The war as one that ended; `ended` is `None` where nothing is to be remembered.
pub(crate) fn with_end(name: &RegistrationName, war: &War, ended: Option<&Ended>) -> Result<DynamicObject, String> {
    let mut object = war.object()?;
    let after = match &war.meaning {
        Meaning::Live(live) => live.after.clone(),
        Meaning::Ended { after, .. } => after.clone(),
        Meaning::Forgotten | Meaning::Foreign(_) => None,
    };
    let registration = name.to_string();
    let written = match ended {
        Some(ended) => Written::Ended { registration, after, end: WrittenEnd::new(ended) },
        None => Written::Forgotten { registration },
    };
    annotate(&mut object, &written)?;
    Ok(object)
}

fn written_live(name: &RegistrationName, live: &Live, group_uid: &str, after: Option<&str>) -> Written {
    let (identity, claimed_only) = identity::stated_to_json(&live.attested.identity, Case::Camel);
    Written::Live(Box::new(WrittenLive {
        registration: name.to_string(),
        group: live.group.name.clone(),
        group_uid: group_uid.to_owned(),
        after: after.map(str::to_owned),
        identity,
        claimed_only,
        issuer_short_name: live.attested.issuer_short_name.clone(),
        evidence_replay: lease::replay(live.attested.replay),
        key: WrittenKey::new(&live.key),
        created_at: live.created_at.to_string(),
        token_expires_at: live.token_expires_at.to_string(),
    }))
}

fn annotate(object: &mut DynamicObject, written: &Written) -> Result<(), String> {
    let text = serde_json::to_string(written).map_err(|error| error.to_string())?;
    object.metadata.annotations.get_or_insert_default().insert(LEASE.to_owned(), text);
    Ok(())
}

/// What the reconciler adds to a war's conditions.
#[derive(Debug)]
pub(crate) struct Condition {
    pub kind: &'static str,
    /// `None`: as it should be.
    pub problem: Option<(&'static str, String)>,
}

impl Condition {
    /// Without a time.
    pub(crate) fn to_json(&self) -> Value {
        match &self.problem {
            None => json!({"type": self.kind, "status": "True", "reason": "AsWanted", "message": ""}),
            Some((reason, message)) => {
                json!({"type": self.kind, "status": "False", "reason": reason, "message": message})
            }
        }
    }
}

/// The status of a live registration, with conditions `added` (without times); conditions of others stay, and a condition that stays as it is keeps its time.
pub(crate) fn status(
    object: &DynamicObject,
    name: &RegistrationName,
    live: &Live,
    boot: &BootState,
    added: Vec<Value>,
    now: Timestamp,
) -> Value {
    let mut new = war::resource(name, live, None)["status"].take();
    if let Some(generation) = object.metadata.generation {
        new["observedGeneration"] = generation.into();
    }
    let mut lease = serde_json::Map::new();
    match &live.connection {
        Connection::Connected { session, .. } => lease.insert("session".to_owned(), session.as_str().into()),
        Connection::Disconnected { reason, .. } => {
            lease.insert("reason".to_owned(), lease::reason_name(*reason).into())
        }
    };
    if let Some(applied) = &boot.applied {
        lease.insert("boot".to_owned(), json!(applied));
    }
    if let Some(behind) = &boot.behind {
        lease.insert("behind".to_owned(), json!(behind));
    }
    new["lease"] = lease.into();
    let old = object.data["status"]["conditions"].as_array();
    let mut conditions = new["conditions"].take();
    if let Some(conditions) = conditions.as_array_mut() {
        conditions.extend(added);
        let of_kind = |kind: &Value| old.into_iter().flatten().find(|it| it["type"] == *kind);
        for condition in conditions.iter_mut().filter(|it| it["lastTransitionTime"].is_null()) {
            let same = of_kind(&condition["type"]).filter(|before| before["status"] == condition["status"]);
            condition["lastTransitionTime"] = match same {
                Some(before) => before["lastTransitionTime"].clone(),
                None => seconds(now).into(),
            };
        }
        let ours: Vec<Value> = conditions.iter().map(|it| it["type"].clone()).collect();
        conditions.extend(old.into_iter().flatten().filter(|it| !ours.contains(&it["type"])).cloned());
    }
    new["conditions"] = conditions;
    new
}

/// As Kubernetes writes times.
pub(crate) fn seconds(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

/// The name of a namespaced object.
pub(crate) fn name_of(metadata: &ObjectMeta) -> Option<RegistrationName> {
    Some(RegistrationName { namespace: metadata.namespace.clone()?, name: metadata.name.clone()? })
}

#[cfg(test)]
#[path = "object_tests.rs"]
mod tests;
