//! Discovery, authorization, registration: from a challenge to a durable registration.

use crate::audit::{Audit, Decision as Outcome, Entry};
use crate::backend::{Backend, PlaneSettings, RegistryError, Snapshot};
use crate::connection::{Challenge, Connection};
use crate::lifecycle::{ApplyError, Lifecycle};
use crate::limits::{Rates, exhausted};
use crate::metrics::Metrics;
use crate::token::{TokenError, Tokens};
use jiff::Timestamp;
use onboarding_attest::{AttestError, Attestors, Context, Evidence};
use onboarding_core::group::{WorkloadEntry, WorkloadGroup};
use onboarding_core::identity::{Attested, Thumbprint};
use onboarding_core::name::{GroupName, RegistrationName, registration_name};
use onboarding_core::policy::Decision;
use onboarding_core::registration::{Event, HostReport, Refusal, Register, State, admits_key};
use onboarding_core::token::{Claims, accept, lifetime};
use onboarding_wire::convert::group_name;
use onboarding_wire::onboarding as pb;
use onboarding_wire::proof::Purpose;
use onboarding_wire::{AWS_EC2_CREDENTIAL, JWT_CREDENTIAL};
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

/// A refusal names so many policies; the audit line too.
const MOST_REASONS: usize = 5;
/// A status message of that many bytes passes every HTTP/2 header limit.
const LONGEST_MESSAGE: usize = 2000;

/// Everything that a call needs. One for the whole endpoint.
pub(crate) struct Authority {
    pub(crate) backend: Backend,
    pub(crate) attestors: Arc<Attestors>,
    pub(crate) tokens: Tokens,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) audit: Audit,
    pub(crate) metrics: Metrics,
    pub(crate) rates: Rates,
    pub(crate) authorizations: Semaphore,
    pub(crate) stop: tokio_util::sync::CancellationToken,
    pub(crate) replica: String,
}

/// A call whose token was accepted.
pub(crate) struct Caller {
    pub(crate) claims: Claims,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) plane: Arc<PlaneSettings>,
}

