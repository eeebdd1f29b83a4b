//! One control plane's configuration, and the proxyConfig that a group's sidecars get of it.
//!
//! Merged as Istio does (`pkg/config/mesh`, `MergeProxyConfig`): a field replaces a field, but `proxyMetadata` and `proxyHeaders` are
//! merged entry by entry. Fields may be in camel case or with underscores, as protobuf's JSON has it.

use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// On pods and WorkloadGroups: proxyConfig of their own, YAML.
pub const PROXY_CONFIG_ANNOTATION: &str = "proxy.istio.io/config";
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_CLUSTER_ID: &str = "Kubernetes";
/// An API server takes no larger object.
const LARGEST: usize = 2 << 20;

/// ConfigMaps `istio[-<revision>]` and `istio-sidecar-injector[-<revision>]`, as far as a sidecar outside the cluster needs them.
#[derive(Debug, Clone, PartialEq)]
pub struct Mesh {
    /// `trustDomain`.
    pub trust_domain: String,
    /// `global.multiCluster.clusterName` of the injector's values.
    pub cluster_id: String,
    /// `defaultConfig`.
    pub proxy_config: ProxyConfig,
}

impl Mesh {
    /// `config`: key `mesh` of ConfigMap `istio[-<revision>]`, YAML. `injector_values`: key `values` of ConfigMap
    /// `istio-sidecar-injector[-<revision>]`, JSON; without it the cluster is called `Kubernetes`, as everywhere in Istio.
    ///
    /// # Errors
    /// It isn't YAML, or what is needed of it isn't of the right type; in words that name the field.
    pub fn read(config: &str, injector_values: Option<&str>) -> Result<Self, String> {
        let mesh = object(config, "mesh")?;
        let trust_domain = match mesh.get("trustDomain") {
            None | Some(Value::Null) => DEFAULT_TRUST_DOMAIN.to_owned(),
            Some(Value::String(text)) if text.is_empty() => DEFAULT_TRUST_DOMAIN.to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(_) => return Err("mesh.trustDomain is not a text".to_owned()),
        };
        let mut proxy_config = ProxyConfig::default();
        match mesh.get("defaultConfig") {
            None | Some(Value::Null) => {}
            Some(Value::Object(fields)) => proxy_config.merge(fields.clone(), "mesh.defaultConfig")?,
            Some(_) => return Err("mesh.defaultConfig is not a map".to_owned()),
        }
        let cluster_id = match injector_values {
            None => None,
            Some(values) => {
                let values = object(values, "values")?;
                let global = values.get("global").and_then(|global| global.get("multiCluster"));
                let name = global.and_then(|cluster| cluster.get("clusterName")).and_then(Value::as_str);
                name.filter(|name| !name.is_empty()).map(str::to_owned)
            }
        };
        Ok(Self { trust_domain, cluster_id: cluster_id.unwrap_or_else(|| DEFAULT_CLUSTER_ID.to_owned()), proxy_config })
    }
}

/// Istio's `ProxyConfig` as protobuf JSON, field names in camel case, and its `proxyMetadata` beside it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ProxyConfig {
    pub fields: Map<String, Value>,
    pub metadata: BTreeMap<String, String>,
}

impl ProxyConfig {
    /// With what an annotation [`PROXY_CONFIG_ANNOTATION`] says in the place of what was.
    pub fn with_annotation(&self, yaml: &str) -> Result<Self, String> {
        let mut merged = self.clone();
        merged.merge(object(yaml, PROXY_CONFIG_ANNOTATION)?, PROXY_CONFIG_ANNOTATION)?;
        Ok(merged)
    }

    fn merge(&mut self, fields: Map<String, Value>, what: &str) -> Result<(), String> {
        for (field, value) in fields {
            let field = camel(&field);
            match (field.as_str(), value) {
                // Absent, to protobuf.
                (_, Value::Null) => {}
                ("proxyMetadata", Value::Object(entries)) => {
                    for (name, value) in entries {
                        let value =
                            scalar(&value).ok_or_else(|| format!("{what}.proxyMetadata.{name} is not a text"))?;
                        self.metadata.insert(name, value);
                    }
                }
                ("proxyMetadata", _) => return Err(format!("{what}.proxyMetadata is not a map")),
                ("proxyHeaders", Value::Object(headers)) => match self.fields.get_mut("proxyHeaders") {
                    Some(Value::Object(held)) => held.extend(headers),
                    _ => drop(self.fields.insert(field, Value::Object(headers))),
                },
                // A oneof.
                ("serviceCluster", value) => {
                    self.fields.shift_remove("tracingServiceName");
                    self.fields.insert(field, value);
                }
                ("tracingServiceName", value) => {
                    self.fields.shift_remove("serviceCluster");
                    self.fields.insert(field, value);
                }
                (_, value) => drop(self.fields.insert(field, value)),
            }
        }
        Ok(())
    }

