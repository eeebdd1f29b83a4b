//! What every call needs: who is asking, by what token, on which connection; and the generated services.

use crate::audit::{Audit, Entry};
use crate::backend::{Backend, PlaneSettings, RegistryError, Snapshot};
use crate::connection::Connection;
use crate::delivery::Room;
use crate::lifecycle::{ApplyError, Lifecycle};
use crate::limits::Rates;
use crate::metrics::Metrics;
use crate::token::{TokenError, Tokens};
use jiff::Timestamp;
use onboarding_attest::Attestors;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Refusal, State};
use onboarding_core::token::{Claims, accept};
use onboarding_runtime::readiness::Readiness;
use onboarding_wire::onboarding as pb;
use onboarding_wire::proof::Purpose;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

const AUDIT: &str = "auditLog";

/// Everything that a call needs. One for the whole endpoint.
pub(crate) struct Authority {
    pub(crate) backend: Backend,
    pub(crate) attestors: Arc<Attestors>,
    pub(crate) tokens: Tokens,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) audit: Arc<Audit>,
    pub(crate) metrics: Metrics,
    pub(crate) rates: Rates,
    pub(crate) authorizations: Semaphore,
    pub(crate) authorizations_per_connection: u32,
    pub(crate) room: Room,
    pub(crate) readiness: Readiness,
    pub(crate) stop: CancellationToken,
    pub(crate) replica: String,
}

/// A call whose token was accepted.
pub(crate) struct Caller {
    pub(crate) claims: Arc<Claims>,
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) plane: Arc<PlaneSettings>,
}

impl Authority {
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.backend.config.watch().borrow().clone()
    }

    pub(crate) fn plane(snapshot: &Snapshot) -> Result<Arc<PlaneSettings>, Status> {
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
        let claims = match connection.known(token) {
            Some(claims) => claims,
            None => {
                let claims = Arc::new(self.tokens.read(token).await.map_err(token_status)?);
                connection.know(token, &claims);
                claims
            }
        };
        accept(&claims, &plane.uid, key, Timestamp::now())
            .map_err(|refusal| Status::unauthenticated(refusal.to_string()))?;
        connection.set_admitted();
        Ok(Caller { claims, snapshot, plane })
    }

    /// Readiness follows: a plane that can't write its audit log lets nobody in.
    pub(crate) async fn write_down(&self, entry: &Entry<'_>) -> Result<(), Status> {
        match self.audit.write(entry).await {
            Ok(()) => {
                self.readiness.ready(AUDIT);
                Ok(())
            }
            Err(error) => {
                self.metrics.audit_failures.inc();
                self.readiness.missing(AUDIT, format!("a decision can't be written: {error}"));
                tracing::error!(%error, "a decision can't be written to the audit log, so nothing is allowed");
                Err(Status::unavailable(
                    "the plane can't write its audit log, so it allows nothing; see the plane's log",
                ))
            }
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

pub(crate) fn token_status(error: TokenError) -> Status {
    match error {
        TokenError::NotOurs(_) => Status::unauthenticated(error.to_string()),
        TokenError::Unavailable(_) => {
            tracing::error!(%error, "tokens can't be signed or verified");
            Status::unavailable("the plane can't use its token keys; see the plane's log")
        }
    }
}

pub(crate) fn registry_status(error: RegistryError) -> Status {
    match error {
        RegistryError::Foreign(why) => Status::failed_precondition(why),
        RegistryError::Conflict | RegistryError::Unavailable(_) => {
            tracing::error!(%error, "the registry could not be used");
            Status::unavailable(error.to_string())
        }
    }
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