impl Authority {
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.backend.config.watch().borrow().clone()
    }

    fn plane(snapshot: &Snapshot) -> Result<Arc<PlaneSettings>, Status> {
        snapshot
            .plane
            .clone()
            .ok_or_else(|| Status::unavailable("onboarding is not enabled: the plane has no valid ControlPlane"))
    }

    pub(crate) fn discover(&self, connection: &Connection) -> Result<pb::DiscoverResponse, Status> {
        let plane = Self::plane(&self.snapshot())?;
        Ok(pb::DiscoverResponse {
            plane_uid: plane.uid.clone(),
            challenge: connection.challenge()?.to_vec(),
            time: Some(timestamp(Timestamp::now())),
        })
    }

    pub(crate) async fn authorize(
        &self,
        connection: &Connection,
        request: pb::AuthorizeOnboardingRequest,
    ) -> Result<pb::AuthorizeOnboardingResponse, Status> {
        self.rates.authorization(connection.peer.ip())?;
        let _permit = self
            .authorizations
            .try_acquire()
            .map_err(|_| exhausted("the plane is busy with other agents", Duration::from_secs(1)))?;
        let started = std::time::Instant::now();
        let now = Timestamp::now();
        let group = group_name(request.workload_group).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let snapshot = self.snapshot();
        let plane = Self::plane(&snapshot)?;
        let credential =
            request.credential.ok_or_else(|| Status::invalid_argument("credential: the evidence is missing"))?;
        let purpose = Purpose::Authorize { evidence: &credential.value, group: &group.to_string() };
        let (key, challenge) = connection.prove(&plane.uid, request.proof.as_ref(), purpose)?;

        let mut case = Case { authority: self, connection, group, key, now, attested: None, registration: None };
        let granted = case.decide(&snapshot, &plane, &credential, challenge).await;
        let (claims, policy, rule) = match granted {
            Ok(granted) => granted,
            Err(refused) => return Err(case.refuse(refused)),
        };
        // The line first: what isn't written down isn't allowed.
        let mut entry = case.entry(Outcome::Allowed);
        entry.policy = Some(&policy);
        entry.rule = Some(rule);
        entry.token_id = Some(&claims.id);
        self.write_down(&entry)?;
        let token = self.tokens.sign(&claims).await.map_err(token_status)?;
        connection.set_proven(key);
        self.metrics.authorization_seconds.observe(started.elapsed().as_secs_f64());
        Ok(pb::AuthorizeOnboardingResponse {
            token,
            expires_at: Some(timestamp(claims.expires_at)),
            registration: claims.subject.to_string(),
        })
    }

    /// Accepts a token of this plane, whose key this connection has proven or proves now.
    pub(crate) async fn caller<T>(
        &self,
        connection: &Connection,
        request: &Request<T>,
        proof: Option<&pb::KeyProof>,
    ) -> Result<Caller, Status> {
        let token = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "))
            .ok_or_else(|| Status::unauthenticated("the token is missing: `authorization: Bearer <token>`"))?;
        self.accept_token(connection, token, proof).await
    }

    pub(crate) async fn accept_token(
        &self,
        connection: &Connection,
        token: &str,
        proof: Option<&pb::KeyProof>,
    ) -> Result<Caller, Status> {
        let snapshot = self.snapshot();
        let plane = Self::plane(&snapshot)?;
        let key = match connection.proven() {
            Some(key) => key,
            None => {
                let (key, _) = connection.prove(&plane.uid, proof, Purpose::UseToken { token })?;
                connection.set_proven(key);
                key
            }
        };
        let claims = self.tokens.read(token).await.map_err(token_status)?;
        accept(&claims, &plane.uid, key, Timestamp::now())
            .map_err(|refusal| Status::unauthenticated(refusal.to_string()))?;
        Ok(Caller { claims, snapshot, plane })
    }

    pub(crate) async fn register(
        &self,
        connection: &Connection,
        request: Request<pb::RegisterWorkloadRequest>,
    ) -> Result<pb::RegisterWorkloadResponse, Status> {
        let caller = self.caller(connection, &request, request.get_ref().proof.as_ref()).await?;
        let registration = request
            .into_inner()
            .registration
            .ok_or_else(|| Status::invalid_argument("registration: what the agent says of itself is missing"))?;
        let report = HostReport::try_from(registration).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let Caller { claims, snapshot, .. } = caller;
        let group = admitting_group(&snapshot, &claims)?;
        WorkloadEntry::new(claims.subject.clone(), group, &claims.attested.identity, &report)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let event = Event::Register(Box::new(Register {
            group: claims.group,
            attested: claims.attested,
            key: claims.key,
            report,
            token_issued_at: claims.issued_at,
            token_expires_at: claims.expires_at,
        }));
        let state = self.lifecycle.apply(&claims.subject, event).await.map_err(apply_status)?;
        // The policies may have changed since they were asked. Whoever changed them goes through what is stored: either
        // that finds this registration, or this finds the change.
        let now = self.snapshot();
        if let State::Live(live) = &state
            && !crate::lifecycle::admitted(&now, live)
        {
            self.lifecycle.apply(&claims.subject, Event::Withdraw).await.map_err(apply_status)?;
            return Err(not_authorized(&live.group, now.policy_unreadable, &[]));
        }
        tracing::info!(registration = %claims.subject, peer = %connection.peer, "registered");
        Ok(pb::RegisterWorkloadResponse { name: claims.subject.to_string() })
    }

    pub(crate) async fn unregister(
        &self,
        connection: &Connection,
        request: Request<pb::UnregisterWorkloadRequest>,
    ) -> Result<pb::UnregisterWorkloadResponse, Status> {
        let caller = self.caller(connection, &request, request.get_ref().proof.as_ref()).await?;
        match self.lifecycle.apply(&caller.claims.subject, Event::Unregister { key: caller.claims.key }).await {
            // Whoever says goodbye twice has left.
            Ok(_) | Err(ApplyError::Refused(Refusal::Gone)) => {}
            Err(error) => return Err(apply_status(error)),
        }
        tracing::info!(registration = %caller.claims.subject, "unregistered");
        Ok(pb::UnregisterWorkloadResponse { propagation_delay: caller.plane.propagation_delay.try_into().ok() })
    }

    fn write_down(&self, entry: &Entry<'_>) -> Result<(), Status> {
        self.audit.write(entry).map_err(|error| {
            self.metrics.audit_failures.inc();
            tracing::error!(%error, "a decision can't be written to the audit log, so nothing is allowed");
            Status::unavailable("the plane can't write its audit log, so it allows nothing; see the plane's log")
        })
    }
}

/// One authorization, as far as it has come.
struct Case<'a> {
    authority: &'a Authority,
    connection: &'a Connection,
    group: GroupName,
    key: Thumbprint,
    now: Timestamp,
    attested: Option<Attested>,
    registration: Option<RegistrationName>,
}

/// Why an authorization is refused: what the agent is told, and what is written down.
struct Refused {
    status: Status,
    reasons: Vec<String>,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self { reasons: vec![status.message().to_owned()], status }
    }
}

