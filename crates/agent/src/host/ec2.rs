//! An EC2 instance: what its metadata service (IMDSv2) and its credentials prove.

use crate::host::{Audience, Evidence, Host, HostError};
use async_trait::async_trait;
use aws_credential_types::Credentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use onboarding_core::registration::{ConnectedOver, HostAddress};
use onboarding_wire::AWS_EC2_CREDENTIAL;
use onboarding_wire::onboarding::{AwsEc2Credential, SignedCallerIdentity};
use onboarding_wire::proof::{STS_BINDING_HEADER, STS_BODY, STS_CONTENT_TYPE, sts_binding, sts_host};
use prost::Message;
use serde::Deserialize;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The instance metadata service of every EC2 instance.
pub const METADATA: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80));

/// This host, as its metadata service describes it.
#[derive(Debug, Clone)]
pub struct Ec2 {
    metadata: SocketAddr,
}

#[derive(Debug, thiserror::Error)]
pub enum Ec2Error {
    #[error(
        "the metadata service did not answer {path} within {seconds} s; where a container runs on the instance, its hop limit may be 1"
    )]
    TooSlow { path: String, seconds: u64 },
    #[error("the metadata service can't be reached for {path}")]
    Unreachable {
        path: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the metadata service answered {path} with {status}")]
    Status { path: String, status: StatusCode },
    #[error("the metadata service answered {path} with what can't be understood: {why}")]
    Garbage { path: String, why: String },
    #[error("signing the GetCallerIdentity request failed: {0}")]
    Signing(String),
}

const TOKEN: &str = "/latest/api/token";
const DOCUMENT: &str = "/latest/dynamic/instance-identity/rsa2048";
const REGION: &str = "/latest/meta-data/placement/region";
const INSTANCE_CREDENTIALS: &str = "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const PRIVATE_ADDRESS: &str = "/latest/meta-data/local-ipv4";
const PUBLIC_ADDRESS: &str = "/latest/meta-data/public-ipv4";
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Off AWS the address is often swallowed: recognising must not hold the start up.
const RECOGNISE_WITHIN: Duration = Duration::from_secs(1);
const LARGEST_ANSWER: usize = 64 * 1024;

/// As IMDS serves temporary credentials.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RoleCredentials {
    code: Option<String>,
    access_key_id: String,
    secret_access_key: String,
    token: String,
}

impl Ec2 {
    /// `metadata`: [`METADATA`].
    pub fn new(metadata: SocketAddr) -> Self {
        Self { metadata }
    }

    /// Whether an IMDSv2 service answers: it gives a token to a PUT.
    pub async fn recognise(&self) -> Result<(), Ec2Error> {
        self.token(RECOGNISE_WITHIN).await.map(|_| ())
    }

