//! The tasks that talk to the plane. Each ends in one piece of news; only a session says more.

use super::Driver;
use super::Settings;
use super::news::{Envelope, News};
use super::witness::sidecar_version;
use crate::machine::{self, Call, Event};
use crate::session::{CallError, Link, Session};
use crate::sidecar::IstioWay;
use crate::store::with_source;
use jiff::Timestamp;
use onboarding_core::registration::{HostAddress, HostReport, SidecarReport};
use onboarding_kinds::agent::SidecarKind;
use onboarding_wire::onboarding as pb;
use std::time::Duration;
use tokio::time::timeout;

const GOODBYE_WITHIN: Duration = Duration::from_secs(4);

impl Driver {
    pub(super) fn connect(&mut self) {
        self.disconnect();
        let endpoint = self.endpoint.clone();
        self.spawn(async move {
            let link = match Link::connect(&endpoint).await {
                Ok(link) => link,
                Err(error) => return lost(with_source(&error)),
            };
            match link.discover().await {
                Ok(discovery) => News::Linked(link, discovery),
                Err(error) => refused(Call::Discover, &error),
            }
        });
    }

    pub(super) fn discover(&mut self) {
        let Some(link) = self.link.clone() else { return };
        self.spawn(async move {
            match link.discover().await {
                Ok(discovery) => News::Rediscovered(discovery),
                Err(error) => refused(Call::Discover, &error),
            }
        });
    }

    pub(super) fn gather(&mut self) {
        let Some(discovery) = self.discovery.clone() else { return };
        let witness = self.witness();
        self.spawn(async move {
            match witness.evidence(&discovery).await {
                Ok(evidence) => News::Evidence(evidence),
                Err(why) => News::Plain(Event::EvidenceFailed { why }),
            }
        });
    }

    pub(super) fn authorize(&mut self) {
        let (Some(link), Some(discovery), Some(evidence)) =
            (self.link.clone(), self.discovery.clone(), self.evidence.clone())
        else {
            return;
        };
        let (key, group) = (self.key.clone(), self.settings.configuration.onboarding.group.clone());
        self.spawn(async move {
            match link.authorize(&key, &discovery, &group, evidence.credential, Timestamp::now()).await {
                Ok(token) => News::Token(token),
                Err(error) => refused(Call::Authorize, &error),
            }
        });
    }

    pub(super) fn renew(&mut self) {
        let Some(link) = self.link.clone() else { return };
        let (witness, group) = (self.witness(), self.settings.configuration.onboarding.group.clone());
        self.spawn(async move {
            let discovery = match link.discover().await {
                Ok(discovery) => discovery,
                Err(error) => return refused(Call::Renew, &error),
            };
            let evidence = match witness.evidence(&discovery).await {
                Ok(evidence) => evidence,
                Err(why) => return News::Plain(Event::EvidenceFailed { why }),
            };
            let answer = link.authorize(&witness.key, &discovery, &group, evidence.credential, Timestamp::now()).await;
            match answer {
                Ok(token) => News::Token(token),
                Err(error) => refused(Call::Renew, &error),
            }
        });
    }

    pub(super) fn register(&mut self, prove: bool) {
        let (Some(link), Some(token)) = (self.link.clone(), self.token.clone()) else { return };
        let proof = self.discovery.take().filter(|_| prove);
        let (witness, version, settings) = (self.witness(), self.sidecar_version.clone(), self.settings.clone());
        self.spawn(async move {
            let addresses = match witness.addresses().await {
                Ok(addresses) => addresses,
                Err(why) => {
                    return News::Plain(Event::Refused {
                        call: Call::Register,
                        code: machine::Code::Other,
                        why,
                        pushback: None,
                    });
                }
            };
            let version = version.get_or_init(|| sidecar_version(&settings)).await;
            let report = report(&settings, addresses, version.clone());
            // The plane refuses a report without one, in better words.
            let address = report.mesh_address().ok();
            let registration = pb::Registration::from(&report);
            match link.register(&witness.key, &token, registration, proof.as_ref()).await {
                Ok(name) => {
                    tracing::info!(registration = name, "registered");
                    News::Registered(address)
                }
                Err(error) => refused(Call::Register, &error),
            }
        });
    }

