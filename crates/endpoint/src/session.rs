//! The session of one connected agent: boot configurations and certificates go out; health, renewals and reports come in.

use crate::authority::{Authority, Caller, Calls, admitting_group, apply_status, registry_status, requires_live};
use crate::backend::{ProvisionError, Workload};
use crate::connection::Connection;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use onboarding_core::registration::{DisconnectReason, EndReason, Event, Health};
use onboarding_core::token::Claims;
use onboarding_wire::onboarding as pb;
use pb::agent_message::Message as FromAgent;
use pb::plane_message::Message as ToAgent;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// How long an agent may take to say hello, and to take a message that is ready for it.
const PATIENCE: Duration = Duration::from_secs(30);
/// Certificates that one session may ask for within [`CERTIFICATE_WINDOW`].
const MOST_CERTIFICATES: u32 = 10;
const CERTIFICATE_WINDOW: Duration = Duration::from_secs(60);
/// What an agent may say about its health, in bytes.
const LONGEST_HEALTH_MESSAGE: usize = 512;

type Outgoing = mpsc::Sender<Result<pb::PlaneMessage, Status>>;

#[tonic::async_trait]
impl pb::session_service_server::SessionService for Calls {
    type SessionStream = ReceiverStream<Result<pb::PlaneMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let outcome = open(self.0.clone(), request).await;
        self.0.metrics.count("Session", outcome).map(Response::new)
    }
}

async fn open(
    authority: Arc<Authority>,
    mut request: Request<Streaming<pb::AgentMessage>>,
) -> Result<ReceiverStream<Result<pb::PlaneMessage, Status>>, Status> {
    let connection = Connection::of(&request)?;
    let first = tokio::time::timeout(PATIENCE, request.get_mut().message())
        .await
        .map_err(|_| Status::deadline_exceeded("the agent said no hello"))??;
    let Some(pb::AgentMessage { message: Some(FromAgent::Hello(hello)) }) = first else {
        return Err(Status::invalid_argument("the first message of a session is hello"));
    };
    let caller = authority.caller(&connection, &request, hello.proof.as_ref()).await?;
    let Caller { claims, snapshot, .. } = caller;
    admitting_group(&snapshot, &claims)?;
    let stored = authority.backend.registry.load(&claims.subject).await.map_err(registry_status)?;
    requires_live(&stored.state, &claims)?;

    let session = uuid::Uuid::new_v4().to_string();
    // Known before it is on record, so that whoever replaces it finds it.
    let ended = authority.lifecycle.sessions().opened(session.clone());
    let connect = Event::Connect { replica: authority.replica.clone(), session: session.clone(), key: claims.key };
    if let Err(error) = authority.lifecycle.apply(&claims.subject, connect).await {
        authority.lifecycle.sessions().closed(&session);
        return Err(apply_status(error));
    }
    // Small: what an agent gets is ready one after the other, and ten thousand agents each have one.
    let (outgoing, stream) = mpsc::channel(1);
    let workload = Workload { name: claims.subject.clone(), group: claims.group.clone() };
    let boots = authority.backend.provisioner.boot(&workload, &hello.boot_version);
    tracing::info!(registration = %claims.subject, peer = %connection.peer, "connected");
    let session = Session {
        authority,
        connection,
        claims,
        workload,
        session,
        outgoing,
        certificates: (tokio::time::Instant::now(), 0),
    };
    tokio::spawn(session.run(request.into_inner(), boots, ended));
    Ok(ReceiverStream::new(stream))
}

struct Session {
    authority: Arc<Authority>,
    connection: Arc<Connection>,
    claims: Claims,
    workload: Workload,
    session: String,
    outgoing: Outgoing,
    /// Since when certificates are counted, and how many.
    certificates: (tokio::time::Instant, u32),
}

/// Why a session is over.
enum Over {
    /// The state of the registration says so already.
    Ended(EndReason),
    Stopping,
    /// The agent is gone, or does what it mustn't.
    Lost(&'static str),
    TokenExpired,
}

impl Session {
    async fn run(
        mut self,
        incoming: Streaming<pb::AgentMessage>,
        boots: BoxStream<'static, Result<pb::BootConfiguration, ProvisionError>>,
        ended: oneshot::Receiver<EndReason>,
    ) {
        self.authority.metrics.sessions.inc();
        let over = self.serve(incoming, boots, ended).await;
        self.authority.metrics.sessions.dec();
        self.authority.lifecycle.sessions().closed(&self.session);
        let (reason, end) = match over {
            Over::Ended(reason) => (None, Some(end_message(reason))),
            Over::Stopping => {
                let end = (pb::session_end::Reason::PlaneStopping, "the plane stops: connect again");
                (Some(DisconnectReason::PlaneRestarted), Some(end))
            }
            Over::TokenExpired => (Some(DisconnectReason::TokenExpired), Some(end_message(EndReason::TokenExpired))),
            Over::Lost(why) => {
                tracing::info!(registration = %self.claims.subject, why, "the connection ended");
                (Some(DisconnectReason::ConnectionLost), None)
            }
        };
        if let Some((reason, message)) = end {
            tracing::info!(registration = %self.claims.subject, reason = reason.as_str_name(), "the session ends");
            let end = pb::SessionEnd { reason: reason.into(), message: message.to_owned() };
            let _ = self.send(ToAgent::End(end)).await;
        }
        if let Some(reason) = reason {
            let event = Event::Disconnect { session: self.session.clone(), reason };
            if let Err(error) = self.authority.lifecycle.apply(&self.claims.subject, event).await {
                // The lease ends what is left.
                tracing::warn!(registration = %self.claims.subject, %error, "the end of a connection could not be recorded");
            }
        }
    }

