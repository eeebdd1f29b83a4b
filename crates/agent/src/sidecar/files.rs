//! Envoy's configuration as files: which differ, in which order they are handed over, and how one is replaced.
//!
//! Envoy watches each file's own path and reads it again when another is renamed over it (tried with Envoy 1.40 for LDS, CDS, EDS and
//! RDS). The order makes before it breaks: what is referred to is there, and accepted, before what refers to it; what nothing refers
//! to any more goes last.

use crate::boot::{HeldBoot, Resources, XdsType};
use anyhow::Context;
use bytes::Bytes;
use onboarding_wire::onboarding as pb;
use onboarding_wire::xds;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

/// Files that are handed over together, and what tells that Envoy took them. The next step waits for that.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Step {
    /// In this order; relative to Envoy's working directory.
    pub writes: Vec<(String, Vec<u8>)>,
    /// Which subscriptions come to which version.
    pub expected: Vec<(Subscription, String)>,
    /// After Envoy took it.
    pub removes: Vec<String>,
}

/// One of Envoy's subscriptions, by the names in its statistics.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subscription {
    Listeners,
    Clusters,
    /// `cluster.<this>.`
    Endpoints(String),
    /// `http.<any>.rds.<this>.`
    Routes(String),
}

impl Step {
    fn expect(&mut self, subscriptions: Vec<Subscription>, version: &str) {
        self.expected.extend(subscriptions.into_iter().map(|subscription| (subscription, version.to_owned())));
    }
}

/// From nothing, in one step: for an Envoy that isn't running yet.
pub(super) fn whole(to: &HeldBoot) -> Step {
    let mut step = Step::default();
    for kind in [XdsType::Endpoint, XdsType::Route] {
        for (name, resource) in of_type(to.resources(), kind) {
            step.writes.extend(own_file(kind, name, &to.version, resource));
        }
    }
    step.writes.push((xds::CLUSTERS.to_owned(), shared_file(&to.version, of_type(to.resources(), XdsType::Cluster))));
    step.writes.push((xds::LISTENERS.to_owned(), shared_file(&to.version, of_type(to.resources(), XdsType::Listener))));
    let mut expected = vec![Subscription::Clusters, Subscription::Listeners];
    expected.extend(endpoint_subscriptions(to.resources(), |_| true));
    expected.extend(route_subscriptions(to.resources(), |_| true));
    step.expect(expected, &to.version);
    step
}

/// Everything anew, in one step: where nobody knows what Envoy has of `from`.
pub(super) fn rewrite(from: &HeldBoot, to: &HeldBoot) -> Step {
    let mut step = whole(to);
    for kind in [XdsType::Endpoint, XdsType::Route] {
        let gone = of_type(from.resources(), kind)
            .filter(|(name, _)| !to.resources().contains_key(&(kind, (*name).to_owned())));
        step.removes.extend(gone.filter_map(|(name, _)| xds::file(wire(kind), name)));
    }
    step
}

