//! What the hosts of a crowd show.

use anyhow::Context;
use jiff::Timestamp;
use jsonwebtoken::Algorithm;
use onboarding_testkit::cms::RegionKey;
use onboarding_testkit::imds::Instance;
use onboarding_testkit::oidc::Oidc;
use onboarding_wire::onboarding as pb;
use onboarding_wire::{AWS_EC2_CREDENTIAL, JWT_CREDENTIAL};
use prost::Message;
use std::sync::Arc;

/// The account of every EC2 instance of a crowd.
pub const ACCOUNT: &str = "123456789012";

/// Makes each agent's credential.
#[derive(Clone)]
pub enum Evidence {
    /// Subject `vm-<number>`, attribute `custom_attributes.region: us-east`, good for an hour.
    Jwt { issuer: Arc<Oidc>, algorithm: Algorithm },
    /// Instance `i-<17 digits>` of [`ACCOUNT`], its identity document alone.
    Ec2Document(Arc<RegionKey>),
}

impl Evidence {
    /// RS256, as almost all issuers sign.
    pub fn jwt(issuer: Arc<Oidc>) -> Self {
        Self::Jwt { issuer, algorithm: Algorithm::RS256 }
    }

    pub(crate) fn credential(&self, number: usize, plane_uid: &str) -> anyhow::Result<prost_types::Any> {
        match self {
            Self::Jwt { issuer, algorithm } => {
                let now = Timestamp::now().as_second();
                let claims = serde_json::json!({
                    "sub": format!("vm-{number}"),
                    "aud": plane_uid,
                    "iat": now,
                    "exp": now + 3600,
                    "custom_attributes": { "region": "us-east" },
                });
                let token = issuer.mint(*algorithm, claims).context("minting a token")?;
                let value = pb::JwtCredential { token }.encode_to_vec();
                Ok(prost_types::Any { type_url: JWT_CREDENTIAL.to_owned(), value })
            }
            Self::Ec2Document(key) => {
                let instance = Instance {
                    account: ACCOUNT.to_owned(),
                    region: key.region().to_owned(),
                    zone: format!("{}b", key.region()),
                    instance_id: format!("i-{number:017x}"),
                    role: None,
                    private_ip: "10.0.0.4".to_owned(),
                };
                let identity_document = key.document(instance.document().as_bytes()).context("signing a document")?;
                let value = pb::AwsEc2Credential { identity_document, instance: None, role: None }.encode_to_vec();
                Ok(prost_types::Any { type_url: AWS_EC2_CREDENTIAL.to_owned(), value })
            }
        }
    }
}
