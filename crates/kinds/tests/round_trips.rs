//! What is written is read back as it was: identities in both spellings, what an agent says of itself, the resource.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use onboarding_core::identity::{
    Attested, AttributeValue, AwsCompute, AwsIdentity, AzureIdentity, Fact, GcpIdentity, Identity, JwtIdentity, Proven,
    Replay, Thumbprint,
};
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::registration::{
    ConnectedOver, Connection, DisconnectReason, Health, HostAddress, HostReport, KeyMemory, Live, SidecarReport,
};
use onboarding_kinds::identity::{self, Case};
use onboarding_kinds::manifest::{self, Object};
use onboarding_kinds::war::{self, report};
use proptest::prelude::*;
use serde_json::json;

fn fact<T: std::fmt::Debug + Clone>(value: impl Strategy<Value = T>) -> impl Strategy<Value = Fact<T>> {
    (value, any::<bool>())
        .prop_map(|(value, proven)| if proven { Proven::by_attestor(value).into() } else { Fact::claimed(value) })
}

fn text() -> impl Strategy<Value = Fact<String>> {
    fact("[a-zA-Z0-9:/._ü'\" -]{0,20}[a-z0-9]")
}

fn attributes() -> impl Strategy<Value = std::collections::BTreeMap<String, Fact<AttributeValue>>> {
    let value = prop_oneof![
        any::<String>().prop_map(AttributeValue::One),
        proptest::collection::vec(any::<String>(), 0..3).prop_map(AttributeValue::Any),
    ];
    proptest::collection::btree_map("[a-z_.A-Z]{1,8}", fact(value), 0..4)
}

fn identities() -> impl Strategy<Value = Identity> {
    let role = || proptest::option::of(text());
    let compute = prop_oneof![
        (text(), role()).prop_map(|(instance_id, iam_role)| AwsCompute::Ec2 { instance_id, iam_role }),
        (text(), text(), role()).prop_map(|(task_id, cluster, iam_role)| AwsCompute::Ecs {
            task_id,
            cluster,
            iam_role
        }),
    ];
    let aws =
        (text(), fact("[0-9]{12}"), text(), text(), compute).prop_map(|(partition, account, region, zone, compute)| {
            Identity::Aws(AwsIdentity { partition, account, region, zone, compute })
        });
    let gcp = (fact("[0-9]{1,12}"), text(), text(), text(), text()).prop_map(
        |(project_number, project_id, region, zone, instance_id)| {
            Identity::Gcp(GcpIdentity { project_number, project_id, region, zone, instance_id })
        },
    );
    let azure = (text(), text(), text()).prop_map(|(subscription, resource_group, instance_id)| {
        Identity::Azure(AzureIdentity { subscription, resource_group, instance_id })
    });
    let jwt = (text(), text(), attributes())
        .prop_map(|(issuer, subject, attributes)| Identity::Jwt(JwtIdentity { issuer, subject, attributes }));
    prop_oneof![aws, gcp, azure, jwt]
}

fn reports() -> impl Strategy<Value = HostReport> {
    let way = || prop_oneof![Just(ConnectedOver::Vpc), Just(ConnectedOver::Internet)];
    let sidecar = prop_oneof![
        (any::<String>(), proptest::option::of(any::<String>()))
            .prop_map(|(version, revision)| SidecarReport::Istio { version, revision }),
        any::<String>().prop_map(|version| SidecarReport::Envoy { version }),
    ];
    let addresses = proptest::collection::vec(
        (any::<std::net::IpAddr>(), way()).prop_map(|(ip, kind)| HostAddress { ip, kind }),
        0..4,
    );
    let labels = proptest::collection::btree_map(any::<String>(), any::<String>(), 0..4);
    (any::<String>(), sidecar, addresses, labels, way()).prop_map(
        |(agent_version, sidecar, addresses, mut labels, connected_over)| {
            labels.remove("<<");
            HostReport { agent_version, sidecar, addresses, labels, connected_over }
        },
    )
}

/// Every fact that isn't proven, as it looks after a round trip that leaves those out.
fn proven_only(identity: &Identity) -> Identity {
    let keep = |fact: &Fact<String>| if fact.is_proven() { fact.clone() } else { Fact::claimed(String::new()) };
    let role = |role: &Option<Fact<String>>| role.clone().filter(Fact::is_proven);
    match identity {
        Identity::Aws(aws) => Identity::Aws(AwsIdentity {
            partition: keep(&aws.partition),
            account: keep(&aws.account),
            region: keep(&aws.region),
            zone: keep(&aws.zone),
            compute: match &aws.compute {
                AwsCompute::Ec2 { instance_id, iam_role } => {
                    AwsCompute::Ec2 { instance_id: keep(instance_id), iam_role: role(iam_role) }
                }
                AwsCompute::Ecs { task_id, cluster, iam_role } => {
                    AwsCompute::Ecs { task_id: keep(task_id), cluster: keep(cluster), iam_role: role(iam_role) }
                }
            },
        }),
        Identity::Gcp(gcp) => Identity::Gcp(GcpIdentity {
            project_number: keep(&gcp.project_number),
            project_id: keep(&gcp.project_id),
            region: keep(&gcp.region),
            zone: keep(&gcp.zone),
            instance_id: keep(&gcp.instance_id),
        }),
        Identity::Azure(azure) => Identity::Azure(AzureIdentity {
            subscription: keep(&azure.subscription),
            resource_group: keep(&azure.resource_group),
            instance_id: keep(&azure.instance_id),
        }),
        Identity::Jwt(jwt) => Identity::Jwt(JwtIdentity {
            issuer: keep(&jwt.issuer),
            subject: keep(&jwt.subject),
            attributes: jwt.attributes.clone().into_iter().filter(|(_, value)| value.is_proven()).collect(),
        }),
    }
}

