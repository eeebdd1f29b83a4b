//! AuthorizeOnboarding: evidence and a proof of the agent's key in, a decision that is written down, a token out.

use crate::audit::{Decision as Outcome, Entry};
use crate::authority::{Authority, refusal_status, registry_status, timestamp, token_status};
use crate::backend::{PlaneSettings, Snapshot};
use crate::connection::Connection;
use crate::lifecycle::vouched_for;
use crate::limits::exhausted;
use crate::refusal::{ATTESTATION_UNAVAILABLE, BELONGS_TO_ANOTHER, EVIDENCE_REFUSED, NOT_AUTHORIZED, Refused};
use jiff::Timestamp;
use onboarding_attest::{AttestError, Context, Evidence};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::identity::{Attested, Identity, Thumbprint};
use onboarding_core::name::{GroupName, RegistrationName, is_resource_name, registration_name};
use onboarding_core::policy::Decision;
use onboarding_core::registration::admits_key;
use onboarding_core::token::{Claims, lifetime};
use onboarding_wire::convert::group_name;
use onboarding_wire::onboarding as pb;
use onboarding_wire::proof::Purpose;
use onboarding_wire::{AWS_EC2_CREDENTIAL, AWS_ECS_CREDENTIAL, JWT_CREDENTIAL};
use prost::Message;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tonic::{Code, Status};

/// A refusal names so many policies; the audit line too.
const MOST_REASONS: usize = 3;
/// Policies that a refusal is explained by: anybody can be refused, so this is not to grow with the mesh. `onboardctl explain` looks at all.
const MOST_EXPLAINED: usize = 1000;
/// A status message of that many bytes passes every HTTP/2 header limit, also with each of them escaped.
const LONGEST_MESSAGE: usize = 2000;
/// Attestors bound each of their own questions to other servers; this bounds them together.
const ATTESTED_WITHIN: Duration = Duration::from_secs(15);
const BUSY: Duration = Duration::from_secs(1);

impl Authority {
    pub(crate) async fn authorize(
        &self,
        connection: &Connection,
        request: pb::AuthorizeOnboardingRequest,
    ) -> Result<pb::AuthorizeOnboardingResponse, Status> {
        connection.authorization(self.authorizations_per_connection)?;
        self.rates.authorization(connection.peer.ip())?;
        let _permit =
            self.authorizations.try_acquire().map_err(|_| exhausted("the plane is busy with other agents", BUSY))?;
        let started = Instant::now();
        let snapshot = self.snapshot();
        let plane = Self::plane(&snapshot)?;
        let group = group_name(request.workload_group).map_err(|error| Status::invalid_argument(error.to_string()))?;
        if !is_resource_name(&group.namespace) || !is_resource_name(&group.name) {
            return Err(Status::invalid_argument("workload_group: its namespace or name is no name of Kubernetes"));
        }
        let credential =
            request.credential.ok_or_else(|| Status::invalid_argument("credential: the evidence is missing"))?;
        let mut case = Case {
            authority: self,
            connection,
            group,
            now: Timestamp::now(),
            key: None,
            attested: None,
            registration: None,
        };
        let granted = case.decide(&snapshot, &plane, &credential, request.proof.as_ref()).await;
        let Grant { claims, policy, rule } = match granted {
            Ok(grant) => grant,
            Err(refused) => return Err(case.refuse(refused).await),
        };
        // The line first: what isn't written down isn't allowed.
        let mut entry = case.entry(Outcome::Allowed);
        entry.policy = Some(&policy);
        entry.rule = Some(rule);
        entry.token_id = Some(&claims.id);
        self.write_down(&entry).await?;
        let token = self.tokens.sign(&claims).map_err(token_status)?;
        let claims = Arc::new(claims);
        connection.set_proven(claims.key);
        connection.set_admitted();
        connection.know(&token, &claims);
        tracing::info!(registration = %claims.subject, peer = %connection.peer, policy, rule, "authorized");
        self.metrics.authorization_seconds.observe(started.elapsed().as_secs_f64());
        Ok(pb::AuthorizeOnboardingResponse {
            token,
            expires_at: Some(timestamp(claims.expires_at)),
            registration: claims.subject.to_string(),
        })
    }
}

/// One authorization, as far as it has come.
struct Case<'a> {
    authority: &'a Authority,
    connection: &'a Connection,
    group: GroupName,
    now: Timestamp,
    key: Option<Thumbprint>,
    attested: Option<Attested>,
    registration: Option<RegistrationName>,
}

/// The claims that are granted, and the policy and rule that grant them.
struct Grant {
    claims: Claims,
    policy: String,
    rule: usize,
}