/// From what a running Envoy has to what it shall have; nothing where nothing changes.
pub(super) fn steps(from: &HeldBoot, to: &HeldBoot) -> Vec<Step> {
    let version = &to.version;
    let changed = |kind| {
        of_type(to.resources(), kind)
            .filter(|(name, resource)| from.resources().get(&(kind, (*name).to_owned())) != Some(*resource))
            .map(|(name, _)| name)
            .collect::<BTreeSet<&str>>()
    };
    let gone = |kind| {
        of_type(from.resources(), kind)
            .map(|(name, _)| name)
            .filter(|name| !to.resources().contains_key(&(kind, (*name).to_owned())))
            .collect::<BTreeSet<&str>>()
    };

    // What is new or different and referred to: endpoints, clusters, files of routes that no listener has yet.
    let mut first = Step::default();
    let endpoints = changed(XdsType::Endpoint);
    let (new_routes, old_routes): (BTreeSet<&str>, BTreeSet<&str>) = changed(XdsType::Route)
        .into_iter()
        .partition(|name| !from.resources().contains_key(&(XdsType::Route, (*name).to_owned())));
    let (clusters, clusters_gone) = (changed(XdsType::Cluster), gone(XdsType::Cluster));
    for (kind, names) in [(XdsType::Endpoint, &endpoints), (XdsType::Route, &new_routes)] {
        for name in names {
            if let Some(resource) = to.resources().get(&(kind, (*name).to_owned())) {
                first.writes.extend(own_file(kind, name, version, resource));
            }
        }
    }
    first.expect(endpoint_subscriptions(to.resources(), |name| endpoints.contains(name)), version);
    if !clusters.is_empty() {
        let kept = of_type(from.resources(), XdsType::Cluster).filter(|(name, _)| clusters_gone.contains(name));
        // Told from the last step's file by its version.
        let version = if clusters_gone.is_empty() { version.clone() } else { format!("{version}~") };
        let all = of_type(to.resources(), XdsType::Cluster).chain(kept);
        first.writes.push((xds::CLUSTERS.to_owned(), shared_file(&version, all)));
        first.expect(vec![Subscription::Clusters], &version);
    }

    // What refers to it.
    let mut second = Step::default();
    for name in &old_routes {
        if let Some(resource) = to.resources().get(&(XdsType::Route, (*name).to_owned())) {
            second.writes.extend(own_file(XdsType::Route, name, version, resource));
        }
    }
    let listeners_gone = gone(XdsType::Listener);
    let listeners_change = !changed(XdsType::Listener).is_empty() || !listeners_gone.is_empty();
    // Envoy removes listeners before it adds others, and if it refuses one of those the removed stay away. So what goes stays until the
    // others are there, except where the two can't be there at once.
    let places: Vec<_> = of_type(to.resources(), XdsType::Listener).map(|(_, json)| Place::of(json)).collect();
    let kept: Vec<_> = of_type(from.resources(), XdsType::Listener)
        .filter(|(name, _)| listeners_gone.contains(name))
        .filter(|(_, json)| {
            let place = Place::of(json);
            !places.iter().any(|other| place.meets(other))
        })
        .collect();
    let listeners_stay = !kept.is_empty();
    if listeners_change {
        let version = if listeners_stay { format!("{version}~") } else { version.clone() };
        let all = of_type(to.resources(), XdsType::Listener).chain(kept);
        second.writes.push((xds::LISTENERS.to_owned(), shared_file(&version, all)));
        second.expect(vec![Subscription::Listeners], &version);
    }
    let routes = route_subscriptions(to.resources(), |name| {
        old_routes.contains(name) || (listeners_change && new_routes.contains(name))
    });
    second.expect(routes, version);

    // What goes: listeners, then what nothing refers to any more.
    let mut third = Step::default();
    if listeners_stay {
        let all = of_type(to.resources(), XdsType::Listener);
        third.writes.push((xds::LISTENERS.to_owned(), shared_file(version, all)));
        third.expect(vec![Subscription::Listeners], version);
    }
    let mut fourth = Step::default();
    if !clusters_gone.is_empty() {
        let all = of_type(to.resources(), XdsType::Cluster);
        fourth.writes.push((xds::CLUSTERS.to_owned(), shared_file(version, all)));
        fourth.expect(vec![Subscription::Clusters], version);
    }
    for kind in [XdsType::Endpoint, XdsType::Route] {
        fourth.removes.extend(gone(kind).into_iter().filter_map(|name| xds::file(wire(kind), name)));
    }
    let mut steps = vec![first, second, third, fourth];
    steps.retain(|step| !step.writes.is_empty() || !step.removes.is_empty());
    steps
}

/// Writes beside it and renames over it. Nothing is synced: after a crash of the machine everything is written anew.
pub(super) fn write(directory: &Path, name: &str, bytes: &[u8]) -> anyhow::Result<()> {
    let path = directory.join(name);
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    let done = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, &path));
    if done.is_err() {
        // Half a file on a full disk only keeps it full.
        let _ = std::fs::remove_file(&part);
    }
    done.with_context(|| format!("writing the sidecar's configuration {}", path.display()))
}

