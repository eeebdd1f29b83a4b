//! What nobody gets below with these libraries on this machine: a join's cryptography, a connection's TLS state, a message encrypted and
//! written.

use crate::figures::Bench;
use crate::machine;
use crate::plane::{HOST, World};
use anyhow::{Context, ensure};
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair, ParsedPublicKey,
    RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256,
};
use nix::time::{ClockId, clock_gettime};
use onboarding_testkit::oidc::{self, MadeTls};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// CPU seconds of each part of what the plane computes for one join.
#[derive(Debug, Clone, Copy)]
pub struct Cryptography {
    /// The server's side of a full TLS 1.3 handshake.
    pub handshake: f64,
    /// Once the agent's proof, once the plane's own token when it comes back: both P-256.
    pub verify: f64,
    /// The plane's token.
    pub sign: f64,
    /// The evidence: RS256 of a JWT, or the RSA-2048 signature of an identity document.
    pub rsa_verify: f64,
}

impl Cryptography {
    /// # Errors
    /// The library refuses what it must take.
    pub fn measure(world: &World, count: usize) -> anyhow::Result<Self> {
        let message = [7; 300];
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).context("a P-256 key")?;
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der()?;
        let signature = pair.sign(&random, &message).context("a P-256 signature")?;
        let rsa = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).context("an RSA key")?;
        let mut rsa_signature = vec![0; rsa.public_modulus_len()];
        rsa.sign(&RSA_PKCS1_SHA256, &random, &message, &mut rsa_signature).context("an RSA signature")?;
        let rsa_public = ParsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, rsa.public_key().as_ref())?;
        let tls = Tls::new(world.tls())?;
        Ok(Self {
            handshake: tls.server_seconds(count)?,
            verify: machine::per_call(count, || {
                // Read anew: each agent has its own.
                let key = ParsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, public.as_ref())?;
                key.verify_sig(&message, signature.as_ref()).context("a P-256 signature")
            })?,
            sign: machine::per_call(count, || pair.sign(&random, &message).map(drop).context("a P-256 signature"))?,
            rsa_verify: machine::per_call(count, || {
                rsa_public.verify_sig(&message, &rsa_signature).context("an RSA signature")
            })?,
        })
    }

    /// All of one join.
    pub fn of_a_join(&self) -> f64 {
        self.handshake + 2.0 * self.verify + self.sign + self.rsa_verify
    }
}

/// The endpoint's TLS without an endpoint: the same library, configuration and certificate, no socket.
pub struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// # Errors
    /// The certificate can't be used.
    pub fn new(made: &MadeTls) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let certificates = |text: &str| {
            CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>().context("a certificate")
        };
        let key = PrivateKeyDer::from_pem_slice(made.private_key.as_bytes()).context("a key")?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_no_client_auth()
            .with_single_cert(certificates(&made.certificate_chain)?, key)?;
        // As the endpoint: nothing is resumed.
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![b"h2".to_vec()];
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&made.ca)? {
            roots.add(certificate)?;
        }
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.resumption = rustls::client::Resumption::disabled();
        client.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { server: Arc::new(server), client: Arc::new(client) })
    }

    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// A server's connection after its handshake, and the CPU time that the server's side took.
    ///
    /// # Errors
    /// The two don't understand each other.
    pub fn handshake(&self) -> anyhow::Result<(ServerConnection, Duration)> {
        let clock = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
        let name = ServerName::try_from(HOST)?;
        let mut client = ClientConnection::new(self.client.clone(), name)?;
        let mut spent = Duration::ZERO;
        let began = clock()?;
        let mut server = ServerConnection::new(self.server.clone())?;
        spent += clock()? - began;
        for _ in 0..4 {
            let mut to_server = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut to_server)?;
            }
            let began = clock()?;
            let mut bytes = to_server.as_slice();
            while !bytes.is_empty() {
                server.read_tls(&mut bytes)?;
                server.process_new_packets()?;
            }
            let mut to_client = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut to_client)?;
            }
            spent += clock()? - began;
            let mut bytes = to_client.as_slice();
            while !bytes.is_empty() {
                client.read_tls(&mut bytes)?;
                client.process_new_packets()?;
            }
            if !client.is_handshaking() && !server.is_handshaking() {
                return Ok((server, spent));
            }
        }
        anyhow::bail!("the handshake does not end")
    }

    /// CPU seconds of the server's side of a handshake.
    ///
    /// # Errors
    /// The two don't understand each other.
    pub fn server_seconds(&self, count: usize) -> anyhow::Result<f64> {
        self.handshake()?;
        let mut all = Duration::ZERO;
        for _ in 0..count {
            all += self.handshake()?.1;
        }
        Ok(all.as_secs_f64() / count as f64)
    }

    /// Bytes that this process needs for each of `count` connections after their handshakes, sockets aside.
    ///
    /// # Errors
    /// The two don't understand each other.
    pub fn bytes_per_connection(&self, count: usize) -> anyhow::Result<f64> {
        let own = i32::try_from(std::process::id())?;
        let before = machine::memory(own)?.anonymous;
        let mut held = Vec::with_capacity(count);
        for _ in 0..count {
            held.push(self.handshake()?.0);
        }
        let after = machine::memory(own)?.anonymous;
        ensure!(held.iter().all(|connection| !connection.is_handshaking()), "a connection that shakes hands still");
        Ok(after.saturating_sub(before) as f64 / count as f64)
    }
}