impl Case<'_> {
    async fn decide(
        &mut self,
        snapshot: &Snapshot,
        plane: &PlaneSettings,
        credential: &prost_types::Any,
        proof: Option<&pb::KeyProof>,
    ) -> Result<Grant, Refused> {
        let purpose = Purpose::Authorize { evidence: &credential.value, group: &self.group.to_string() };
        let (key, challenge) = self.connection.prove(&plane.uid, proof, purpose)?;
        self.key = Some(key);
        let context =
            Context { plane_uid: &plane.uid, challenge: &challenge, key, now: self.now, issuers: &plane.issuers };
        let evidence = evidence(credential)?;
        let attesting = self.authority.attestors.attest(&evidence, context);
        let attested = tokio::time::timeout(ATTESTED_WITHIN, attesting)
            .await
            .unwrap_or_else(|_| Err(AttestError::Unavailable("the evidence could not be checked in time".to_owned())))
            .map_err(|error| Refused::from(attest_status(error)))?;
        let attested = self.attested.insert(attested).clone();
        let Admission { policy, rule, .. } = admission(snapshot, &attested.identity, &self.group)?;
        let name = registration_name(&self.group, &attested.identity, attested.issuer_short_name.as_deref())
            .map_err(|error| Refused::from(Status::permission_denied(error.to_string())))?;
        let name = self.registration.insert(name).clone();
        let state = self.authority.lifecycle.load(&name).await.map_err(registry_status)?;
        admits_key(&state, key, attested.replay, self.now).map_err(|refusal| refusal_status(&refusal, Some(&name)))?;
        let (issued_at, expires_at) = lifetime(&state, self.now, plane.token_life);
        let claims = Claims {
            plane_uid: plane.uid.clone(),
            subject: name,
            issued_at,
            expires_at,
            id: uuid::Uuid::new_v4().to_string(),
            attested,
            group: self.group.clone(),
            key,
        };
        Ok(Grant { claims, policy, rule })
    }

    fn entry(&self, outcome: Outcome) -> Entry<'_> {
        let mut entry = Entry::new(self.now, outcome, self.group.to_string())
            .about(self.attested.as_ref().map(|attested| &attested.identity), self.key);
        entry.peer = Some(self.connection.peer.ip());
        entry.registration = self.registration.as_ref().map(ToString::to_string);
        entry
    }

    async fn refuse(&self, refused: Refused) -> Status {
        let identity = self.attested.as_ref().map(|attested| &attested.identity);
        let reason = self.for_operators(&refused.status);
        self.authority.tell(self.entry(Outcome::Refused), &self.group, identity, &refused, reason).await;
        refused.status
    }

    /// What a refusal is called, where it is one that an operator can do something about.
    fn for_operators(&self, status: &Status) -> Option<&'static str> {
        match status.code() {
            Code::PermissionDenied => Some(NOT_AUTHORIZED),
            Code::Unauthenticated if self.key.is_some() => Some(EVIDENCE_REFUSED),
            // Who is asked about the evidence (an issuer's keys, STS) doesn't answer.
            Code::Unavailable if self.key.is_some() && self.attested.is_none() => Some(ATTESTATION_UNAVAILABLE),
            Code::FailedPrecondition if self.registration.is_some() => Some(BELONGS_TO_ANOTHER),
            _ => None,
        }
    }
}

fn evidence(credential: &prost_types::Any) -> Result<Evidence, Status> {
    let unreadable = |_| Status::invalid_argument("credential: the message can't be read");
    match credential.type_url.as_str() {
        AWS_EC2_CREDENTIAL => {
            pb::AwsEc2Credential::decode(credential.value.as_slice()).map(Evidence::AwsEc2).map_err(unreadable)
        }
        AWS_ECS_CREDENTIAL => {
            pb::AwsEcsCredential::decode(credential.value.as_slice()).map(Evidence::AwsEcs).map_err(unreadable)
        }
        JWT_CREDENTIAL => pb::JwtCredential::decode(credential.value.as_slice()).map(Evidence::Jwt).map_err(unreadable),
        other => Err(Status::invalid_argument(format!(
            "credential: {:?} is no kind of evidence that this plane knows",
            other.chars().take(100).collect::<String>()
        ))),
    }
}

fn attest_status(error: AttestError) -> Status {
    match error {
        AttestError::Refused(why) => Status::unauthenticated(truncated(why)),
        AttestError::Unavailable(why) => Status::unavailable(truncated(why)),
    }
}

/// The group that an identity may join, and by which policy and rule.
pub(crate) struct Admission<'a> {
    pub(crate) group: &'a Arc<WorkloadGroup>,
    policy: String,
    rule: usize,
}

/// Whether a policy admits this identity to this group, as things are configured in this snapshot.
pub(crate) fn admission<'a>(
    snapshot: &'a Snapshot,
    identity: &Identity,
    name: &GroupName,
) -> Result<Admission<'a>, Refused> {
    let Some(group) = snapshot.groups.get(name) else {
        return Err(Status::permission_denied(format!(
            "Not authorized by OnboardingPolicy: there is no WorkloadGroup {name}; create it, or correct workloadGroup in the agent's onboarding.config.yaml"
        ))
        .into());
    };
    if !vouched_for(snapshot, identity) {
        return Err(Status::permission_denied(
            "Not authorized by OnboardingPolicy: the issuer of this workload's JWT isn't in spec.meshExpansion.onboarding.workloads.authentication.jwt.issuers of the ControlPlane any more",
        )
        .into());
    }
    match snapshot.policies.decide(identity, group) {
        Decision::Allowed { policy, rule } => Ok(Admission { group, policy, rule }),
        Decision::Refused => {
            let reasons = snapshot.policies.reasons(identity, group, MOST_EXPLAINED, MOST_REASONS);
            let mut reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
            if reasons.is_empty() {
                reasons.push(format!("there is no OnboardingPolicy in namespace {}", name.namespace));
            }
            let mut message = format!("Not authorized by OnboardingPolicy to join WorkloadGroup {name}");
            if snapshot.policy_unreadable {
                message.push_str("; a policy can't be read, see the plane's log");
            }
            for reason in &reasons {
                message.push_str("; ");
                message.push_str(reason);
            }
            Err(Refused { status: Status::permission_denied(truncated(message)), reasons })
        }
    }
}

fn truncated(mut message: String) -> String {
    if message.len() > LONGEST_MESSAGE {
        let end = (0..=LONGEST_MESSAGE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or(0);
        message.truncate(end);
        message.push_str(" ...");
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut_between_characters() {
        assert_eq!(truncated("short".to_owned()), "short");
        let cut = truncated(format!("a{}", "ü".repeat(LONGEST_MESSAGE)));
        assert!(cut.len() <= LONGEST_MESSAGE + 4 && cut.ends_with("ü ..."), "{} bytes", cut.len());
    }
}
