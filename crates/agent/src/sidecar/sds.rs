//! The Secret Discovery Service that Envoy gets its certificate and its roots from, over a Unix socket.

use super::Identity;
use anyhow::Context;
use futures_util::Stream;
use onboarding_wire::sds::secret_discovery_service_server::{SecretDiscoveryService, SecretDiscoveryServiceServer};
use onboarding_wire::sds::{
    CertificateValidationContext, DataSource, DiscoveryRequest, DiscoveryResponse, Secret, TlsCertificate, data_source,
    secret,
};
use prost::Message;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// The certificate and its key.
const CERTIFICATE: &str = "default";
/// The roots that peers are verified against.
const ROOTS: &str = "ROOTCA";
/// Envoy asks for one secret by stream.
const MAX_NAMES: usize = 16;
const MAX_REQUEST: usize = 64 * 1024;
/// A Unix socket's path has to fit `sockaddr_un`.
const LONGEST_PATH: usize = 107;

/// Serves as long as it is held.
pub(super) struct Server {
    current: watch::Sender<Arc<Versioned>>,
    refused: watch::Receiver<Refused>,
    _task: AbortOnDropHandle<()>,
}

/// What Envoy refused last of each secret, in its words, until it accepts what follows. Each secret has a stream of its own, so that
/// the roots' acknowledgement says nothing about the certificate.
pub(super) type Refused = BTreeMap<String, String>;

struct Versioned {
    version: u64,
    identity: Identity,
}

impl Server {
    /// Listens on `socket` in `directory`, which nobody else may enter; what an earlier run left there is replaced.
    pub(super) fn start(directory: &Path, socket: &str, identity: Identity) -> anyhow::Result<Self> {
        let listener = bind(directory, socket)
            .with_context(|| format!("listening for the sidecar on {}", directory.join(socket).display()))?;
        let (current, watched) = watch::channel(Arc::new(Versioned { version: 1, identity }));
        let (refuse, refused) = watch::channel(Refused::new());
        let service = SecretDiscoveryServiceServer::new(Service { watched, refuse: Arc::new(refuse) })
            .max_decoding_message_size(MAX_REQUEST);
        let server = tonic::transport::Server::builder().add_service(service);
        let task = tokio::spawn(async move {
            if let Err(error) = server.serve_with_incoming(UnixListenerStream::new(listener)).await {
                tracing::error!(%error, "the server for the sidecar's certificates ended");
            }
        });
        Ok(Self { current, refused, _task: AbortOnDropHandle::new(task) })
    }

    /// Each of Envoy's streams gets the new version at once.
    pub(super) fn rotate(&self, identity: Identity) {
        self.current.send_modify(|current| {
            *current = Arc::new(Versioned { version: current.version + 1, identity });
        });
    }

    pub(super) fn refused(&self) -> watch::Receiver<Refused> {
        self.refused.clone()
    }
}