    pub fn text(&self, field: &str) -> Option<&str> {
        self.fields.get(field).and_then(Value::as_str).filter(|text| !text.is_empty())
    }
}

/// A YAML map; nothing at all is an empty one.
fn object(yaml: &str, what: &str) -> Result<Map<String, Value>, String> {
    if yaml.len() > LARGEST {
        return Err(format!("{what} is larger than {LARGEST} bytes"));
    }
    match serde_yaml_ng::from_str(yaml) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(Value::Null) => Ok(Map::new()),
        Ok(_) => Err(format!("{what} is not a map")),
        Err(error) => Err(format!("{what} can't be read: {}", error.to_string().escape_debug())),
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// `discovery_address` and `discoveryAddress` are one field.
fn camel(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                out.extend(c.to_uppercase());
                upper = false;
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESH: &str = "
trustDomain: example.org
defaultConfig:
  discoveryAddress: istiod.istio-system.svc:15012
  stat_name_length: 100
  proxyHeaders: {server: {disabled: true}}
  proxyMetadata: {ISTIO_META_DNS_CAPTURE: 'true', N: 3, FLAG: false}
";

    #[test]
    fn reads_what_istio_writes() {
        let values = r#"{"global":{"multiCluster":{"clusterName":"east"},"network":"pods"}}"#;
        let mesh = Mesh::read(MESH, Some(values)).unwrap();
        assert_eq!((mesh.trust_domain.as_str(), mesh.cluster_id.as_str()), ("example.org", "east"));
        assert_eq!(mesh.proxy_config.fields["statNameLength"], 100);
        assert_eq!(mesh.proxy_config.metadata["N"], "3");
        assert_eq!(mesh.proxy_config.metadata["FLAG"], "false");
        let bare = Mesh::read("", None).unwrap();
        assert_eq!((bare.trust_domain.as_str(), bare.cluster_id.as_str()), ("cluster.local", "Kubernetes"));
    }

    #[test]
    fn an_annotation_replaces_fields_and_adds_to_maps() {
        let mesh = Mesh::read(MESH, None).unwrap();
        let merged = mesh
            .proxy_config
            .with_annotation(
                "statNameLength: 7\nproxyMetadata: {N: '4', M: x}\nproxyHeaders: {requestId: {}}\ndiscoveryAddress: null",
            )
            .unwrap();
        assert_eq!(merged.fields["statNameLength"], 7);
        assert_eq!(merged.fields["discoveryAddress"], "istiod.istio-system.svc:15012");
        assert_eq!(merged.metadata.keys().collect::<Vec<_>>(), ["FLAG", "ISTIO_META_DNS_CAPTURE", "M", "N"]);
        assert_eq!(merged.metadata["N"], "4");
        assert_eq!(merged.fields["proxyHeaders"].as_object().unwrap().len(), 2);
    }

    #[test]
    fn one_of_two_names_of_the_cluster() {
        let mesh = Mesh::read("defaultConfig: {serviceCluster: a}", None).unwrap();
        let merged = mesh.proxy_config.with_annotation("tracing_service_name: CANONICAL_NAME_ONLY").unwrap();
        assert_eq!(merged.fields.keys().collect::<Vec<_>>(), ["tracingServiceName"]);
    }

    #[test]
    fn what_cannot_be_read_is_said() {
        for (text, words) in [
            ("[", "mesh can't be read"),
            ("- a", "mesh is not a map"),
            ("trustDomain: [a]", "mesh.trustDomain is not a text"),
            ("defaultConfig: a", "mesh.defaultConfig is not a map"),
            ("defaultConfig: {proxyMetadata: {A: [1]}}", "mesh.defaultConfig.proxyMetadata.A is not a text"),
            ("defaultConfig: {proxyMetadata: a}", "mesh.defaultConfig.proxyMetadata is not a map"),
        ] {
            let error = Mesh::read(text, None).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert!(Mesh::read("", Some("{")).unwrap_err().contains("values can't be read"));
        let large = format!("a: {}", "x".repeat(LARGEST));
        assert!(Mesh::read(&large, None).unwrap_err().contains("larger than"));
    }
}
