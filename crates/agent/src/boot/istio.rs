//! What a sidecar of an Istio mesh is started from. All of it comes from the plane and is checked here, before it is kept: paths stay
//! in the working directory, variables can't change which program runs, and everything has a bound.

use super::{BootError, malformed};
use jiff::Timestamp;
use onboarding_wire::onboarding as pb;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

/// Valid, and possibly with the placeholder of the host's address: see [`Istio::placed`].
#[derive(Debug, Clone, PartialEq)]
pub struct Istio {
    /// pilot-agent's, by path relative to its working directory (`etc/istio/config/mesh`).
    pub files: BTreeMap<String, Vec<u8>>,
    /// pilot-agent's.
    pub environment: BTreeMap<String, String>,
    /// Where istiod is reached; `None`: at the agent's own endpoint.
    pub discovery_address: Option<Address>,
    /// The name of istiod's certificate, and the SNI.
    pub istiod_san: String,
    /// PEM bundle.
    pub root_certificates: String,
    /// For istiod's CA.
    pub token: Secret,
    pub token_expires_at: Timestamp,
    /// Envoy's node as a JSON object.
    pub node: Vec<u8>,
    pub drain_duration: Option<Duration>,
}

/// `host:port`; an IPv6 address is without its brackets here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

/// Never in a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Stands for the address that the agent registered.
const HOST_IP: &[u8] = b"{{HOST_IP}}";

/// What of the mesh's proxyConfig is different for this proxy; here always a JSON object.
pub const PROXY_CONFIG: &str = "PROXY_CONFIG";

const MOST_FILES: usize = 64;
const LARGEST_FILE: usize = 1 << 20;
const LONGEST_PATH: usize = 200;
/// Where pilot-agent's files are; what else is in the working directory is the agent's.
const FOLDERS: [&str; 2] = ["etc", "var"];
const MOST_VARIABLES: usize = 256;
/// What the kernel takes of one is 128 KiB.
const LONGEST_VALUE: usize = 64 << 10;
/// What the kernel takes of all, with the arguments, is 2 MiB by default.
const LARGEST_ENVIRONMENT: usize = 512 << 10;
const LARGEST_NODE: usize = 1 << 20;
const LARGEST_ROOTS: usize = 1 << 20;
const LONGEST_TOKEN: usize = 16 << 10;
const LONGEST_DRAIN: Duration = Duration::from_secs(3600);

impl Istio {
    pub(super) fn read(message: pb::IstioBoot) -> Result<Self, BootError> {
        if message.files.len() > MOST_FILES {
            return Err(malformed("files", format!("are {}, and {MOST_FILES} are allowed", message.files.len())));
        }
        let mut files = BTreeMap::new();
        for (path, bytes) in message.files {
            if bytes.len() > LARGEST_FILE {
                return Err(malformed("files", format!("have {path:?} with more than {LARGEST_FILE} bytes")));
            }
            let name = relative(&path).map_err(|why| malformed("files", format!("have {path:?}, which {why}")))?;
            if files.insert(name, bytes).is_some() {
                return Err(malformed("files", format!("have {path:?} twice")));
            }
        }
        let drain_duration = match message.drain_duration {
            None => None,
            Some(given) => {
                let duration = Duration::try_from(given).ok().filter(|duration| *duration <= LONGEST_DRAIN);
                Some(duration.ok_or_else(|| malformed("drain_duration", "is not between zero and an hour"))?)
            }
        };
        let environment: BTreeMap<_, _> = message.environment.into_iter().collect();
        check_environment(&environment)?;
        let (token, token_expires_at) = credential(message.token, message.token_expires_at)?;
        Ok(Self {
            files,
            environment,
            discovery_address: address(&message.discovery_address)?,
            istiod_san: server_name(message.istiod_san)?,
            root_certificates: roots(message.root_certificates)?,
            token,
            token_expires_at,
            node: node(message.node)?,
            drain_duration,
        })
    }

    /// The same with the token of this message.
    pub(super) fn with_token_of(&self, message: pb::IstioBoot) -> Result<Self, BootError> {
        let (token, token_expires_at) = credential(message.token, message.token_expires_at)?;
        Ok(Self { token, token_expires_at, ..self.clone() })
    }

    pub(super) fn to_message(&self) -> pb::IstioBoot {
        pb::IstioBoot {
            files: self.files.iter().map(|(path, bytes)| (path.clone(), bytes.clone())).collect(),
            environment: self.environment.clone().into_iter().collect(),
            discovery_address: self.discovery_address.as_ref().map(Address::to_string).unwrap_or_default(),
            istiod_san: self.istiod_san.clone(),
            root_certificates: self.root_certificates.clone(),
            token: self.token.0.clone(),
            token_expires_at: Some(prost_types::Timestamp {
                seconds: self.token_expires_at.as_second(),
                nanos: self.token_expires_at.subsec_nanosecond(),
            }),
            node: self.node.clone(),
            drain_duration: self.drain_duration.and_then(|duration| duration.try_into().ok()),
        }
    }

