//! The session of one connected agent: boot configurations and certificates go out; health, renewals and reports come in.

use crate::authority::{Authority, Caller, Calls, apply_status, registry_status, requires_live};
use crate::authorization::admission;
use crate::backend::{self, ProvisionError, Snapshot, Workload};
use crate::connection::Connection;
use crate::delivery::{self, Delivery, PATIENCE, Place, Room, Sent};
use crate::limits::Budget;
use crate::metrics::Why;
use crate::refusal::Refused;
use crate::registration::not_admitted_any_more;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use onboarding_core::registration::{DisconnectReason, EndReason, Event, Health, State};
use onboarding_core::token::Claims;
use onboarding_wire::onboarding as pb;
use pb::agent_message::Message as FromAgent;
use pb::plane_message::Message as ToAgent;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status, Streaming};

/// How long an agent may take to say hello.
const HELLO_WITHIN: Duration = Duration::from_secs(10);
/// The last message waits no longer than this.
const GOODBYE_WITHIN: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);
/// Certificates that one session may ask for within a minute.
const MOST_CERTIFICATES: u32 = 10;
/// Messages of any kind that it may send within a minute: each may cost a durable write.
const MOST_MESSAGES: u32 = 120;
/// What an agent may say about its health, in characters.
const LONGEST_HEALTH_MESSAGE: usize = 256;
/// What a certificate request of any usual key stays below, in bytes.
const LONGEST_CSR: usize = 16 * 1024;

type ToAgents = BoxStream<'static, Result<pb::PlaneMessage, Status>>;

#[tonic::async_trait]
impl pb::session_service_server::SessionService for Calls {
    type SessionStream = ToAgents;

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
) -> Result<ToAgents, Status> {
    let connection = Connection::of(&request)?;
    let first = tokio::time::timeout(HELLO_WITHIN, request.get_mut().message())
        .await
        .map_err(|_| Status::deadline_exceeded("the agent said no hello"))??;
    let Some(pb::AgentMessage { message: Some(FromAgent::Hello(hello)) }) = first else {
        return Err(Status::invalid_argument("the first message of a session is hello"));
    };
    let caller = authority.caller(&connection, &request, hello.proof.as_ref()).await?;
    let Caller { claims, snapshot, .. } = caller;
    if let Err(refused) = may_connect(&authority, &claims, &snapshot).await {
        return Err(authority.refuse(&connection, &claims, refused).await);
    }
    let session = uuid::Uuid::new_v4().to_string();
    // Known before it is on record, so that whoever replaces it finds it.
    let ended = authority.lifecycle.sessions().opened(&claims.subject, session.clone());
    if let Err(refused) = connect(&authority, &claims, &session).await {
        authority.lifecycle.sessions().closed(&session);
        return Err(authority.refuse(&connection, &claims, refused).await);
    }
    // Small: what an agent gets is ready one after the other, and ten thousand agents each have one.
    let (outgoing, stream) = mpsc::channel(1);
    let workload = Workload { name: claims.subject.clone(), group: claims.group.clone() };
    let boots = authority.backend.provisioner.boot(&workload, &hello.boot_version);
    let room = authority.room.clone();
    let boots = boots.then(move |boot| with_room(boot, room.clone())).boxed();
    tracing::info!(registration = %claims.subject, peer = %connection.peer, "connected");
    let session = Session {
        authority,
        connection,
        claims,
        workload,
        session,
        outgoing,
        delivery: None,
        ended,
        certificates: Budget::new(MOST_CERTIFICATES, MINUTE),
        messages: Budget::new(MOST_MESSAGES, MINUTE),
    };
    tokio::spawn(session.run(request.into_inner(), boots));
    Ok(delivery::stream(stream).boxed())
}

type Boot = Result<(pb::BootConfiguration, Option<Place>), ProvisionError>;

async fn with_room(boot: Result<pb::BootConfiguration, ProvisionError>, room: Room) -> Boot {
    let boot = boot?;
    let place = room.wait(&boot).await;
    Ok((boot, place))
}

async fn may_connect(authority: &Authority, claims: &Claims, snapshot: &Snapshot) -> Result<(), Refused> {
    admission(snapshot, &claims.attested.identity, &claims.group)?;
    let state = authority.lifecycle.load(&claims.subject).await.map_err(registry_status)?;
    Ok(requires_live(&state, claims)?)
}

