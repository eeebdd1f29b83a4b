//! Facts in, findings out: a cluster in which all is well, and one mutation for each finding.

use super::*;
use crate::doctor::facts::{Answer, Endpoint, Facts, Finding, Host, Level, Objects, OtherGateway, Served};
use crate::doctor::material;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};
use onboarding_testkit::oidc::make_tls;
use serde_json::{Value, json};
use std::net::IpAddr;

const HOST: &str = "onboarding-endpoint.your-company.corp";
const GATEWAY: &str = "192.0.2.7";
const UID: &str = "the-uid";

fn secret(names: &[&str]) -> Value {
    let made = make_tls(names).unwrap();
    json!({
        "metadata": {"name": "onboarding-endpoint-tls", "namespace": "istio-system"},
        "type": "kubernetes.io/tls",
        "data": {"tls.crt": STANDARD.encode(made.certificate_chain), "tls.key": STANDARD.encode(made.private_key)},
    })
}

fn certificate(secret: &Value) -> material::Certificate {
    let bytes = |key: &str| STANDARD.decode(secret["data"][key].as_str().unwrap()).unwrap();
    material::of_secret(&bytes("tls.crt"), &bytes("tls.key")).unwrap()
}

fn deployment(name: &str, available: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "istio-system"},
        "spec": {"template": {"spec": {"containers": [{"name": "a", "image": "pilot:1.29"}]}}},
        "status": {
            "readyReplicas": 2,
            "conditions": [{"type": "Available", "status": available, "message": "0 of 2 are ready"}],
        },
    })
}

fn metadata(name: &str, namespace: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": namespace}})
}

fn mesh(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "istio-system"}, "data": {"mesh": "trustDomain: cluster.local"}})
}

fn war(name: &str, connected: &str, since: Timestamp) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "bookinfo", "uid": format!("uid-of-{name}")},
        "status": {"conditions": [{"type": "AgentConnected", "status": connected, "lastTransitionTime": since.to_string()}]},
    })
}

fn entry(name: &str, war: &str) -> Value {
    json!({"metadata": {
        "name": name, "namespace": "bookinfo",
        "labels": {"app.kubernetes.io/managed-by": "onboarding-plane"},
        "ownerReferences": [{"kind": "WorkloadAutoRegistration", "name": name, "uid": format!("uid-of-{war}")}],
    }})
}

/// All is well.
fn well() -> Facts {
    let secret = secret(&[HOST]);
    let served = certificate(&secret);
    let now = Timestamp::now();
    let mut service = json!({
        "metadata": {"name": "vmgateway", "namespace": "istio-system", "annotations": {}},
        "spec": {"type": "LoadBalancer", "ports": [{"port": 15443}]},
        "status": {"loadBalancer": {"ingress": [{"ip": GATEWAY}]}},
    });
    service["metadata"]["annotations"]["external-dns.alpha.kubernetes.io/hostname"] = HOST.into();
    let plane = json!({
        "apiVersion": "install.tetrate.io/v1alpha1", "kind": "ControlPlane",
        "metadata": {"name": "controlplane", "namespace": "istio-system"},
        "spec": {"meshExpansion": {"onboarding": {
            "endpoint": {"hosts": [HOST], "secretName": "onboarding-endpoint-tls"}, "uid": UID,
        }}},
    });
    let policy = json!({
        "apiVersion": "authorization.onboarding.tetrate.io/v1alpha1", "kind": "OnboardingPolicy",
        "metadata": {"name": "any", "namespace": "bookinfo"},
        "spec": {"allow": [{
            "workloads": [{"aws": {"accounts": ["123456789012"], "ec2": {}}}],
            "onboardTo": [{"workloadGroupSelector": {"matchLabels": {"app": "ratings"}}}],
        }]},
    });
    let group = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadGroup",
        "metadata": {"name": "ratings", "namespace": "bookinfo", "labels": {"app": "ratings"}},
        "spec": {"template": {"serviceAccount": "ratings-vm"}},
    });
    let mut istiod = deployment("istiod", "True");
    istiod["metadata"]["labels"] = json!({"app": "istiod"});
    let gateway: IpAddr = GATEWAY.parse().unwrap();
    let host = Host {
        name: HOST.to_owned(),
        addresses: Ok(vec![gateway]),
        answer: Some(Answer {
            address: (gateway, 15443).into(),
            outcome: Ok(Served { certificate: Ok(served), uid: Ok(UID.to_owned()) }),
        }),
    };
    Facts {
        now,
        server: "https://api.example".to_owned(),
        version: Ok("v1.36.3".to_owned()),
        objects: Some(Objects {
            planes: Ok(vec![plane]),
            policies: Ok(vec![policy]),
            groups: Ok(vec![group]),
            wars: Ok(vec![war("a", "True", now)]),
            entries: Ok(vec![entry("a", "a")]),
            accounts: Ok(vec![metadata("ratings-vm", "bookinfo")]),
            roots: Ok(vec![metadata("istio-ca-root-cert", "bookinfo")]),
            config_maps: Ok(vec![
                mesh("istio"),
                metadata("istio-ca-root-cert", "istio-system"),
                metadata("istio-sidecar-injector", "istio-system"),
            ]),
            deployments: Ok(vec![deployment("vmgateway", "True"), deployment("onboarding-plane", "True"), istiod]),
            services: Ok(vec![service, metadata("istiod", "istio-system")]),
            plane_config: Ok(None),
        }),
        endpoint: Some(Endpoint {
            secret_name: "onboarding-endpoint-tls".to_owned(),
            secret: Ok(Some(secret)),
            hosts: vec![host],
            gateway: vec![gateway],
            other_gateway: None,
        }),
    }
}

