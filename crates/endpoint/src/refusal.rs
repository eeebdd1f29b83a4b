//! What becomes of a refusal: a line in the log, one in the audit log, and word to whoever looks after the group.

use crate::audit::{Decision as Outcome, Entry};
use crate::authority::Authority;
use crate::backend;
use crate::connection::Connection;
use jiff::Timestamp;
use onboarding_core::identity::Identity;
use onboarding_core::name::GroupName;
use onboarding_core::token::Claims;
use onboarding_kinds::identity;
use tonic::{Code, Status};

pub(crate) const NOT_AUTHORIZED: &str = "NotAuthorized";
pub(crate) const EVIDENCE_REFUSED: &str = "EvidenceRefused";
pub(crate) const ATTESTATION_UNAVAILABLE: &str = "AttestationUnavailable";
pub(crate) const BELONGS_TO_ANOTHER: &str = "RegistrationBelongsToAnother";
const REGISTRATION_REFUSED: &str = "RegistrationRefused";

/// Why a call is refused: what the agent is told, and what is written down.
pub(crate) struct Refused {
    pub(crate) status: Status,
    pub(crate) reasons: Vec<String>,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self { reasons: vec![status.message().to_owned()], status }
    }
}

impl Authority {
    /// Tells everybody but the agent. `reason`: what it is called where an operator can do something about it.
    pub(crate) async fn tell(
        &self,
        mut entry: Entry<'_>,
        group: &GroupName,
        identity: Option<&Identity>,
        refused: &Refused,
        reason: Option<&'static str>,
    ) {
        tracing::warn!(
            %group,
            peer = entry.peer.map(tracing::field::display),
            reason = %refused.status.message().escape_debug(),
            "onboarding refused"
        );
        entry.reasons = &refused.reasons;
        // A refusal stands whether it could be written down or not.
        let _ = self.write_down(&entry).await;
        if let Some(reason) = reason {
            self.backend.notices.refused(backend::Refused {
                group: group.clone(),
                identity: identity.map(|identity| identity::to_json(identity, identity::Case::Camel).to_string()),
                reason,
                message: refused.status.message().to_owned(),
            });
        }
    }

    /// Refuses a call that came with a token; gives what the agent is told.
    pub(crate) async fn refuse(&self, connection: &Connection, claims: &Claims, refused: Refused) -> Status {
        let reason = match refused.status.code() {
            Code::PermissionDenied => NOT_AUTHORIZED,
            Code::FailedPrecondition => BELONGS_TO_ANOTHER,
            Code::InvalidArgument => REGISTRATION_REFUSED,
            // It passes by itself, or by onboarding again.
            _ => return refused.status,
        };
        // As often as authorizations are written down, and no more often.
        if connection.authorization(self.authorizations_per_connection).is_ok() {
            let identity = Some(&claims.attested.identity);
            let mut entry = Entry::new(Timestamp::now(), Outcome::Refused, claims.group.to_string())
                .about(identity, Some(claims.key));
            entry.peer = Some(connection.peer.ip());
            entry.registration = Some(claims.subject.to_string());
            self.tell(entry, &claims.group, identity, &refused, Some(reason)).await;
        }
        refused.status
    }
}
