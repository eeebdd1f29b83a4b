//! The control plane that tests use is the real one, and ends with its handle.
#![allow(clippy::unwrap_used, reason = "a test")]

use onboarding_testkit::cluster::{Cluster, Options};
use std::net::TcpStream;

#[test]
fn an_api_server_comes_back_with_what_it_had_and_leaves_nothing() {
    let cluster = Cluster::start(Options::default()).unwrap();
    cluster.kubectl(["create", "namespace", "bookinfo"]).unwrap();
    cluster.kill_api().unwrap();
    TcpStream::connect(cluster.api_address()).unwrap_err();
    cluster.start_api().unwrap();
    assert_eq!(cluster.kubectl(["get", "namespace", "bookinfo", "-o", "name"]).unwrap(), "namespace/bookinfo\n");
    let refused = cluster.try_kubectl(["get", "namespace", "elsewhere"]).unwrap();
    assert!(!refused.status.success() && refused.stderr.contains("not found"), "{refused:?}");
    let (api, directory) = (cluster.api_address(), cluster.directory().to_owned());
    drop(cluster);
    TcpStream::connect(api).unwrap_err();
    assert!(!directory.exists());
}

#[test]
fn istiod_publishes_its_root() {
    let cluster = Cluster::start(Options::default()).unwrap();
    cluster.apply_istio_crds().unwrap();
    let istiod = cluster.start_istiod("trustDomain: cluster.local\n").unwrap();
    TcpStream::connect(istiod.secure).unwrap();
    let wait = ["wait", "--for=create", "--timeout=60s", "configmap/istio-ca-root-cert", "-n", "istio-system"];
    cluster.kubectl(wait).unwrap();
    let root = cluster
        .kubectl([
            "get",
            "configmap",
            "istio-ca-root-cert",
            "-n",
            "istio-system",
            "-o",
            "jsonpath={.data.root-cert\\.pem}",
        ])
        .unwrap();
    assert!(root.contains("BEGIN CERTIFICATE"), "{root}");
    cluster.kill_istiod().unwrap();
    TcpStream::connect(istiod.secure).unwrap_err();
}
