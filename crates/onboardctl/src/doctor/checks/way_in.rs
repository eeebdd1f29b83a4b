//! The way in: the gateway, the plane, the endpoint's names and its certificate.

use super::{known, named};
use crate::doctor::endpoint::PORT;
use crate::doctor::facts::{Endpoint, Finding, Host, Objects, OtherGateway, Served};
use crate::doctor::gather::{GATEWAY, enabled};
use crate::doctor::material::{self, Certificate};
use crate::plane::objects::{condition, is_true, items, keyed, text};
use crate::status;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use std::net::IpAddr;

/// A certificate that ends sooner should have been renewed: cert-manager does it 15 days before in the requirement's example.
const SOON: SignedDuration = SignedDuration::from_hours(14 * 24);
const EXTERNAL_DNS: &str = "external-dns.alpha.kubernetes.io/hostname";

pub fn check(now: Timestamp, objects: &Objects, endpoint: &Endpoint, findings: &mut Vec<Finding>) {
    let hosts: Vec<&str> = endpoint.hosts.iter().map(|host| host.name.as_str()).collect();
    let certificate = secret(now, endpoint, &hosts, findings);
    deployments(objects, findings);
    let service = gateway(objects, endpoint, findings);
    if let Some(service) = service {
        external_dns(service, endpoint, findings);
    }
    if let Some(other) = &endpoint.other_gateway {
        findings.push(other_gateway(other));
    }
    for host in &endpoint.hosts {
        dns(host, &endpoint.gateway, findings);
        answer(now, host, &hosts, certificate.as_ref(), uid(objects).as_deref(), findings);
    }
}

/// The plane's UID as it is configured.
fn uid(objects: &Objects) -> Option<String> {
    let plane = enabled(objects.planes.as_deref().unwrap_or_default())?;
    plane.uid.or_else(|| status::uid(objects.plane_config.as_ref().ok()?.as_ref()?))
}

fn secret(now: Timestamp, endpoint: &Endpoint, hosts: &[&str], findings: &mut Vec<Finding>) -> Option<Certificate> {
    let what = format!("Secret {}", endpoint.secret_name);
    let create = format!("kubectl create secret tls {} -n istio-system --cert=FILE --key=FILE", endpoint.secret_name);
    let Some(secret) = known(&what, &endpoint.secret, findings)? else {
        findings.push(Finding::fail(what, "isn't there", format!("create it: {create}")));
        return None;
    };
    match text(secret, "/type") {
        "kubernetes.io/tls" => {}
        other => {
            let words = format!("is of type {other:?}, and must be of kubernetes.io/tls");
            findings.push(Finding::fail(what, words, format!("delete it and create it anew: {create}")));
            return None;
        }
    }
    let bytes =
        |key: &str| secret["data"][key].as_str().and_then(|text| STANDARD.decode(text).ok()).unwrap_or_default();
    let certificate = match material::of_secret(&bytes("tls.crt"), &bytes("tls.key")) {
        Ok(certificate) => certificate,
        Err(why) => {
            findings.push(Finding::fail(what, why, "put a certificate and its own key into it, both PEM"));
            return None;
        }
    };
    findings.push(judge(now, &what, &certificate, hosts));
    Some(certificate)
}

fn judge(now: Timestamp, what: &str, certificate: &Certificate, hosts: &[&str]) -> Finding {
    let Certificate { not_before, not_after, self_signed, .. } = certificate;
    let lacks = certificate.lacks(hosts.iter().copied());
    let renew = "renew it; the plane takes a new one up by itself";
    if *not_after <= now {
        return Finding::fail(what, format!("its certificate expired at {not_after}"), renew);
    }
    if *not_before > now {
        let way_out = "wait, or check the clock of whoever signed it";
        return Finding::fail(what, format!("its certificate is valid only from {not_before} on"), way_out);
    }
    if !lacks.is_empty() {
        let words = format!("its certificate isn't for {}", lacks.join(", "));
        return Finding::fail(
            what,
            words,
            "renew it with every name of the ControlPlane's endpoint.hosts among its names",
        );
    }
    if not_after.duration_since(now) < SOON {
        return Finding::warn(what, format!("its certificate expires soon, at {not_after}"), renew);
    }
    if *self_signed {
        let way_out =
            "put it into /etc/onboarding-agent/root-certs.pem of each VM, or take one of a CA that they trust";
        return Finding::warn(what, format!("its certificate is signed by itself, valid until {not_after}"), way_out);
    }
    Finding::ok(what, format!("has a certificate for {}, valid until {not_after}, and its key", hosts.join(", ")))
}