impl Case<'_> {
    /// The claims that are granted, and the policy and rule that grant them.
    async fn decide(
        &mut self,
        snapshot: &Snapshot,
        plane: &PlaneSettings,
        credential: &prost_types::Any,
        challenge: Challenge,
    ) -> Result<(Claims, String, usize), Refused> {
        let context = Context {
            plane_uid: &plane.uid,
            challenge: &challenge,
            key: self.key,
            now: self.now,
            issuers: &plane.issuers,
        };
        let attested = self
            .authority
            .attestors
            .attest(&evidence(credential)?, context)
            .await
            .map_err(|error| Refused::from(attest_status(error)))?;
        let attested = self.attested.insert(attested).clone();
        let (policy, rule) = self.admit(snapshot, &attested)?;
        let name = registration_name(&self.group, &attested.identity, attested.issuer_short_name.as_deref())
            .map_err(|error| Refused::from(Status::permission_denied(error.to_string())))?;
        let name = self.registration.insert(name).clone();
        let stored = self.authority.backend.registry.load(&name).await.map_err(registry_status)?;
        admits_key(&stored.state, self.key, attested.replay, self.now)
            .map_err(|refusal| refusal_status(&refusal, Some(&name)))?;
        let (issued_at, expires_at) = lifetime(&stored.state, self.now, plane.token_life);
        let claims = Claims {
            plane_uid: plane.uid.clone(),
            subject: name,
            issued_at,
            expires_at,
            id: uuid::Uuid::new_v4().to_string(),
            attested,
            group: self.group.clone(),
            key: self.key,
        };
        Ok((claims, policy, rule))
    }

    fn admit(&self, snapshot: &Snapshot, attested: &Attested) -> Result<(String, usize), Refused> {
        let Some(group) = snapshot.groups.get(&self.group) else {
            let group = &self.group;
            return Err(Status::permission_denied(format!(
                "Not authorized by OnboardingPolicy: there is no WorkloadGroup {group}; create it, or correct workloadGroup in the agent's onboarding.config.yaml"
            ))
            .into());
        };
        match snapshot.policies.decide(&attested.identity, group) {
            Decision::Allowed { policy, rule } => Ok((policy, rule)),
            Decision::Refused => {
                let reasons: Vec<String> = snapshot
                    .policies
                    .reasons(&attested.identity, group, MOST_REASONS)
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                Err(Refused { status: not_authorized(&self.group, snapshot.policy_unreadable, &reasons), reasons })
            }
        }
    }

    fn entry(&self, outcome: Outcome) -> Entry<'_> {
        let mut entry = Entry::new(self.now, outcome, self.group.to_string(), self.connection.peer.ip())
            .about(self.attested.as_ref().map(|attested| &attested.identity), Some(self.key));
        entry.registration = self.registration.as_ref().map(ToString::to_string);
        entry
    }

    fn refuse(&self, refused: Refused) -> Status {
        let mut entry = self.entry(Outcome::Refused);
        entry.reasons = &refused.reasons;
        tracing::warn!(
            group = %self.group,
            peer = %self.connection.peer,
            reason = refused.status.message(),
            "onboarding refused"
        );
        // A refusal stands whether it could be written down or not.
        let _ = self.authority.write_down(&entry);
        refused.status
    }
}

fn evidence(credential: &prost_types::Any) -> Result<Evidence, Status> {
    let unreadable = |_| Status::invalid_argument("credential: the message can't be read");
    match credential.type_url.as_str() {
        AWS_EC2_CREDENTIAL => {
            pb::AwsEc2Credential::decode(credential.value.as_slice()).map(Evidence::AwsEc2).map_err(unreadable)
        }
        JWT_CREDENTIAL => pb::JwtCredential::decode(credential.value.as_slice()).map(Evidence::Jwt).map_err(unreadable),
        other => Err(Status::invalid_argument(format!(
            "credential: {:?} is no kind of evidence that this plane knows",
            other.chars().take(100).collect::<String>()
        ))),
    }
}

fn not_authorized(group: &GroupName, unreadable: bool, reasons: &[String]) -> Status {
    let mut message = format!("Not authorized by OnboardingPolicy to join WorkloadGroup {group}");
    if unreadable {
        message.push_str("; a policy can't be read, see the plane's log");
    }
    if reasons.is_empty() {
        message.push_str(&format!("; there is no OnboardingPolicy in namespace {}", group.namespace));
    }
    for reason in reasons {
        message.push_str("; ");
        message.push_str(reason);
    }
    Status::permission_denied(truncated(message))
}