    async fn serve(
        &mut self,
        mut incoming: Streaming<pb::AgentMessage>,
        mut boots: BoxStream<'static, Result<pb::BootConfiguration, ProvisionError>>,
        mut ended: oneshot::Receiver<EndReason>,
    ) -> Over {
        let stop = self.authority.stop.clone();
        loop {
            let expires_in =
                Duration::try_from(self.claims.expires_at.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO);
            let outcome = tokio::select! {
                reason = &mut ended => {
                    return reason.map_or(Over::Lost("it was forgotten"), Over::Ended);
                }
                () = stop.cancelled() => return Over::Stopping,
                () = tokio::time::sleep(expires_in) => return Over::TokenExpired,
                message = incoming.message() => match message {
                    Ok(Some(pb::AgentMessage { message: Some(message) })) => self.heard(message).await,
                    Ok(Some(_)) => Err(Over::Lost("it sent a message that this plane doesn't know")),
                    Ok(None) => Err(Over::Lost("the agent closed it")),
                    Err(_) => Err(Over::Lost("it broke")),
                },
                boot = boots.next() => match boot {
                    Some(Ok(boot)) => self.send(ToAgent::Boot(boot)).await,
                    Some(Err(error)) => {
                        tracing::error!(registration = %self.claims.subject, %error, "no boot configuration could be made");
                        Ok(())
                    }
                    // It isn't registered any more; what ended it ends the session.
                    None => { boots = futures_util::stream::pending().boxed(); Ok(()) }
                },
            };
            if let Err(over) = outcome {
                return over;
            }
        }
    }

    async fn heard(&mut self, message: FromAgent) -> Result<(), Over> {
        match message {
            FromAgent::Hello(_) => Err(Over::Lost("it said hello twice")),
            FromAgent::Health(health) => {
                let message = health.message.chars().filter(|c| !c.is_control());
                let health =
                    Health { ready: health.ready, message: message.take(LONGEST_HEALTH_MESSAGE / 4).collect() };
                self.apply(Event::Health(health)).await
            }
            FromAgent::CertificateRequest(request) => self.certificate(&request.csr).await,
            FromAgent::TokenRenewed(renewed) => self.renewed(&renewed.token).await,
            FromAgent::SidecarReport(report) => {
                self.authority.backend.provisioner.reported(&self.workload, &report);
                Ok(())
            }
        }
    }

    async fn certificate(&mut self, csr: &[u8]) -> Result<(), Over> {
        if self.certificates.0.elapsed() > CERTIFICATE_WINDOW {
            self.certificates = (tokio::time::Instant::now(), 0);
        }
        self.certificates.1 += 1;
        if self.certificates.1 > MOST_CERTIFICATES {
            let message = "too many certificates were asked for; wait a minute".to_owned();
            return self.send(ToAgent::CertificateRefused(pb::CertificateRefused { message })).await;
        }
        let answer = match self.authority.backend.provisioner.certificate(&self.workload, csr).await {
            Ok(certificate) => {
                self.authority.metrics.certificates.inc();
                ToAgent::Certificate(certificate)
            }
            Err(error) => {
                tracing::warn!(registration = %self.claims.subject, %error, "no certificate could be issued");
                ToAgent::CertificateRefused(pb::CertificateRefused { message: error.to_string() })
            }
        };
        self.send(answer).await
    }

    async fn renewed(&mut self, token: &str) -> Result<(), Over> {
        let caller = self.authority.accept_token(&self.connection, token, None).await;
        let claims = match caller {
            Ok(caller) if caller.claims.subject == self.claims.subject => caller.claims,
            Ok(_) => return Err(Over::Lost("it renewed with the token of another registration")),
            Err(error) => {
                tracing::warn!(registration = %self.claims.subject, error = error.message(), "a renewed token was not accepted");
                return Err(Over::Lost("it renewed with a token that isn't accepted"));
            }
        };
        let event = Event::Renew {
            key: claims.key,
            attested: Box::new(claims.attested.clone()),
            token_expires_at: claims.expires_at,
        };
        self.apply(event).await?;
        self.claims = claims;
        Ok(())
    }

    async fn apply(&self, event: Event) -> Result<(), Over> {
        match self.authority.lifecycle.apply(&self.claims.subject, event).await {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::warn!(registration = %self.claims.subject, %error, "an event could not be applied to the registration");
                Err(Over::Lost("what it said could not be recorded"))
            }
        }
    }

    async fn send(&self, message: ToAgent) -> Result<(), Over> {
        let message = pb::PlaneMessage { message: Some(message) };
        match tokio::time::timeout(PATIENCE, self.outgoing.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Over::Lost("the agent closed it")),
            Err(_) => Err(Over::Lost("the agent takes no messages")),
        }
    }
}

fn end_message(reason: EndReason) -> (pb::session_end::Reason, &'static str) {
    let message = match reason {
        EndReason::Replaced => "a newer session of this agent took over",
        EndReason::Withdrawn => "Not authorized by OnboardingPolicy any more: the workload leaves the mesh",
        EndReason::PolicyUnreadable => {
            "a policy can't be read, so nobody can say that this workload is admitted: onboard again"
        }
        EndReason::Deleted => "the registration was deleted by an operator: onboard again",
        EndReason::Unregistered => "the agent unregistered",
        EndReason::TokenExpired => "the token expired and was not renewed: onboard again",
    };
    (reason.into(), message)
}