/// What is found once this has been done to a cluster in which all was well.
fn after(change: impl FnOnce(&mut Facts, &mut Objects, &mut Endpoint)) -> Vec<Finding> {
    let mut facts = well();
    let (mut objects, mut endpoint) = (facts.objects.take().unwrap(), facts.endpoint.take().unwrap());
    change(&mut facts, &mut objects, &mut endpoint);
    all(&Facts { objects: Some(objects), endpoint: Some(endpoint), ..facts })
}

#[track_caller]
fn only(findings: Vec<Finding>, level: Level, what: &str, words: &str) {
    let wrong: Vec<Finding> = findings.into_iter().filter(|finding| finding.level != Level::Ok).collect();
    let [finding] = wrong.as_slice() else { panic!("not one: {wrong:#?}") };
    assert_eq!((finding.level, finding.what.as_str()), (level, what), "{finding:?}");
    assert!(finding.words.contains(words), "{words:?} isn't in {finding:?}");
    assert!(!finding.way_out.is_empty(), "{finding:?}");
}

fn objects_of(asked: &mut Asked<Vec<Value>>) -> &mut Vec<Value> {
    asked.as_mut().unwrap()
}

const SECRET: &str = "Secret onboarding-endpoint-tls";
const ENDPOINT: &str = "endpoint onboarding-endpoint.your-company.corp:15443";

#[test]
fn nothing_is_wrong_where_all_is_well() {
    let wrong: Vec<Finding> = all(&well()).into_iter().filter(|finding| finding.level != Level::Ok).collect();
    assert_eq!(wrong, []);
}

#[test]
fn the_control_plane() {
    let gone = |facts: &mut Facts| {
        let mut objects = facts.objects.take().unwrap();
        objects.planes = Ok(Vec::new());
        all(&Facts { objects: Some(objects), endpoint: None, ..well() })
    };
    only(gone(&mut well()), Level::Fail, "ControlPlane", "none in istio-system enables onboarding");
    let findings = after(|_, objects, _| {
        objects_of(&mut objects.planes)[0]["spec"]["meshExpansion"]["onboarding"]["endpoint"]["hosts"] = json!([]);
    });
    only(
        findings,
        Level::Fail,
        "ControlPlane istio-system/controlplane",
        "spec.meshExpansion.onboarding.endpoint.hosts",
    );
    let findings = after(|_, objects, _| {
        let mut second = objects_of(&mut objects.planes)[0].clone();
        second["metadata"]["name"] = "another".into();
        objects_of(&mut objects.planes).push(second);
    });
    only(findings, Level::Fail, "ControlPlane istio-system/another", "another ControlPlane enables onboarding");
    let findings = after(|_, objects, _| {
        objects_of(&mut objects.planes)[0]["status"] = json!({"conditions": [
            {"type": "CertificateReady", "status": "False", "message": "the Secret is absent"},
            {"type": "Ready", "status": "False", "message": "the Secret is absent"},
        ]});
    });
    only(findings, Level::Warn, "ControlPlane controlplane", "CertificateReady is False: the Secret is absent");
}