fn truncated(mut message: String) -> String {
    if message.len() > LONGEST_MESSAGE {
        let end = (0..=LONGEST_MESSAGE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or(0);
        message.truncate(end);
        message.push_str(" ...");
    }
    message
}

/// The group that a token is for, if a policy still admits its holder.
pub(crate) fn admitting_group<'a>(snapshot: &'a Snapshot, claims: &Claims) -> Result<&'a Arc<WorkloadGroup>, Status> {
    let group = snapshot.groups.get(&claims.group).ok_or_else(|| {
        Status::permission_denied(format!(
            "Not authorized by OnboardingPolicy: there is no WorkloadGroup {}",
            claims.group
        ))
    })?;
    match snapshot.policies.decide(&claims.attested.identity, group) {
        Decision::Allowed { .. } => Ok(group),
        Decision::Refused => {
            let reasons: Vec<String> = snapshot
                .policies
                .reasons(&claims.attested.identity, group, MOST_REASONS)
                .iter()
                .map(ToString::to_string)
                .collect();
            Err(not_authorized(&claims.group, snapshot.policy_unreadable, &reasons))
        }
    }
}

/// Whether the registration lives and belongs to the key of these claims.
pub(crate) fn requires_live(state: &State, claims: &Claims) -> Result<(), Status> {
    match state {
        State::Live(live) if live.key.thumbprint == claims.key => Ok(()),
        State::Live(live) => Err(refusal_status(
            &Refusal::AnotherKey { known: live.key.thumbprint, presented: claims.key },
            Some(&claims.subject),
        )),
        State::Absent | State::Ended(_) => Err(refusal_status(&Refusal::Gone, None)),
    }
}

fn attest_status(error: AttestError) -> Status {
    match error {
        AttestError::Refused(why) => Status::unauthenticated(truncated(why)),
        AttestError::Unavailable(why) => Status::unavailable(truncated(why)),
    }
}

fn token_status(error: TokenError) -> Status {
    match error {
        TokenError::NotOurs(_) => Status::unauthenticated(error.to_string()),
        TokenError::Unavailable(_) => {
            tracing::error!(%error, "tokens can't be signed or verified");
            Status::unavailable("the plane can't use its token keys; see the plane's log")
        }
    }
}

pub(crate) fn registry_status(error: RegistryError) -> Status {
    tracing::error!(%error, "the registry could not be used");
    Status::unavailable(error.to_string())
}

pub(crate) fn refusal_status(refusal: &Refusal, name: Option<&RegistrationName>) -> Status {
    match refusal {
        Refusal::AnotherKey { .. } => {
            let name = name.map(|name| format!(" (registration {name})")).unwrap_or_default();
            Status::failed_precondition(format!("{refusal}{name}"))
        }
        Refusal::Gone => Status::not_found(refusal.to_string()),
        Refusal::TokenFromBefore => Status::unauthenticated(refusal.to_string()),
    }
}

pub(crate) fn apply_status(error: ApplyError) -> Status {
    match error {
        ApplyError::Refused(refusal) => refusal_status(&refusal, None),
        ApplyError::Registry(error) => registry_status(error),
    }
}

pub(crate) fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: time.as_second(), nanos: time.subsec_nanosecond() }
}

/// The generated services, in the words of this crate.
#[derive(Clone)]
pub(crate) struct Calls(pub(crate) Arc<Authority>);

#[tonic::async_trait]
impl pb::discovery_service_server::DiscoveryService for Calls {
    async fn discover(&self, request: Request<pb::DiscoverRequest>) -> Result<Response<pb::DiscoverResponse>, Status> {
        let outcome = Connection::of(&request).and_then(|connection| self.0.discover(&connection));
        self.0.metrics.count("Discover", outcome).map(Response::new)
    }
}

#[tonic::async_trait]
impl pb::onboarding_authorization_service_server::OnboardingAuthorizationService for Calls {
    async fn authorize_onboarding(
        &self,
        request: Request<pb::AuthorizeOnboardingRequest>,
    ) -> Result<Response<pb::AuthorizeOnboardingResponse>, Status> {
        let connection = Connection::of(&request)?;
        let outcome = self.0.authorize(&connection, request.into_inner()).await;
        self.0.metrics.count("AuthorizeOnboarding", outcome).map(Response::new)
    }
}

#[tonic::async_trait]
impl pb::workload_registration_service_server::WorkloadRegistrationService for Calls {
    async fn register_workload(
        &self,
        request: Request<pb::RegisterWorkloadRequest>,
    ) -> Result<Response<pb::RegisterWorkloadResponse>, Status> {
        let connection = Connection::of(&request)?;
        let outcome = self.0.register(&connection, request).await;
        self.0.metrics.count("RegisterWorkload", outcome).map(Response::new)
    }

    async fn unregister_workload(
        &self,
        request: Request<pb::UnregisterWorkloadRequest>,
    ) -> Result<Response<pb::UnregisterWorkloadResponse>, Status> {
        let connection = Connection::of(&request)?;
        let outcome = self.0.unregister(&connection, request).await;
        self.0.metrics.count("UnregisterWorkload", outcome).map(Response::new)
    }
}
