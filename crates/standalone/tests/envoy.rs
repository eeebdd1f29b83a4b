//! What is rendered, as Envoy itself takes it: it validates the configuration, and two of them carry requests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod fixture;

use fixture::{Envoy, envoy_binary, http_get, member, mesh, name};
use onboarding_kinds::mesh::{Protocol, Resolution, ServicePort, TargetPort};
use onboarding_standalone::ca::MeshCa;
use onboarding_standalone::data_dir::DataDir;
use onboarding_standalone::mesh::MeshConfig;
use onboarding_standalone::world::{Look, Rendered, World};
use onboarding_wire::onboarding::{BootConfiguration, XdsType, boot_configuration::Sidecar};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

fn rendered(world: &World, registration: &str) -> Rendered {
    match world.look(&name(registration), None) {
        Look::New(rendered) => *rendered,
        other => panic!("{registration}: {other:?}"),
    }
}

fn resource(boot: &BootConfiguration, kind: XdsType, name: &str) -> serde_json::Value {
    let Some(Sidecar::Envoy(envoy)) = &boot.sidecar else { panic!("no Envoy") };
    let found = envoy.changed.iter().find(|resource| resource.r#type() == kind && resource.name == name);
    let found = found.unwrap_or_else(|| panic!("no {kind:?} {name} in {:?}", names(boot)));
    serde_json::from_slice(&found.json).unwrap()
}

fn names(boot: &BootConfiguration) -> Vec<String> {
    let Some(Sidecar::Envoy(envoy)) = &boot.sidecar else { panic!("no Envoy") };
    envoy.changed.iter().map(|resource| format!("{:?} {}", resource.r#type(), resource.name)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whoever follows by differences, now and then after having missed some, has what whoever comes new is given.
    #[test]
    fn any_changes_applied_as_differences_are_the_whole(
        changes in proptest::collection::vec((0..6u8, 0..4u8, any::<bool>(), any::<bool>()), 1..12),
    ) {
        let groups = ["ratings", "productpage"];
        let mut world = bookinfo();
        let mut had = rendered(&world, "ratings-vm1");
        let mut held = had.message(None);
        for (host, what, ready, looks) in changes {
            let group = groups[usize::from(what % 2)];
            let (registration, address) = (format!("host{host}"), format!("10.0.1.{host}"));
            let change = match what {
                3 => vec![(name(&format!("{group}-{registration}")), None)],
                2 => vec![member("ratings", "vm1", &format!("10.0.0.{}", host + 1), ready)],
                _ => vec![member(group, &registration, &address, ready)],
            };
            world = world.next(world.mesh.clone(), change);
            if !looks {
                continue;
            }
            if let Look::New(has) = world.look(&name("ratings-vm1"), Some(&had)) {
                held = fixture::applied(&held, has.message(Some(&had)));
                had = *has;
            }
            prop_assert_eq!(&held, &rendered(&world, "ratings-vm1").message(None));
        }
    }
}

/// The requirement's example, and something outside the mesh.
fn bookinfo() -> World {
    let mesh = mesh(&["127.0.0.2"], 8080);
    World::empty("cluster.local").next(
        Arc::new(mesh),
        vec![member("ratings", "vm1", "10.0.0.1", true), member("productpage", "vm2", "10.0.0.2", true)],
    )
}

#[test]
fn the_requirements_sidecar_becomes_listeners_routes_clusters_and_endpoints() {
    let boot = rendered(&bookinfo(), "ratings-vm1").message(None);
    assert_eq!(
        names(&boot),
        [
            "Listener 10.0.0.1_8080",
            "Listener 127.0.0.2_8080",
            "Cluster inbound|8080||",
            "Cluster outbound|8080||example.org",
            "Cluster outbound|8080||productpage.bookinfo.svc.cluster.local",
            "Cluster outbound|8080||ratings.bookinfo.svc.cluster.local",
            "Endpoint outbound|8080||productpage.bookinfo.svc.cluster.local",
            "Endpoint outbound|8080||ratings.bookinfo.svc.cluster.local",
            "Route 127.0.0.2_8080",
        ]
    );
    let Some(Sidecar::Envoy(envoy)) = &boot.sidecar else { panic!("no Envoy") };
    let resources: Vec<serde_json::Value> =
        envoy.changed.iter().map(|resource| serde_json::from_slice(&resource.json).unwrap()).collect();
    insta::assert_json_snapshot!("requirement", resources);
    assert_eq!(boot.spiffe_id, "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm");
    assert_eq!(envoy.node_id, "sidecar~10.0.0.1~ratings-vm1.bookinfo~bookinfo.svc.cluster.local");
    assert_eq!(boot.host_aliases.len(), 1);
    assert_eq!(boot.host_aliases[0].ip, "127.0.0.2");
    for wanted in ["ratings.bookinfo", "ratings.bookinfo.svc", "ratings.bookinfo.svc.cluster.local", "example.org"] {
        assert!(boot.host_aliases[0].names.iter().any(|name| name == wanted), "{wanted}");
    }
    assert_eq!(boot.ingress.len(), 1);
    assert_eq!((boot.ingress[0].bind.as_str(), boot.ingress[0].port), ("10.0.0.1", 8080));
    assert_eq!(boot.ingress[0].default_endpoint, "127.0.0.1:8080");
}

#[test]
fn a_change_sends_only_what_changed_and_versions_follow_the_content() {
    let before = bookinfo();
    let had = rendered(&before, "ratings-vm1");
    // Not ready: the endpoints of productpage change, and nothing else.
    let after = before.next(before.mesh.clone(), vec![member("productpage", "vm2", "10.0.0.2", false)]);
    let Look::New(has) = after.look(&name("ratings-vm1"), Some(&had)) else { panic!("nothing new") };
    let boot = fixture::whole(&had.message(None), has.message(Some(&had)));
    assert_eq!(names(&boot), ["Endpoint outbound|8080||productpage.bookinfo.svc.cluster.local"]);
    let Some(Sidecar::Envoy(envoy)) = &boot.sidecar else { panic!("no Envoy") };
    assert_eq!(envoy.base_version, had.version);
    assert_ne!(boot.version, had.version);
    let assignment = resource(&boot, XdsType::Endpoint, "outbound|8080||productpage.bookinfo.svc.cluster.local");
    assert_eq!(assignment["endpoints"][0]["lb_endpoints"][0]["health_status"], "UNHEALTHY");

    // Back again: the version of before. Gone: the endpoint is gone.
    let back = after.next(before.mesh.clone(), vec![member("productpage", "vm2", "10.0.0.2", true)]);
    assert_eq!(rendered(&back, "ratings-vm1").version, had.version);
    let gone = back.next(before.mesh.clone(), vec![(name("productpage-vm2"), None)]);
    let boot = fixture::whole(&has.message(None), rendered(&gone, "ratings-vm1").message(Some(&has)));
    let assignment = resource(&boot, XdsType::Endpoint, "outbound|8080||productpage.bookinfo.svc.cluster.local");
    assert_eq!(assignment["endpoints"], serde_json::json!([]));
    assert!(matches!(gone.look(&name("productpage-vm2"), None), Look::Gone));

    // A service that goes is removed by name.
    let mut smaller = (*before.mesh).clone();
    smaller.service_entries.clear();
    let smaller = before.next(Arc::new(smaller), Vec::new());
    let boot = rendered(&smaller, "ratings-vm1").message(Some(&had));
    let Some(Sidecar::Envoy(envoy)) = &boot.sidecar else { panic!("no Envoy") };
    let removed: Vec<&str> = envoy.removed.iter().map(|removed| removed.name.as_str()).collect();
    assert_eq!(removed, ["outbound|8080||example.org"]);
    assert_eq!(names(&boot), ["Route 127.0.0.2_8080"]);
}

#[test]
fn who_is_not_concerned_sees_nothing_new() {
    let mut mesh = mesh(&["127.0.0.2"], 8080);
    // The workloads of productpage call only what is outside.
    mesh.sidecars.iter_mut().find(|sidecar| sidecar.name == "productpage").unwrap().egress[0].hosts =
        vec!["bookinfo/example.org".to_owned()];
    let before = World::empty("cluster.local").next(
        Arc::new(mesh),
        vec![member("ratings", "vm1", "10.0.0.1", true), member("productpage", "vm2", "10.0.0.2", true)],
    );
    let had = rendered(&before, "productpage-vm2");
    let after = before.next(before.mesh.clone(), vec![member("ratings", "vm3", "10.0.0.3", true)]);
    assert!(matches!(after.look(&name("productpage-vm2"), Some(&had)), Look::Same));
    assert!(matches!(after.look(&name("ratings-vm1"), Some(&rendered(&before, "ratings-vm1"))), Look::New(_)));
    // A configuration that says the same is no change.
    let same = after.next(Arc::new((*before.mesh).clone()), Vec::new());
    assert!(matches!(same.look(&name("productpage-vm2"), Some(&had)), Look::Same));
}

/// The faults of a mesh that differs from the requirement's by one change.
fn faults_after(change: impl Fn(&mut MeshConfig)) -> (Vec<String>, BootConfiguration) {
    let mut mesh = mesh(&["127.0.0.2"], 8080);
    change(&mut mesh);
    let members = vec![member("ratings", "vm1", "10.0.0.1", true), member("productpage", "vm2", "10.0.0.2", true)];
    let world = World::empty("cluster.local").next(Arc::new(mesh), members);
    let boot = rendered(&world, "ratings-vm1").message(None);
    (world.faults(), boot)
}

#[test]
fn what_cannot_be_served_is_said_and_the_rest_is_served() {
    assert_eq!(faults_after(|_| {}).0, Vec::<String>::new());
    let said = |wanted: &str, change: fn(&mut MeshConfig)| {
        let (faults, boot) = faults_after(change);
        assert!(faults.iter().any(|fault| fault.contains(wanted)), "{wanted}: {faults:#?}");
        boot
    };
    let boot = said("2 TCP services share 127.0.0.2:8080", |mesh| {
        mesh.service_entries.clear();
        mesh.services.iter_mut().for_each(|service| service.ports[0].protocol = Protocol::Tcp);
    });
    let listener = resource(&boot, XdsType::Listener, "127.0.0.2_8080").to_string();
    assert!(
        listener.contains("outbound|8080||productpage") && listener.contains("TcpProxy"),
        "the first by name: {listener}"
    );
    let boot =
        said("ratings.bookinfo.svc.cluster.local:8080 is TCP, but the listener 127.0.0.2:8080 is HTTP", |mesh| {
            mesh.services[1].ports[0].protocol = Protocol::Tcp;
        });
    assert!(!names(&boot).iter().any(|name| name.starts_with("Cluster outbound|8080||ratings")));
    said("nothing listens", |mesh| {
        for sidecar in &mut mesh.sidecars {
            sidecar.egress[0].port.as_mut().unwrap().protocol = Some(Protocol::Tcp);
        }
    });
    said("127.0.0.2:8080 is another egress listener's already", |mesh| {
        let again = mesh.sidecars[1].egress[0].clone();
        mesh.sidecars[1].egress.push(again);
    });
    said("spec.selector: without one", |mesh| mesh.services[0].selector.clear());
    said("NONE needs the original address", |mesh| mesh.service_entries[0].resolution = Resolution::None);
    said("STATIC needs addresses", |mesh| mesh.service_entries[0].endpoints.clear());
    said("is not an IP address, which STATIC needs", |mesh| {
        mesh.service_entries[0].endpoints[0].address = "example.net".to_owned();
    });
    said("*.example.org can't be resolved", |mesh| {
        let entry = &mut mesh.service_entries[0];
        (entry.hosts, entry.resolution) = (vec!["*.example.org".to_owned()], Resolution::Dns);
        entry.endpoints.clear();
    });
    said("is another Service's or ServiceEntry's already", |mesh| {
        let mut again = mesh.service_entries[0].clone();
        again.name = "example-org-again".to_owned();
        mesh.service_entries.push(again);
    });
    said("is where the listener itself is", |mesh| {
        mesh.sidecars[1].ingress[0].default_endpoint = "0.0.0.0:8080".to_owned();
    });
    said("is neither IP:PORT nor unix:///PATH", |mesh| {
        mesh.sidecars[1].ingress[0].default_endpoint = "localhost:8080".to_owned();
    });
    said("isn't in it; its workloads get no traffic", |mesh| {
        mesh.services[1].ports[0].target_port = Some(TargetPort::Name("web".to_owned()));
    });
    said("several Sidecars select its workloads", |mesh| {
        let mut again = mesh.sidecars[1].clone();
        again.name = "ratings-again".to_owned();
        mesh.sidecars.push(again);
    });
    said("is served on 127.0.0.2 and on 127.0.0.3", |mesh| {
        let port = ServicePort { number: 8081, ..mesh.services[1].ports[0].clone() };
        mesh.services[1].ports.push(port);
        let mut other = mesh.sidecars[1].egress[0].clone();
        (other.bind, other.port.as_mut().unwrap().number) = (Some("127.0.0.3".to_owned()), 8081);
        mesh.sidecars[1].egress.push(other);
    });
}

#[test]
fn hosts_and_export_say_what_a_listener_leads_to() {
    let clusters = |hosts: &[&str], export: &[&str]| {
        let (_, boot) = faults_after(|mesh| {
            let mut elsewhere = mesh.service_entries[0].clone();
            (elsewhere.namespace, elsewhere.hosts) = ("shop".to_owned(), vec!["api.shop.example".to_owned()]);
            elsewhere.export_to = export.iter().map(|to| (*to).to_owned()).collect();
            mesh.service_entries.push(elsewhere);
            mesh.sidecars[1].egress[0].hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        });
        let clusters =
            names(&boot).into_iter().filter_map(|name| Some(name.strip_prefix("Cluster outbound|8080||")?.to_owned()));
        clusters.collect::<Vec<_>>()
    };
    let (own, shop) = (
        ["example.org", "productpage.bookinfo.svc.cluster.local", "ratings.bookinfo.svc.cluster.local"],
        "api.shop.example",
    );
    assert_eq!(clusters(&["./*"], &[]), own);
    assert_eq!(clusters(&["bookinfo/*"], &[]), own);
    assert_eq!(clusters(&["*/*"], &[]), [&[shop], own.as_slice()].concat());
    assert_eq!(clusters(&["*/*"], &["*"]), [&[shop], own.as_slice()].concat());
    assert_eq!(clusters(&["*/*"], &["."]), own);
    assert_eq!(clusters(&["shop/*"], &[]), [shop]);
    assert_eq!(clusters(&["~/*"], &[]), Vec::<String>::new());
    assert_eq!(clusters(&["*/*.bookinfo.svc.cluster.local"], &[]), own[1..]);
    assert_eq!(clusters(&["./ratings.bookinfo.svc.cluster.local", "./example.org"], &[]), [own[0], own[2]]);
}

#[test]
fn only_the_service_accounts_behind_a_service_may_answer_for_it() {
    let exact = |change: fn(&mut MeshConfig)| {
        let (_, boot) = faults_after(change);
        let cluster = resource(&boot, XdsType::Cluster, "outbound|8080||ratings.bookinfo.svc.cluster.local");
        let context = &cluster["transport_socket"]["typed_config"]["common_tls_context"];
        let names =
            &context["combined_validation_context"]["default_validation_context"]["match_typed_subject_alt_names"];
        let names = names.as_array().unwrap().iter().map(|name| name["matcher"]["exact"].as_str().unwrap().to_owned());
        names.collect::<Vec<_>>()
    };
    assert_eq!(exact(|_| {}), ["spiffe://cluster.local/ns/bookinfo/sa/ratings-vm"]);
    // Nobody is behind it: nobody may answer, instead of everybody.
    assert_eq!(
        exact(|mesh| mesh.services[1].selector = [("app".to_owned(), "none".to_owned())].into()),
        ["spiffe://cluster.local/nobody"]
    );
    // By a label that an agent added, too.
    assert_eq!(
        exact(|mesh| mesh.services[1].selector = [("version".to_owned(), "v1".to_owned())].into()),
        ["spiffe://cluster.local/ns/bookinfo/sa/productpage-vm", "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm"]
    );
}

#[test]
fn a_name_that_the_hosts_file_maps_to_the_sidecar_is_resolved_by_dns_alone() {
    let (_, boot) = faults_after(|mesh| {
        let entry = &mut mesh.service_entries[0];
        entry.resolution = Resolution::Dns;
        entry.endpoints.clear();
    });
    let cluster = resource(&boot, XdsType::Cluster, "outbound|8080||example.org").to_string();
    assert!(cluster.contains("\"address\":\"example.org.\""), "{cluster}");
}

#[test]
fn ten_thousand_workloads_share_what_they_have_in_common() {
    let mesh = Arc::new(mesh(&["127.0.0.2"], 8080));
    let many = (0..10_000)
        .map(|index| member("ratings", &format!("vm{index}"), &format!("10.1.{}.{}", index / 250, index % 250), true));
    let world = World::empty("cluster.local").next(mesh.clone(), many.collect());
    let (first, last) = (rendered(&world, "ratings-vm0"), rendered(&world, "ratings-vm9999"));
    let started = std::time::Instant::now();
    let after = world.next(mesh, vec![member("productpage", "vm", "10.0.0.2", true)]);
    let took = started.elapsed();
    for (name_, had) in [("ratings-vm0", &first), ("ratings-vm9999", &last)] {
        let Look::New(has) = after.look(&name(name_), Some(had)) else { panic!("nothing new") };
        let boot = has.message(Some(had));
        assert_eq!(names(&boot), ["Endpoint outbound|8080||productpage.bookinfo.svc.cluster.local"]);
    }
    println!("one join among 10,000: {took:?}");
}

#[test]
fn envoy_accepts_what_is_rendered() {
    let Some(binary) = envoy_binary() else { return };
    let mesh = fixture::everything();
    let world = World::empty("cluster.local").next(
        Arc::new(mesh),
        vec![member("ratings", "vm1", "127.0.1.1", true), member("productpage", "vm2", "127.0.1.2", true)],
    );
    for registration in ["ratings-vm1", "productpage-vm2"] {
        let dir = tempfile::tempdir().unwrap();
        let boot = rendered(&world, registration).message(None);
        // Validation doesn't read what dynamic resources name: what is there is put in as static, and the rest is tried by running it.
        fixture::write_static(dir.path(), &boot);
        let output = std::process::Command::new(&binary)
            .args(["--mode", "validate", "-c", "static.json", "--log-level", "warning"])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{registration}:\n{}\n{:#?}",
            String::from_utf8_lossy(&output.stderr),
            names(&boot)
        );
        for resource in ["Route 127.0.0.2_8080", "Listener 127.0.0.4_9443", "Listener 127.0.0.3_9000"] {
            assert!(names(&boot).iter().any(|name| name == resource), "{resource} in {:?}", names(&boot));
        }
    }
    // Routes and endpoints are read by one that runs.
    let data_dir = tempfile::tempdir().unwrap();
    let data = Arc::new(DataDir::open(data_dir.path()).unwrap());
    let ca = MeshCa::open(&data, "cluster.local", Duration::from_secs(3600), jiff::Timestamp::now()).unwrap();
    let envoy = Envoy::start(&binary, &rendered(&world, "ratings-vm1").message(None), &ca);
    let answer = http_get("127.0.0.2:8080", "/", "nobody.example");
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let complaints: Vec<String> = (envoy.log().lines())
        .filter(|line| ["[warning]", "[error]", "[critical]"].iter().any(|level| line.contains(level)))
        // Of our bootstrap, not of what is rendered.
        .filter(|line| !line.contains("active downstream connections"))
        .map(str::to_owned)
        .collect();
    assert!(complaints.is_empty(), "{complaints:#?}");
}

#[test]
fn two_envoys_carry_requests_by_mutual_tls() {
    let Some(binary) = envoy_binary() else { return };
    let application = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = application.local_addr().unwrap().port();
    std::thread::spawn(move || fixture::serve(&application));

    let data_dir = tempfile::tempdir().unwrap();
    let data = Arc::new(DataDir::open(data_dir.path()).unwrap());
    let now = jiff::Timestamp::now();
    let ca = MeshCa::open(&data, "cluster.local", Duration::from_secs(3600), now).unwrap();
    let world = World::empty("cluster.local").next(
        Arc::new(mesh(&["127.0.0.2", "127.0.0.5"], port)),
        vec![member("ratings", "vm1", "127.0.1.1", true), member("productpage", "vm2", "127.0.1.2", true)],
    );
    let server = Envoy::start(&binary, &rendered(&world, "ratings-vm1").message(None), &ca);
    let client = Envoy::start(&binary, &rendered(&world, "productpage-vm2").message(None), &ca);

    let egress = format!("127.0.0.5:{port}");
    for host in [
        "ratings.bookinfo",
        "ratings.bookinfo.svc",
        "ratings.bookinfo.svc.cluster.local",
        "ratings",
        "RATINGS.bookinfo",
    ] {
        for host in [host.to_owned(), format!("{host}:{port}")] {
            let answer = http_get(&egress, "/who", &host);
            assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}\n{}", client.log());
            assert!(
                answer.contains("URI=spiffe://cluster.local/ns/bookinfo/sa/productpage-vm"),
                "the application learns who calls: {answer}"
            );
            assert!(!answer.contains("URI=spiffe://evil"), "what a caller says of itself is dropped: {answer}");
        }
    }
    // `http_proxy`.
    let answer = http_get(&egress, &format!("http://ratings.bookinfo:{port}/who"), &format!("ratings.bookinfo:{port}"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // A name that isn't known is said.
    let answer = http_get(&egress, "/", "nobody.bookinfo");
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(answer.contains("knows no service by the name \"nobody.bookinfo\""), "{answer}");

    // Who isn't of the mesh gets nothing: no TLS, and TLS without a certificate.
    let mut plain = TcpStream::connect(format!("127.0.1.1:{port}")).unwrap();
    plain.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\nhost: ratings\r\n\r\n").unwrap();
    let mut bytes = Vec::new();
    let _ = plain.read_to_end(&mut bytes);
    assert!(!String::from_utf8_lossy(&bytes).contains("200 OK"), "{}", server.log());

    // The peer's identity is verified: a server with a certificate of another account answers nobody.
    drop(server);
    let impostor = Envoy::start_as(
        &binary,
        &rendered(&world, "ratings-vm1").message(None),
        &ca,
        "spiffe://cluster.local/ns/bookinfo/sa/other",
    );
    let answer = http_get(&egress, "/who", "ratings.bookinfo");
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}\n{}", impostor.log());
}

#[test]
fn an_endpoint_that_becomes_unready_gets_no_traffic_and_no_request_is_lost() {
    let Some(binary) = envoy_binary() else { return };
    let application = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = application.local_addr().unwrap().port();
    std::thread::spawn(move || fixture::serve(&application));
    let data_dir = tempfile::tempdir().unwrap();
    let data = Arc::new(DataDir::open(data_dir.path()).unwrap());
    let ca = MeshCa::open(&data, "cluster.local", Duration::from_secs(3600), jiff::Timestamp::now()).unwrap();
    let mesh = Arc::new(mesh(&["127.0.0.6", "127.0.0.7"], port));
    let both = World::empty("cluster.local").next(
        mesh.clone(),
        vec![
            member("ratings", "vm1", "127.0.2.1", true),
            member("ratings", "dead", "127.0.2.9", true),
            member("productpage", "vm2", "127.0.2.2", true),
        ],
    );
    let _server = Envoy::start(&binary, &rendered(&both, "ratings-vm1").message(None), &ca);
    let had = rendered(&both, "productpage-vm2");
    let client = Envoy::start(&binary, &had.message(None), &ca);
    let egress = format!("127.0.0.7:{port}");
    // Nobody is at 127.0.2.9: each request that goes there first is tried elsewhere.
    for _ in 0..20 {
        let answer = http_get(&egress, "/", "ratings.bookinfo");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    // All unready: nothing is tried, and nothing panics into sending anyway.
    let none = both
        .next(mesh, vec![member("ratings", "vm1", "127.0.2.1", false), member("ratings", "dead", "127.0.2.9", false)]);
    client.apply(&fixture::whole(&had.message(None), rendered(&none, "productpage-vm2").message(Some(&had))));
    let began = std::time::Instant::now();
    loop {
        let answer = http_get(&egress, "/", "ratings.bookinfo");
        if answer.starts_with("HTTP/1.1 503") {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "still: {answer}\n{}", client.log());
    }
}
