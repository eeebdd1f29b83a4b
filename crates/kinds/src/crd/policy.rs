//! The schema of an OnboardingPolicy, as `crate::policy` reads it.
//!
//! An API server estimates what its rules may cost before it accepts them, from how many items there may be: hence the limits,
//! and hence `Schema::pattern` where the items of a list in a list in a list are checked.

use super::grammar::{
    ASCII, AWS_ACCOUNT, FIRST_WRONG_KEY, ISSUER, LABEL_KEY, LABEL_KEYS, LABEL_VALUE, LABEL_VALUES, MANY_DIGITS, NAME,
    ONE_OF_MANY,
};
use super::schema::{Grammar, Says, Schema};
use super::{conditions, observed_generation, root};

const MOST_RULES: u32 = 32;
const MOST_MATCHERS: u32 = 16;
const MOST_TARGETS: u32 = 32;
const MOST_ITEMS: u32 = 100;
const MOST_ACCOUNTS: u32 = 256;
const MOST_SUBJECTS: u32 = 1024;
const MOST_ATTRIBUTES: u32 = 32;
const MOST_LABELS: u32 = 16;

pub(super) fn schema() -> Schema {
    let rule = Schema::object(
        "Whoever one of `workloads` matches may join whichever WorkloadGroup one of `onboardTo` selects.",
        [
            ("workloads", Schema::list("Any of them may match.", matcher(), MOST_MATCHERS).at_least_one()),
            (
                "onboardTo",
                Schema::list("WorkloadGroups of the policy's namespace.", target(), MOST_TARGETS).at_least_one(),
            ),
        ],
    )
    .requires(&["workloads", "onboardTo"]);
    let allow = Schema::list("Rules, any of which may allow.", rule, MOST_RULES).at_least_one();
    let spec = Schema::object("Who may join what. Policies only add up.", [("allow", allow)]).requires(&["allow"]);
    let status = Schema::object(
        "What the plane says of this policy.",
        [
            ("observedGeneration", observed_generation()),
            ("workloads", Schema::integer("How many workloads that have joined this policy admits.", 0, None)),
            ("conditions", conditions("Accepted: whether the policy could be read.")),
        ],
    );
    root(
        "Authorizes workloads that run outside of Kubernetes to join WorkloadGroups of the same namespace.",
        [("spec", spec), ("status", status)],
    )
    .requires(&["spec"])
}

fn matcher() -> Schema {
    let platforms = [("aws", aws()), ("jwt", jwt()), ("gcp", gcp()), ("azure", azure())];
    Schema::object("By the identity of the host.", platforms).one_of(&["aws", "jwt", "gcp", "azure"])
}

fn texts(says: &str, grammar: &Grammar) -> Schema {
    Schema::list(says, Schema::text("", grammar), MOST_ITEMS)
}

fn aws() -> Schema {
    let roles = || ("iamRoleNames", texts("IAM roles; empty: with any role, or none.", &NAME));
    let account = Schema::text("", &AWS_ACCOUNT);
    let accounts = Schema::list("12 digits each, in quotes. Never any account.", account, MOST_ACCOUNTS);
    let ec2 = Schema::object("An EC2 instance; {} is any.", [roles()]);
    let ecs = Schema::object("An ECS task; {} is any.", [("clusters", texts("Names; empty: any.", &NAME)), roles()]);
    Schema::object(
        "What AWS has proven of a host.",
        [
            ("partitions", texts("aws, aws-cn, aws-us-gov; empty: any.", &NAME)),
            ("accounts", accounts.at_least_one()),
            ("regions", texts("Empty: any.", &NAME)),
            ("zones", texts("Empty: any.", &NAME)),
            ("ec2", ec2),
            ("ecs", ecs),
        ],
    )
    .requires(&["accounts"])
    .one_of(&["ec2", "ecs"])
}

fn jwt() -> Schema {
    let attribute = Schema::object(
        "",
        [
            ("name", Schema::text("", &NAME)),
            ("values", texts("One of them; empty: the attribute must be there, with any value.", &ONE_OF_MANY)),
        ],
    )
    .requires(&["name"]);
    Schema::object(
        "What an issuer's token says of a host.",
        [
            ("issuer", Schema::text("Equal to the token's `iss`.", &ISSUER)),
            ("subjects", Schema::list("Empty: any.", Schema::text("", &ASCII), MOST_SUBJECTS)),
            ("attributes", Schema::list("All of them must match.", attribute, MOST_ATTRIBUTES)),
        ],
    )
    .requires(&["issuer"])
}

fn gcp() -> Schema {
    let gce = Schema::object("A Compute Engine instance.", [("instanceIds", texts("Empty: any.", &MANY_DIGITS))]);
    Schema::object(
        "Matches nothing yet: this version has no attestor that proves GCP identities.",
        [
            ("projectNumbers", texts("Digits, in quotes.", &MANY_DIGITS)),
            ("projectIds", texts("", &ONE_OF_MANY)),
            ("regions", texts("Empty: any.", &ONE_OF_MANY)),
            ("zones", texts("Empty: any.", &ONE_OF_MANY)),
            ("gce", gce),
        ],
    )
    .refuses(
        "has(self.projectNumbers) && self.projectNumbers.size() > 0 || has(self.projectIds) && self.projectIds.size() > 0",
        Says::Words("must have at least one of projectNumbers and projectIds"),
        None,
        "FieldValueRequired",
    )
}

fn azure() -> Schema {
    let compute = Schema::object("A virtual machine.", [("vmIds", texts("Empty: any.", &ONE_OF_MANY))]);
    Schema::object(
        "Matches nothing yet: this version has no attestor that proves Azure identities.",
        [
            ("subscriptions", texts("", &ONE_OF_MANY).at_least_one()),
            ("resourceGroups", texts("Empty: any.", &ONE_OF_MANY)),
            ("compute", compute),
        ],
    )
    .requires(&["subscriptions"])
}

fn target() -> Schema {
    let labels = Schema::map("All of them must be there.", Schema::text("", &LABEL_VALUE), MOST_LABELS).refuses(
        LABEL_KEYS.holds,
        Says::Expression { first: FIRST_WRONG_KEY, otherwise: LABEL_KEYS.says },
        None,
        "FieldValueInvalid",
    );
    let expression = Schema::object(
        "",
        [
            ("key", Schema::text("", &LABEL_KEY)),
            ("operator", Schema::word("", &["In", "NotIn", "Exists", "DoesNotExist"])),
            ("values", texts("", &LABEL_VALUES)),
        ],
    )
    .requires(&["key", "operator"])
    .refuses(
        "!(self.operator in ['In', 'NotIn']) || has(self.values) && self.values.size() > 0",
        Says::Words("must have at least one item where the operator is In or NotIn"),
        Some("values"),
        "FieldValueRequired",
    )
    .refuses(
        "self.operator in ['In', 'NotIn'] || !has(self.values) || self.values.size() == 0",
        Says::Words("must be empty where the operator is Exists or DoesNotExist"),
        Some("values"),
        "FieldValueForbidden",
    );
    let selector = Schema::object(
        "A label selector over metadata.labels; {} is every group of the namespace.",
        [
            ("matchLabels", labels),
            ("matchExpressions", Schema::list("All of them must hold.", expression, MOST_LABELS)),
        ],
    );
    Schema::object("", [("workloadGroupSelector", selector)]).requires(&["workloadGroupSelector"])
}