#[test]
fn the_secret_and_its_certificate() {
    let with =
        |change: fn(&mut Value)| after(|_, _, endpoint| change(endpoint.secret.as_mut().unwrap().as_mut().unwrap()));
    only(after(|_, _, endpoint| endpoint.secret = Ok(None)), Level::Fail, SECRET, "isn't there");
    only(with(|it| it["type"] = "Opaque".into()), Level::Fail, SECRET, "is of type \"Opaque\"");
    only(with(|it| it["data"]["tls.crt"] = "".into()), Level::Fail, SECRET, "has no certificate");
    only(with(|it| it["data"]["tls.key"] = "bm9uc2Vuc2U=".into()), Level::Fail, SECRET, "tls.key is no PEM");
    let foreign = with(|it| it["data"]["tls.key"] = secret(&[HOST])["data"]["tls.key"].clone());
    only(foreign, Level::Fail, SECRET, "tls.key does not belong to its tls.crt");

    let end = |hours| certificate(&secret(&[HOST])).not_after.checked_add(SignedDuration::from_hours(hours)).unwrap();
    // What is connected now is overdue at that time.
    only(after(|facts, _, _| facts.now = end(1)), Level::Fail, SECRET, "expired at");
    only(after(|facts, _, _| facts.now = end(-24)), Level::Warn, SECRET, "expires soon");
    let early = Timestamp::from_second(0).unwrap();
    only(after(|facts, _, _| facts.now = early), Level::Fail, SECRET, "is valid only from");
}

#[test]
fn a_certificate_for_another_name() {
    let findings = after(|_, _, endpoint| {
        let other = secret(&["other.example"]);
        let served = endpoint.hosts[0].answer.as_mut().unwrap().outcome.as_mut().unwrap();
        served.certificate = Ok(certificate(&other));
        endpoint.secret = Ok(Some(other));
    });
    only(findings, Level::Fail, SECRET, "its certificate isn't for onboarding-endpoint.your-company.corp");
}

#[test]
fn the_deployments_and_the_gateway() {
    for (index, name) in ["vmgateway", "onboarding-plane"].into_iter().enumerate() {
        let what = format!("Deployment {name}");
        let findings = after(|_, objects, _| objects_of(&mut objects.deployments)[index] = deployment(name, "False"));
        only(findings, Level::Fail, &what, "isn't available: 0 of 2 are ready");
        let findings = after(|_, objects, _| drop(objects_of(&mut objects.deployments).remove(index)));
        only(findings, Level::Fail, &what, "isn't there");
    }
    let findings = after(|_, objects, _| {
        objects_of(&mut objects.planes)[0]["spec"]["meshExpansion"]["onboarding"]["localRepository"] = json!({});
    });
    only(findings, Level::Fail, "Deployment onboarding-repository", "isn't there");

    const SERVICE: &str = "Service vmgateway";
    let findings = after(|_, objects, _| drop(objects_of(&mut objects.services).remove(0)));
    only(findings, Level::Fail, SERVICE, "isn't there");
    let findings =
        after(|_, objects, _| objects_of(&mut objects.services)[0]["spec"]["ports"] = json!([{"port": 443}]));
    only(findings, Level::Fail, SERVICE, "has no port 15443");
    only(after(|_, _, endpoint| endpoint.gateway.clear()), Level::Fail, SERVICE, "has no address yet");
    let findings = after(|_, objects, endpoint| {
        objects_of(&mut objects.services)[0]["spec"]["type"] = "NodePort".into();
        endpoint.gateway.clear();
    });
    only(findings, Level::Warn, SERVICE, "is of type NodePort");
}

#[test]
fn another_gateway_leads_to_istiod() {
    let at = "192.0.2.8:15443".parse().unwrap();
    let with = |outcome| {
        after(|_, _, endpoint| {
            let (host, istiod) = ("gateway.corp".to_owned(), "istiod.istio-system.svc".to_owned());
            endpoint.other_gateway = Some(OtherGateway { host, port: 15443, istiod, outcome });
        })
    };
    const WHAT: &str = "customGateway gateway.corp:15443";
    let good = with(Ok((at, certificate(&secret(&["istiod.istio-system.svc"])))));
    assert!(good.iter().all(|finding| finding.level == Level::Ok), "{good:#?}");
    assert!(
        good.iter().any(|it| it.what == WHAT && it.words == "leads to istiod.istio-system.svc, by 192.0.2.8:15443")
    );
    let other = certificate(&secret(&[HOST]));
    only(with(Ok((at, other))), Level::Fail, WHAT, "not with the certificate of istiod.istio-system.svc");
    only(with(Err("doesn't answer at 192.0.2.8:15443: no".to_owned())), Level::Fail, WHAT, "doesn't answer");
}