/// Bytes of the TLS library's own state for each of `count` connections: in a process of its own, whose allocator has nothing left over
/// from anything before.
///
/// # Errors
/// It can't be started, or says no number.
pub fn tls_state(bench: &Bench, count: usize) -> anyhow::Result<f64> {
    let mut command = Command::new(bench.binaries.join("onboarding-bench"));
    let output = command.arg("tls-state").arg(count.to_string()).output().context("starting it for the TLS state")?;
    let said = String::from_utf8_lossy(&output.stdout);
    said.trim().parse().with_context(|| format!("it said {said:?}, and {}", String::from_utf8_lossy(&output.stderr)))
}

/// What that process does.
///
/// # Errors
/// The handshakes don't succeed.
#[allow(clippy::print_stdout, reason = "who started it reads the number")]
pub fn print_tls_state(count: usize) -> anyhow::Result<()> {
    println!("{}", Tls::new(&oidc::make_tls(&[HOST])?)?.bytes_per_connection(count)?);
    Ok(())
}

/// CPU seconds of encrypting a message of this size and writing it to a loopback socket, as it is sent: records of at most 16 KiB,
/// AES-128-GCM. `count` are measured, where they are not too many bytes.
///
/// # Errors
/// Loopback can't be written to.
pub fn message(count: usize, size: usize) -> anyhow::Result<f64> {
    const RECORD: usize = 16 << 10;
    /// Enough to know.
    const BYTES: usize = 256 << 20;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut to = TcpStream::connect(listener.local_addr()?)?;
    to.set_nodelay(true)?;
    let (mut from, _) = listener.accept()?;
    let reader = std::thread::spawn(move || {
        let mut block = vec![0; 64 * 1024];
        while from.read(&mut block).is_ok_and(|read| read > 0) {}
    });
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[7; 16])?);
    let (message, mut sealed) = (vec![7; size], Vec::with_capacity(2 * RECORD));
    let each = machine::per_call(count.min(BYTES / size.max(1)).max(1), || {
        for record in message.chunks(RECORD) {
            sealed.clear();
            sealed.extend_from_slice(record);
            key.seal_in_place_append_tag(Nonce::assume_unique_for_key([7; 12]), Aad::empty(), &mut sealed)?;
            to.write_all(&sealed)?;
        }
        Ok(())
    })?;
    drop(to);
    // It ends with the socket.
    let _ = reader.join();
    Ok(each)
}
