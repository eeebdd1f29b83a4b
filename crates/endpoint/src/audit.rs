//! One line of JSON for every decision, written before its token leaves.

use jiff::Timestamp;
use onboarding_core::identity::{Identity, Thumbprint};
use onboarding_kinds::identity::{Case, to_json};
use serde::Serialize;
use std::io::Write;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

/// Where the lines go.
pub struct Audit {
    sink: Mutex<Box<dyn Write + Send>>,
}

/// What was decided, about whom, and why.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry<'a> {
    pub time: Timestamp,
    pub decision: Decision,
    /// `namespace/name`.
    pub workload_group: String,
    /// `namespace/name` of the registration, once the identity has a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registration: Option<String>,
    /// Only what was proven.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<serde_json::Value>,
    /// Thumbprint, once it was proven.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_key: Option<String>,
    pub peer: IpAddr,
    /// The policy and the rule that allow it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
    /// Why it was refused.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub reasons: &'a [String],
    /// Of the token that this decision allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_id: Option<&'a str>,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Decision {
    Allowed,
    Refused,
}

impl<'a> Entry<'a> {
    pub(crate) fn new(time: Timestamp, decision: Decision, workload_group: String, peer: IpAddr) -> Self {
        Self {
            time,
            decision,
            workload_group,
            registration: None,
            identity: None,
            agent_key: None,
            peer,
            policy: None,
            rule: None,
            reasons: &[],
            token_id: None,
        }
    }
    pub(crate) fn about(self, identity: Option<&Identity>, key: Option<Thumbprint>) -> Self {
        Self {
            identity: identity.map(|identity| to_json(identity, Case::Camel)),
            agent_key: key.map(|key| key.to_string()),
            ..self
        }
    }
}

impl Audit {
    pub fn new(sink: Box<dyn Write + Send>) -> Self {
        Self { sink: Mutex::new(sink) }
    }

    /// An error means that the line may be missing: nothing may be allowed then.
    pub(crate) fn write(&self, entry: &Entry<'_>) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        sink.write_all(&line)?;
        sink.flush()
    }
}
