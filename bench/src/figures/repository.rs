//! The package repository under many downloads at once, beside nginx with the same file and the same certificate.

use super::Bench;
use crate::machine::{self, Killed};
use crate::plane::World;
use crate::table::Figure;
use anyhow::{Context, ensure};
use onboarding_testkit::port;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

const PATH: &str = "/install/deb/amd64/onboarding-agent.deb";
const NGINX: &str = "nginx";
const READY_WITHIN: Duration = Duration::from_secs(20);
const DOWNLOADED_WITHIN: Duration = Duration::from_secs(120);
const MIB: f64 = 1024.0 * 1024.0;

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let (clients, size) = (bench.count(20, 200), bench.count(5, 50) << 20);
    let started = Instant::now();
    let world = World::start().await?;
    let site = Site::new(bench, &world, size)?;
    let client = Client::new(&world.tls().ca)?;
    let (mut ours, mut theirs, mut sealed) = (Seen::default(), Seen::default(), Vec::new());
    for _ in 0..bench.repeat {
        let server = site.repository(bench).await?;
        ours.measure(&server, &client, clients, size).await?;
        bench.say(started, &format!("ours: {:.0} MiB/s", ours.speed.last().copied().unwrap_or_default()));
        drop(server);
        let server = site.nginx(bench).await.context("nginx, which dev/setup --bench installs")?;
        theirs.measure(&server, &client, clients, size).await?;
        bench.say(started, &format!("nginx: {:.0} MiB/s", theirs.speed.last().copied().unwrap_or_default()));
        sealed.push(sealing(size)?);
    }
    let name = |what: &str| format!("repository, {clients} clients: {what}");
    Ok(vec![
        Figure::new(name("all together"), "MiB/s", ours.speed, (NGINX, theirs.speed)).goal("as nginx"),
        Figure::new(name("CPU of the server for a GiB"), "s", ours.cpu, (NGINX, theirs.cpu))
            .against("AES-256-GCM alone", sealed)
            .goal("as nginx"),
        Figure::new(name("resident memory at its peak"), "MiB", ours.peak, (NGINX, theirs.peak)).goal("flat"),
        Figure::new(name("resident memory before"), "MiB", ours.before, (NGINX, theirs.before)),
    ])
}

/// What was measured of one server, several times.
#[derive(Default)]
struct Seen {
    speed: Vec<f64>,
    cpu: Vec<f64>,
    before: Vec<f64>,
    peak: Vec<f64>,
}

impl Seen {
    async fn measure(&mut self, server: &Server, client: &Client, clients: usize, size: usize) -> anyhow::Result<()> {
        // Its checksum is computed at the first request; and the file is in the page cache, as for everybody after the first.
        client.download(server.address, size).await.context("the first download")?;
        self.before.push(machine::memory(server.pid())?.resident as f64 / MIB);
        let (cpu, began) = (machine::cpu_time(server.pid())?, Instant::now());
        let downloads: Vec<_> = (0..clients)
            .map(|_| {
                let (client, address) = (client.clone(), server.address);
                tokio::spawn(async move { client.download(address, size).await })
            })
            .collect();
        for download in downloads {
            download.await??;
        }
        let total = clients as f64 * size as f64 / MIB;
        self.speed.push(total / began.elapsed().as_secs_f64());
        self.cpu.push((machine::cpu_time(server.pid())? - cpu).as_secs_f64() / total * 1024.0);
        self.peak.push(machine::peak_memory(server.pid())? as f64 / MIB);
        Ok(())
    }
}

/// The file, the certificate, and the configuration of nginx.
struct Site {
    directory: tempfile::TempDir,
}

struct Server {
    process: Killed,
    address: SocketAddr,
}