proptest! {
    #[test]
    fn an_identity_with_its_claims(identity in identities(), snake in any::<bool>()) {
        let case = if snake { Case::Snake } else { Case::Camel };
        let (value, claimed) = identity::stated_to_json(&identity, case);
        prop_assert_eq!(identity::from_json(&value, &claimed), Ok(identity));
    }

    #[test]
    fn a_subject_may_be_anything(subject in ".{1,20}") {
        let value = json!({"jwt": {"issuer": "i", "subject": subject.clone()}});
        let read = identity::from_json(&value, &[]);
        prop_assert!(matches!(read, Ok(Identity::Jwt(jwt)) if *jwt.subject.stated() == subject));
    }

    #[test]
    fn an_identity_without_what_is_only_claimed(identity in identities(), snake in any::<bool>()) {
        let case = if snake { Case::Snake } else { Case::Camel };
        let value = identity::to_json(&identity, case);
        prop_assert_eq!(identity::from_json(&value, &[]), Ok(proven_only(&identity)));
    }

    #[test]
    fn a_file_of_an_identity(identity in identities()) {
        let (mut value, claimed) = identity::stated_to_json(&identity, Case::Camel);
        value["claimedOnly"] = claimed.into();
        prop_assert_eq!(identity::read_identity_file("f", &value.to_string()), Ok(identity));
    }

    #[test]
    fn what_an_agent_says_of_itself(report in reports()) {
        prop_assert_eq!(report::from_json(&report::to_json(&report)), Ok(report));
    }

    #[test]
    fn any_json_is_no_panic(text in "[\\{\\}\\[\\]a-z:\",0-9]{0,40}") {
        if let Ok(value) = serde_json::from_str(&text) {
            let _ = identity::from_json(&value, &[]);
            let _ = report::from_json(&value);
        }
    }
}

#[test]
fn the_identities_of_the_reference() {
    let identity = identity::read_identity_file(
        "f",
        "aws:   {partition: aws, account: '123456789012', region: ca-central-1, zone: ca-central-1b, ec2: {instance_id: i-1234567890abcdef0, iam_role: {name: example-role}}}",
    )
    .unwrap();
    assert_eq!(
        identity::to_json(&identity, Case::Camel),
        json!({"aws": {"partition": "aws", "account": "123456789012", "region": "ca-central-1", "zone": "ca-central-1b",
            "ec2": {"instanceId": "i-1234567890abcdef0", "iamRole": {"name": "example-role"}}}})
    );
    assert_eq!(identity::to_json(&identity, Case::Snake)["aws"]["ec2"]["iam_role"]["name"], "example-role");
    for text in [
        "aws:   {partition: aws, account: '123456789012', region: ca-central-1, zone: ca-central-1b, ecs: {task_id: 16aeded318d842bb8226e5bc678cd446, cluster: bookinfo, iam_role: {name: example-role}}}",
        "gcp:   {project_number: '234567890121', project_id: gcp-example, region: us-central1, zone: us-central1-a, gce: {instance_id: '693197132356332126'}}",
        "azure: {subscription: 531bed28-f708-4fc5-b0c1-2c1edde46e4f, resource_group: azure-example, compute: {instance_id: fc13d26e-d3c0-458e-b353-686d5ca19506}}",
        "jwt:   {issuer: https://mycompany.corp, subject: us-east-datacenter1-vm007, attributes: {region: us-east, instance_role: app-ratings}}",
    ] {
        assert!(identity::read_identity_file("f", text).is_ok(), "{text}");
    }
}

#[test]
fn attributes_are_compared_by_their_json_text() {
    let text = "jwt: {issuer: i, subject: s, attributes: {a: 5, b: 1.50, c: true, d: [x, 2, false], e: {x: 1}, f: ~, g: 'yes', h: [], i: [x, {z: 1}], j: [x, ~], k: [[x]]}}";
    let Ok(Identity::Jwt(jwt)) = identity::read_identity_file("f", text) else { panic!("not read") };
    let values: Vec<_> =
        jwt.attributes.iter().map(|(name, value)| (name.as_str(), value.stated().values().to_vec())).collect();
    let owned = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        values,
        [
            ("a", owned(&["5"])),
            ("b", owned(&["1.5"])),
            ("c", owned(&["true"])),
            ("d", owned(&["x", "2", "false"])),
            ("g", owned(&["yes"])),
            ("h", owned(&[])),
        ]
    );
}

