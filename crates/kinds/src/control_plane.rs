//! `install.tetrate.io/v1alpha1` ControlPlane: the part that is ours. The rest is preserved by never being looked at.

use crate::fault::shown;
use crate::reader::{Item, Map};
use crate::syntax;
use onboarding_core::registration::LONGEST_TOKEN_LIFE;
use std::collections::HashSet;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq)]
pub struct ControlPlane {
    pub namespace: String,
    pub name: String,
    /// `spec.meshExpansion.onboarding`; absent: not enabled.
    pub onboarding: Option<Onboarding>,
    pub custom_gateway: Option<CustomGateway>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct CustomGateway {
    pub host: String,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Onboarding {
    pub hosts: Vec<String>,
    pub secret_name: String,
    pub uid: Option<String>,
    pub token_expiration: Duration,
    pub local_repository: bool,
    pub issuers: Vec<JwtIssuer>,
    pub propagation_delay: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct JwtIssuer {
    pub issuer: String,
    pub short_name: String,
    /// At most one of the two.
    pub jwks_uri: Option<String>,
    pub jwks: Option<String>,
    /// As RFC 9535 reads it: the short form `.a` has become `$.a`.
    pub attributes_json_path: Option<String>,
}

const DEFAULT_EXPIRATION: Duration = Duration::from_secs(60 * 60);
const DEFAULT_PROPAGATION_DELAY: Duration = Duration::from_secs(10);
/// From here on, systemd and ECS may kill a sidecar before it has drained.
const LONG_PROPAGATION_DELAY: Duration = Duration::from_secs(15);
const DEFAULT_PORT: u16 = 15443;

/// `spec.meshExpansion`; what surrounds our fields is neither read nor judged.
pub(crate) fn mesh_expansion(root: &mut Map<'_>) -> (Option<Onboarding>, Option<CustomGateway>) {
    let spec = root.optional("spec").and_then(|spec| spec.map());
    let Some(mut expansion) = spec.and_then(|mut spec| spec.optional("meshExpansion")?.map()) else {
        return (None, None);
    };
    let onboarding = expansion.optional("onboarding").and_then(|item| onboarding(&item));
    let custom_gateway = expansion.optional("customGateway").and_then(|item| {
        let mut gateway = item.map()?;
        let host = gateway.required_as("host", syntax::host);
        let port = gateway.optional("port").map_or(Some(DEFAULT_PORT), |item| item.port());
        Some(CustomGateway { host: host?, port: port? })
    });
    expansion.warn_of_misspelt("onboarding");
    (onboarding, custom_gateway)
}

fn onboarding(item: &Item<'_>) -> Option<Onboarding> {
    let mut onboarding = item.map()?;
    let (mut hosts, mut secret_name) = (Vec::new(), None);
    if let Some(mut endpoint) = onboarding.required("endpoint").and_then(|item| item.map()) {
        hosts = endpoint.required_texts("hosts", syntax::host);
        secret_name = endpoint.required_as("secretName", syntax::resource_name);
        endpoint.close();
    }
    let uid = onboarding.optional_as("uid", uid);
    let token_expiration = onboarding.inner(&["tokenIssuer", "jwt"], |jwt| {
        let item = jwt.optional("expiration")?;
        let expiration = item.duration(Duration::from_nanos(1))?;
        if expiration > LONGEST_TOKEN_LIFE {
            item.warn(format!(
                "no token lives longer than {} hours, whatever is said here",
                LONGEST_TOKEN_LIFE.as_secs() / 3600
            ));
        }
        Some(expiration)
    });
    let local_repository = onboarding.optional("localRepository").and_then(|item| item.map());
    let has_local_repository = local_repository.is_some();
    local_repository.into_iter().for_each(Map::close);
    let (mut issuers, mut propagation_delay) = (Vec::new(), None);
    if let Some(mut workloads) = onboarding.optional("workloads").and_then(|item| item.map()) {
        let read = workloads.inner(&["authentication", "jwt"], |jwt| Some(jwt_issuers(jwt)));
        issuers = read.unwrap_or_default();
        propagation_delay = workloads.inner(&["deregistration"], |deregistration| {
            let item = deregistration.optional("propagationDelay")?;
            let delay = item.duration(Duration::ZERO)?;
            if delay >= LONG_PROPAGATION_DELAY {
                item.warn(format!(
                    "{delay:?} is long: systemd and ECS enforce stop timeouts, so keep it under {LONG_PROPAGATION_DELAY:?}"
                ));
            }
            Some(delay)
        });
        workloads.close();
    }
    onboarding.close();
    Some(Onboarding {
        hosts,
        secret_name: secret_name?,
        uid,
        token_expiration: token_expiration.unwrap_or(DEFAULT_EXPIRATION),
        local_repository: has_local_repository,
        issuers,
        propagation_delay: propagation_delay.unwrap_or(DEFAULT_PROPAGATION_DELAY),
    })
}

fn uid(text: &str) -> Result<String, String> {
    match text.len() <= 1024 && !text.contains(char::is_whitespace) {
        true => Ok(text.to_owned()),
        false => Err("must be at most 1024 characters without spaces".to_owned()),
    }
}

fn jwt_issuers(jwt: &mut Map<'_>) -> Vec<JwtIssuer> {
    let items = jwt.optional("issuers").and_then(|item| item.list()).unwrap_or_default();
    let (mut issuers, mut names, mut short_names) = (Vec::new(), HashSet::new(), HashSet::new());
    for item in &items {
        let Some(issuer) = jwt_issuer(item) else { continue };
        if !names.insert(issuer.issuer.clone()) {
            item.fault_at("issuer", format!("{} is there twice; an issuer may be listed once", shown(&issuer.issuer)));
        }
        if !short_names.insert(issuer.short_name.clone()) {
            let message = format!("{} is the short name of another issuer too", shown(&issuer.short_name));
            item.fault_at("shortName", message);
        }
        issuers.push(issuer);
    }
    issuers
}

fn jwt_issuer(item: &Item<'_>) -> Option<JwtIssuer> {
    let mut map = item.map()?;
    let issuer = map.required_as("issuer", syntax::issuer);
    let short_name = map.required_as("shortName", syntax::short_name);
    let (mut jwks_uri, mut jwks) = (None, None);
    for (key, item) in map.at_most_one_of(&["jwksUri", "jwks"]) {
        match key {
            "jwksUri" => jwks_uri = item.parse(syntax::https_url),
            _ => {
                jwks = item.text().and_then(|text| syntax::jwks(text).map_err(|message| item.fault(message)).ok());
                for index in jwks.as_deref().map(syntax::nameless_keys).unwrap_or_default() {
                    item.warn(format!(
                        "keys[{index}] has no kid, by which a token names the key that signed it, so it verifies nothing"
                    ));
                }
            }
        }
    }
    let attributes_json_path =
        map.inner(&["tokenFields", "attributes"], |attributes| attributes.optional_as("jsonPath", syntax::json_path));
    map.close();
    Some(JwtIssuer { issuer: issuer?, short_name: short_name?, jwks_uri, jwks, attributes_json_path })
}
