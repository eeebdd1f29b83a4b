//! Identities as resources (camelCase), as token claims (snake_case), and as the files that `onboardctl explain` reads.

use crate::fault::{Fault, shown};
use crate::node::{self, Node, Value as NodeValue};
use crate::reader::{Document, Item, Map, did_you_mean};
use crate::syntax;
use onboarding_core::identity::{
    AttributeValue, AwsCompute, AwsIdentity, AzureIdentity, Fact, GcpIdentity, Identity, JwtIdentity, Proven,
};
use serde_json::{Map as Object, Value};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    Camel,
    Snake,
}

/// Only what was proven: `spec.identity` of a war, `claims.workload` of a token.
pub fn to_json(identity: &Identity, case: Case) -> Value {
    write(identity, case, &mut |_, proven| proven)
}

/// What was proven and what is only claimed, and the names of the latter as [`from_json`] takes them back.
pub fn stated_to_json(identity: &Identity, case: Case) -> (Value, Vec<String>) {
    let mut claimed = Vec::new();
    let value = write(identity, case, &mut |name, proven| {
        if !proven {
            claimed.push(name.to_owned());
        }
        true
    });
    (value, claimed)
}

/// An identity in a resource, claim or file: either case. Every fact in it counts as proven, except those that
/// `claimed_only` names (`aws.ec2.iamRole`); an unknown name in it is an error. A fact that isn't there was not proven:
/// it becomes one that is claimed to be empty, and matches nothing.
///
/// Only for what was attested before: our own tokens (after their signature was verified), our own registry, and `explain`.
pub fn from_json(value: &Value, claimed_only: &[String]) -> Result<Identity, String> {
    let node = Node::from_json(value);
    let document = Document::new("", String::new());
    let reading = Reading::new(claimed_only, false);
    let identity = document.root(&node).map().and_then(|mut map| {
        let identity = reading.identity(&mut map);
        map.close();
        identity
    });
    for name in reading.unknown() {
        document.fault(1, "claimedOnly", reading.unknown_message(&name));
    }
    let (faults, _) = document.finish();
    match identity {
        Some(identity) if faults.is_empty() => Ok(identity),
        _ => Err(faults.iter().map(in_one_sentence).collect::<Vec<_>>().join("; ")),
    }
}

/// The identity file of `onboardctl explain`: section 3 of the reference, with the optional key `claimedOnly`. YAML or JSON.
pub fn read_identity_file(file: &str, text: &str) -> Result<Identity, Vec<Fault>> {
    let document = Document::new(file, String::new());
    let mut documents = node::documents(text);
    let node = match documents.next() {
        Some(Ok(node)) => Some(node),
        Some(Err(error)) => {
            document.fault(error.line, "", error.message);
            None
        }
        None => {
            document.fault(1, "", "the file is empty, and must hold one identity");
            None
        }
    };
    for other in documents.take(10) {
        match other {
            Ok(node) => document.fault(node.line, "", "is a second document; the file must hold one identity"),
            Err(error) => document.fault(error.line, "", error.message),
        }
    }
    let identity = node.as_ref().and_then(|node| read_file(&document, node));
    let (faults, _) = document.finish();
    match identity {
        Some(identity) if faults.is_empty() => Ok(identity),
        _ => Err(faults),
    }
}

fn read_file(document: &Document, node: &Node) -> Option<Identity> {
    let mut root = document.root(node).map()?;
    let claimed = root.either("claimedOnly", "claimed_only").and_then(|item| item.list()).unwrap_or_default();
    let names: Vec<_> = claimed.iter().map(|item| item.parse(syntax::any).unwrap_or_default()).collect();
    let reading = Reading::new(&names, true);
    let identity = reading.identity(&mut root);
    root.close();
    // Which names there are is only known for an identity that could be read.
    if identity.is_some() {
        let unknown = reading.unknown();
        for (item, name) in
            claimed.iter().zip(&names).filter(|(_, name)| !name.is_empty() && unknown.contains(name.as_str()))
        {
            item.fault(reading.unknown_message(name));
        }
    }
    identity
}

/// `spec.identity` of a war.
pub(crate) fn read_resource(item: &Item<'_>) -> Option<Identity> {
    let mut map = item.map()?;
    let identity = Reading::new(&[], false).identity(&mut map);
    map.close();
    identity
}

pub(crate) fn in_one_sentence(fault: &Fault) -> String {
    match fault.path.as_str() {
        "" => fault.message.clone(),
        path => format!("{path} {}", fault.message),
    }
}