fn deployments(objects: &Objects, findings: &mut Vec<Finding>) {
    let Some(deployments) = known("Deployments", &objects.deployments, findings) else { return };
    let plane = enabled(objects.planes.as_deref().unwrap_or_default());
    let repository = plane.is_some_and(|plane| plane.local_repository).then_some("onboarding-repository");
    for wanted in [GATEWAY, "onboarding-plane"].into_iter().chain(repository) {
        let what = format!("Deployment {wanted}");
        findings.push(match named(deployments, wanted) {
            None => Finding::fail(
                what,
                "isn't there",
                "is the onboarding-operator running? It makes what the ControlPlane asks for",
            ),
            Some(found) if is_true(found, "Available") => {
                let ready = found.pointer("/status/readyReplicas").and_then(Value::as_u64).unwrap_or(0);
                Finding::ok(what, format!("is available, {ready} ready"))
            }
            Some(found) => {
                let why = condition(found, "Available").map_or("nothing is known of it yet", |it| text(it, "/message"));
                let way_out = format!("kubectl describe deployment {wanted} -n istio-system, and the logs of its pods");
                Finding::fail(what, format!("isn't available: {why}"), way_out)
            }
        });
    }
}

fn gateway<'a>(objects: &'a Objects, endpoint: &Endpoint, findings: &mut Vec<Finding>) -> Option<&'a Value> {
    let what = format!("Service {GATEWAY}");
    let services = known(&what, &objects.services, findings)?;
    let Some(service) = named(services, GATEWAY) else {
        let way_out = "is the onboarding-operator running? It makes what the ControlPlane asks for";
        findings.push(Finding::fail(what, "isn't there", way_out));
        return None;
    };
    let has_port = items(service, "/spec/ports").any(|port| port["port"].as_u64() == Some(PORT.into()));
    let addresses: Vec<String> = endpoint.gateway.iter().map(ToString::to_string).collect();
    findings.push(match (has_port, addresses.is_empty(), text(service, "/spec/type")) {
        (false, ..) => {
            Finding::fail(what, format!("has no port {PORT}"), "add it: agents and sidecars come in by that port alone")
        }
        (true, false, _) => Finding::ok(what, format!("has the address {}", addresses.join(", "))),
        (true, true, "LoadBalancer") => Finding::fail(
            what,
            "has no address yet (.status.loadBalancer.ingress)",
            "kubectl describe service vmgateway -n istio-system says what the load balancer waits for",
        ),
        (true, true, kind) => Finding::warn(
            what,
            format!("is of type {kind} and has no address of its own"),
            "see that VMs reach its port 15443 by whatever address the names of the endpoint have",
        ),
    });
    Some(service)
}

/// Sidecars come to istiod by it, as long as their groups name nothing else.
fn other_gateway(other: &OtherGateway) -> Finding {
    let OtherGateway { host, port, istiod, outcome } = other;
    let what = format!("customGateway {host}:{port}");
    let way_out = format!(
        "see that it passes TLS for {istiod} through to that istiod's port 15012; sidecars of VMs come to istiod by it"
    );
    match outcome {
        Err(why) => Finding::fail(what, why, way_out),
        Ok((at, certificate)) if !certificate.lacks([istiod.as_str()]).is_empty() => {
            Finding::fail(what, format!("answers at {at}, and not with the certificate of {istiod}"), way_out)
        }
        Ok((at, _)) => Finding::ok(what, format!("leads to {istiod}, by {at}")),
    }
}

