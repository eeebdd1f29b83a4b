//! `onboardctl attest`: what a piece of evidence proves, by the code that the plane verifies it with.

use crate::manifests;
use crate::outcome::{Format, Outcome, json};
use anyhow::{Context as _, anyhow};
use jiff::Timestamp;
use onboarding_attest::jwt::verify::Token;
use onboarding_attest::jwt::{Issuer, KeySource};
use onboarding_attest::{Attestors, Context, Evidence, Options};
use onboarding_core::identity::{Attested, Identity, Replay, Thumbprint};
use onboarding_kinds::control_plane::{JwtIssuer, Onboarding};
use onboarding_kinds::identity::{Case, to_json};
use onboarding_wire::onboarding::{AwsEc2Credential, JwtCredential};
use std::path::PathBuf;

/// Say what a piece of evidence proves, or why it doesn't
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl attest document.txt
  onboardctl attest token.jwt --jwt-issuers controlplane.yaml
  onboardctl attest token.jwt --jwt-issuers controlplane.yaml --audience UID -o json

FILE is an EC2 identity document as /latest/dynamic/instance-identity/rsa2048 serves it
(base64, no PEM lines), or a JWT. A JWT's audience is the uid of the ControlPlane, or what
--audience says (onboardctl status shows a UID that the plane made itself); with neither, all
but the audience is checked, and a warning on standard error says so. Keys that are not
in the ControlPlane are fetched from the issuer. What is printed is an identity file for
onboardctl explain.

Exit codes: 0 it proves what is printed; 1 it doesn't, or an input can't be used.")]
pub struct Attest {
    /// The evidence: a file, or - for standard input
    #[arg(value_name = "FILE")]
    evidence: PathBuf,
    /// The ControlPlane that lists the issuers of JWTs
    #[arg(long, value_name = "MANIFEST")]
    jwt_issuers: Option<PathBuf>,
    /// The plane's UID, which a JWT must have as its audience [default: the ControlPlane's uid]
    #[arg(long, value_name = "UID")]
    audience: Option<String>,
    /// Certificates of further AWS regions: PEM, each after a line "# REGION"
    #[arg(long, value_name = "FILE")]
    aws_extra_certificates: Option<PathBuf>,
    /// PEM of CAs that issuers' servers may have besides those of the system
    #[arg(long, value_name = "FILE")]
    jwks_extra_roots: Option<PathBuf>,
    /// How to say it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

impl Attest {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let others = [&self.jwt_issuers, &self.aws_extra_certificates, &self.jwks_extra_roots];
        manifests::stdin_once(others.into_iter().flatten().chain([&self.evidence]))?;
        let text = manifests::read_file(&self.evidence)?;
        let read = |path: &Option<PathBuf>| path.as_deref().map(manifests::read_file).transpose();
        let attestors = Attestors::new(Options {
            extra_aws_certificates: read(&self.aws_extra_certificates)?,
            extra_roots_pem: read(&self.jwks_extra_roots)?,
            ..Options::default()
        })?;
        let mut notes = Vec::new();
        let attested = if is_jwt(&text) {
            let plane = self.plane()?;
            let audience = match self.audience.clone().or(plane.uid) {
                Some(uid) => uid,
                None => {
                    let stated = stated_audience(&text).with_context(|| self.nothing())?;
                    notes.push(format!("warning: whether this token is for this plane isn't checked: it is for {stated:?}, and the ControlPlane has no uid; name the plane's UID (onboardctl status shows it) with --audience"));
                    stated
                }
            };
            let issuers: Vec<Issuer> = plane.issuers.into_iter().map(issuer).collect();
            attest(&attestors, Evidence::Jwt(JwtCredential { token: text.trim().to_owned() }), &audience, &issuers)
        } else {
            let credential = AwsEc2Credential { identity_document: text, ..AwsEc2Credential::default() };
            attest(&attestors, Evidence::AwsEc2(credential), "", &[])
        };
        let attested = attested.with_context(|| self.nothing())?;
        let identity = to_json(&attested.identity, Case::Camel);
        let out = match self.output {
            Format::Json => json(&identity),
            Format::Text => format!("{}{}", remarks(&attested), serde_yaml_ng::to_string(&identity)?),
        };
        Ok(Outcome { out, notes, code: 0 })
    }

    fn nothing(&self) -> String {
        format!("{} proves nothing", self.evidence.display())
    }

    fn plane(&self) -> anyhow::Result<Onboarding> {
        let path = self
            .jwt_issuers
            .clone()
            .context("this is a JWT: name the manifest of the ControlPlane that lists its issuer with --jwt-issuers")?;
        let loaded = manifests::load(std::slice::from_ref(&path));
        loaded.all_read()?;
        let fault =
            loaded.faults.iter().find(|fault| fault.path.is_empty() || fault.object.starts_with("ControlPlane"));
        if let Some(fault) = fault {
            return Err(anyhow!("{fault}"));
        }
        let mut planes = loaded.admission().planes;
        match planes.len() {
            1 => planes.pop().context("there is one"),
            0 => Err(anyhow!("{}: no ControlPlane with spec.meshExpansion.onboarding in it", path.display())),
            count => Err(anyhow!("{}: {count} ControlPlanes enable onboarding; one may", path.display())),
        }
    }
}

/// A document is base64, which has no dots.
fn is_jwt(text: &str) -> bool {
    text.contains('.')
}

/// Where nobody knows the plane's UID, which it made itself, all but that can be verified.
fn stated_audience(token: &str) -> anyhow::Result<String> {
    let token = Token::read(token.trim())?;
    let stated = token.stated_audience();
    stated
        .first()
        .map(|one| (*one).to_owned())
        .context("the token says of no plane that it is for it: it has no \"aud\"")
}

/// The key and the challenge are those of a connection, which there is none of; neither evidence looks at them.
fn attest(attestors: &Attestors, evidence: Evidence, uid: &str, issuers: &[Issuer]) -> anyhow::Result<Attested> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting up")?;
    let context = Context { plane_uid: uid, challenge: &[], key: Thumbprint([0; 32]), now: Timestamp::now(), issuers };
    Ok(runtime.block_on(attestors.attest(&evidence, context))?)
}

fn issuer(issuer: JwtIssuer) -> Issuer {
    Issuer {
        keys: match (issuer.jwks, issuer.jwks_uri) {
            (Some(jwks), _) => KeySource::Inline(jwks),
            (None, Some(uri)) => KeySource::Uri(uri),
            (None, None) => KeySource::Discovery,
        },
        issuer: issuer.issuer,
        short_name: issuer.short_name,
        attributes: issuer.attributes_json_path,
    }
}

/// What it proves and doesn't, as comments of the YAML below them.
fn remarks(attested: &Attested) -> String {
    let unproven = match &attested.identity {
        Identity::Aws(_) => {
            "# Not proven: aws.ec2.iamRole, and that the instance itself presents this; an agent has STS vouch for both.\n"
        }
        Identity::Jwt(jwt) if jwt.attributes.is_empty() => {
            "# Not proven: which host presents this; jwt.attributes, as there are none where the ControlPlane looks for them.\n"
        }
        Identity::Jwt(_) => "# Not proven: which host presents this.\n",
        Identity::Gcp(_) | Identity::Azure(_) => "",
    };
    let replay = match attested.replay {
        Replay::BoundToKey => String::new(),
        Replay::Until(end) => {
            format!("# Whoever has a copy can present it until {end}; the first key that comes with it is the one.\n")
        }
        Replay::Forever => {
            "# Whoever has a copy can present it for ever; the first key that comes with it is the one.\n".to_owned()
        }
    };
    format!("{unproven}{replay}")
}