/// What is wanted of an identity that is read.
struct Reading {
    /// As given, and as facts are named here.
    claimed_only: Vec<(String, String)>,
    /// Facts must be there.
    complete: bool,
    /// The names of the facts that this identity has.
    known: RefCell<Vec<String>>,
}

impl Reading {
    fn new(claimed_only: &[String], complete: bool) -> Self {
        let claimed_only = claimed_only.iter().map(|name| (name.clone(), canonical(name))).collect();
        Self { claimed_only, complete, known: RefCell::default() }
    }

    /// Those that the identity doesn't have, as given.
    fn unknown(&self) -> HashSet<String> {
        let known = self.known.borrow();
        let known: HashSet<_> = known.iter().collect();
        self.claimed_only.iter().filter(|(_, name)| !known.contains(name)).map(|(given, _)| given.clone()).collect()
    }

    fn unknown_message(&self, name: &str) -> String {
        const MOST: usize = 20;
        let known = self.known.borrow();
        let known: Vec<_> = known.iter().map(String::as_str).take(MOST).collect();
        format!(
            "{} is no fact of this identity; it has {}{}",
            shown(name),
            known.join(", "),
            did_you_mean(name, &known)
        )
    }

    fn judge<T>(&self, name: &str, value: T) -> Fact<T> {
        match self.claimed_only.iter().any(|(_, claimed)| claimed == name) {
            true => Fact::claimed(value),
            false => Proven::by_attestor(value).into(),
        }
    }

    fn identity(&self, map: &mut Map<'_>) -> Option<Identity> {
        let found = map.one_of(&["aws", "gcp", "azure", "jwt"]);
        let read = |(kind, item): &(&str, Item<'_>)| {
            let mut map = item.map()?;
            let identity = match *kind {
                "aws" => self.aws(&mut map).map(Identity::Aws),
                "gcp" => self.gcp(&mut map).map(Identity::Gcp),
                "azure" => self.azure(&mut map).map(Identity::Azure),
                _ => self.jwt(&mut map).map(Identity::Jwt),
            };
            map.close();
            identity
        };
        found.iter().map(read).next_back().flatten()
    }

    fn fact(
        &self,
        map: &mut Map<'_>,
        name: &str,
        keys: (&'static str, &'static str),
        syntax: fn(&str) -> Result<String, String>,
    ) -> Option<Fact<String>> {
        self.known.borrow_mut().push(name.to_owned());
        match map.either(keys.0, keys.1) {
            Some(item) => Some(self.judge(name, self.value(&item, syntax)?)),
            None if self.complete => {
                map.fault_at(keys.0, "is required");
                None
            }
            None => Some(Fact::claimed(String::new())),
        }
    }

    /// A person's file is held to more than what was once attested: an issuer may choose any subject.
    fn value(&self, item: &Item<'_>, syntax: fn(&str) -> Result<String, String>) -> Option<String> {
        if self.complete {
            return item.parse(syntax);
        }
        let text = item.text()?;
        if text.is_empty() {
            item.fault("must not be empty");
            return None;
        }
        syntax(text).map_err(|message| item.fault(message)).ok()
    }

    fn aws(&self, aws: &mut Map<'_>) -> Option<AwsIdentity> {
        let partition = self.fact(aws, "aws.partition", ("partition", "partition"), syntax::any);
        let account = self.fact(aws, "aws.account", ("account", "account"), syntax::aws_account);
        let region = self.fact(aws, "aws.region", ("region", "region"), syntax::any);
        let zone = self.fact(aws, "aws.zone", ("zone", "zone"), syntax::any);
        let mut compute = None;
        for (kind, item) in aws.one_of(&["ec2", "ecs"]) {
            let Some(mut map) = item.map() else { continue };
            compute = match kind {
                "ec2" => {
                    let instance_id =
                        self.fact(&mut map, "aws.ec2.instanceId", ("instanceId", "instance_id"), syntax::any);
                    let iam_role = self.iam_role(&mut map, "aws.ec2.iamRole");
                    instance_id.zip(iam_role).map(|(instance_id, iam_role)| AwsCompute::Ec2 { instance_id, iam_role })
                }
                _ => {
                    let task_id = self.fact(&mut map, "aws.ecs.taskId", ("taskId", "task_id"), syntax::any);
                    let cluster = self.fact(&mut map, "aws.ecs.cluster", ("cluster", "cluster"), syntax::any);
                    let iam_role = self.iam_role(&mut map, "aws.ecs.iamRole");
                    let facts = task_id.zip(cluster).zip(iam_role);
                    facts.map(|((task_id, cluster), iam_role)| AwsCompute::Ecs { task_id, cluster, iam_role })
                }
            };
            map.close();
        }
        Some(AwsIdentity { partition: partition?, account: account?, region: region?, zone: zone?, compute: compute? })
    }

