#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

use super::*;
use crate::boot::{HeldBoot, Sidecar};

/// What a plane sends, for `root`.
pub(crate) fn message(root: &str) -> pb::IstioBoot {
    pb::IstioBoot {
        files: [("./etc/istio/config/mesh".to_owned(), b"defaultConfig: {x: '{{HOST_IP}}'}\n".to_vec())].into(),
        environment: [
            ("INSTANCE_IP".to_owned(), "{{HOST_IP}}".to_owned()),
            ("POD_NAMESPACE".to_owned(), "bookinfo".to_owned()),
        ]
        .into(),
        discovery_address: "vmgateway.example.org:15443".to_owned(),
        istiod_san: "istiod.istio-system.svc".to_owned(),
        root_certificates: root.to_owned(),
        token: "aaa.the-tokens-payload.ccc".to_owned(),
        token_expires_at: Some(prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 }),
        node: br#"{"id":"sidecar~{{HOST_IP}}~a.b~b.svc.cluster.local","cluster":"a.b","metadata":{"CLUSTER_ID":"Kubernetes"}}"#
            .to_vec(),
        drain_duration: Some(prost_types::Duration { seconds: 20, nanos: 0 }),
    }
}

pub(crate) fn a_root() -> String {
    let mut parameters = rcgen::CertificateParams::default();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    parameters.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
}

pub(crate) fn boot(version: &str, istio: pb::IstioBoot) -> pb::BootConfiguration {
    pb::BootConfiguration {
        version: version.to_owned(),
        spiffe_id: "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm".to_owned(),
        trust_domain: "cluster.local".to_owned(),
        sidecar: Some(pb::boot_configuration::Sidecar::Istio(istio)),
        ..Default::default()
    }
}

fn istio(boot: &HeldBoot) -> &Istio {
    match &boot.sidecar {
        Sidecar::Istio(istio) => istio,
        Sidecar::Standalone(_) => panic!("{boot:?}"),
    }
}

#[test]
fn survives_the_disk_and_its_token_is_in_no_log() {
    let held = HeldBoot::apply(None, boot("1", message(&a_root()))).unwrap();
    assert_eq!(HeldBoot::from_bytes(&held.to_bytes()).as_ref(), Some(&held));
    assert!(!format!("{held:?}").contains("the-tokens-payload"), "{held:?}");
    assert_eq!(istio(&held).drain_duration, Some(Duration::from_secs(20)));
}

#[test]
fn the_version_that_is_held_brings_a_token_and_nothing_else() {
    let held = HeldBoot::apply(None, boot("1", message(&a_root()))).unwrap();
    let token = || pb::IstioBoot {
        token: "ddd.eee.fff".to_owned(),
        token_expires_at: Some(prost_types::Timestamp { seconds: 4_100_000_000, nanos: 0 }),
        ..Default::default()
    };
    let next = HeldBoot::apply(Some(&held), boot("1", token())).unwrap();
    assert_eq!(istio(&next).token.0, "ddd.eee.fff");
    assert_eq!(istio(&next).token_expires_at.as_second(), 4_100_000_000);
    assert_eq!(istio(&next).files, istio(&held).files);
    // The whole of it again is the same.
    let whole = HeldBoot::apply(Some(&held), boot("1", message(&a_root()))).unwrap();
    assert_eq!(whole, held);
    // Another version is all of it, or nothing.
    HeldBoot::apply(Some(&held), boot("2", token())).unwrap_err();
    HeldBoot::apply(Some(&held), boot("1", pb::IstioBoot::default())).unwrap_err();
}