    pub(super) fn open_session(&mut self, complete: bool) {
        let (Some(link), Some(token)) = (self.link.clone(), self.token.clone()) else { return };
        self.session = None;
        let held = self.held.as_ref().filter(|_| !complete).map(|held| held.version.clone());
        let (news, connection) = (self.news.clone(), self.connection);
        self.tasks.spawn(async move {
            let say = async |found| news.send(Envelope { connection: Some(connection), news: found }).await.is_ok();
            match link.open_session(&token, held.unwrap_or_default()).await {
                Err(error) => {
                    say(refused(Call::Session, &error)).await;
                }
                Ok(Session { outgoing, mut incoming }) => {
                    if !say(News::Session(outgoing)).await {
                        return;
                    }
                    let why = loop {
                        match incoming.message().await {
                            Ok(Some(message)) => {
                                if !say(News::Plane(Box::new(message))).await {
                                    return;
                                }
                            }
                            Ok(None) => break "the plane closed the session".to_owned(),
                            Err(status) => {
                                break format!("the session broke: {}", CallError::Refused(status).describe());
                            }
                        }
                    };
                    say(lost(why)).await;
                }
            }
        });
    }

    pub(super) fn unregister(&mut self) {
        let Some(token) = self.token.clone() else { return };
        // The connection is only of use where the key was proven on it, as it was for a session.
        let link = self.link.clone().filter(|_| self.session.is_some());
        let (endpoint, key) = (self.endpoint.clone(), self.key.clone());
        self.spawn(async move {
            let goodbye = async {
                match link {
                    Some(link) => link.unregister(&key, &token, None).await.map_err(|error| error.describe()),
                    None => {
                        let link = Link::connect(&endpoint).await.map_err(|error| with_source(&error))?;
                        let discovery = link.discover().await.map_err(|error| error.describe())?;
                        link.unregister(&key, &token, Some(&discovery)).await.map_err(|error| error.describe())
                    }
                }
            };
            let answer = timeout(GOODBYE_WITHIN, goodbye)
                .await
                .unwrap_or_else(|_| Err(format!("no answer within {} s", GOODBYE_WITHIN.as_secs())));
            let propagation_delay = match answer {
                Ok(delay) => {
                    tracing::info!(?delay, "unregistered; the sidecar serves on while the mesh learns of it");
                    Some(delay)
                }
                Err(why) => {
                    tracing::warn!(why, "can't unregister; the registration ends with its grace period");
                    None
                }
            };
            News::Plain(Event::Unregistered { propagation_delay })
        });
    }
}

fn report(settings: &Settings, addresses: Vec<HostAddress>, version: String) -> HostReport {
    let onboarding = &settings.configuration.onboarding;
    let sidecar = match (&settings.configuration.agent.sidecar.kind, &settings.istio) {
        (Some(SidecarKind::Istio { revision }), _) => SidecarReport::Istio { version, revision: revision.clone() },
        (None, IstioWay::PilotAgent(_)) => SidecarReport::Istio { version, revision: None },
        (Some(SidecarKind::Envoy), _) | (None, IstioWay::Envoy) => SidecarReport::Envoy { version },
    };
    HostReport {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        sidecar,
        addresses,
        labels: onboarding.labels.clone(),
        connected_over: onboarding.connected_over,
    }
}

fn lost(why: String) -> News {
    News::Plain(Event::ConnectionLost { why })
}

fn refused(call: Call, error: &CallError) -> News {
    News::Plain(Event::Refused { call, code: error.code(), why: error.describe(), pushback: error.pushback() })
}
