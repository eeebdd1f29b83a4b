//! An EC2 instance: what its metadata service (IMDSv2) and its credentials prove.

use crate::host::aws::{ANSWER_WITHIN, AwsError, Metadata, RoleCredentials, sign_caller_identity};
use crate::host::{Audience, Evidence, Host, HostError};
use async_trait::async_trait;
use http::{Method, StatusCode};
use jiff::Timestamp;
use onboarding_core::registration::{ConnectedOver, HostAddress};
use onboarding_wire::AWS_EC2_CREDENTIAL;
use onboarding_wire::onboarding::AwsEc2Credential;
use prost::Message;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

/// The instance metadata service of every EC2 instance.
pub const METADATA: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80));

/// This host, as its metadata service describes it.
#[derive(Debug, Clone)]
pub struct Ec2 {
    metadata: Metadata,
}

const TOKEN: &str = "/latest/api/token";
const DOCUMENT: &str = "/latest/dynamic/instance-identity/rsa2048";
const REGION: &str = "/latest/meta-data/placement/region";
const INSTANCE_CREDENTIALS: &str = "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const PRIVATE_ADDRESS: &str = "/latest/meta-data/local-ipv4";
const PUBLIC_ADDRESS: &str = "/latest/meta-data/public-ipv4";
/// Off AWS the address is often swallowed: recognising must not hold the start up.
const RECOGNISE_WITHIN: Duration = Duration::from_secs(1);

impl Ec2 {
    /// `metadata`: [`METADATA`].
    pub fn new(metadata: SocketAddr) -> Self {
        let hint = "where a container runs on the instance, its hop limit may be 1";
        Self { metadata: Metadata { address: metadata, hint } }
    }

    /// Whether an IMDSv2 service answers: it gives a token to a PUT.
    pub async fn recognise(&self) -> Result<(), AwsError> {
        self.token(RECOGNISE_WITHIN).await.map(|_| ())
    }

    async fn token(&self, within: Duration) -> Result<String, AwsError> {
        let token =
            self.metadata.ask(Method::PUT, TOKEN, &[("x-aws-ec2-metadata-token-ttl-seconds", "300")], within).await?;
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(AwsError::Garbage { path: TOKEN.to_owned(), why: "not a token".to_owned() });
        }
        Ok(token)
    }

    async fn get(&self, token: &str, path: &str) -> Result<String, AwsError> {
        self.metadata.ask(Method::GET, path, &[("x-aws-ec2-metadata-token", token)], ANSWER_WITHIN).await
    }

    /// `None`: 404.
    async fn get_optional(&self, token: &str, path: &str) -> Result<Option<String>, AwsError> {
        match self.get(token, path).await {
            Ok(text) => Ok(Some(text)),
            Err(AwsError::Status { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn credentials(&self, token: &str, path: &str) -> Result<RoleCredentials, AwsError> {
        RoleCredentials::read(path, &self.get(token, path).await?)
    }
}

fn is_name(text: &str, also: &[u8]) -> bool {
    !text.is_empty()
        && text.len() <= 128
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || also.contains(&byte))
}

#[async_trait]
impl Host for Ec2 {
    /// The identity document, the instance's own identity, and its role where it has one.
    async fn evidence(&self, audience: &Audience, now: Timestamp) -> Result<Evidence, HostError> {
        let token = self.token(ANSWER_WITHIN).await?;
        let identity_document = self.get(&token, DOCUMENT).await?;
        let region = self.get(&token, REGION).await?;
        if !is_name(&region, b"-") {
            return Err(AwsError::Garbage { path: REGION.to_owned(), why: "not a region".to_owned() }.into());
        }
        let instance = match self.credentials(&token, INSTANCE_CREDENTIALS).await {
            Ok(credentials) => Some(sign_caller_identity(&credentials, &region, audience, now)?),
            // Without it the document still proves the instance, though not that it is alive now.
            Err(AwsError::Status { status: StatusCode::NOT_FOUND, .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let role = match self.get_optional(&token, ROLES).await?.filter(|text| !text.is_empty()) {
            Some(text) => {
                let name = text.lines().next().unwrap_or_default().trim();
                if !is_name(name, b"+=,.@-_") {
                    return Err(
                        AwsError::Garbage { path: ROLES.to_owned(), why: "not a role's name".to_owned() }.into()
                    );
                }
                let credentials = self.credentials(&token, &format!("{ROLES}{name}")).await?;
                Some(sign_caller_identity(&credentials, &region, audience, now)?)
            }
            None => None,
        };
        let message = AwsEc2Credential { identity_document, instance, role };
        Ok(Evidence {
            credential: prost_types::Any { type_url: AWS_EC2_CREDENTIAL.to_owned(), value: message.encode_to_vec() },
            expires_at: None,
            origin: "EC2 metadata".to_owned(),
        })
    }

    /// The private address, and the public one that the instance was given, which is on no interface.
    async fn addresses(&self) -> Result<Vec<HostAddress>, HostError> {
        let token = self.token(ANSWER_WITHIN).await?;
        let mut addresses = Vec::new();
        for (path, kind) in [(PRIVATE_ADDRESS, ConnectedOver::Vpc), (PUBLIC_ADDRESS, ConnectedOver::Internet)] {
            if let Some(text) = self.get_optional(&token, path).await?.filter(|text| !text.is_empty()) {
                let ip: Ipv4Addr = text
                    .parse()
                    .map_err(|_| AwsError::Garbage { path: path.to_owned(), why: "not an IPv4 address".to_owned() })?;
                tracing::info!(address = %ip, kind = ?kind, source = path, "took an address from the metadata service");
                addresses.push(HostAddress { ip: ip.into(), kind });
            }
        }
        Ok(addresses)
    }

    fn describe(&self) -> String {
        "AWS EC2 instance".to_owned()
    }
}

#[cfg(test)]
#[path = "ec2_tests.rs"]
mod tests;
