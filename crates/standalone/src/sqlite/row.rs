//! A state as a row, and back.

use jiff::Timestamp;
use onboarding_core::identity::{Attested, Identity};
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::registration::{Connection as Session, Ended, Health, HostReport, KeyMemory, Live, State};
use onboarding_endpoint::backend::Stored;
use onboarding_kinds::identity::{self, Case};
use onboarding_kinds::war::lease::{self, parse_reason, parse_replay, reason_name, replay};
use onboarding_kinds::war::report;
use rusqlite::{Connection, named_params};
use serde_json::Value;

/// The columns of a row but its name and version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row {
    state: String,
    key_thumbprint: Option<String>,
    key_replay: Option<String>,
    ended_at: Option<String>,
    group_namespace: Option<String>,
    group_name: Option<String>,
    identity: Option<String>,
    claimed_only: Option<String>,
    issuer_short_name: Option<String>,
    evidence_replay: Option<String>,
    report: Option<String>,
    created_at: Option<String>,
    token_expires_at: Option<String>,
    replica: Option<String>,
    session: Option<String>,
    connection_since: Option<String>,
    disconnect_reason: Option<String>,
    ready: Option<bool>,
    health_message: Option<String>,
    health_since: Option<String>,
}

pub const SELECT: &str = "SELECT namespace, name, version, state, key_thumbprint, key_replay, ended_at, group_namespace, group_name, \
     identity, claimed_only, issuer_short_name, evidence_replay, report, created_at, token_expires_at, replica, session, \
     connection_since, disconnect_reason, ready, health_message, health_since FROM registration";

const REPLACE: &str = "INSERT OR REPLACE INTO registration (namespace, name, version, state, key_thumbprint, key_replay, ended_at, \
     group_namespace, group_name, identity, claimed_only, issuer_short_name, evidence_replay, report, created_at, token_expires_at, \
     replica, session, connection_since, disconnect_reason, ready, health_message, health_since) \
     VALUES (:namespace, :name, :version, :state, :key_thumbprint, :key_replay, :ended_at, :group_namespace, :group_name, :identity, \
     :claimed_only, :issuer_short_name, :evidence_replay, :report, :created_at, :token_expires_at, :replica, :session, \
     :connection_since, :disconnect_reason, :ready, :health_message, :health_since)";

impl Row {
    /// `None` for `Absent`, which has no row. What is returned can be read back.
    pub fn new(state: &State) -> Result<Option<Self>, String> {
        match state {
            State::Absent => Ok(None),
            State::Ended(ended) => {
                let row = Self { state: "ended".to_owned(), ended_at: time(ended.at), ..Self::default() };
                Ok(Some(row.with_key(ended.key.as_ref())))
            }
            State::Live(live) => Self::live(live).map(Some),
        }
    }

    fn live(live: &Live) -> Result<Self, String> {
        let (identity, claimed) = identity::stated_to_json(&live.attested.identity, Case::Camel);
        let report = report::to_json(&live.report);
        // These two say what a host said, and their readers refuse something; all else comes back as it is.
        read_identity(&identity, &claimed)?;
        read_report(&report)?;
        let mut row = Self {
            state: "live".to_owned(),
            group_namespace: Some(live.group.namespace.clone()),
            group_name: Some(live.group.name.clone()),
            identity: Some(identity.to_string()),
            claimed_only: (!claimed.is_empty()).then(|| Value::from(claimed).to_string()),
            issuer_short_name: live.attested.issuer_short_name.clone(),
            evidence_replay: Some(replay(live.attested.replay)),
            report: Some(report.to_string()),
            created_at: time(live.created_at),
            token_expires_at: time(live.token_expires_at),
            ready: Some(live.health.ready),
            health_message: Some(live.health.message.clone()),
            health_since: time(live.health_since),
            ..Self::default()
        };
        match &live.connection {
            Session::Connected { replica, session, since } => {
                row.replica = Some(replica.clone());
                row.session = Some(session.clone());
                row.connection_since = time(*since);
            }
            Session::Disconnected { since, reason } => {
                row.connection_since = time(*since);
                row.disconnect_reason = Some(reason_name(*reason).to_owned());
            }
        }
        Ok(row.with_key(Some(&live.key)))
    }

    fn with_key(mut self, key: Option<&KeyMemory>) -> Self {
        self.key_thumbprint = key.map(|key| key.thumbprint.to_string());
        self.key_replay = key.map(|key| replay(key.replay));
        self
    }

    /// The state that this row is of.
    pub fn state(&self) -> Result<State, String> {
        let key = match (&self.key_thumbprint, &self.key_replay) {
            (Some(thumbprint), Some(replay)) => Some(KeyMemory {
                thumbprint: thumbprint.parse().map_err(|error| format!("key_thumbprint: {error}"))?,
                replay: parse_replay(replay)?,
            }),
            (None, None) => None,
            _ => return Err("half a key".to_owned()),
        };
        match self.state.as_str() {
            "ended" => Ok(State::Ended(Ended { key, at: parse_time("ended_at", &self.ended_at)? })),
            "live" => Ok(State::Live(Box::new(self.parse_live(key.ok_or("key_thumbprint is missing")?)?))),
            other => Err(format!("state {other:?} is unknown")),
        }
    }