    /// `None`: can't be read; `Some(None)`: there is none.
    fn iam_role(&self, map: &mut Map<'_>, name: &str) -> Option<Option<Fact<String>>> {
        self.known.borrow_mut().push(name.to_owned());
        let Some(item) = map.either("iamRole", "iam_role") else { return Some(None) };
        let mut role = item.map()?;
        let value = role.required("name").and_then(|item| self.value(&item, syntax::any));
        role.close();
        Some(Some(self.judge(name, value?)))
    }

    fn gcp(&self, gcp: &mut Map<'_>) -> Option<GcpIdentity> {
        let project_number = self.fact(gcp, "gcp.projectNumber", ("projectNumber", "project_number"), syntax::digits);
        let project_id = self.fact(gcp, "gcp.projectId", ("projectId", "project_id"), syntax::any);
        let region = self.fact(gcp, "gcp.region", ("region", "region"), syntax::any);
        let zone = self.fact(gcp, "gcp.zone", ("zone", "zone"), syntax::any);
        let mut instance_id = None;
        if let Some(mut map) = gcp.required("gce").and_then(|item| item.map()) {
            instance_id = self.fact(&mut map, "gcp.gce.instanceId", ("instanceId", "instance_id"), syntax::any);
            map.close();
        }
        Some(GcpIdentity {
            project_number: project_number?,
            project_id: project_id?,
            region: region?,
            zone: zone?,
            instance_id: instance_id?,
        })
    }

    fn azure(&self, azure: &mut Map<'_>) -> Option<AzureIdentity> {
        let subscription = self.fact(azure, "azure.subscription", ("subscription", "subscription"), syntax::any);
        let resource_group = self.fact(azure, "azure.resourceGroup", ("resourceGroup", "resource_group"), syntax::any);
        let mut instance_id = None;
        if let Some(mut map) = azure.required("compute").and_then(|item| item.map()) {
            instance_id = self.fact(&mut map, "azure.compute.instanceId", ("instanceId", "instance_id"), syntax::any);
            map.close();
        }
        Some(AzureIdentity { subscription: subscription?, resource_group: resource_group?, instance_id: instance_id? })
    }

    fn jwt(&self, jwt: &mut Map<'_>) -> Option<JwtIdentity> {
        let issuer = self.fact(jwt, "jwt.issuer", ("issuer", "issuer"), syntax::any);
        let subject = self.fact(jwt, "jwt.subject", ("subject", "subject"), syntax::any);
        let mut attributes = BTreeMap::new();
        for (key, item) in jwt.optional("attributes").and_then(|item| item.pairs()).unwrap_or_default() {
            if let Some(value) = attribute(item.node()) {
                let name = format!("jwt.attributes.{key}");
                attributes.insert(key.to_owned(), self.judge(&name, value));
                self.known.borrow_mut().push(name);
            }
        }
        Some(JwtIdentity { issuer: issuer?, subject: subject?, attributes })
    }
}

/// Scalars and lists of them; `None` for what never matches.
fn attribute(node: &Node) -> Option<AttributeValue> {
    match &node.value {
        NodeValue::List(items) => AttributeValue::array(items.iter().map(scalar)),
        _ => scalar(node).map(AttributeValue::One),
    }
}

/// Text as it is, numbers and booleans by their JSON text.
fn scalar(node: &Node) -> Option<String> {
    match &node.value {
        NodeValue::Text(text) | NodeValue::YesNo(text) => Some(text.clone()),
        NodeValue::Number(text) => {
            Some(node::json_number(text).map_or_else(|| text.clone(), |number| number.to_string()))
        }
        NodeValue::Bool(value) => Some(value.to_string()),
        NodeValue::Null | NodeValue::List(_) | NodeValue::Map(_) => None,
    }
}