fn bind(directory: &Path, socket: &str) -> std::io::Result<UnixListener> {
    let path = directory.join(socket);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = if path.as_os_str().len() > LONGEST_PATH {
        use std::os::fd::AsRawFd;
        let opened = std::fs::File::open(directory)?;
        UnixListener::bind(format!("/proc/self/fd/{}/{socket}", opened.as_raw_fd()))?
    } else {
        UnixListener::bind(&path)?
    };
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

struct Service {
    watched: watch::Receiver<Arc<Versioned>>,
    refuse: Arc<watch::Sender<Refused>>,
}

#[tonic::async_trait]
impl SecretDiscoveryService for Service {
    type StreamSecretsStream = Pin<Box<dyn Stream<Item = Result<DiscoveryResponse, Status>> + Send>>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let (answers, receiver) = mpsc::channel(4);
        let (watched, refuse) = (self.watched.clone(), Arc::clone(&self.refuse));
        tokio::spawn(async move {
            if let Err(status) = converse(request.into_inner(), watched, &refuse, &answers).await {
                let _ = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn fetch_secrets(&self, request: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        let request = request.into_inner();
        check(&request)?;
        let current = self.watched.borrow().clone();
        Ok(Response::new(response(&current, &request.resource_names, String::new())))
    }
}

/// One stream: answers each change of the names that are asked for, pushes each new version, takes acknowledgements.
/// (xDS protocol, "SotW": a request with the nonce of the last answer acknowledges it, or refuses it by its error.)
async fn converse(
    mut requests: Streaming<DiscoveryRequest>,
    mut watched: watch::Receiver<Arc<Versioned>>,
    refuse: &watch::Sender<Refused>,
    answers: &mpsc::Sender<Result<DiscoveryResponse, Status>>,
) -> Result<(), Status> {
    let mut names: Vec<String> = Vec::new();
    let mut nonce = 0_u64;
    loop {
        let push = tokio::select! {
            request = requests.message() => {
                let Some(request) = request? else { return Ok(()) };
                check(&request)?;
                let answered = request.response_nonce == nonce.to_string();
                let secrets = request.resource_names.join(", ");
                if let Some(error) = &request.error_detail {
                    tracing::error!(secrets, reason = error.message, "the sidecar refused a secret; it goes on with its last one");
                    refuse.send_modify(|refused| {
                        refused.insert(secrets, error.message.clone());
                    });
                } else if answered {
                    tracing::debug!(secrets, version = request.version_info, "the sidecar took a secret");
                    refuse.send_if_modified(|refused| refused.remove(&secrets).is_some());
                } else if !request.response_nonce.is_empty() {
                    // About an answer that another one has replaced since.
                    continue;
                }
                let changed = names != request.resource_names;
                names = request.resource_names;
                changed || request.response_nonce.is_empty()
            }
            changed = watched.changed() => match changed {
                Ok(()) => !names.is_empty(),
                Err(_) => return Ok(()),
            },
        };
        if push {
            nonce += 1;
            let current = watched.borrow_and_update().clone();
            if answers.send(Ok(response(&current, &names, nonce.to_string()))).await.is_err() {
                return Ok(());
            }
        }
    }
}

fn check(request: &DiscoveryRequest) -> Result<(), Status> {
    if !request.type_url.is_empty() && request.type_url != SECRET {
        return Err(Status::invalid_argument(format!("only {SECRET} is served here")));
    }
    if request.resource_names.len() > MAX_NAMES {
        return Err(Status::invalid_argument(format!("more than {MAX_NAMES} secrets in one request")));
    }
    match request.resource_names.iter().find(|name| *name != CERTIFICATE && *name != ROOTS) {
        Some(name) => Err(Status::not_found(format!("no secret {name:?}; there are {CERTIFICATE:?} and {ROOTS:?}"))),
        None => Ok(()),
    }
}

fn response(current: &Versioned, names: &[String], nonce: String) -> DiscoveryResponse {
    let inline =
        |text: &str| Some(DataSource { specifier: Some(data_source::Specifier::InlineString(text.to_owned())) });
    let resources = names.iter().map(|name| {
        let secret = if name == CERTIFICATE {
            secret::Type::TlsCertificate(TlsCertificate {
                certificate_chain: inline(&current.identity.certificate_chain),
                private_key: inline(&current.identity.private_key),
            })
        } else {
            secret::Type::ValidationContext(CertificateValidationContext {
                trusted_ca: inline(&current.identity.roots),
            })
        };
        let secret = Secret { name: name.clone(), r#type: Some(secret) };
        prost_types::Any { type_url: SECRET.to_owned(), value: secret.encode_to_vec() }
    });
    DiscoveryResponse {
        version_info: current.version.to_string(),
        resources: resources.collect(),
        type_url: SECRET.to_owned(),
        nonce,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(names: &[&str]) -> DiscoveryRequest {
        DiscoveryRequest {
            resource_names: names.iter().map(|name| (*name).to_owned()).collect(),
            type_url: SECRET.to_owned(),
            ..DiscoveryRequest::default()
        }
    }

    fn service() -> Service {
        let identity = Identity { certificate_chain: "chain".into(), private_key: "key".into(), roots: "roots".into() };
        let (_, watched) = watch::channel(Arc::new(Versioned { version: 7, identity }));
        Service { watched, refuse: Arc::new(watch::channel(Refused::new()).0) }
    }

    #[tokio::test]
    async fn fetches_what_it_has() {
        let response =
            service().fetch_secrets(Request::new(request(&[ROOTS, CERTIFICATE]))).await.unwrap().into_inner();
        assert_eq!((response.version_info.as_str(), response.type_url.as_str()), ("7", SECRET));
        let secrets: Vec<_> =
            response.resources.iter().map(|any| Secret::decode(any.value.as_slice()).unwrap()).collect();
        assert_eq!(secrets.iter().map(|secret| secret.name.as_str()).collect::<Vec<_>>(), [ROOTS, CERTIFICATE]);
        let text = |source: &Option<DataSource>| match source.as_ref().and_then(|source| source.specifier.clone()) {
            Some(data_source::Specifier::InlineString(text)) => text,
            other => panic!("{other:?}"),
        };
        match (&secrets[0].r#type, &secrets[1].r#type) {
            (Some(secret::Type::ValidationContext(roots)), Some(secret::Type::TlsCertificate(own))) => {
                assert_eq!(text(&roots.trusted_ca), "roots");
                assert_eq!((text(&own.certificate_chain), text(&own.private_key)), ("chain".into(), "key".into()));
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn refuses_what_it_has_not() {
        let other_type = DiscoveryRequest { type_url: "type.googleapis.com/a.B".into(), ..request(&[ROOTS]) };
        let too_many = request(&[ROOTS; MAX_NAMES + 1]);
        for (request, code, words) in [
            (request(&["file-cert"]), tonic::Code::NotFound, "file-cert"),
            (other_type, tonic::Code::InvalidArgument, "only type.googleapis.com"),
            (too_many, tonic::Code::InvalidArgument, "more than 16"),
        ] {
            let status = service().fetch_secrets(Request::new(request)).await.unwrap_err();
            assert_eq!(status.code(), code);
            assert!(status.message().contains(words), "{status}");
        }
    }
}
