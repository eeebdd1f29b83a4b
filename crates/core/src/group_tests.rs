use super::*;
use crate::identity::{AwsIdentity, Fact, JwtIdentity, Proven};
use crate::registration::{ConnectedOver, HostAddress};

fn proven(value: &str) -> Fact<String> {
    Fact::Proven(Proven::by_attestor(value.to_owned()))
}

fn ec2(zone: Fact<String>) -> Identity {
    Identity::Aws(AwsIdentity {
        partition: proven("aws"),
        account: proven("123456789012"),
        region: proven("us-east-2"),
        zone,
        compute: AwsCompute::Ec2 { instance_id: proven("i-1234567890abcdef0"), iam_role: None },
    })
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

fn ratings() -> WorkloadGroup {
    WorkloadGroup {
        name: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
        labels: labels(&[("team", "a")]),
        workload_labels: labels(&[("app", "ratings"), ("class", "vm")]),
        workload_annotations: BTreeMap::new(),
        service_account: "ratings-vm".to_owned(),
        network: Some("virtual-machines".to_owned()),
        locality: None,
        weight: Some(3),
        ports: [("http".to_owned(), 8080)].into(),
        address: None,
        probe: None,
    }
}

fn report(connected_over: ConnectedOver) -> HostReport {
    let address = |ip: &str, kind| HostAddress { ip: ip.parse().unwrap(), kind };
    HostReport {
        addresses: vec![
            address("10.0.0.1", ConnectedOver::Vpc),
            address("1.2.3.4", ConnectedOver::Internet),
            address("10.0.0.2", ConnectedOver::Vpc),
        ],
        labels: labels(&[("version", "v3"), ("app", "admin")]),
        connected_over,
        ..HostReport::default()
    }
}

fn entry(group: &WorkloadGroup, identity: &Identity, report: &HostReport) -> Result<WorkloadEntry, EntryError> {
    let name = RegistrationName { namespace: "bookinfo".to_owned(), name: "ratings-1".to_owned() };
    WorkloadEntry::new(name, group, identity, report)
}

#[test]
fn an_entry_has_the_templates_fields_and_what_the_agent_may_add() {
    let entry = entry(&ratings(), &ec2(proven("us-east-2b")), &report(ConnectedOver::Vpc)).unwrap();
    // Not the group's own labels, which are for policies; and an agent can't call itself another app.
    assert_eq!(entry.labels, labels(&[("app", "ratings"), ("class", "vm"), ("version", "v3")]));
    assert_eq!(entry.address, "10.0.0.1");
    assert_eq!(entry.service_account, "ratings-vm");
    assert_eq!(entry.network.as_deref(), Some("virtual-machines"));
    assert_eq!(entry.locality.as_deref(), Some("us-east-2/us-east-2b"));
    assert_eq!((entry.weight, &entry.ports), (Some(3), &ratings().ports));
}

#[test]
fn the_address_is_the_kind_that_the_settings_name() {
    let identity = ec2(proven("us-east-2b"));
    assert_eq!(entry(&ratings(), &identity, &report(ConnectedOver::Internet)).unwrap().address, "1.2.3.4");
    let fixed = WorkloadGroup { address: Some("vm.corp".to_owned()), ..ratings() };
    assert_eq!(entry(&fixed, &identity, &HostReport::default()).unwrap().address, "vm.corp");

    let mut private = report(ConnectedOver::Internet);
    private.addresses.retain(|address| address.kind == ConnectedOver::Vpc);
    assert_eq!(
        entry(&ratings(), &identity, &private).unwrap_err().to_string(),
        "no INTERNET address among those that the host reports (10.0.0.1, 10.0.0.2); set settings.connectedOver, or give the agent a hostinfo plugin that reports one"
    );
    let nothing = entry(&ratings(), &identity, &HostReport::default()).unwrap_err();
    assert_eq!(nothing, EntryError::NoAddress { wanted: "VPC", reported: "none".to_owned() });
}

#[test]
fn a_locality_is_the_groups_or_proven() {
    let set = WorkloadGroup { locality: Some("here/there".to_owned()), ..ratings() };
    let locality = |group: &WorkloadGroup, identity: &Identity| {
        entry(group, identity, &report(ConnectedOver::Vpc)).unwrap().locality
    };
    assert_eq!(locality(&set, &ec2(proven("us-east-2b"))).as_deref(), Some("here/there"));
    assert_eq!(locality(&ratings(), &ec2(Fact::claimed("us-east-2b".to_owned()))), None);
    let on_premises = Identity::Jwt(JwtIdentity {
        issuer: proven("https://mycompany.corp"),
        subject: proven("vm007"),
        attributes: BTreeMap::new(),
    });
    assert_eq!(locality(&ratings(), &on_premises), None);
}