/// Puts the session on record, if a policy admits it still.
async fn connect(authority: &Authority, claims: &Claims, session: &str) -> Result<(), Refused> {
    let connect = Event::Connect { replica: authority.replica.clone(), session: session.to_owned(), key: claims.key };
    let state = authority.lifecycle.apply(&claims.subject, connect).await.map_err(apply_status)?;
    authority.lifecycle.sessions().put_on_record(session);
    let now = authority.snapshot();
    match authority.lifecycle.enforce(&claims.subject, &state, &now).await.map_err(apply_status)? {
        true => Ok(()),
        false => Err(not_admitted_any_more(&now, &claims.attested.identity, &claims.group)),
    }
}

struct Session {
    authority: Arc<Authority>,
    connection: Arc<Connection>,
    claims: Arc<Claims>,
    workload: Workload,
    session: String,
    outgoing: mpsc::Sender<Sent>,
    /// What the agent is taking; the next configuration waits for it.
    delivery: Option<Box<Delivery>>,
    ended: oneshot::Receiver<EndReason>,
    certificates: Budget,
    messages: Budget,
}

type Boots = BoxStream<'static, Boot>;

const TAKES_NOTHING: Over = Over::Lost("the agent takes no messages");

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
    async fn run(mut self, incoming: Streaming<pb::AgentMessage>, boots: Boots) {
        let metrics = self.authority.metrics.clone();
        metrics.sessions.inc();
        let over = self.serve(incoming, boots).await;
        metrics.sessions.dec();
        let name = &self.claims.subject;
        let (label, disconnect, end) = match over {
            Over::Ended(reason) => (label(reason), None, Some(end_message(reason))),
            Over::Stopping => {
                let end = (pb::session_end::Reason::PlaneStopping, "the plane stops: connect again");
                // Ten thousand at a time: the next start puts it on record.
                ("plane_stopping", None, Some(end))
            }
            Over::TokenExpired => {
                let end = end_message(EndReason::TokenExpired);
                ("token_expired", Some(DisconnectReason::TokenExpired), Some(end))
            }
            Over::Lost(why) => {
                tracing::info!(registration = %name, why, "the connection ended");
                ("connection_lost", Some(DisconnectReason::ConnectionLost), None)
            }
        };
        metrics.sessions_ended.get_or_create(&Why { reason: label }).inc();
        if let Some((reason, message)) = end {
            tracing::info!(registration = %name, reason = reason.as_str_name(), "the session ends");
            let end = pb::SessionEnd { reason: reason.into(), message: message.to_owned() };
            let (end, _) = Sent::new(ToAgent::End(end), None);
            let _ = tokio::time::timeout(GOODBYE_WITHIN, self.outgoing.send(end)).await;
        }
        self.authority.lifecycle.sessions().closed(&self.session);
        if let Some(reason) = disconnect {
            let event = Event::Disconnect { session: self.session.clone(), reason };
            if let Err(error) = Box::pin(self.authority.lifecycle.apply(name, event)).await {
                // It is found within a minute; whatever happens, the lease ends what is left.
                tracing::warn!(registration = %name, %error, "the end of a connection could not be recorded");
            }
        }
    }

    async fn serve(&mut self, mut incoming: Streaming<pb::AgentMessage>, mut boots: Boots) -> Over {
        let stop = self.authority.stop.clone();
        loop {
            let expires_in =
                Duration::try_from(self.claims.expires_at.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO);
            let outcome = tokio::select! {
                reason = &mut self.ended => return ended(reason),
                () = stop.cancelled() => return Over::Stopping,
                () = tokio::time::sleep(expires_in) => return Over::TokenExpired,
                message = incoming.message() => match message {
                    // Boxed: what answering needs isn't kept by ten thousand idle sessions.
                    Ok(Some(pb::AgentMessage { message: Some(message) })) => Box::pin(self.heard(message)).await,
                    Ok(Some(_)) => Err(Over::Lost("it sent a message that this plane doesn't know")),
                    Ok(None) => Err(Over::Lost("the agent closed it")),
                    Err(_) => Err(Over::Lost("it broke")),
                },
                taken = Delivery::ends(&mut self.delivery) => {
                    self.delivery = None;
                    if taken { Ok(()) } else { Err(TAKES_NOTHING) }
                }
                boot = boots.next(), if self.delivery.is_none() => match boot {
                    Some(Ok((boot, place))) => Box::pin(self.deliver(ToAgent::Boot(boot), place)).await,
                    Some(Err(error)) => Box::pin(self.no_boot(&error)).await,
                    // It isn't registered any more; what ended it ends the session.
                    None => {
                        boots = futures_util::stream::pending().boxed();
                        Ok(())
                    }
                },
            };
            if let Err(over) = outcome {
                return over;
            }
        }
    }

    /// Says so to everybody who can do something about it: the log, who looks after the group, and the agent.
    async fn no_boot(&mut self, error: &ProvisionError) -> Result<(), Over> {
        tracing::error!(registration = %self.claims.subject, %error, "no boot configuration could be made");
        let message = error.to_string();
        self.authority.backend.notices.refused(backend::Refused {
            group: self.workload.group.clone(),
            // Of a thousand workloads that lack the same it is said once; which they are, their registrations say.
            identity: None,
            reason: "NoBootConfiguration",
            message: message.clone(),
        });
        self.send(ToAgent::BootRefused(pb::BootRefused { message })).await
    }

    async fn heard(&mut self, message: FromAgent) -> Result<(), Over> {
        if !self.messages.spend() {
            return Err(Over::Lost("it sent too many messages"));
        }
        match message {
            FromAgent::Hello(_) => Err(Over::Lost("it said hello twice")),
            FromAgent::Health(health) => {
                let message = health.message.chars().filter(|c| !c.is_control()).take(LONGEST_HEALTH_MESSAGE);
                self.apply(Event::Health(Health { ready: health.ready, message: message.collect() })).await?;
                Ok(())
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
        let refusal = match (self.certificates.spend(), csr.len() <= LONGEST_CSR) {
            (true, true) => None,
            (false, _) => Some("too many certificates were asked for; wait a minute"),
            (_, false) => Some("the certificate request is larger than that of any usual key"),
        };
        if let Some(message) = refusal {
            let message = message.to_owned();
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
        let state = self.apply(event).await?;
        self.claims = claims;
        // What was attested may be less than before: the policies are asked about it as it is now.
        let now = self.authority.snapshot();
        match self.authority.lifecycle.enforce(&self.claims.subject, &state, &now).await {
            Ok(true) => Ok(()),
            // The state that ended has told this session.
            Ok(false) => Err(ended((&mut self.ended).await)),
            Err(_) => Err(Over::Lost("what it said could not be recorded")),
        }
    }

    async fn apply(&self, event: Event) -> Result<State, Over> {
        self.authority.lifecycle.apply(&self.claims.subject, event).await.map_err(|error| {
            tracing::warn!(registration = %self.claims.subject, %error, "what an agent said could not be recorded");
            Over::Lost("what it said could not be recorded")
        })
    }

    async fn send(&mut self, message: ToAgent) -> Result<(), Over> {
        self.deliver(message, None).await
    }

    async fn deliver(&mut self, message: ToAgent, place: Option<Place>) -> Result<(), Over> {
        let (message, delivery) = Sent::new(message, place);
        tokio::select! {
            sent = self.outgoing.send(message) => sent.map_err(|_| Over::Lost("the agent closed it"))?,
            reason = &mut self.ended => return Err(ended(reason)),
            () = tokio::time::sleep(PATIENCE) => return Err(TAKES_NOTHING),
        }
        // What needs no room leaves alone what is on its way.
        self.delivery = delivery.or(self.delivery.take());
        Ok(())
    }
}

fn ended(reason: Result<EndReason, oneshot::error::RecvError>) -> Over {
    reason.map_or(Over::Lost("it was forgotten"), Over::Ended)
}

fn label(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Replaced => "replaced",
        EndReason::Withdrawn => "withdrawn",
        EndReason::PolicyUnreadable => "policy_unreadable",
        EndReason::Deleted => "deleted",
        EndReason::Unregistered => "unregistered",
        EndReason::TokenExpired => "token_expired",
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
