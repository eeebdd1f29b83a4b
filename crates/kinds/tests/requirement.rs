//! The manifests of the requirement, with the indentation that its print lost, read as they stand there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use onboarding_core::label::{LabelSelector, Operator, Requirement};
use onboarding_core::policy::{AwsComputeMatcher, AwsMatcher, Matcher, Policy, Rule};
use onboarding_kinds::manifest::{self, Manifests, Object};
use onboarding_kinds::mesh::Protocol;
use std::time::Duration;

fn read(name: &str) -> Manifests {
    let path = format!("{}/tests/requirement/{name}.yaml", env!("CARGO_MANIFEST_DIR"));
    manifest::read(name, &std::fs::read_to_string(path).unwrap())
}

fn only(manifests: Manifests) -> Object {
    assert!(manifests.faults.is_empty(), "{:?}", manifests.faults);
    assert!(manifests.warnings.is_empty(), "{:?}", manifests.warnings);
    assert!(!manifests.policy_unreadable);
    assert_eq!(manifests.items.len(), 1);
    manifests.items.into_iter().next().unwrap().object
}

#[test]
fn the_wide_policy() {
    let Object::OnboardingPolicy(policy) = only(read("policy-wide")) else { panic!("not a policy") };
    let matcher = AwsMatcher {
        partitions: Vec::new(),
        accounts: vec!["123456789012".to_owned(), "234567890123".to_owned()],
        regions: Vec::new(),
        zones: Vec::new(),
        compute: AwsComputeMatcher::Ec2 { iam_role_names: Vec::new() },
    };
    let rule = Rule { workloads: vec![Matcher::Aws(matcher)], onboard_to: vec![LabelSelector::default()] };
    let name = "allow-any-aws-ec2-instance-from-given-accounts".to_owned();
    assert_eq!(policy, Policy { namespace: "bookinfo".to_owned(), name, rules: vec![rule] });
}

#[test]
fn the_narrow_policy() {
    let Object::OnboardingPolicy(policy) = only(read("policy-narrow")) else { panic!("not a policy") };
    let [Rule { workloads, onboard_to }] = policy.rules.as_slice() else { panic!("{policy:?}") };
    let [Matcher::Aws(aws)] = workloads.as_slice() else { panic!("{workloads:?}") };
    assert_eq!(aws.partitions, ["aws"]);
    assert_eq!(aws.regions, ["us-east-2"]);
    assert_eq!(aws.zones, ["us-east-2b"]);
    assert_eq!(aws.compute, AwsComputeMatcher::Ec2 { iam_role_names: vec!["ratings-role".to_owned()] });
    let requirement = Requirement { key: "app".to_owned(), operator: Operator::In(vec!["ratings".to_owned()]) };
    assert_eq!(onboard_to, &[LabelSelector { requirements: vec![requirement] }]);
}

#[test]
fn the_group() {
    let Object::WorkloadGroup(group) = only(read("workloadgroup")) else { panic!("not a group") };
    assert_eq!(group.name.to_string(), "bookinfo/ratings");
    assert_eq!(group.labels["app"], "ratings");
    assert_eq!(group.workload_labels["class"], "vm");
    assert_eq!(group.service_account, "ratings-vm");
    assert_eq!(group.network.as_deref(), Some("virtual-machines"));
    assert_eq!(group.probe, None);
}

#[test]
fn the_sidecar() {
    let Object::Sidecar(sidecar) = only(read("sidecar")) else { panic!("not a sidecar") };
    assert_eq!(sidecar.workload_selector.len(), 2);
    let [ingress] = sidecar.ingress.as_slice() else { panic!("{sidecar:?}") };
    assert_eq!((ingress.port.number, ingress.port.protocol), (8080, Some(Protocol::Http)));
    assert_eq!(ingress.default_endpoint, "127.0.0.1:8080");
    let [egress] = sidecar.egress.as_slice() else { panic!("{sidecar:?}") };
    assert_eq!(egress.bind.as_deref(), Some("127.0.0.2"));
    assert_eq!(egress.port.as_ref().unwrap().protocol, None);
    assert_eq!(egress.hosts, ["./*"]);
}

#[test]
fn a_certificate_is_of_others() {
    let manifests = read("certificate");
    assert!(manifests.faults.is_empty() && manifests.items.is_empty() && !manifests.policy_unreadable);
}

#[test]
fn the_control_plane_once_its_placeholders_are_replaced() {
    let path = format!("{}/tests/requirement/controlplane.yaml", env!("CARGO_MANIFEST_DIR"));
    let printed = std::fs::read_to_string(path).unwrap().replace("  ...\n", "");

    let faults: Vec<_> = manifest::read("cp.yaml", &printed).faults.iter().map(ToString::to_string).collect();
    let at = |line: usize, path: &str, placeholder: &str| {
        format!(
            "cp.yaml:{line}: ControlPlane istio-system/controlplane: spec.meshExpansion.onboarding.{path}: \"{placeholder}\" is a placeholder; replace it with your own value"
        )
    };
    assert_eq!(
        faults,
        [
            at(11, "endpoint.hosts[0]", "<onboarding-endpoint-dns-name>"),
            at(12, "endpoint.secretName", "<onboarding-endpoint-tls-cert>"),
            at(15, "tokenIssuer.jwt.expiration", "<onboarding-token-expiration-time>"),
        ]
    );

    let filled = printed
        .replace("<onboarding-endpoint-dns-name>", "onboarding-endpoint.your-company.corp")
        .replace("<onboarding-endpoint-tls-cert>", "onboarding-endpoint-tls")
        .replace("<onboarding-token-expiration-time>", "1h30m");
    let Object::ControlPlane(plane) = only(manifest::read("cp.yaml", &filled)) else { panic!("not a ControlPlane") };
    let onboarding = plane.onboarding.unwrap();
    assert_eq!(onboarding.hosts, ["onboarding-endpoint.your-company.corp"]);
    assert_eq!(onboarding.secret_name, "onboarding-endpoint-tls");
    assert_eq!(onboarding.token_expiration, Duration::from_secs(5400));
    assert!(onboarding.local_repository);
    assert_eq!(onboarding.propagation_delay, Duration::from_secs(10));
}
