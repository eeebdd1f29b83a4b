//! What the libraries cost by themselves: a server that takes joins and sessions over the endpoint's TLS and HTTP/2, and answers with
//! constants.
//!
//! No endpoint is in it: nothing is attested, decided, signed, written down or remembered. What it needs of processor and memory,
//! nobody with these libraries gets below.

use crate::crowd::Target;
use crate::figures::Bench;
use crate::floor::Tls;
use crate::machine::{self, Killed};
use crate::plane::{HOST, UID, World};
use anyhow::Context;
use futures_util::stream::{self, BoxStream, StreamExt};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use onboarding_testkit::oidc::MadeTls;
use onboarding_wire::onboarding as pb;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

const CHAIN: &str = "chain.pem";
const KEY: &str = "key.pem";

/// As a process of its own, so that its CPU time is its own; killed with this value.
pub struct Bare {
    process: Killed,
    address: SocketAddr,
    ca: String,
    _directory: TempDir,
}

impl Bare {
    /// # Errors
    /// It can't be started, or says no address.
    pub fn start(bench: &Bench, world: &World) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir_in(&bench.directory)?;
        std::fs::write(directory.path().join(CHAIN), &world.tls().certificate_chain)?;
        std::fs::write(directory.path().join(KEY), &world.tls().private_key)?;
        let program = bench.binaries.join("onboarding-bench");
        let mut command = machine::on_planes_core(&program, bench.one_core);
        command.arg("bare-server").arg(directory.path()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Killed(command.spawn().context("starting the bare server")?);
        let mut line = String::new();
        let said = process.0.stdout.take().context("its output")?;
        BufReader::new(said).read_line(&mut line).context("the bare server's address")?;
        let address = line.trim().parse().context("the bare server's address")?;
        Ok(Self { process, address, ca: world.tls().ca.clone(), _directory: directory })
    }

    pub fn target(&self) -> Target {
        Target { addresses: vec![self.address], server_name: HOST.to_owned(), ca: self.ca.clone() }
    }

    pub fn pid(&self) -> i32 {
        self.process.pid()
    }
}

/// What the process does: serves until it is killed. Its address is its first line.
///
/// # Errors
/// The directory's certificate can't be read, or loopback not be listened on.
#[allow(clippy::print_stdout, reason = "who started it reads the address")]
pub async fn serve(directory: &Path) -> anyhow::Result<()> {
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).with_context(|| format!("reading {name}"));
    let made = MadeTls { certificate_chain: read(CHAIN)?, private_key: read(KEY)?, ca: read(CHAIN)? };
    let tls = TlsAcceptor::from(Tls::new(&made)?.server());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("{}", listener.local_addr()?);
    let routes = Routes::new(pb::discovery_service_server::DiscoveryServiceServer::new(Constant))
        .add_service(pb::onboarding_authorization_service_server::OnboardingAuthorizationServiceServer::new(Constant))
        .add_service(pb::workload_registration_service_server::WorkloadRegistrationServiceServer::new(Constant))
        .add_service(pb::session_service_server::SessionServiceServer::new(Constant))
        .prepare();
    loop {
        let (stream, _) = listener.accept().await?;
        let (tls, routes) = (tls.clone(), routes.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let Ok(stream) = Box::pin(tls.accept(stream)).await else { return };
            let mut builder = http2::Builder::new(TokioExecutor::new());
            // The endpoint's own.
            builder
                .timer(TokioTimer::new())
                .initial_stream_window_size(64 * 1024)
                .initial_connection_window_size(64 * 1024)
                .max_frame_size(16 * 1024)
                .max_send_buf_size(16 * 1024)
                .max_header_list_size(16 * 1024)
                .keep_alive_interval(Duration::from_secs(20));
            let _ = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes)).await;
        });
    }
}

struct Constant;

#[tonic::async_trait]
impl pb::discovery_service_server::DiscoveryService for Constant {
    async fn discover(&self, _: Request<pb::DiscoverRequest>) -> Result<Response<pb::DiscoverResponse>, Status> {
        Ok(Response::new(pb::DiscoverResponse {
            plane_uid: UID.to_owned(),
            challenge: vec![7; 32],
            time: Some(prost_types::Timestamp::default()),
        }))
    }
}

#[tonic::async_trait]
impl pb::onboarding_authorization_service_server::OnboardingAuthorizationService for Constant {
    async fn authorize_onboarding(
        &self,
        _: Request<pb::AuthorizeOnboardingRequest>,
    ) -> Result<Response<pb::AuthorizeOnboardingResponse>, Status> {
        Ok(Response::new(pb::AuthorizeOnboardingResponse {
            // As long as one of the plane's.
            token: "t".repeat(1000),
            expires_at: Some(prost_types::Timestamp::default()),
            registration: "bookinfo/ratings-jwt-my-corp--some-subject".to_owned(),
        }))
    }
}

#[tonic::async_trait]
impl pb::workload_registration_service_server::WorkloadRegistrationService for Constant {
    async fn register_workload(
        &self,
        _: Request<pb::RegisterWorkloadRequest>,
    ) -> Result<Response<pb::RegisterWorkloadResponse>, Status> {
        Ok(Response::new(pb::RegisterWorkloadResponse {
            name: "bookinfo/ratings-jwt-my-corp--some-subject".to_owned(),
        }))
    }

    async fn unregister_workload(
        &self,
        _: Request<pb::UnregisterWorkloadRequest>,
    ) -> Result<Response<pb::UnregisterWorkloadResponse>, Status> {
        Err(Status::unimplemented("a join has no end"))
    }
}

#[tonic::async_trait]
impl pb::session_service_server::SessionService for Constant {
    type SessionStream = BoxStream<'static, Result<pb::PlaneMessage, Status>>;

    /// One boot configuration, and then silence; what the agent says is read and forgotten.
    async fn session(
        &self,
        request: Request<Streaming<pb::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut said = request.into_inner();
        let boot = pb::BootConfiguration { version: "1".to_owned(), ..pb::BootConfiguration::default() };
        let boot = pb::PlaneMessage { message: Some(pb::plane_message::Message::Boot(boot)) };
        let silence = stream::once(async move {
            while let Ok(Some(_)) = said.message().await {}
            Err(Status::cancelled("the agent closed it"))
        });
        Ok(Response::new(stream::once(async { Ok(boot) }).chain(silence).boxed()))
    }
}