#[test]
fn is_placed_at_an_address() {
    let endpoint = Address { host: "onboarding.example.org".to_owned(), port: 15443 };
    let held = HeldBoot::apply(None, boot("1", message(&a_root()))).unwrap();
    let placed = istio(&held).placed(Some("10.0.0.4".parse().unwrap()), &endpoint).unwrap();
    assert_eq!(placed.environment["INSTANCE_IP"], "10.0.0.4");
    assert_eq!(placed.files["etc/istio/config/mesh"], b"defaultConfig: {x: '10.0.0.4'}\n");
    assert!(placed.node.starts_with(br#"{"id":"sidecar~10.0.0.4~a.b~"#));
    assert_eq!(placed.discovery_address.unwrap().to_string(), "vmgateway.example.org:15443");
    assert_eq!(istio(&held).placed(None, &endpoint), Err(BootError::NoHostAddress));
    let own = pb::IstioBoot { discovery_address: String::new(), ..message(&a_root()) };
    let held = HeldBoot::apply(None, boot("1", own)).unwrap();
    let placed = istio(&held).placed(Some("fd00::4".parse().unwrap()), &endpoint).unwrap();
    assert_eq!(placed.discovery_address, Some(endpoint));
    assert!(placed.node.starts_with(br#"{"id":"sidecar~fd00::4~"#));
}

#[test]
fn an_address_is_a_host_and_a_port() {
    for (good, host) in [("a.b:1", "a.b"), ("10.0.0.1:15012", "10.0.0.1"), ("[fd00::1]:15012", "fd00::1")] {
        let address = address(good).unwrap().unwrap();
        assert_eq!((address.host.as_str(), address.to_string().as_str()), (host, good));
    }
    for bad in
        ["a.b", ":1", "a.b:0", "a.b:70000", "fd00::1:15012", "[a.b]:1", "a b:1", "a\":1", "http://a.b:1", "a/b:1"]
    {
        assert!(address(bad).is_err(), "{bad}");
    }
}

#[test]
fn what_is_hostile_is_refused() {
    let root = a_root();
    let refuse = |change: &dyn Fn(&mut pb::IstioBoot), words: &str| {
        let mut message = message(&root);
        change(&mut message);
        let error = HeldBoot::apply(None, boot("1", message)).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
        assert!(!error.contains("the-tokens-payload"), "{error}");
    };
    for path in [
        "/etc/passwd",
        "../etc/passwd",
        "./../etc/x",
        "./etc/../../x",
        "etc/./x",
        "etc//x",
        "etc/",
        "",
        ".",
        "./",
        "etc/.hidden",
        "etc/a b",
        "etc/a\nb",
        "etc/a\0b",
        "etc/ä",
        "etc\\x",
    ] {
        refuse(&|message| _ = message.files.insert(path.to_owned(), Vec::new()), "not a relative path of plain names");
    }
    for path in ["envoy.pid", "sds.sock", "xds/lds.json", "./bootstrap.json", "etc", "var"] {
        refuse(&|message| _ = message.files.insert(path.to_owned(), Vec::new()), "not in ./etc or ./var");
    }
    refuse(&|message| _ = message.files.insert(format!("etc/{}", "a".repeat(300)), Vec::new()), "too long");
    refuse(&|message| _ = message.files.insert("etc/x".to_owned(), vec![0; LARGEST_FILE + 1]), "more than");
    refuse(&|message| message.files = (0..65).map(|n| (format!("etc/{n}"), Vec::new())).collect(), "64 are allowed");
    refuse(
        &|message| {
            message.files.insert("etc/x".to_owned(), Vec::new());
            message.files.insert("./etc/x".to_owned(), Vec::new());
        },
        "twice",
    );
    let variable = |name: &str, value: String, words: &str| {
        refuse(&|message| _ = message.environment.insert(name.to_owned(), value.clone()), words);
    };
    for name in ["LD_PRELOAD", "LD_LIBRARY_PATH", "PATH"] {
        variable(name, "x".to_owned(), "only this host may set");
    }
    for name in ["", "a", "A=B", "A B", "A\0", "Ä"] {
        variable(name, "x".to_owned(), "not one of A-Z");
    }
    variable("PROXY_CONFIG", "a: b".to_owned(), "not a JSON object");
    variable("A", "\0".to_owned(), "NUL");
    variable("A", "x".repeat(LONGEST_VALUE + 1), "too long");
    refuse(
        &|message| message.environment = (0..9).map(|n| (format!("A{n}"), "x".repeat(LONGEST_VALUE))).collect(),
        "larger than",
    );
    refuse(
        &|message| message.environment = (0..257).map(|n| (format!("A{n}"), String::new())).collect(),
        "256 are allowed",
    );
    refuse(&|message| message.istiod_san = "istiod service".to_owned(), "istiod_san");
    refuse(&|message| message.istiod_san = String::new(), "istiod_san");
    refuse(&|message| message.discovery_address = "istiod".to_owned(), "not host:port");
    refuse(&|message| message.root_certificates = String::new(), "are missing");
    refuse(&|message| message.root_certificates = root.replace("MII", "AAA"), "can't be read");
    for token in ["", "aaa.bbb ccc", "aaa.bbb\r\nccc", &"a".repeat(LONGEST_TOKEN + 1)] {
        refuse(&|message| message.token = token.to_owned(), "token is missing");
    }
    refuse(&|message| message.token_expires_at = None, "token_expires_at");
    for json in ["", "[]", "{", "{} {}"] {
        refuse(&|message| message.node = json.into(), "not a JSON object");
    }
    for json in ["{}", r#"{"id":"a"}"#, r#"{"id":"a","cluster":""}"#, r#"{"id":1,"cluster":"a"}"#] {
        refuse(&|message| message.node = json.into(), "no id or no cluster");
    }
    refuse(&|message| message.node = br#"{"id":"a","cluster":"b","metadata":[]}"#.to_vec(), "no JSON object");
    refuse(&|message| message.drain_duration = Some(prost_types::Duration { seconds: -1, nanos: 0 }), "drain_duration");
}
