//! The schema of a ControlPlane, as `crate::control_plane` reads it: what is others' is kept, and nobody asks what is in it.

use super::grammar::{
    DURATION, HOST, HTTPS_URL, ISSUER, JSON_PATH, JWKS, POSITIVE_DURATION, RESOURCE_NAME, SHORT_NAME, UID,
};
use super::schema::{Says, Schema};
use super::{conditions, observed_generation, root};

const MOST_HOSTS: u32 = 64;
const MOST_ISSUERS: u32 = 32;

pub(super) fn schema() -> Schema {
    let gateway = Schema::object(
        "Another gateway, for workloads that can't reach `vmgateway`.",
        [
            ("host", Schema::text("A host name or an IP address.", &HOST)),
            ("port", Schema::integer("15443 where it is absent.", 1, Some(65535))),
        ],
    )
    .requires(&["host"])
    .open();
    let expansion = Schema::object("", [("onboarding", onboarding()), ("customGateway", gateway)]).open();
    let spec = Schema::object("", [("meshExpansion", expansion)]).open();
    let status = Schema::object(
        "What the operator says.",
        [
            ("observedGeneration", observed_generation()),
            ("conditions", conditions("What is there, and what is missing.")),
        ],
    )
    .open();
    root("Workload onboarding is enabled by spec.meshExpansion.onboarding.", [("spec", spec), ("status", status)])
        .open()
}

fn onboarding() -> Schema {
    let endpoint = Schema::object(
        "Where agents reach the plane.",
        [
            (
                "hosts",
                Schema::list(
                    "Host names or IP addresses, those in the certificate.",
                    Schema::text("", &HOST),
                    MOST_HOSTS,
                )
                .at_least_one(),
            ),
            ("secretName", Schema::text("A Secret of type kubernetes.io/tls in this namespace.", &RESOURCE_NAME)),
        ],
    )
    .requires(&["hosts", "secretName"]);
    let expiration = Schema::text("How long an onboarding token lives; 1h where it is absent.", &POSITIVE_DURATION);
    let issuers = Schema::list_by("Whose tokens prove a host.", "issuer", issuer(), MOST_ISSUERS).refuses(
        "self.all(a, self.exists_one(b, a.shortName == b.shortName))",
        Says::Words("two issuers have the same short name"),
        None,
        "FieldValueInvalid",
    );
    let delay = Schema::text("How long a sidecar serves on after its goodbye; 10s where it is absent.", &DURATION);
    let workloads = Schema::object(
        "",
        [
            ("authentication", Schema::object("", [("jwt", Schema::object("", [("issuers", issuers)]))])),
            ("deregistration", Schema::object("", [("propagationDelay", delay)])),
        ],
    );
    Schema::object(
        "Present: enabled.",
        [
            ("endpoint", endpoint),
            ("uid", Schema::text("The audience of credentials; made once where it is absent.", &UID)),
            ("tokenIssuer", Schema::object("", [("jwt", Schema::object("", [("expiration", expiration)]))])),
            ("localRepository", Schema::object("Present: serve DEB and RPM packages.", [])),
            ("workloads", workloads),
        ],
    )
    .requires(&["endpoint"])
}

fn issuer() -> Schema {
    let path = Schema::text("Where in a token the attributes are.", &JSON_PATH);
    let fields = Schema::object("", [("attributes", Schema::object("", [("jsonPath", path)]))]);
    Schema::object(
        "",
        [
            ("issuer", Schema::text("Equal to the token's `iss`.", &ISSUER)),
            ("shortName", Schema::text("Becomes a part of registrations' names.", &SHORT_NAME)),
            (
                "jwksUri",
                Schema::text("Where its keys are; neither this nor `jwks`: OpenID Connect Discovery.", &HTTPS_URL),
            ),
            ("jwks", Schema::text("Its keys: a JSON Web Key Set.", &JWKS)),
            ("tokenFields", fields),
        ],
    )
    .requires(&["issuer", "shortName"])
    .at_most_one_of(&["jwksUri", "jwks"])
}