    async fn token(&self, within: Duration) -> Result<String, Ec2Error> {
        let token = self.ask(Method::PUT, TOKEN, ("x-aws-ec2-metadata-token-ttl-seconds", "300"), within).await?;
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Ec2Error::Garbage { path: TOKEN.to_owned(), why: "not a token".to_owned() });
        }
        Ok(token)
    }

    async fn get(&self, token: &str, path: &str) -> Result<String, Ec2Error> {
        self.ask(Method::GET, path, ("x-aws-ec2-metadata-token", token), ANSWER_WITHIN).await
    }

    /// `None`: 404.
    async fn get_optional(&self, token: &str, path: &str) -> Result<Option<String>, Ec2Error> {
        match self.get(token, path).await {
            Ok(text) => Ok(Some(text)),
            Err(Ec2Error::Status { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        header: (&str, &str),
        within: Duration,
    ) -> Result<String, Ec2Error> {
        let unreachable =
            |source: Box<dyn std::error::Error + Send + Sync>| Ec2Error::Unreachable { path: path.to_owned(), source };
        let exchange = async {
            let stream = TcpStream::connect(self.metadata).await.map_err(|error| unreachable(error.into()))?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|error| unreachable(error.into()))?;
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header("host", self.metadata.ip().to_string())
                .header(header.0, header.1)
                .body(Empty::<Bytes>::new())
                .map_err(|error| unreachable(error.into()))?;
            let answer = async {
                let response = sender.send_request(request).await.map_err(|error| unreachable(error.into()))?;
                let status = response.status();
                let body = Limited::new(response.into_body(), LARGEST_ANSWER)
                    .collect()
                    .await
                    .map_err(|error| Ec2Error::Garbage { path: path.to_owned(), why: error.to_string() })?;
                if status != StatusCode::OK {
                    return Err(Ec2Error::Status { path: path.to_owned(), status });
                }
                let body = body.to_bytes();
                let text = std::str::from_utf8(&body)
                    .map_err(|_| Ec2Error::Garbage { path: path.to_owned(), why: "not UTF-8".to_owned() })?;
                Ok(text.trim().to_owned())
            };
            tokio::pin!(answer);
            tokio::select! {
                answer = &mut answer => answer,
                ended = connection => {
                    // The answer may be whole already when the other side closes.
                    match (timeout(Duration::from_millis(100), answer).await, ended) {
                        (Ok(answer), _) => answer,
                        (Err(_), Err(error)) => Err(unreachable(error.into())),
                        (Err(_), Ok(())) => Err(unreachable("the connection was closed".into())),
                    }
                }
            }
        };
        timeout(within, exchange)
            .await
            .unwrap_or_else(|_| Err(Ec2Error::TooSlow { path: path.to_owned(), seconds: within.as_secs() }))
    }

    async fn credentials(&self, token: &str, path: &str) -> Result<RoleCredentials, Ec2Error> {
        let text = self.get(token, path).await?;
        let garbage = |why: &str| Ec2Error::Garbage { path: path.to_owned(), why: why.to_owned() };
        let credentials: RoleCredentials =
            serde_json::from_str(&text).map_err(|_| garbage("not credentials in JSON"))?;
        match credentials.code.as_deref() {
            None | Some("Success") => Ok(credentials),
            Some(_) => Err(garbage("its Code is not Success; is the instance profile's role still there?")),
        }
    }
}

/// The parts of a `GetCallerIdentity` request, signed for one plane, challenge and key.
fn sign_caller_identity(
    credentials: &RoleCredentials,
    region: &str,
    audience: &Audience,
    now: SystemTime,
) -> Result<SignedCallerIdentity, Ec2Error> {
    let failed = |error: String| Ec2Error::Signing(error);
    let identity = Credentials::new(
        credentials.access_key_id.clone(),
        credentials.secret_access_key.clone(),
        Some(credentials.token.clone()),
        None,
        "imds",
    )
    .into();
    let parameters = v4::SigningParams::builder()
        .identity(&identity)
        .region(region)
        .name("sts")
        .time(now)
        .settings(SigningSettings::default())
        .build()
        .map_err(|error| failed(error.to_string()))?
        .into();
    let binding = sts_binding(&audience.plane_uid, &audience.challenge, audience.key);
    let url = format!("https://{}/", sts_host(region));
    let headers = [("content-type", STS_CONTENT_TYPE), (STS_BINDING_HEADER, binding.as_str())];
    let request = SignableRequest::new("POST", &url, headers.into_iter(), SignableBody::Bytes(STS_BODY.as_bytes()))
        .map_err(|error| failed(error.to_string()))?;
    let (instructions, signature) = sign(request, &parameters).map_err(|error| failed(error.to_string()))?.into_parts();
    let amz_date = instructions
        .headers()
        .find(|(name, _)| name.eq_ignore_ascii_case("x-amz-date"))
        .map(|(_, value)| value.to_owned())
        .ok_or_else(|| failed("it has no date".to_owned()))?;
    Ok(SignedCallerIdentity {
        region: region.to_owned(),
        amz_date,
        access_key_id: credentials.access_key_id.clone(),
        session_token: credentials.token.clone(),
        signature,
    })
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
            return Err(Ec2Error::Garbage { path: REGION.to_owned(), why: "not a region".to_owned() }.into());
        }
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_second().try_into().unwrap_or(0));
        let instance = match self.credentials(&token, INSTANCE_CREDENTIALS).await {
            Ok(credentials) => Some(sign_caller_identity(&credentials, &region, audience, now)?),
            // Without it the document still proves the instance, though not that it is alive now.
            Err(Ec2Error::Status { status: StatusCode::NOT_FOUND, .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let role = match self.get_optional(&token, ROLES).await?.filter(|text| !text.is_empty()) {
            Some(text) => {
                let name = text.lines().next().unwrap_or_default().trim();
                if !is_name(name, b"+=,.@-_") {
                    return Err(
                        Ec2Error::Garbage { path: ROLES.to_owned(), why: "not a role's name".to_owned() }.into()
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
                    .map_err(|_| Ec2Error::Garbage { path: path.to_owned(), why: "not an IPv4 address".to_owned() })?;
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