#[test]
fn names_in_the_dns() {
    const DNS: &str = "DNS onboarding-endpoint.your-company.corp";
    let nowhere = |endpoint: &mut Endpoint| endpoint.hosts[0].addresses = Err("no such name".to_owned());
    only(after(|_, _, endpoint| nowhere(endpoint)), Level::Fail, DNS, "doesn't resolve on this machine: no such name");
    let findings = after(|_, _, endpoint| endpoint.hosts[0].addresses = Ok(vec!["192.0.2.8".parse().unwrap()]));
    only(findings, Level::Warn, DNS, "is 192.0.2.8, and svc/vmgateway has 192.0.2.7");
    // A name that is there needs no annotation; one that isn't does.
    let bare = |objects: &mut Objects| objects_of(&mut objects.services)[0]["metadata"]["annotations"] = json!({});
    assert!(after(|_, objects, _| bare(objects)).iter().all(|finding| finding.level == Level::Ok));
    let findings = after(|_, objects, endpoint| {
        bare(objects);
        nowhere(endpoint);
    });
    let warned = findings.iter().find(|finding| finding.what == "ExternalDNS").unwrap();
    assert_eq!(
        (warned.level, warned.way_out.as_str()),
        (Level::Warn, "add the annotation, or make the records by hand")
    );
}

#[test]
fn what_answers_at_the_endpoint() {
    let served = |change: fn(&mut Result<Served, String>)| {
        after(|_, _, endpoint| change(&mut endpoint.hosts[0].answer.as_mut().unwrap().outcome))
    };
    let refused = served(|it| *it = Err("Connection refused".to_owned()));
    only(refused, Level::Fail, ENDPOINT, "doesn't answer at 192.0.2.7:15443: Connection refused");
    let another = served(|it| it.as_mut().unwrap().certificate = Ok(certificate(&secret(&[HOST]))));
    only(another, Level::Fail, ENDPOINT, "another certificate than the Secret's");
    let silent = served(|it| it.as_mut().unwrap().uid = Err("Unavailable: no route".to_owned()));
    only(silent, Level::Fail, ENDPOINT, "doesn't answer Discover: Unavailable: no route");
    let stranger = served(|it| it.as_mut().unwrap().uid = Ok("another".to_owned()));
    only(stranger, Level::Fail, ENDPOINT, "a plane of another UID answers: \"another\"");
}

#[test]
fn a_uid_that_was_made_is_known_from_its_config_map() {
    let made = |objects: &mut Objects, uid: &str| {
        let plane = &mut objects_of(&mut objects.planes)[0]["spec"]["meshExpansion"]["onboarding"];
        plane.as_object_mut().unwrap().remove("uid");
        objects.plane_config = Ok(Some(json!({"data": {"config.yaml": format!("uid: {uid}\n")}})));
    };
    assert!(after(|_, objects, _| made(objects, UID)).iter().all(|finding| finding.level == Level::Ok));
    only(after(|_, objects, _| made(objects, "made")), Level::Fail, ENDPOINT, "and here it is \"made\"");
}

#[test]
fn istio_and_its_revisions() {
    let findings = after(|_, objects, _| objects_of(&mut objects.config_maps).clear());
    let wrong: Vec<_> = findings.iter().filter(|it| it.level != Level::Ok).map(|it| it.what.as_str()).collect();
    assert_eq!(wrong, ["Istio", "istiod istiod"]);
    let findings = after(|_, objects, _| {
        objects_of(&mut objects.deployments)[2]["metadata"]["labels"]["istio.io/rev"] = "canary".into()
    });
    only(findings, Level::Fail, "istiod istiod", "ConfigMap istio-canary, isn't there");
    let findings = after(|_, objects, _| {
        objects_of(&mut objects.deployments)[2]["metadata"]["labels"]["istio.io/rev"] = "canary".into();
        objects_of(&mut objects.config_maps).push(mesh("istio-canary"));
    });
    assert!(findings.iter().all(|finding| finding.level == Level::Ok), "{findings:#?}");
    let findings = after(|_, objects, _| objects_of(&mut objects.deployments)[2]["status"] = json!({}));
    only(findings, Level::Fail, "istiod istiod", "isn't available (revision default, image pilot:1.29)");
    let findings = after(|_, objects, _| drop(objects_of(&mut objects.services).remove(1)));
    only(findings, Level::Fail, "istiod istiod", "no Service istiod");
    let findings = after(|_, objects, _| drop(objects_of(&mut objects.deployments).remove(2)));
    only(findings, Level::Warn, "istiod", "there is no Deployment with the label app=istiod");
    let findings = after(|_, objects, _| objects_of(&mut objects.roots).clear());
    only(findings, Level::Fail, "root certificate", "isn't in bookinfo");
    let findings = after(|_, objects, _| {
        objects_of(&mut objects.groups)[0]["metadata"]["labels"]["istio.io/rev"] = "canary".into();
    });
    only(findings, Level::Warn, "WorkloadGroup bookinfo/ratings", "asks for the Istio revision \"canary\"");
}

