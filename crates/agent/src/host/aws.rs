//! What EC2 and ECS have in common: a metadata service on this host, credentials that it hands out, requests signed with them.

use crate::host::Audience;
use aws_credential_types::Credentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use onboarding_wire::onboarding::SignedCallerIdentity;
use onboarding_wire::proof::{STS_BINDING_HEADER, STS_BODY, STS_CONTENT_TYPE, sts_binding, sts_host};
use serde::Deserialize;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A metadata service that this host alone reaches: plain HTTP/1.1, a connection for each question.
#[derive(Debug, Clone)]
pub struct Metadata {
    pub address: SocketAddr,
    /// Why it may not answer.
    pub hint: &'static str,
}

#[derive(Debug, thiserror::Error)]
pub enum AwsError {
    #[error("the metadata service did not answer {path} within {seconds} s; {hint}")]
    TooSlow { path: String, seconds: u64, hint: &'static str },
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

pub const ANSWER_WITHIN: Duration = Duration::from_secs(5);
pub const LARGEST_ANSWER: usize = 256 * 1024;

/// Temporary credentials, as the services of EC2 and ECS hand them out. It has no `Debug`: it holds a secret.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RoleCredentials {
    /// EC2 says so when there are none.
    code: Option<String>,
    access_key_id: String,
    secret_access_key: String,
    token: String,
}

impl RoleCredentials {
    /// From an answer to `path`.
    pub fn read(path: &str, text: &str) -> Result<Self, AwsError> {
        let garbage = |why: &str| AwsError::Garbage { path: path.to_owned(), why: why.to_owned() };
        let credentials: Self = serde_json::from_str(text).map_err(|_| garbage("not credentials in JSON"))?;
        match credentials.code.as_deref() {
            None | Some("Success") => Ok(credentials),
            Some(_) => Err(garbage("its Code is not Success; is the instance profile's role still there?")),
        }
    }
}

impl Metadata {
    /// A question, with headers of its own. Errors: anything but 200 and text.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        within: Duration,
    ) -> Result<String, AwsError> {
        let unreachable =
            |source: Box<dyn std::error::Error + Send + Sync>| AwsError::Unreachable { path: path.to_owned(), source };
        let exchange = async {
            let stream = TcpStream::connect(self.address).await.map_err(|error| unreachable(error.into()))?;
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|error| unreachable(error.into()))?;
            let mut request = Request::builder().method(method).uri(path).header("host", self.address.ip().to_string());
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let request = request.body(Empty::<Bytes>::new()).map_err(|error| unreachable(error.into()))?;
            let answer = async {
                let response = sender.send_request(request).await.map_err(|error| unreachable(error.into()))?;
                let status = response.status();
                let body = Limited::new(response.into_body(), LARGEST_ANSWER)
                    .collect()
                    .await
                    .map_err(|error| AwsError::Garbage { path: path.to_owned(), why: error.to_string() })?;
                if status != StatusCode::OK {
                    return Err(AwsError::Status { path: path.to_owned(), status });
                }
                let body = body.to_bytes();
                let text = std::str::from_utf8(&body)
                    .map_err(|_| AwsError::Garbage { path: path.to_owned(), why: "not UTF-8".to_owned() })?;
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
        timeout(within, exchange).await.unwrap_or_else(|_| {
            Err(AwsError::TooSlow { path: path.to_owned(), seconds: within.as_secs(), hint: self.hint })
        })
    }
}

/// The parts of a `GetCallerIdentity` request, signed for one plane, challenge and key.
pub fn sign_caller_identity(
    credentials: &RoleCredentials,
    region: &str,
    audience: &Audience,
    now: Timestamp,
) -> Result<SignedCallerIdentity, AwsError> {
    let failed = |error: String| AwsError::Signing(error);
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_second().try_into().unwrap_or(0));
    let identity = Credentials::new(
        credentials.access_key_id.clone(),
        credentials.secret_access_key.clone(),
        Some(credentials.token.clone()),
        None,
        "metadata",
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