#[test]
fn names_in_claimed_only() {
    let aws = |claimed: &str| {
        identity::read_identity_file(
            "f",
            &format!(
                "aws: {{partition: aws, account: '123456789012', region: r, zone: z, ec2: {{instanceId: i}}}}\nclaimedOnly: [{claimed}]"
            ),
        )
    };
    for known in ["aws.ec2.iamRole", "aws.ec2.iam_role", "aws.ec2.iamRole.name", "aws.ec2.instance_id", "aws.zone", ""]
    {
        assert!(aws(known).is_ok(), "{known}");
    }
    for unknown in ["aws.ecs.iamRole", "ec2.iamRole", "aws", "jwt.subject", "iamRole", "''"] {
        assert!(aws(unknown).is_err(), "{unknown}");
    }
    let jwt = |claimed: &str| {
        let attributes = "attributes: {region: x, a.b: y}";
        identity::read_identity_file(
            "f",
            &format!("jwt: {{issuer: i, subject: s, {attributes}}}\nclaimedOnly: [{claimed}]"),
        )
    };
    let Ok(Identity::Jwt(read)) = jwt("jwt.attributes.a.b") else { panic!("not read") };
    assert!(read.attributes["region"].is_proven() && !read.attributes["a.b"].is_proven());
    assert!(jwt("jwt.attributes.regoin").unwrap_err()[0].message.ends_with("did you mean jwt.attributes.region?"));
}

fn live(connection: Connection) -> Live {
    let identity = identity::read_identity_file(
        "f",
        "aws: {partition: aws, account: '123456789012', region: us-east-2, zone: us-east-2b, ec2: {instanceId: i-1, iamRole: {name: r}}}\nclaimedOnly: [aws.ec2.iamRole]",
    );
    let time: jiff::Timestamp = "2026-11-24T10:00:00Z".parse().unwrap();
    let replay = Replay::Forever;
    Live {
        group: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
        attested: Attested { identity: identity.unwrap(), issuer_short_name: None, replay },
        key: KeyMemory { thumbprint: Thumbprint([1; 32]), replay },
        report: HostReport { agent_version: "0.1.0".to_owned(), ..HostReport::default() },
        created_at: time,
        token_expires_at: time,
        connection,
        health: Health { ready: false, message: "GET /ready answered 503".to_owned() },
        health_since: "2026-11-24T10:00:03Z".parse().unwrap(),
    }
}

#[test]
fn the_resource_of_a_registration() {
    let since = "2026-11-24T10:00:05Z".parse().unwrap();
    let name = RegistrationName { namespace: "bookinfo".to_owned(), name: "ratings-x".to_owned() };
    let replica = "onboarding-plane-745bf76677-974tq".to_owned();
    let connected = live(Connection::Connected { replica, session: "s".to_owned(), since });
    assert_eq!(
        war::resource(&name, &connected, Some("u-1")),
        json!({
            "apiVersion": "runtime.onboarding.tetrate.io/v1alpha1",
            "kind": "WorkloadAutoRegistration",
            "metadata": {
                "namespace": "bookinfo",
                "name": "ratings-x",
                "creationTimestamp": "2026-11-24T10:00:00Z",
                "ownerReferences": [{
                    "apiVersion": "networking.istio.io/v1beta1", "kind": "WorkloadGroup", "name": "ratings", "uid": "u-1",
                    "controller": true, "blockOwnerDeletion": true,
                }],
            },
            "spec": {
                "identity": {"aws": {"partition": "aws", "account": "123456789012", "region": "us-east-2", "zone": "us-east-2b", "ec2": {"instanceId": "i-1"}}},
                "registration": {
                    "agent": {"version": "0.1.0"},
                    "sidecar": {"envoy": {"version": ""}},
                    "host": {"addresses": []},
                    "workload": {"labels": {}},
                    "settings": {"connectedOver": "VPC"},
                },
            },
            "status": {
                "observedGeneration": 1,
                "activeAgentConnection": {"connectedTo": "onboarding-plane-745bf76677-974tq"},
                "conditions": [
                    {"type": "AgentConnected", "status": "True", "reason": "AgentEstablishedConnection", "message": "the agent is connected", "lastTransitionTime": "2026-11-24T10:00:05Z"},
                    {"type": "Healthy", "status": "False", "reason": "ProbeFailed", "message": "GET /ready answered 503", "lastTransitionTime": "2026-11-24T10:00:03Z"},
                ],
            },
        })
    );
    let gone = live(Connection::Disconnected { since, reason: DisconnectReason::ConnectionLost });
    let resource = war::resource(&name, &gone, None);
    assert_eq!(resource["status"].get("activeAgentConnection"), None);
    assert_eq!(resource["metadata"]["ownerReferences"][0].get("uid"), None);
    let condition = &resource["status"]["conditions"][0];
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("False"), &json!("AgentDisconnected")));

    // It passes our own lint, and its spec is what was written.
    let manifests = manifest::read("f", &resource.to_string());
    assert_eq!(manifests.faults, []);
    let Object::WorkloadAutoRegistration(read) = &manifests.items[0].object else { panic!("not a war") };
    assert_eq!(read.spec, resource["spec"]);
}