impl Server {
    fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Waits for it to take connections.
    async fn started(child: Child, address: SocketAddr, log: &Path) -> anyhow::Result<Self> {
        let (server, began) = (Self { process: Killed(child), address }, Instant::now());
        while TcpStream::connect(address).await.is_err() {
            ensure!(
                began.elapsed() < READY_WITHIN,
                "nothing listens on {address}; its log: {}",
                std::fs::read_to_string(log).unwrap_or_default()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(server)
    }
}

impl Site {
    fn new(bench: &Bench, world: &World, size: usize) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("onboarding-bench-").tempdir_in(&bench.directory)?;
        let packages = directory.path().join("packages");
        let file = packages.join(PATH.trim_start_matches("/install/"));
        std::fs::create_dir_all(file.parent().context("a package is in a directory")?)?;
        std::fs::write(&file, package(size)?)?;
        // What nginx serves has the same path.
        std::os::unix::fs::symlink(&packages, directory.path().join("install"))?;
        std::fs::create_dir(directory.path().join("tls"))?;
        std::fs::write(directory.path().join("tls/tls.crt"), &world.tls().certificate_chain)?;
        std::fs::write(directory.path().join("tls/tls.key"), &world.tls().private_key)?;
        Ok(Self { directory })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn repository(&self, bench: &Bench) -> anyhow::Result<Server> {
        let (address, admin) = (port::free_at(Ipv4Addr::LOCALHOST)?, port::free_at(Ipv4Addr::LOCALHOST)?);
        let mut command = machine::on_planes_core(&bench.binaries.join("onboarding-repository"), bench.one_core);
        command
            .args(["--listen", &address.to_string(), "--admin-listen", &admin.to_string()])
            .arg("--packages")
            .arg(self.at("packages"))
            .arg("--certificate-directory")
            .arg(self.at("tls"));
        self.start(command, address).await
    }

    /// One worker in the foreground, with what a distribution's configuration has.
    async fn nginx(&self, bench: &Bench) -> anyhow::Result<Server> {
        let (address, here) = (port::free_at(Ipv4Addr::LOCALHOST)?, self.directory.path().display());
        std::fs::write(
            self.at("nginx.conf"),
            format!(
                "daemon off; master_process off; user root; pid {here}/nginx.pid; error_log {here}/nginx.log;
events {{ worker_connections 1024; }}
http {{
  sendfile on; tcp_nopush on; access_log off; types {{ application/vnd.debian.binary-package deb; }}
  client_body_temp_path {here}/t1; proxy_temp_path {here}/t2; fastcgi_temp_path {here}/t3; uwsgi_temp_path {here}/t4; scgi_temp_path {here}/t5;
  server {{
    listen {address} ssl; root {here};
    ssl_protocols TLSv1.2 TLSv1.3; ssl_certificate {here}/tls/tls.crt; ssl_certificate_key {here}/tls/tls.key;
  }}
}}
"
            ),
        )?;
        let mut command = machine::on_planes_core(Path::new(NGINX), bench.one_core);
        command.arg("-c").arg(self.at("nginx.conf")).arg("-p").arg(self.directory.path());
        self.start(command, address).await
    }

    async fn start(&self, mut command: Command, address: SocketAddr) -> anyhow::Result<Server> {
        let log = std::fs::File::options().create(true).append(true).open(self.at("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        Server::started(child, address, &self.at("log")).await
    }
}

/// A Debian package as far as its outermost layer goes, with noise in it.
fn package(size: usize) -> anyhow::Result<Vec<u8>> {
    const HEADERS: usize = 8 + 3 * 60 + 4 + 2;
    let mut data = vec![0; size - HEADERS];
    aws_lc_rs::rand::fill(&mut data)?;
    let mut all = b"!<arch>\n".to_vec();
    for (name, content) in [("debian-binary", b"2.0\n".as_slice()), ("control.tar", b"cc"), ("data.tar", &data)] {
        let header = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100_644, content.len());
        all.extend(header.as_bytes());
        all.extend(content);
    }
    ensure!(all.len() == size, "the package has {} bytes", all.len());
    Ok(all)
}

/// Reads and throws away, TLS 1.3 with AES-256-GCM.
#[derive(Clone)]
struct Client(TlsConnector);

impl Client {
    fn new(ca: &str) -> anyhow::Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(ca.as_bytes()) {
            roots.add(certificate?)?;
        }
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        // The same for both servers, whatever each prefers.
        provider.cipher_suites.retain(|suite| suite.suite() == rustls::CipherSuite::TLS13_AES_256_GCM_SHA384);
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // As many machines: none knows what another was given.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    /// Of the whole package, in HTTP/1.1.
    async fn download(&self, from: SocketAddr, size: usize) -> anyhow::Result<()> {
        tokio::time::timeout(DOWNLOADED_WITHIN, self.read(from, size))
            .await
            .with_context(|| format!("a download took longer than {DOWNLOADED_WITHIN:?}"))?
    }

    async fn read(&self, from: SocketAddr, size: usize) -> anyhow::Result<()> {
        let host = crate::plane::HOST;
        let stream = TcpStream::connect(from).await?;
        let mut stream = self.0.connect(ServerName::try_from(host)?, stream).await.context("the TLS handshake")?;
        stream.write_all(format!("GET {PATH} HTTP/1.1\r\nHost: {host}\r\n\r\n").as_bytes()).await?;
        let (mut block, mut head, mut body) = (vec![0; 64 << 10], Vec::new(), None);
        while body.is_none_or(|body| body < size) {
            let read = stream.read(&mut block).await?;
            ensure!(read > 0, "the download ended after {body:?} bytes; its head: {}", String::from_utf8_lossy(&head));
            match &mut body {
                Some(body) => *body += read,
                None => {
                    head.extend_from_slice(&block[..read]);
                    body = head.windows(4).position(|end| end == b"\r\n\r\n").map(|end| head.len() - end - 4);
                    ensure!(
                        body.is_none() || head.starts_with(b"HTTP/1.1 200"),
                        "{}",
                        String::from_utf8_lossy(&head[..head.len().min(400)])
                    );
                }
            }
        }
        Ok(())
    }
}

/// Seconds in which the library encrypts a GiB, in records of 16 KiB.
fn sealing(size: usize) -> anyhow::Result<f64> {
    use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32])?);
    let mut record = vec![7; 16 << 10];
    let count = size / record.len();
    let each = machine::per_call(count.max(1), || {
        let tag = key.seal_in_place_separate_tag(Nonce::assume_unique_for_key([7; 12]), Aad::empty(), &mut record)?;
        record[..tag.as_ref().len()].copy_from_slice(tag.as_ref());
        Ok(())
    })?;
    Ok(each * ((1 << 30) / record.len()) as f64)
}