    fn parse_live(&self, key: KeyMemory) -> Result<Live, String> {
        let since = parse_time("connection_since", &self.connection_since)?;
        let json = |column, text: &Option<String>| {
            serde_json::from_str::<Value>(needed(column, text)?).map_err(|error| format!("{column}: {error}"))
        };
        let claimed: Vec<String> = match &self.claimed_only {
            Some(text) => serde_json::from_str(text).map_err(|error| format!("claimed_only: {error}"))?,
            None => Vec::new(),
        };
        Ok(Live {
            group: GroupName {
                namespace: needed("group_namespace", &self.group_namespace)?.to_owned(),
                name: needed("group_name", &self.group_name)?.to_owned(),
            },
            attested: Attested {
                identity: read_identity(&json("identity", &self.identity)?, &claimed)?,
                issuer_short_name: self.issuer_short_name.clone(),
                replay: parse_replay(needed("evidence_replay", &self.evidence_replay)?)?,
            },
            key,
            report: read_report(&json("report", &self.report)?)?,
            created_at: parse_time("created_at", &self.created_at)?,
            token_expires_at: parse_time("token_expires_at", &self.token_expires_at)?,
            connection: match (&self.replica, &self.session, &self.disconnect_reason) {
                (Some(replica), Some(session), None) => {
                    Session::Connected { replica: replica.clone(), session: session.clone(), since }
                }
                (None, None, Some(reason)) => Session::Disconnected { since, reason: parse_reason(reason)? },
                _ => return Err("neither connected nor disconnected".to_owned()),
            },
            health: Health {
                ready: self.ready.ok_or("ready is missing")?,
                message: needed("health_message", &self.health_message)?.to_owned(),
            },
            // Rows of before this was kept have none.
            health_since: match &self.health_since {
                Some(_) => parse_time("health_since", &self.health_since)?,
                None => since,
            },
        })
    }

    pub fn write(&self, connection: &Connection, name: &RegistrationName, version: u64) -> rusqlite::Result<()> {
        connection.prepare_cached(REPLACE)?.execute(named_params! {
            ":namespace": name.namespace,
            ":name": name.name,
            ":version": version as i64,
            ":state": self.state,
            ":key_thumbprint": self.key_thumbprint,
            ":key_replay": self.key_replay,
            ":ended_at": self.ended_at,
            ":group_namespace": self.group_namespace,
            ":group_name": self.group_name,
            ":identity": self.identity,
            ":claimed_only": self.claimed_only,
            ":issuer_short_name": self.issuer_short_name,
            ":evidence_replay": self.evidence_replay,
            ":report": self.report,
            ":created_at": self.created_at,
            ":token_expires_at": self.token_expires_at,
            ":replica": self.replica,
            ":session": self.session,
            ":connection_since": self.connection_since,
            ":disconnect_reason": self.disconnect_reason,
            ":ready": self.ready,
            ":health_message": self.health_message,
            ":health_since": self.health_since,
        })?;
        Ok(())
    }
}

pub fn delete(connection: &Connection, name: &RegistrationName) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM registration WHERE namespace = ?1 AND name = ?2")?
        .execute([&name.namespace, &name.name])?;
    Ok(())
}

/// A row of [`SELECT`]; the inner error says what in it can't be understood.
pub fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Result<(RegistrationName, Stored), String>> {
    let name = RegistrationName { namespace: row.get("namespace")?, name: row.get("name")? };
    let version: i64 = row.get("version")?;
    let columns = Row {
        state: row.get("state")?,
        key_thumbprint: row.get("key_thumbprint")?,
        key_replay: row.get("key_replay")?,
        ended_at: row.get("ended_at")?,
        group_namespace: row.get("group_namespace")?,
        group_name: row.get("group_name")?,
        identity: row.get("identity")?,
        claimed_only: row.get("claimed_only")?,
        issuer_short_name: row.get("issuer_short_name")?,
        evidence_replay: row.get("evidence_replay")?,
        report: row.get("report")?,
        created_at: row.get("created_at")?,
        token_expires_at: row.get("token_expires_at")?,
        replica: row.get("replica")?,
        session: row.get("session")?,
        connection_since: row.get("connection_since")?,
        disconnect_reason: row.get("disconnect_reason")?,
        ready: row.get("ready")?,
        health_message: row.get("health_message")?,
        health_since: row.get("health_since")?,
    };
    Ok(columns
        .state()
        .and_then(|state| {
            let version = u64::try_from(version).map_err(|_| "a negative version".to_owned())?;
            Ok(Stored { state, version })
        })
        .map(|stored| (name.clone(), stored))
        .map_err(|problem| format!("{name}: {problem}")))
}

fn read_identity(value: &Value, claimed: &[String]) -> Result<Identity, String> {
    identity::from_json(value, claimed).map_err(|problem| format!("identity: {problem}"))
}

fn read_report(value: &Value) -> Result<HostReport, String> {
    report::from_json(value).map_err(|problem| format!("report: {problem}"))
}

fn needed<'a>(column: &str, value: &'a Option<String>) -> Result<&'a str, String> {
    value.as_deref().ok_or_else(|| format!("{column} is missing"))
}

fn time(time: Timestamp) -> Option<String> {
    Some(time.to_string())
}

fn parse_time(column: &str, text: &Option<String>) -> Result<Timestamp, String> {
    lease::parse_time(column, needed(column, text)?)
}

#[cfg(test)]
#[path = "row_tests.rs"]
mod tests;