    /// With the address that this host registered, and the endpoint where no other address is given.
    ///
    /// Fails where the host's address is needed and not known.
    pub fn placed(&self, host: Option<IpAddr>, endpoint: &Address) -> Result<Self, BootError> {
        let place = |bytes: &[u8]| match host {
            Some(ip) => Ok(replace(bytes, HOST_IP, ip.to_string().as_bytes())),
            None if bytes.windows(HOST_IP.len()).any(|window| window == HOST_IP) => Err(BootError::NoHostAddress),
            None => Ok(bytes.to_vec()),
        };
        let text = |text: &String| place(text.as_bytes()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        Ok(Self {
            files: self
                .files
                .iter()
                .map(|(path, bytes)| Ok((path.clone(), place(bytes)?)))
                .collect::<Result<_, BootError>>()?,
            environment: self
                .environment
                .iter()
                .map(|(name, value)| Ok((name.clone(), text(value)?)))
                .collect::<Result<_, BootError>>()?,
            discovery_address: Some(self.discovery_address.clone().unwrap_or_else(|| endpoint.clone())),
            node: place(&self.node)?,
            ..self.clone()
        })
    }
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
        let (before, found) = rest.split_at(at);
        replaced.extend_from_slice(before);
        replaced.extend_from_slice(to);
        rest = found.get(from.len()..).unwrap_or_default();
    }
    replaced.extend_from_slice(rest);
    replaced
}

/// Without `./` in front; never out of the directory, and never through a name that means something to a shell.
fn relative(path: &str) -> Result<String, &'static str> {
    let inner = path.strip_prefix("./").unwrap_or(path);
    if inner.len() > LONGEST_PATH {
        return Err("is too long");
    }
    let plain = |name: &str| {
        !name.is_empty()
            && !name.starts_with('.')
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    let mut parts = inner.split('/');
    if !inner.split('/').all(plain) {
        return Err("is not a relative path of plain names");
    }
    if !parts.next().is_some_and(|first| FOLDERS.contains(&first)) || parts.next().is_none() {
        return Err("is not in ./etc or ./var");
    }
    Ok(inner.to_owned())
}

fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), BootError> {
    let fault = |problem: String| Err(malformed("environment", problem));
    if environment.len() > MOST_VARIABLES {
        return fault(format!("has {} variables, and {MOST_VARIABLES} are allowed", environment.len()));
    }
    let mut size = 0;
    for (name, value) in environment {
        let plain = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
        if name.is_empty() || name.len() > 256 || !name.bytes().all(plain) {
            return fault(format!("has the name {name:?}, which is not one of A-Z, 0-9 and _"));
        }
        // These decide which code runs.
        if name == "PATH" || name.starts_with("LD_") {
            return fault(format!("has {name}, which only this host may set"));
        }
        if value.len() > LONGEST_VALUE || value.contains('\0') {
            return fault(format!("has {name} with a value that is too long, or has a NUL in it"));
        }
        // The agent adds to it.
        if name == PROXY_CONFIG && serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(value).is_err() {
            return fault(format!("has {name}, which is not a JSON object"));
        }
        size += name.len() + value.len();
    }
    if size > LARGEST_ENVIRONMENT {
        return fault(format!("is larger than {LARGEST_ENVIRONMENT} bytes"));
    }
    Ok(())
}

fn address(text: &str) -> Result<Option<Address>, BootError> {
    if text.is_empty() {
        return Ok(None);
    }
    let parse = || {
        let (host, port) = text.rsplit_once(':')?;
        let port = port.parse::<u16>().ok().filter(|port| *port > 0)?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(ip) => ip.parse::<std::net::Ipv6Addr>().ok()?.to_string(),
            None => match rustls_pki_types::ServerName::try_from(host).ok()? {
                rustls_pki_types::ServerName::IpAddress(rustls_pki_types::IpAddr::V6(_)) => return None,
                _ => host.to_owned(),
            },
        };
        Some(Address { host, port })
    };
    parse().map(Some).ok_or_else(|| malformed("discovery_address", format!("is {text:?}, which is not host:port")))
}

fn server_name(name: String) -> Result<String, BootError> {
    match rustls_pki_types::DnsName::try_from(name.as_str()) {
        Ok(_) => Ok(name),
        Err(_) => Err(malformed("istiod_san", format!("is {name:?}, which is not a DNS name"))),
    }
}

fn roots(bundle: String) -> Result<String, BootError> {
    use rustls_pki_types::pem::PemObject;
    if bundle.len() > LARGEST_ROOTS {
        return Err(malformed("root_certificates", format!("are larger than {LARGEST_ROOTS} bytes")));
    }
    let mut certificates = rustls::RootCertStore::empty();
    for certificate in rustls_pki_types::CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        let added = certificate.ok().and_then(|certificate| certificates.add(certificate).ok());
        added.ok_or_else(|| malformed("root_certificates", "have one that can't be read"))?;
    }
    if certificates.is_empty() {
        return Err(malformed("root_certificates", "are missing"));
    }
    Ok(bundle)
}

fn credential(token: String, expires_at: Option<prost_types::Timestamp>) -> Result<(Secret, Timestamp), BootError> {
    if token.is_empty() || token.len() > LONGEST_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(malformed("token", "is missing, too long, or not one word"));
    }
    let expires_at = expires_at.and_then(crate::session::timestamp);
    Ok((Secret(token), expires_at.ok_or_else(|| malformed("token_expires_at", "is missing or out of range"))?))
}

fn node(json: Vec<u8>) -> Result<Vec<u8>, BootError> {
    if json.len() > LARGEST_NODE {
        return Err(malformed("node", format!("is larger than {LARGEST_NODE} bytes")));
    }
    let Ok(node) = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&json) else {
        return Err(malformed("node", "is not a JSON object"));
    };
    // Envoy needs both.
    let named = |name| node.get(name).and_then(serde_json::Value::as_str).is_some_and(|text| !text.is_empty());
    if !named("id") || !named("cluster") {
        return Err(malformed("node", "has no id or no cluster"));
    }
    match node.get("metadata") {
        None | Some(serde_json::Value::Object(_)) => Ok(json),
        Some(_) => Err(malformed("node", "has metadata that is no JSON object")),
    }
}

#[cfg(test)]
#[path = "istio_tests.rs"]
pub(crate) mod tests;