fn external_dns(service: &Value, endpoint: &Endpoint, findings: &mut Vec<Finding>) {
    let annotated: Vec<&str> = keyed(service, "annotations", EXTERNAL_DNS).split(',').map(str::trim).collect();
    let names = endpoint.hosts.iter().filter(|host| host.name.parse::<IpAddr>().is_err());
    let (with, without): (Vec<&Host>, Vec<&Host>) = names.partition(|host| annotated.contains(&host.name.as_str()));
    let list = |hosts: &[&Host]| hosts.iter().map(|host| host.name.as_str()).collect::<Vec<_>>().join(", ");
    if !with.is_empty() {
        findings
            .push(Finding::ok("ExternalDNS", format!("is asked for {} by the annotation {EXTERNAL_DNS}", list(&with))));
    }
    if !without.is_empty() {
        let words = format!("isn't asked for {}: svc/vmgateway has no such annotation {EXTERNAL_DNS}", list(&without));
        findings.push(match without.iter().all(|host| host.addresses.is_ok()) {
            true => Finding::ok("ExternalDNS", format!("{words}; the names are in the DNS by another way")),
            false => Finding::warn("ExternalDNS", words, "add the annotation, or make the records by hand"),
        });
    }
}

fn dns(host: &Host, gateway: &[IpAddr], findings: &mut Vec<Finding>) {
    let what = format!("DNS {}", host.name);
    let list = |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let record = match gateway {
        [] => "make a record of it with the address of svc/vmgateway, once that has one".to_owned(),
        gateway => format!("make a record of it with the address of svc/vmgateway: {}", list(gateway)),
    };
    findings.push(match &host.addresses {
        Err(why) => Finding::fail(what, format!("doesn't resolve on this machine: {why}"), record),
        Ok(found) if found.is_empty() => Finding::fail(what, "has no address", record),
        Ok(found) if gateway.is_empty() || found.iter().any(|address| gateway.contains(address)) => {
            Finding::ok(what, format!("is {}", list(found)))
        }
        Ok(found) => Finding::warn(
            what,
            format!("is {}, and svc/vmgateway has {}", list(found), list(gateway)),
            "correct the record, unless something in front of the gateway has that address",
        ),
    });
}

fn answer(
    now: Timestamp,
    host: &Host,
    hosts: &[&str],
    wanted: Option<&Certificate>,
    uid: Option<&str>,
    findings: &mut Vec<Finding>,
) {
    let Some(answer) = &host.answer else { return };
    let what = format!("endpoint {}:{PORT}", host.name);
    let at = answer.address;
    let Served { certificate, uid: discovered } = match &answer.outcome {
        Ok(served) => served,
        Err(why) => {
            let way_out = "is the Deployment vmgateway up, and does the network let this machine through to that port?";
            findings.push(Finding::fail(what, format!("doesn't answer at {at}: {why}"), way_out));
            return;
        }
    };
    findings.push(match (certificate, wanted) {
        (Err(why), _) => Finding::fail(&what, format!("answers at {at}, but {why}"), "see who listens there"),
        (Ok(served), Some(wanted)) if served.der == wanted.der => {
            Finding::ok(&what, format!("answers at {at} with the certificate of the Secret"))
        }
        (Ok(served), Some(_)) => Finding::fail(
            &what,
            format!("answers at {at} with another certificate than the Secret's (valid until {})", served.not_after),
            "does the name lead to this cluster's gateway? A plane that keeps an older certificate says why in its log",
        ),
        (Ok(served), None) => Finding { what: what.clone(), ..judge(now, &what, served, hosts) },
    });
    findings.push(match (discovered, uid) {
        (Err(why), _) => Finding::fail(
            what,
            format!("speaks TLS, but doesn't answer Discover: {why}"),
            "is the Deployment onboarding-plane up, and does the gateway pass this name on to it?",
        ),
        (Ok(found), Some(wanted)) if found != wanted => Finding::fail(
            what,
            format!("a plane of another UID answers: {found:?}, and here it is {wanted:?}"),
            "does the name lead to this cluster's gateway?",
        ),
        (Ok(found), _) => Finding::ok(what, format!("the plane answers, its UID is {found:?}")),
    });
}
