//! `networking.istio.io` WorkloadGroup, read into [`onboarding_core::group::WorkloadGroup`]. Fields that onboarding
//! doesn't use are allowed and ignored.

use crate::manifest::Metadata;
use crate::reader::{Item, Map};
use crate::syntax;
use onboarding_core::group::{Probe, ProbeAction, WorkloadGroup};
use onboarding_core::name::GroupName;
use std::collections::BTreeMap;
use std::time::Duration;

pub(crate) fn read(root: &mut Map<'_>, metadata: Option<Metadata>) -> Option<WorkloadGroup> {
    let mut group = WorkloadGroup {
        name: GroupName { namespace: String::new(), name: String::new() },
        labels: BTreeMap::new(),
        workload_labels: BTreeMap::new(),
        workload_annotations: BTreeMap::new(),
        service_account: "default".to_owned(),
        network: None,
        locality: None,
        weight: None,
        ports: BTreeMap::new(),
        address: None,
        probe: None,
    };
    if let Some(mut spec) = root.required("spec").and_then(|item| item.map()) {
        if let Some(mut workload) = spec.optional("metadata").and_then(|item| item.map()) {
            group.workload_labels = workload.labels("labels");
            group.workload_annotations =
                workload.optional("annotations").and_then(|item| item.texts()).unwrap_or_default();
        }
        if let Some(mut template) = spec.optional("template").and_then(|item| item.map()) {
            group.workload_labels.extend(template.labels("labels"));
            let account = non_empty(&mut template, "serviceAccount").and_then(|item| item.parse(syntax::resource_name));
            group.service_account = account.unwrap_or(group.service_account);
            group.network = non_empty(&mut template, "network").and_then(|item| item.parse(syntax::any));
            group.locality = non_empty(&mut template, "locality").and_then(|item| item.parse(locality));
            group.address = non_empty(&mut template, "address").and_then(|item| item.parse(address));
            group.weight = template.optional("weight").and_then(|item| weight(&item));
            group.ports = template.optional("ports").and_then(|item| ports(&item)).unwrap_or_default();
        }
        group.probe = spec.optional("probe").and_then(|item| probe(&item));
    }
    let Metadata { namespace, name, labels } = metadata?;
    group.name = GroupName { namespace, name };
    group.labels = labels;
    Some(group)
}

/// To Istio an empty text is an absent field.
fn non_empty<'a>(map: &mut Map<'a>, key: &'static str) -> Option<Item<'a>> {
    map.optional(key).filter(|item| item.node().as_text() != Some(""))
}

/// Port name to number.
pub(crate) fn ports(item: &Item<'_>) -> Option<BTreeMap<String, u16>> {
    Some(item.pairs()?.into_iter().filter_map(|(name, item)| Some((name.to_owned(), item.port()?))).collect())
}

pub(crate) fn weight(item: &Item<'_>) -> Option<u32> {
    item.integer(0, u32::MAX.into()).and_then(|weight| u32::try_from(weight).ok())
}

/// `region`, `region/zone` or `region/zone/subzone`.
pub(crate) fn locality(text: &str) -> Result<String, String> {
    let parts: Vec<_> = text.split('/').collect();
    match parts.len() <= 3 && parts.iter().all(|part| !part.is_empty()) {
        true => Ok(text.to_owned()),
        false => Err(format!("must be REGION, REGION/ZONE or REGION/ZONE/SUBZONE, and is {text:?}")),
    }
}

/// Of a workload: a host name, an IP address, or a Unix socket.
pub(crate) fn address(text: &str) -> Result<String, String> {
    match text.strip_prefix("unix://") {
        Some(path) if path.starts_with(['/', '@']) => Ok(text.to_owned()),
        Some(_) => Err(format!("must be unix:// and an absolute path, and is {text:?}")),
        None => syntax::host(text),
    }
}

/// `spec.probe`, with Istio's defaults.
fn probe(item: &Item<'_>) -> Option<Probe> {
    let mut probe = item.map()?;
    let mut number = |key, default: u32| {
        let value = probe.optional(key).and_then(|item| item.integer(0, i32::MAX.into()));
        value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
    };
    let seconds = |value: u32| Duration::from_secs(value.into());
    let initial_delay = seconds(number("initialDelaySeconds", 0));
    let timeout = seconds(number("timeoutSeconds", 1));
    let period = seconds(number("periodSeconds", 10));
    let success_threshold = number("successThreshold", 1);
    let failure_threshold = number("failureThreshold", 3);
    let mut action = None;
    for (kind, item) in probe.one_of(&["httpGet", "tcpSocket", "exec", "grpc"]) {
        action = match kind {
            "httpGet" => http_get(&item),
            "tcpSocket" => tcp_socket(&item),
            "exec" => exec(&item),
            _ => {
                item.fault("isn't supported here; use httpGet, tcpSocket or exec");
                None
            }
        };
    }
    Some(Probe { initial_delay, timeout, period, success_threshold, failure_threshold, action: action? })
}

fn http_get(item: &Item<'_>) -> Option<ProbeAction> {
    let mut get = item.map()?;
    let path = non_empty(&mut get, "path").map_or(Some("/".to_owned()), |item| item.parse(http_path));
    let port = get.required("port").and_then(|item| item.port());
    let host = non_empty(&mut get, "host").and_then(|item| item.parse(syntax::host));
    let https = non_empty(&mut get, "scheme")
        .and_then(|item| item.word(&[("HTTP", false), ("HTTPS", true), ("http", false), ("https", true)]))
        .unwrap_or(false);
    let headers = get.optional("httpHeaders").and_then(|item| item.list()).unwrap_or_default();
    let headers = headers.iter().filter_map(|item| {
        let mut header = item.map()?;
        let name = header.required_as("name", header_name);
        let value = header.optional("value").map_or(Some(String::new()), |item| item.parse(syntax::any));
        Some((name?, value?))
    });
    let headers = headers.collect();
    Some(ProbeAction::HttpGet { path: path?, port: port?, host, https, headers })
}

fn http_path(text: &str) -> Result<String, String> {
    match text.bytes().all(|byte| byte.is_ascii_graphic()) {
        true if text.starts_with('/') => Ok(text.to_owned()),
        true => Ok(format!("/{text}")),
        false => Err(format!("must be the path of a URL, and is {text:?}")),
    }
}

fn header_name(text: &str) -> Result<String, String> {
    match text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)) {
        true => Ok(text.to_owned()),
        false => Err(format!("must be the name of a header, and is {text:?}")),
    }
}

fn tcp_socket(item: &Item<'_>) -> Option<ProbeAction> {
    let mut socket = item.map()?;
    let host = non_empty(&mut socket, "host").and_then(|item| item.parse(syntax::host));
    let port = socket.required("port").and_then(|item| item.port());
    Some(ProbeAction::TcpSocket { host, port: port? })
}

fn exec(item: &Item<'_>) -> Option<ProbeAction> {
    let mut exec = item.map()?;
    let items = exec.required("command").and_then(|item| item.items()).unwrap_or_default();
    let command: Vec<_> = items.iter().filter_map(|item| item.text().map(str::to_owned)).collect();
    Some(ProbeAction::Exec { command })
}
