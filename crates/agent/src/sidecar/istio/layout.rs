//! pilot-agent's working directory and environment.

use super::super::Options;
use super::super::process::Launch;
use super::{PilotAgent, bootstrap};
use crate::boot::{Istio, PROXY_CONFIG};
use crate::store;
use anyhow::Context;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

const TOKEN: &str = "var/run/secrets/tokens/istio-token";
const ROOTS: &str = "etc/certs/root-cert.pem";
/// Where pilot-agent leaves its certificate, and finds it after a reboot.
pub(super) const CERTIFICATE: &str = "etc/certs/cert-chain.pem";
const TEMPLATE: &str = "var/lib/istio/envoy/envoy_bootstrap_tmpl.json";
const LARGEST_TEMPLATE: u64 = 1 << 20;
/// Of an earlier run: what no boot configuration names any more must not be there.
const STALE: [&str; 2] = ["etc/istio", "var/run/secrets/workload-spiffe-uds"];

/// Everything that pilot-agent is started with. It isn't running.
pub(super) fn lay_out(directory: &Path, istio: &Istio, pilot_agent: &PilotAgent) -> anyhow::Result<()> {
    for name in STALE {
        match std::fs::remove_dir_all(directory.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("emptying {}", directory.join(name).display()));
            }
            _ => {}
        }
    }
    for (path, bytes) in &istio.files {
        write(directory, path, bytes)?;
    }
    let template = store::read_bounded(&pilot_agent.template, LARGEST_TEMPLATE)?.with_context(|| {
        format!(
            "the bootstrap template {} is missing; it comes with the istio-sidecar package",
            pilot_agent.template.display()
        )
    })?;
    write(directory, TEMPLATE, &template)?;
    write_credentials(directory, istio)
}

/// The token and the roots, which pilot-agent reads whenever it needs them.
pub(super) fn write_credentials(directory: &Path, istio: &Istio) -> anyhow::Result<()> {
    write(directory, ROOTS, istio.root_certificates.as_bytes())?;
    write(directory, TOKEN, istio.token.0.as_bytes())
}

/// Whole or not at all, and private. `path` is relative and plain ([`Istio`] made sure, or it is one of ours).
fn write(directory: &Path, path: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let path = directory.join(path);
    if let Some(parent) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .with_context(|| format!("making the directory {}", parent.display()))?;
    }
    Ok(store::write_atomically(&path, bytes, 0o600)?)
}

/// How pilot-agent is started. `istio` is placed.
pub(super) fn launch(options: &Options, pilot_agent: &PilotAgent, istio: &Istio, instance: &str) -> Launch {
    Launch {
        name: "pilot-agent",
        binary: pilot_agent.binary.clone(),
        arguments: ["proxy", "sidecar"].map(OsString::from).to_vec(),
        environment: Some(environment(options, istio, instance)),
    }
}

fn environment(options: &Options, istio: &Istio, instance: &str) -> BTreeMap<String, OsString> {
    let mut environment: BTreeMap<String, OsString> =
        istio.environment.iter().map(|(name, value)| (name.clone(), value.into())).collect();
    // What only this host knows; which program runs is not the plane's to say.
    let mut proxy_config: Map<String, Value> =
        istio.environment.get(PROXY_CONFIG).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let mut set = |name: &str, value: Value| _ = proxy_config.insert(name.to_owned(), value);
    set("binaryPath", options.binary.to_string_lossy().into());
    set("configPath", "./etc/istio/proxy".into());
    set("proxyBootstrapTemplatePath", format!("./{TEMPLATE}").into());
    set("customConfigFile", "".into());
    set("proxyAdminPort", options.admin.port().into());
    if let Some(address) = &istio.discovery_address {
        set("discoveryAddress", address.to_string().into());
    }
    // It is drained before it is told to end.
    set("terminationDrainDuration", "1s".into());
    environment.insert(PROXY_CONFIG.to_owned(), json!(proxy_config).to_string().into());
    environment.insert(format!("ISTIO_META_{}", bootstrap::INSTANCE), instance.into());
    for (name, value) in [
        ("PROV_CERT", "./etc/certs"),
        ("OUTPUT_CERTS", "./etc/certs"),
        ("ISTIOD_SAN", istio.istiod_san.as_str()),
        // Or Envoy doesn't count the connections that a drain waits for.
        ("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", "true"),
        ("MINIMUM_DRAIN_DURATION", "1s"),
    ] {
        environment.entry(name.to_owned()).or_insert_with(|| value.into());
    }
    environment.entry("HOME".to_owned()).or_insert_with(|| options.directory.clone().into_os_string());
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    environment.insert("PATH".to_owned(), path);
    environment
}
