//! Names: of resources (Istio's, which people know from `/clusters` and `/listeners`), of services, of protocols.

use onboarding_kinds::mesh::{Port, Protocol};
use std::net::IpAddr;

pub fn listener(address: &str, port: u16) -> String {
    format!("{address}_{port}")
}

pub fn inbound_cluster(port: u16) -> String {
    format!("inbound|{port}||")
}

pub fn outbound_cluster(port: u16, host: &str) -> String {
    format!("outbound|{port}||{host}")
}

/// The server name by which the peers of a mesh tell services apart; `None` where it would be longer than a server name may be.
pub fn sni(port: u16, host: &str) -> Option<String> {
    Some(format!("outbound_.{port}_._.{host}")).filter(|name| name.len() <= 255)
}

pub fn service_host(name: &str, namespace: &str) -> String {
    format!("{name}.{namespace}.svc.{}", super::CLUSTER_DOMAIN)
}

/// What a port speaks, as far as it matters how its bytes are passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Speech {
    Http1,
    Http2,
    /// TLS of the application's own, passed on as it is.
    Tls,
    Tcp,
}

impl Speech {
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http1 | Self::Http2)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP",
            Self::Http2 => "HTTP2",
            Self::Tls => "TLS",
            Self::Tcp => "TCP",
        }
    }
}

impl From<Protocol> for Speech {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Http => Self::Http1,
            Protocol::Http2 | Protocol::Grpc => Self::Http2,
            Protocol::Tls | Protocol::Https => Self::Tls,
            Protocol::Tcp => Self::Tcp,
        }
    }
}

/// The port's protocol, or the one that its name begins with, as Istio reads names (`http-web`).
pub fn speech(port: &Port) -> Option<Speech> {
    port.protocol.map(Speech::from).or_else(|| match port.name.as_deref()?.split('-').next()? {
        "http" => Some(Speech::Http1),
        "http2" | "grpc" => Some(Speech::Http2),
        "https" | "tls" => Some(Speech::Tls),
        "tcp" => Some(Speech::Tcp),
        _ => None,
    })
}

/// Where a connection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Socket(IpAddr, u16),
    Pipe(String),
}

/// `127.0.0.1:8080`, `[::1]:8080`, `unix:///path`.
pub fn target(text: &str) -> Option<Target> {
    if let Some(path) = text.strip_prefix("unix://") {
        return path.starts_with('/').then(|| Target::Pipe(path.to_owned()));
    }
    let address: std::net::SocketAddr = text.parse().ok()?;
    (address.port() != 0).then(|| Target::Socket(address.ip(), address.port()))
}
