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
