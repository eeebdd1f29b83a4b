//! The schema of a WorkloadAutoRegistration, as `crate::war` writes and reads it.

use super::grammar::{AWS_ACCOUNT, DIGITS, FACT, IP};
use super::schema::{Says, Schema};
use super::{conditions, observed_generation, root};

const MOST_ADDRESSES: u32 = 256;
const MOST_PAIRS: u32 = 1024;

pub(super) fn schema() -> Schema {
    let spec = Schema::object("Written by the plane.", [("identity", identity()), ("registration", registration())])
        .requires(&["identity", "registration"]);
    let connection = Schema::object(
        "There while the agent is connected.",
        [("connectedTo", Schema::any_text("The replica of the plane."))],
    );
    let status = Schema::object(
        "",
        [
            ("observedGeneration", observed_generation()),
            ("activeAgentConnection", connection),
            ("conditions", conditions("AgentConnected, Healthy, Admitted, UpToDate and Published.")),
            ("lease", Schema::object("The plane's own record.", []).open()),
        ],
    );
    root(
        "One workload outside of Kubernetes that has joined its WorkloadGroup. Deleting it makes the agent onboard again.",
        [("spec", spec), ("status", status)],
    )
    .requires(&["spec"])
}

fn fact() -> Schema {
    Schema::text("", &FACT)
}

/// Fields that may be written in either case.
fn either(fields: Vec<(&'static str, &'static str, Schema)>, others: Vec<(&'static str, Schema)>) -> Schema {
    let both = fields.iter().flat_map(|(camel, snake, schema)| [(*camel, schema.clone()), (*snake, schema.clone())]);
    let schema = Schema::object("", both.chain(others));
    fields.iter().fold(schema, |schema, (camel, snake, _)| {
        schema.refuses(
            &format!("!(has(self.{camel}) && has(self.{snake}))"),
            Says::Words(&format!("is there as {camel} too")),
            Some(snake),
            "FieldValueForbidden",
        )
    })
}

fn role() -> (&'static str, &'static str, Schema) {
    ("iamRole", "iam_role", Schema::object("", [("name", fact())]).requires(&["name"]))
}

fn identity() -> Schema {
    let ec2 = either(vec![("instanceId", "instance_id", fact()), role()], vec![]);
    let ecs = either(vec![("taskId", "task_id", fact()), role()], vec![("cluster", fact())]);
    let aws = Schema::object(
        "",
        [
            ("partition", fact()),
            ("account", Schema::text("12 digits.", &AWS_ACCOUNT)),
            ("region", fact()),
            ("zone", fact()),
            ("ec2", ec2),
            ("ecs", ecs),
        ],
    )
    .one_of(&["ec2", "ecs"]);
    let gcp = either(
        vec![("projectNumber", "project_number", Schema::text("", &DIGITS)), ("projectId", "project_id", fact())],
        vec![
            ("region", fact()),
            ("zone", fact()),
            ("gce", either(vec![("instanceId", "instance_id", fact())], vec![])),
        ],
    )
    .requires(&["gce"]);
    let azure = either(
        vec![("resourceGroup", "resource_group", fact())],
        vec![("subscription", fact()), ("compute", either(vec![("instanceId", "instance_id", fact())], vec![]))],
    )
    .requires(&["compute"]);
    let attributes = Schema::map("As the token has them.", Schema::anything("Text, or a list of texts."), MOST_PAIRS);
    let jwt = Schema::object("", [("issuer", fact()), ("subject", fact()), ("attributes", attributes)]);
    Schema::object("What was attested.", [("aws", aws), ("gcp", gcp), ("azure", azure), ("jwt", jwt)])
        .one_of(&["aws", "gcp", "azure", "jwt"])
}

fn registration() -> Schema {
    let version = || ("version", Schema::any_text(""));
    let sidecar = Schema::object(
        "",
        [
            ("istio", Schema::object("", [version(), ("revision", Schema::any_text(""))])),
            ("envoy", Schema::object("", [version()])),
        ],
    )
    .at_most_one_of(&["istio", "envoy"]);
    let ways = ["VPC", "INTERNET"];
    let address = Schema::object("", [("ip", Schema::text("", &IP)), ("type", Schema::word("", &ways))])
        .requires(&["ip", "type"]);
    Schema::object(
        "What the agent said of its host.",
        [
            ("agent", Schema::object("", [version()])),
            ("sidecar", sidecar),
            ("host", Schema::object("", [("addresses", Schema::list("", address, MOST_ADDRESSES))])),
            ("workload", Schema::object("", [("labels", Schema::map("", Schema::any_text(""), MOST_PAIRS))])),
            ("settings", Schema::object("", [("connectedOver", Schema::word("", &ways))])),
        ],
    )
}
