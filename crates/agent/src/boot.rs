//! The boot configuration that the agent holds: what came last, put together from differences, kept on disk.

mod istio;

#[cfg(test)]
pub(crate) use istio::tests as fixtures;
pub use istio::{Address, Istio, PROXY_CONFIG, Secret};

use aws_lc_rs::digest::{SHA256, digest};
use bytes::Bytes;
use onboarding_wire::onboarding as pb;
use onboarding_wire::xds;
use prost::Message;
use std::collections::BTreeMap;

/// Complete; what a sidecar is started from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeldBoot {
    pub version: String,
    pub spiffe_id: String,
    pub trust_domain: String,
    pub sidecar: Sidecar,
    pub probe: Option<pb::Probe>,
    pub host_aliases: Vec<pb::HostAlias>,
    pub ingress: Vec<pb::IngressListener>,
    pub propagation_delay: std::time::Duration,
}

/// Which mesh it is for, and so who configures the sidecar.
#[derive(Debug, Clone, PartialEq)]
pub enum Sidecar {
    /// The plane does, through the agent.
    Standalone(Standalone),
    /// istiod does.
    Istio(Box<Istio>),
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Standalone {
    pub node_id: String,
    pub cluster: String,
    /// Each resource as protobuf JSON, by type and name.
    pub resources: Resources,
}

/// Shared: the driver, the sidecar's task and the last good configuration hold the same bytes.
pub type Resources = BTreeMap<(XdsType, String), Bytes>;

impl Default for Sidecar {
    fn default() -> Self {
        Self::Standalone(Standalone::default())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum XdsType {
    Listener,
    Cluster,
    Endpoint,
    Route,
}

/// Why a boot configuration can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    #[error("the plane sent a difference to version {base:?}, and this agent holds {held:?}")]
    AnotherBase { base: String, held: String },
    #[error("the plane sent a difference to the resource {name:?}, and this agent holds another of that name, or none")]
    AnotherResource { name: String },
    #[error("the sidecar is configured with this host's address, which this agent has not registered yet")]
    NoHostAddress,
    #[error("the plane sent a boot configuration whose {field} {problem}")]
    Malformed { field: &'static str, problem: String },
}

fn malformed(field: &'static str, problem: impl Into<String>) -> BootError {
    BootError::Malformed { field, problem: problem.into() }
}

impl HeldBoot {
    /// What is held after `message`, which is complete or a difference to `held`.
    pub fn apply(held: Option<&Self>, message: pb::BootConfiguration) -> Result<Self, BootError> {
        if message.version.is_empty() {
            return Err(malformed("version", "is missing"));
        }
        let mut host_aliases = message.host_aliases;
        let sidecar = match (message.sidecar, held) {
            (Some(pb::boot_configuration::Sidecar::Envoy(envoy)), _) => {
                let kept = envoy.host_aliases_kept;
                let standalone = Standalone::apply(held, envoy)?;
                if let (true, Some(held)) = (kept, held) {
                    host_aliases.clone_from(&held.host_aliases);
                }
                Sidecar::Standalone(standalone)
            }
            (Some(pb::boot_configuration::Sidecar::Istio(istio)), Some(held)) if held.version == message.version => {
                return held.with_token_of(istio);
            }
            (Some(pb::boot_configuration::Sidecar::Istio(istio)), _) => Sidecar::Istio(Box::new(Istio::read(istio)?)),
            (None, _) => return Err(malformed("sidecar", "is missing")),
        };
        Ok(Self {
            version: message.version,
            spiffe_id: message.spiffe_id,
            trust_domain: message.trust_domain,
            sidecar,
            probe: message.probe,
            host_aliases,
            ingress: message.ingress,
            propagation_delay: message
                .propagation_delay
                .and_then(|delay| delay.try_into().ok())
                .unwrap_or(std::time::Duration::from_secs(10)),
        })
    }

    /// The version that is held brings a new token, and nothing else.
    fn with_token_of(&self, message: pb::IstioBoot) -> Result<Self, BootError> {
        let sidecar = match &self.sidecar {
            Sidecar::Istio(istio) => Sidecar::Istio(Box::new(istio.with_token_of(message)?)),
            Sidecar::Standalone(_) => Sidecar::Istio(Box::new(Istio::read(message)?)),
        };
        Ok(Self { sidecar, ..self.clone() })
    }

    /// Of the standalone mesh; none, where istiod has them.
    pub fn resources(&self) -> &Resources {
        static NONE: Resources = Resources::new();
        match &self.sidecar {
            Sidecar::Standalone(standalone) => &standalone.resources,
            Sidecar::Istio(_) => &NONE,
        }
    }

    /// For a sidecar on this host: with the address that was registered, and the endpoint where istiod is reached by it.
    ///
    /// Fails where the host's address is needed and not known.
    pub fn placed(&self, host: Option<std::net::IpAddr>, endpoint: &Address) -> Result<Self, BootError> {
        let sidecar = match &self.sidecar {
            Sidecar::Istio(istio) => Sidecar::Istio(Box::new(istio.placed(host, endpoint)?)),
            Sidecar::Standalone(_) => self.sidecar.clone(),
        };
        Ok(Self { sidecar, ..self.clone() })
    }

    #[cfg(test)]
    pub(crate) fn resources_mut(&mut self) -> &mut Resources {
        match &mut self.sidecar {
            Sidecar::Standalone(standalone) => &mut standalone.resources,
            Sidecar::Istio(_) => panic!("istiod has them"),
        }
    }

    /// The whole of it as the message that would bring it.
    pub fn to_message(&self) -> pb::BootConfiguration {
        let sidecar = match &self.sidecar {
            Sidecar::Standalone(standalone) => pb::boot_configuration::Sidecar::Envoy(standalone.to_message()),
            Sidecar::Istio(istio) => pb::boot_configuration::Sidecar::Istio(istio.to_message()),
        };
        pb::BootConfiguration {
            version: self.version.clone(),
            spiffe_id: self.spiffe_id.clone(),
            trust_domain: self.trust_domain.clone(),
            sidecar: Some(sidecar),
            probe: self.probe.clone(),
            host_aliases: self.host_aliases.clone(),
            ingress: self.ingress.clone(),
            propagation_delay: self.propagation_delay.try_into().ok(),
        }
    }

    /// For the disk: SHA-256 of what follows, then the message.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let message = self.to_message().encode_to_vec();
        let mut bytes = digest(&SHA256, &message).as_ref().to_vec();
        bytes.extend_from_slice(&message);
        bytes
    }

    /// `None`: damaged.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (sum, message) = bytes.split_at_checked(32)?;
        if digest(&SHA256, message).as_ref() != sum {
            return None;
        }
        Self::apply(None, pb::BootConfiguration::decode(message).ok()?).ok()
    }
}

impl Standalone {
    fn apply(held: Option<&HeldBoot>, envoy: pb::EnvoyBoot) -> Result<Self, BootError> {
        let mut resources = if envoy.base_version.is_empty() {
            BTreeMap::new()
        } else {
            match held {
                Some(held) if held.version == envoy.base_version => held.resources().clone(),
                other => {
                    return Err(BootError::AnotherBase {
                        base: envoy.base_version,
                        held: other.map(|held| held.version.clone()).unwrap_or_default(),
                    });
                }
            }
        };
        for removed in envoy.removed {
            resources.remove(&(xds_type(removed.r#type())?, removed.name));
        }
        for changed in envoy.changed {
            let kind = xds_type(changed.r#type())?;
            if changed.name.is_empty() {
                return Err(malformed("resource", "has no name"));
            }
            let key = (kind, changed.name);
            let json = if changed.splices.is_empty() {
                // Not a part of the message that it came in: that would be kept as long as it.
                Bytes::copy_from_slice(&changed.json)
            } else {
                let made = resources.get(&key).and_then(|base| xds::spliced(base, &changed.splices));
                made.ok_or_else(|| BootError::AnotherResource { name: key.1.clone() })?.into()
            };
            // Envoy judges the content; that it is one JSON object is what the files are put together from.
            if json.first() != Some(&b'{') || serde_json::from_slice::<serde::de::IgnoredAny>(&json).is_err() {
                return Err(malformed("resource", format!("{:?} is not a JSON object", key.1)));
            }
            resources.insert(key, json);
        }
        Ok(Self { node_id: envoy.node_id, cluster: envoy.cluster, resources })
    }

    fn to_message(&self) -> pb::EnvoyBoot {
        let changed = self.resources.iter().map(|((kind, name), json)| pb::XdsResource {
            r#type: match kind {
                XdsType::Listener => pb::XdsType::Listener,
                XdsType::Cluster => pb::XdsType::Cluster,
                XdsType::Endpoint => pb::XdsType::Endpoint,
                XdsType::Route => pb::XdsType::Route,
            }
            .into(),
            name: name.clone(),
            json: json.clone(),
            splices: Vec::new(),
        });
        pb::EnvoyBoot {
            base_version: String::new(),
            changed: changed.collect(),
            removed: Vec::new(),
            node_id: self.node_id.clone(),
            cluster: self.cluster.clone(),
            host_aliases_kept: false,
        }
    }
}

fn xds_type(kind: pb::XdsType) -> Result<XdsType, BootError> {
    Ok(match kind {
        pb::XdsType::Listener => XdsType::Listener,
        pb::XdsType::Cluster => XdsType::Cluster,
        pb::XdsType::Endpoint => XdsType::Endpoint,
        pb::XdsType::Route => XdsType::Route,
        pb::XdsType::Unspecified => return Err(malformed("resource", "has no type")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(kind: pb::XdsType, name: &str, json: &str) -> pb::XdsResource {
        pb::XdsResource {
            r#type: kind.into(),
            name: name.to_owned(),
            json: json.as_bytes().to_vec().into(),
            splices: Vec::new(),
        }
    }

    fn message(version: &str, envoy: pb::EnvoyBoot) -> pb::BootConfiguration {
        pb::BootConfiguration {
            version: version.to_owned(),
            spiffe_id: "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm".to_owned(),
            sidecar: Some(pb::boot_configuration::Sidecar::Envoy(envoy)),
            ..Default::default()
        }
    }

    fn first() -> HeldBoot {
        let envoy = pb::EnvoyBoot {
            changed: vec![
                resource(pb::XdsType::Listener, "a", r#"{"a":1}"#),
                resource(pb::XdsType::Cluster, "a", r#"{"c":1}"#),
            ],
            ..Default::default()
        };
        HeldBoot::apply(None, message("1", envoy)).unwrap()
    }

    fn names(boot: &HeldBoot) -> Vec<(XdsType, &str)> {
        boot.resources().keys().map(|(kind, name)| (*kind, name.as_str())).collect()
    }

    #[test]
    fn a_difference_changes_what_it_names() {
        let envoy = pb::EnvoyBoot {
            base_version: "1".to_owned(),
            changed: vec![
                resource(pb::XdsType::Cluster, "b", r#"{"c":2}"#),
                resource(pb::XdsType::Listener, "a", r#"{"a":2}"#),
            ],
            removed: vec![pb::XdsResourceName { r#type: pb::XdsType::Cluster.into(), name: "a".to_owned() }],
            ..Default::default()
        };
        let next = HeldBoot::apply(Some(&first()), message("2", envoy)).unwrap();
        assert_eq!(names(&next), [(XdsType::Listener, "a"), (XdsType::Cluster, "b")]);
        assert_eq!(next.resources()[&(XdsType::Listener, "a".to_owned())].as_ref(), br#"{"a":2}"#);
        assert_eq!(next.version, "2");
    }

    #[test]
    fn a_complete_one_drops_what_it_does_not_name() {
        let envoy = pb::EnvoyBoot { changed: vec![resource(pb::XdsType::Route, "r", "{}")], ..Default::default() };
        let next = HeldBoot::apply(Some(&first()), message("2", envoy)).unwrap();
        assert_eq!(names(&next), [(XdsType::Route, "r")]);
    }

    #[test]
    fn a_difference_to_something_else_is_refused() {
        let envoy = || pb::EnvoyBoot { base_version: "0".to_owned(), ..Default::default() };
        let error = HeldBoot::apply(Some(&first()), message("2", envoy())).unwrap_err();
        assert_eq!(error, BootError::AnotherBase { base: "0".to_owned(), held: "1".to_owned() });
        let error = HeldBoot::apply(None, message("2", envoy())).unwrap_err();
        assert_eq!(error, BootError::AnotherBase { base: "0".to_owned(), held: String::new() });
    }

    #[test]
    fn splices_change_a_resource_in_place() {
        let spliced = |name: &str, offset: u64, insert: &'static str| {
            let splices = vec![pb::Splice { offset, length: 1, insert: insert.into() }];
            let changed = vec![pb::XdsResource { splices, ..resource(pb::XdsType::Listener, name, "") }];
            let envoy = pb::EnvoyBoot { base_version: "1".to_owned(), changed, ..Default::default() };
            HeldBoot::apply(Some(&first()), message("2", envoy))
        };
        let next = spliced("a", 5, "23").unwrap();
        assert_eq!(next.resources()[&(XdsType::Listener, "a".to_owned())].as_ref(), br#"{"a":23}"#);
        assert_eq!(names(&next), names(&first()));
        let another = |name: &str| Err(BootError::AnotherResource { name: name.to_owned() });
        assert_eq!(spliced("b", 5, "23"), another("b"));
        assert_eq!(spliced("a", 7, "23"), another("a"));
        assert!(spliced("a", 5, "}").unwrap_err().to_string().contains("not a JSON object"));
    }

    #[test]
    fn host_aliases_stay_where_a_difference_leaves_them_out() {
        let aliases = |name: &str| vec![pb::HostAlias { ip: "127.0.0.1".to_owned(), names: vec![name.to_owned()] }];
        let held = HeldBoot { host_aliases: aliases("ratings"), ..first() };
        let next = |host_aliases_kept, host_aliases| {
            let envoy = pb::EnvoyBoot { base_version: "1".to_owned(), host_aliases_kept, ..Default::default() };
            let message = pb::BootConfiguration { host_aliases, ..message("2", envoy) };
            HeldBoot::apply(Some(&held), message).unwrap().host_aliases
        };
        assert_eq!(next(true, Vec::new()), aliases("ratings"));
        assert_eq!(next(false, Vec::new()), []);
        assert_eq!(next(false, aliases("reviews")), aliases("reviews"));
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let apply = |message| HeldBoot::apply(None, message).unwrap_err().to_string();
        assert!(apply(message("", pb::EnvoyBoot::default())).contains("version is missing"));
        assert!(apply(pb::BootConfiguration { version: "1".to_owned(), ..Default::default() }).contains("sidecar"));
        for (kind, name, json, words) in [
            (pb::XdsType::Unspecified, "a", "{}", "has no type"),
            (pb::XdsType::Listener, "", "{}", "has no name"),
            (pb::XdsType::Listener, "a", "{", "not a JSON object"),
            (pb::XdsType::Listener, "a", "[]", "not a JSON object"),
        ] {
            let envoy = pb::EnvoyBoot { changed: vec![resource(kind, name, json)], ..Default::default() };
            let text = apply(message("1", envoy));
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn survives_the_disk() {
        let boot = first();
        assert_eq!(HeldBoot::from_bytes(&boot.to_bytes()), Some(HeldBoot { ..boot }));
    }
}
