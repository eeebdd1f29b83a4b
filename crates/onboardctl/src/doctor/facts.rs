//! What was found out about a cluster, and what is made of it.

use super::material::Certificate;
use crate::plane::cluster::Problem;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};

pub type Asked<T> = Result<T, Problem>;

/// Objects as the API server has them, or why they can't be asked for.
#[derive(Debug)]
pub struct Facts {
    pub now: Timestamp,
    pub server: String,
    pub version: Asked<String>,
    pub objects: Option<Objects>,
    pub endpoint: Option<Endpoint>,
}

/// Those without a place in parentheses are of istio-system.
#[derive(Debug)]
pub struct Objects {
    pub planes: Asked<Vec<Value>>,
    /// (Of all namespaces)
    pub policies: Asked<Vec<Value>>,
    /// (Of all namespaces)
    pub groups: Asked<Vec<Value>>,
    /// (Of all namespaces)
    pub wars: Asked<Vec<Value>>,
    /// (Of all namespaces)
    pub entries: Asked<Vec<Value>>,
    /// (Of all namespaces) `metadata` only.
    pub accounts: Asked<Vec<Value>>,
    /// (Of all namespaces) ConfigMaps `istio-ca-root-cert`, `metadata` only.
    pub roots: Asked<Vec<Value>>,
    /// Those whose names begin as Istio's do.
    pub config_maps: Asked<Vec<Value>>,
    pub deployments: Asked<Vec<Value>>,
    pub services: Asked<Vec<Value>>,
    /// ConfigMap `onboarding-plane-config`.
    pub plane_config: Asked<Option<Value>>,
}

/// Of the one ControlPlane that enables onboarding.
#[derive(Debug)]
pub struct Endpoint {
    pub secret_name: String,
    pub secret: Asked<Option<Value>>,
    pub hosts: Vec<Host>,
    /// Addresses of svc/vmgateway, those of its host names included.
    pub gateway: Vec<IpAddr>,
    pub other_gateway: Option<OtherGateway>,
}

/// `spec.meshExpansion.customGateway`: where sidecars come to istiod.
#[derive(Debug)]
pub struct OtherGateway {
    pub host: String,
    pub port: u16,
    /// The istiod that was asked for there (its name in its certificate).
    pub istiod: String,
    /// The first address that answered, and with what certificate.
    pub outcome: Result<(SocketAddr, Certificate), String>,
}

#[derive(Debug)]
pub struct Host {
    pub name: String,
    /// As this machine resolves it.
    pub addresses: Result<Vec<IpAddr>, String>,
    /// `None`: there was no address to ask.
    pub answer: Option<Answer>,
}

/// Of port 15443.
#[derive(Debug)]
pub struct Answer {
    pub address: SocketAddr,
    pub outcome: Result<Served, String>,
}

/// What came over TLS.
#[derive(Debug)]
pub struct Served {
    pub certificate: Result<Certificate, String>,
    /// The plane's UID, as `Discover` says it.
    pub uid: Result<String, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Ok,
    Warn,
    Fail,
}

impl Level {
    pub fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub level: Level,
    /// The thing that was looked at.
    pub what: String,
    pub words: String,
    /// Empty where nothing is to be done.
    pub way_out: String,
}

impl Finding {
    pub fn ok(what: impl Into<String>, words: impl Into<String>) -> Self {
        Self { level: Level::Ok, what: what.into(), words: words.into(), way_out: String::new() }
    }
    pub fn warn(what: impl Into<String>, words: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { level: Level::Warn, what: what.into(), words: words.into(), way_out: way_out.into() }
    }
    pub fn fail(what: impl Into<String>, words: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { level: Level::Fail, what: what.into(), words: words.into(), way_out: way_out.into() }
    }
    pub fn to_json(&self) -> Value {
        let level = self.level.word().to_ascii_lowercase();
        json!({ "level": level, "what": self.what, "words": self.words, "wayOut": self.way_out })
    }
}