/// `aws.ec2.iam_role.name` is `aws.ec2.iamRole`; what follows `jwt.attributes.` is the issuer's own name.
fn canonical(name: &str) -> String {
    if name.starts_with("jwt.attributes.") {
        return name.to_owned();
    }
    let mut camel = String::new();
    let mut upper = false;
    for c in name.chars() {
        match c {
            '_' => upper = true,
            c if upper => {
                camel.push(c.to_ascii_uppercase());
                upper = false;
            }
            c => camel.push(c),
        }
    }
    match camel.strip_suffix(".iamRole.name") {
        Some(prefix) => format!("{prefix}.iamRole"),
        None => camel,
    }
}

/// `keep(name, proven)` says which facts are written.
fn write(identity: &Identity, case: Case, keep: &mut dyn FnMut(&str, bool) -> bool) -> Value {
    let mut writer = Writer { case, keep };
    let (kind, fields) = match identity {
        Identity::Aws(aws) => ("aws", writer.aws(aws)),
        Identity::Gcp(gcp) => {
            let facts = [
                ("projectNumber", &gcp.project_number),
                ("projectId", &gcp.project_id),
                ("region", &gcp.region),
                ("zone", &gcp.zone),
            ];
            let mut fields = writer.facts("gcp", &facts);
            fields.insert("gce".into(), writer.facts("gcp.gce", &[("instanceId", &gcp.instance_id)]).into());
            ("gcp", fields)
        }
        Identity::Azure(azure) => {
            let facts = [("subscription", &azure.subscription), ("resourceGroup", &azure.resource_group)];
            let mut fields = writer.facts("azure", &facts);
            fields
                .insert("compute".into(), writer.facts("azure.compute", &[("instanceId", &azure.instance_id)]).into());
            ("azure", fields)
        }
        Identity::Jwt(jwt) => ("jwt", writer.jwt(jwt)),
    };
    Value::Object(Object::from_iter([(kind.to_owned(), Value::Object(fields))]))
}

struct Writer<'a> {
    case: Case,
    keep: &'a mut dyn FnMut(&str, bool) -> bool,
}

impl Writer<'_> {
    fn facts(&mut self, parent: &str, facts: &[(&str, &Fact<String>)]) -> Object<String, Value> {
        let mut fields = Object::new();
        for (key, fact) in facts {
            if (self.keep)(&format!("{parent}.{key}"), fact.is_proven()) {
                fields.insert(self.key(key), fact.stated().clone().into());
            }
        }
        fields
    }

    fn key(&self, camel: &str) -> String {
        match self.case {
            Case::Camel => camel.to_owned(),
            Case::Snake => camel.chars().fold(String::new(), |mut snake, c| {
                if c.is_ascii_uppercase() {
                    snake.push('_');
                }
                snake.push(c.to_ascii_lowercase());
                snake
            }),
        }
    }

    fn aws(&mut self, aws: &AwsIdentity) -> Object<String, Value> {
        let facts =
            [("partition", &aws.partition), ("account", &aws.account), ("region", &aws.region), ("zone", &aws.zone)];
        let mut fields = self.facts("aws", &facts);
        let (kind, mut compute, iam_role) = match &aws.compute {
            AwsCompute::Ec2 { instance_id, iam_role } => {
                ("ec2", self.facts("aws.ec2", &[("instanceId", instance_id)]), iam_role)
            }
            AwsCompute::Ecs { task_id, cluster, iam_role } => {
                ("ecs", self.facts("aws.ecs", &[("taskId", task_id), ("cluster", cluster)]), iam_role)
            }
        };
        if let Some(role) = iam_role
            && (self.keep)(&format!("aws.{kind}.iamRole"), role.is_proven())
        {
            compute.insert(self.key("iamRole"), serde_json::json!({ "name": role.stated() }));
        }
        fields.insert(kind.to_owned(), compute.into());
        fields
    }

    fn jwt(&mut self, jwt: &JwtIdentity) -> Object<String, Value> {
        let mut fields = self.facts("jwt", &[("issuer", &jwt.issuer), ("subject", &jwt.subject)]);
        let mut attributes = Object::new();
        for (name, value) in &jwt.attributes {
            if (self.keep)(&format!("jwt.attributes.{name}"), value.is_proven()) {
                let value = match value.stated() {
                    AttributeValue::One(value) => value.clone().into(),
                    AttributeValue::Any(values) => values.clone().into(),
                };
                attributes.insert(name.clone(), value);
            }
        }
        if !attributes.is_empty() {
            fields.insert("attributes".into(), attributes.into());
        }
        fields
    }
}