/// Removes what is gone; that nothing is there is what was wanted.
pub(super) fn remove(directory: &Path, names: &[String]) {
    for name in names {
        let _ = std::fs::remove_file(directory.join(name));
    }
}

/// Makes the directories, and empties those with a file per resource, so that nothing of an earlier run is taken for this one's.
pub(super) fn prepare(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    for name in ["xds/eds", "xds/rds"] {
        let path = directory.join(name);
        if path.exists() {
            std::fs::remove_dir_all(&path).with_context(|| format!("emptying {}", path.display()))?;
        }
        builder.create(&path).with_context(|| format!("making the sidecar's directory {}", path.display()))?;
    }
    Ok(())
}

fn of_type(resources: &Resources, kind: XdsType) -> impl Iterator<Item = (&str, &Bytes)> {
    resources.iter().filter(move |((of, _), _)| *of == kind).map(|((_, name), resource)| (name.as_str(), resource))
}

fn wire(kind: XdsType) -> pb::XdsType {
    match kind {
        XdsType::Listener => pb::XdsType::Listener,
        XdsType::Cluster => pb::XdsType::Cluster,
        XdsType::Endpoint => pb::XdsType::Endpoint,
        XdsType::Route => pb::XdsType::Route,
    }
}

fn own_file(kind: XdsType, name: &str, version: &str, resource: &Bytes) -> Option<(String, Vec<u8>)> {
    Some((xds::file(wire(kind), name)?, shared_file(version, std::iter::once((name, resource)))))
}

/// Where a listener listens; nowhere, if that can't be read: it is for Envoy to refuse.
#[derive(Default, Deserialize)]
struct Place {
    #[serde(default, alias = "portValue")]
    port_value: u16,
    #[serde(default)]
    address: String,
}

impl Place {
    fn of(listener: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Listener {
            address: Address,
        }
        #[derive(Deserialize)]
        struct Address {
            #[serde(alias = "socketAddress")]
            socket_address: Place,
        }
        serde_json::from_slice::<Listener>(listener).map(|of| of.address.socket_address).unwrap_or_default()
    }

    /// One address, or every address on one side.
    fn meets(&self, other: &Self) -> bool {
        let every = |address: &str| address.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
        self.port_value == other.port_value
            && (self.address == other.address || every(&self.address) || every(&other.address))
    }
}

/// A DiscoveryResponse. The resources are JSON objects already ([`HeldBoot::apply`] made sure).
fn shared_file<'a>(version: &str, resources: impl Iterator<Item = (&'a str, &'a Bytes)>) -> Vec<u8> {
    let mut bytes = format!("{{\"version_info\":{},\"resources\":[", serde_json::Value::from(version)).into_bytes();
    for (index, (_, resource)) in resources.enumerate() {
        if index > 0 {
            bytes.push(b',');
        }
        bytes.extend_from_slice(resource);
    }
    bytes.extend_from_slice(b"]}\n");
    bytes
}

#[derive(Deserialize)]
struct Cluster {
    name: String,
    #[serde(alias = "altStatName")]
    alt_stat_name: Option<String>,
    #[serde(alias = "edsClusterConfig")]
    eds_cluster_config: Option<EdsClusterConfig>,
}

#[derive(Deserialize)]
struct EdsClusterConfig {
    #[serde(alias = "serviceName")]
    service_name: Option<String>,
}

/// The subscriptions of the clusters that take one of these endpoint resources.
fn endpoint_subscriptions(resources: &Resources, of: impl Fn(&str) -> bool) -> Vec<Subscription> {
    of_type(resources, XdsType::Cluster)
        .filter_map(|(_, json)| serde_json::from_slice::<Cluster>(json).ok())
        .filter_map(|cluster| {
            let service = cluster.eds_cluster_config?.service_name.filter(|name| !name.is_empty());
            let service = service.as_ref().unwrap_or(&cluster.name);
            let known = resources.contains_key(&(XdsType::Endpoint, service.clone()));
            let stat = cluster.alt_stat_name.filter(|name| !name.is_empty()).unwrap_or_else(|| cluster.name.clone());
            (known && of(service)).then(|| Subscription::Endpoints(stat_name(&stat)))
        })
        .collect()
}