#[test]
fn policies_and_groups() {
    let policy = |change: fn(&mut Value)| after(|_, objects, _| change(&mut objects_of(&mut objects.policies)[0]));
    let findings = policy(|it| it["spec"]["allow"][0]["workloads"][0]["aws"]["accounts"] = json!([]));
    let wrong: Vec<_> =
        findings.iter().filter(|it| it.level != Level::Ok).map(|it| (it.level, it.what.as_str())).collect();
    let group = "WorkloadGroup bookinfo/ratings";
    assert_eq!(wrong, [(Level::Fail, "OnboardingPolicy bookinfo/any"), (Level::Warn, group)]);

    let findings =
        policy(|it| it["spec"]["allow"][0]["onboardTo"][0]["workloadGroupSelector"]["matchLabels"]["app"] = "x".into());
    let wrong: Vec<_> = findings.iter().filter(|it| it.level != Level::Ok).map(|it| it.words.as_str()).collect();
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong[0].contains("admits nobody") && wrong[1].contains("nobody may join it"), "{wrong:?}");

    let findings = policy(|it| {
        let jwt = json!({"jwt": {"issuer": "https://mycompany.corp"}});
        it["spec"]["allow"][0]["workloads"] = json!([jwt, jwt]);
    });
    only(findings, Level::Warn, "OnboardingPolicy bookinfo/any", "the issuer \"https://mycompany.corp\"");
    let findings = after(|_, objects, _| objects_of(&mut objects.accounts).clear());
    only(findings, Level::Fail, group, "its ServiceAccount \"ratings-vm\" isn't there");
    // One that is being deleted is as good as gone, and so is what it said.
    let findings = policy(|it| {
        it["metadata"]["deletionTimestamp"] = "2026-11-24T00:00:00Z".into();
        it["spec"]["allow"] = json!([]);
    });
    only(findings, Level::Warn, group, "nobody may join it");
}

#[test]
fn what_was_left_behind() {
    let gone = |minutes, arguments: Value| {
        after(|facts, objects, _| {
            let since = facts.now.checked_sub(SignedDuration::from_mins(minutes)).unwrap();
            objects_of(&mut objects.wars)[0] = war("a", "False", since);
            objects_of(&mut objects.deployments)[1]["spec"]["template"]["spec"]["containers"][0]["args"] = arguments;
        })
    };
    assert!(gone(4, json!([])).iter().all(|finding| finding.level == Level::Ok));
    only(
        gone(7, json!([])),
        Level::Fail,
        "registrations",
        "1 weren't connected for longer than the grace period (5m): bookinfo/a",
    );
    for arguments in [json!(["--grace-period=1h"]), json!(["kubernetes", "--grace-period", "1h"])] {
        assert!(gone(7, arguments).iter().all(|finding| finding.level == Level::Ok));
    }
    let findings = after(|_, objects, _| objects_of(&mut objects.entries).push(entry("b", "b")));
    only(findings, Level::Warn, "WorkloadEntries", "1 that the plane made have no registration any more: bookinfo/b");
    // Whoever made another one by hand knows what it is for.
    let findings = after(|_, objects, _| objects_of(&mut objects.entries).push(metadata("by-hand", "bookinfo")));
    assert!(findings.iter().all(|finding| finding.level == Level::Ok));
}

#[test]
fn what_can_not_be_asked_is_said() {
    let problem = |kind| Problem { kind, words: "listing them: no".to_owned(), way_out: "ask for a role".to_owned() };
    let findings = after(|_, objects, _| objects.policies = Err(problem(ProblemKind::Forbidden)));
    only(findings, Level::Warn, "OnboardingPolicies", "can't be looked at: listing them: no");
    let findings = after(|_, objects, _| objects.wars = Err(problem(ProblemKind::Unknown)));
    only(findings, Level::Fail, "WorkloadAutoRegistrations", "listing them: no");
    // The certificate that is served is judged by itself where the Secret can't be read.
    let findings = after(|_, _, endpoint| endpoint.secret = Err(problem(ProblemKind::Forbidden)));
    only(findings, Level::Warn, SECRET, "can't be looked at");
    let away = Facts { version: Err(problem(ProblemKind::Away)), objects: None, endpoint: None, ..well() };
    only(all(&away), Level::Fail, "API server https://api.example", "listing them: no");
}