/// The subscriptions of the listeners that take one of these routes.
fn route_subscriptions(resources: &Resources, of: impl Fn(&str) -> bool) -> Vec<Subscription> {
    let mut names = BTreeSet::new();
    for (_, json) in of_type(resources, XdsType::Listener) {
        if let Ok(listener) = serde_json::from_slice(json) {
            collect_routes(&listener, &mut names);
        }
    }
    names.retain(|name| of(name) && resources.contains_key(&(XdsType::Route, name.clone())));
    names.iter().map(|name| Subscription::Routes(stat_name(name))).collect()
}

/// Every `rds.route_config_name`, however deep; serde_json bounds the depth.
fn collect_routes(value: &serde_json::Value, names: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => {
            for (key, value) in map {
                if key == "rds"
                    && let Some(name) = ["route_config_name", "routeConfigName"].iter().find_map(|key| value.get(key))
                    && let Some(name) = name.as_str()
                {
                    names.insert(name.to_owned());
                }
                collect_routes(value, names);
            }
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| collect_routes(value, names)),
        _ => {}
    }
}

/// A name as Envoy's statistics have it (Envoy's `Stats::Utility::sanitizeStatsName`).
fn stat_name(name: &str) -> String {
    name.replace("://", "_").replace(":/", "_").replace([':', '\0'], "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(version: &str, resources: &[(XdsType, &str, &str)]) -> HeldBoot {
        let resources =
            resources.iter().map(|(kind, name, json)| ((*kind, (*name).to_owned()), json.as_bytes().to_vec().into()));
        let mut boot = HeldBoot { version: version.into(), ..HeldBoot::default() };
        boot.resources_mut().extend(resources);
        boot
    }

    const L: XdsType = XdsType::Listener;
    const C: XdsType = XdsType::Cluster;
    const E: XdsType = XdsType::Endpoint;
    const R: XdsType = XdsType::Route;
    const LISTENER: &str = r#"{"name":"l","chains":[{"hcm":{"rds":{"routeConfigName":"r:1"}}}]}"#;
    const CLUSTER: &str = r#"{"name":"a://b","edsClusterConfig":{"serviceName":"e"}}"#;

    fn first() -> HeldBoot {
        boot("1", &[(L, "l", LISTENER), (C, "a://b", CLUSTER), (E, "e", "{}"), (R, "r:1", "{}"), (R, "unused", "{}")])
    }

    fn names(step: &Step) -> Vec<&str> {
        step.writes.iter().map(|(name, _)| name.split_once('-').map_or(name.as_str(), |(name, _)| name)).collect()
    }

    fn at(version: &str, subscription: Subscription) -> (Subscription, String) {
        (subscription, version.to_owned())
    }

    #[test]
    fn at_first_everything_is_written_and_what_is_referred_to_is_expected() {
        let step = whole(&first());
        assert_eq!(names(&step), ["xds/eds/e", "xds/rds/r_1", "xds/rds/unused", "xds/cds.json", "xds/lds.json"]);
        let expected = [
            Subscription::Clusters,
            Subscription::Listeners,
            Subscription::Endpoints("a_b".into()),
            Subscription::Routes("r_1".into()),
        ];
        assert_eq!(step.expected, expected.map(|subscription| at("1", subscription)));
        let file: serde_json::Value = serde_json::from_slice(&step.writes[4].1).unwrap();
        assert_eq!(file["version_info"], "1");
        assert_eq!(file["resources"][0]["name"], "l");
    }

    #[test]
    fn nothing_changed_is_no_step() {
        assert_eq!(steps(&first(), &HeldBoot { version: "2".into(), ..first() }), []);
    }

    #[test]
    fn a_listener_goes_when_its_successor_is_there() {
        let listener = |name: &str, address: &str, port: u16| {
            let at = serde_json::json!({"socketAddress": {"address": address, "portValue": port}});
            serde_json::json!({"name": name, "address": at}).to_string()
        };
        let from = boot("1", &[(L, "one", &listener("one", "127.0.0.2", 80))]);
        let listeners = |step: &Step| {
            assert_eq!(names(step), ["xds/lds.json"]);
            let file: serde_json::Value = serde_json::from_slice(&step.writes[0].1).unwrap();
            assert_eq!(step.expected, [at(file["version_info"].as_str().unwrap(), Subscription::Listeners)]);
            file["resources"].as_array().unwrap().iter().map(|of| of["name"].as_str().unwrap().to_owned()).collect()
        };
        let to = |name: &str, address: &str, port: u16| {
            let to = boot("2", &[(L, name, &listener(name, address, port))]);
            steps(&from, &to).iter().map(listeners).collect::<Vec<Vec<_>>>()
        };
        assert_eq!(to("two", "127.0.0.3", 80), [vec!["two", "one"], vec!["two"]]);
        assert_eq!(to("two", "127.0.0.2", 81), [vec!["two", "one"], vec!["two"]]);
        // Not two of one address.
        assert_eq!(to("two", "127.0.0.2", 80), [["two"]]);
        assert_eq!(to("two", "0.0.0.0", 80), [["two"]]);
        assert_eq!(to("one", "127.0.0.3", 80), [["one"]]);
    }

    #[test]
    fn makes_before_it_breaks() {
        let to = boot(
            "2",
            &[(L, "l", LISTENER), (C, "c", r#"{"name":"c"}"#), (R, "r:1", r#"{"to":"c"}"#), (R, "new", "{}")],
        );
        let steps = steps(&first(), &to);
        assert_eq!(steps.len(), 3);
        // The new cluster beside the old one, and no route to it yet.
        assert_eq!(names(&steps[0]), ["xds/rds/new", "xds/cds.json"]);
        let clusters = String::from_utf8(steps[0].writes[1].1.clone()).unwrap();
        assert!(clusters.contains(r#""c""#) && clusters.contains("a://b"), "{clusters}");
        assert_eq!(steps[0].expected, [at("2~", Subscription::Clusters)]);
        assert_eq!(names(&steps[1]), ["xds/rds/r_1"]);
        assert_eq!(steps[1].expected, [at("2", Subscription::Routes("r_1".into()))]);
        assert!(steps[1].removes.is_empty());
        // Nothing goes before nothing refers to it.
        let clusters = String::from_utf8(steps[2].writes[0].1.clone()).unwrap();
        assert!(!clusters.contains("a://b"), "{clusters}");
        assert_eq!(steps[2].expected, [at("2", Subscription::Clusters)]);
        assert_eq!(steps[2].removes.len(), 2);
        assert!(steps[2].removes[0].starts_with("xds/eds/e-") && steps[2].removes[1].starts_with("xds/rds/unused-"));
    }

    #[test]
    fn only_what_changed_is_written() {
        let mut to = HeldBoot { version: "2".into(), ..first() };
        to.resources_mut().insert((E, "e".into()), Bytes::from_static(b"{\"n\":1}"));
        let steps = steps(&first(), &to);
        assert_eq!(steps.iter().map(names).collect::<Vec<_>>(), [["xds/eds/e"]]);
        assert_eq!(steps[0].expected, [at("2", Subscription::Endpoints("a_b".into()))]);
    }

    #[test]
    fn a_file_is_whole_or_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path()).unwrap();
        write(directory.path(), "xds/lds.json", b"old").unwrap();
        // A directory in the way of the temporary file, as a full disk is.
        std::fs::create_dir(directory.path().join("xds/lds.json.part")).unwrap();
        let error = write(directory.path(), "xds/lds.json", b"new").unwrap_err();
        assert!(format!("{error:#}").contains("xds/lds.json"), "{error:#}");
        assert_eq!(std::fs::read(directory.path().join("xds/lds.json")).unwrap(), b"old");
    }
}
