//! AWS STS as far as `GetCallerIdentity`: it really verifies SigV4, and can be told to misbehave.
//!
//! Its credentials carry what they stand for (sealed in the session token), so that whoever makes them for a machine and the
//! server that verifies them share a secret and nothing else.

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::hmac::{HMAC_SHA256, Key, sign};
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;

/// Temporary credentials, as the metadata service hands them out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: String,
    pub expiration: Timestamp,
}

/// What makes credentials, and what its STS recognises.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cloud {
    pub secret: String,
}

/// What a session token carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    arn: String,
    user_id: String,
    account: String,
    expiration: Timestamp,
}

impl Cloud {
    /// With a random secret.
    pub fn generate() -> anyhow::Result<Self> {
        let mut bytes = [0; 32];
        aws_lc_rs::rand::fill(&mut bytes)?;
        Ok(Self { secret: hex(&bytes) })
    }

    /// Those of `identity-credentials/ec2/security-credentials/ec2-instance`.
    pub fn instance_credentials(
        &self,
        region: &str,
        account: &str,
        instance: &str,
        until: Timestamp,
    ) -> anyhow::Result<Credentials> {
        let arn = format!("arn:{}:sts::{account}:assumed-role/aws:ec2-instance/{instance}", partition(region));
        self.credentials(&arn, &format!("{account}:aws:ec2-instance:{instance}"), account, until)
    }

    /// Those of an assumed role; on an instance the session's name is the instance's ID.
    pub fn role_credentials(
        &self,
        region: &str,
        account: &str,
        role: &str,
        session: &str,
        until: Timestamp,
    ) -> anyhow::Result<Credentials> {
        let arn = format!("arn:{}:sts::{account}:assumed-role/{role}/{session}", partition(region));
        self.credentials(&arn, &format!("AROAEXAMPLEEXAMPLE123:{session}"), account, until)
    }

    /// For any caller that STS may speak of.
    pub fn credentials(
        &self,
        arn: &str,
        user_id: &str,
        account: &str,
        expiration: Timestamp,
    ) -> anyhow::Result<Credentials> {
        let identity =
            Identity { arn: arn.to_owned(), user_id: user_id.to_owned(), account: account.to_owned(), expiration };
        let mut sealed = serde_json::to_vec(&identity)?;
        let seal = self.mac("seal", &sealed);
        sealed.extend_from_slice(&seal);
        Ok(self.of_token(STANDARD.encode(sealed), expiration))
    }

    fn of_token(&self, session_token: String, expiration: Timestamp) -> Credentials {
        const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        let id: String = self.mac("access key", session_token.as_bytes())[..16]
            .iter()
            .map(|byte| char::from(BASE32[usize::from(byte % 32)]))
            .collect();
        let secret = STANDARD.encode(self.mac("secret key", session_token.as_bytes()));
        Credentials {
            access_key_id: format!("ASIA{id}"),
            secret_access_key: secret[..40].to_owned(),
            session_token,
            expiration,
        }
    }

    fn open(&self, session_token: &str) -> Option<Identity> {
        let sealed = STANDARD.decode(session_token).ok()?;
        let (identity, seal) = sealed.split_at_checked(sealed.len().checked_sub(32)?)?;
        verify_slices_are_equal(seal, &self.mac("seal", identity)).ok()?;
        serde_json::from_slice(identity).ok()
    }

    fn mac(&self, purpose: &str, message: &[u8]) -> Vec<u8> {
        let key = Key::new(HMAC_SHA256, format!("{purpose}:{}", self.secret).as_bytes());
        sign(&key, message).as_ref().to_vec()
    }
}

fn partition(region: &str) -> &'static str {
    match region {
        region if region.starts_with("cn-") => "aws-cn",
        region if region.starts_with("us-gov-") => "aws-us-gov",
        _ => "aws",
    }
}

/// How it answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Mode {
    #[default]
    Honest,
    /// 302 to this address.
    Redirect(String),
    /// So many bytes of XML.
    Huge(usize),
    /// Accepts the request and never answers.
    Silent,
    /// A right answer to a right request, for this account instead.
    OtherAccount(String),
    /// This status and body, to whatever is asked.
    Fixed(u16, String),
}

/// A running STS; it ends with this value.
pub struct Sts {
    pub address: SocketAddr,
    service: Arc<Service>,
    task: tokio::task::JoinHandle<()>,
}

impl Sts {
    /// `http://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
    pub fn set_mode(&self, mode: Mode) {
        *self.service.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
    }
    /// How many requests have come.
    pub fn asked(&self) -> u64 {
        self.service.asked.load(Ordering::SeqCst)
    }
}

impl Drop for Sts {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// On a free port of 127.0.0.1, in plain HTTP: what the plane's `--aws-sts-endpoint` is for.
pub async fn start(cloud: Cloud) -> anyhow::Result<Sts> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let service = Arc::new(Service { cloud, mode: Mutex::default(), asked: AtomicU64::new(0) });
    let router = router(service.clone());
    let task = tokio::spawn(async move {
        let _ = axum::serve(listener, router).await;
    });
    Ok(Sts { address, service, task })
}

/// Until the process ends.
pub async fn serve(listener: TcpListener, cloud: Cloud) -> anyhow::Result<()> {
    let service = Arc::new(Service { cloud, mode: Mutex::default(), asked: AtomicU64::new(0) });
    Ok(axum::serve(listener, router(service)).await?)
}

struct Service {
    cloud: Cloud,
    mode: Mutex<Mode>,
    asked: AtomicU64,
}

fn router(service: Arc<Service>) -> Router {
    Router::new().fallback(answer).with_state(service)
}

async fn answer(
    State(service): State<Arc<Service>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    service.asked.fetch_add(1, Ordering::SeqCst);
    let mode = service.mode.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match mode {
        Mode::Honest => identity_or_error(verify(&service.cloud, &method, &uri, &headers, &body)),
        Mode::Redirect(location) => (StatusCode::FOUND, [("location", location)]).into_response(),
        Mode::Huge(size) => ([("content-type", "text/xml")], format!("<a>{}</a>", "x".repeat(size))).into_response(),
        Mode::Silent => std::future::pending().await,
        Mode::OtherAccount(account) => {
            identity_or_error(verify(&service.cloud, &method, &uri, &headers, &body).map(|identity| Identity {
                arn: identity.arn.replace(&identity.account, &account),
                user_id: identity.user_id.replace(&identity.account, &account),
                account,
                ..identity
            }))
        }
        Mode::Fixed(status, body) => {
            (StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), body).into_response()
        }
    }
}

/// As AWS says it: status, code, message.
type AwsError = (StatusCode, &'static str, String);

fn verify(cloud: &Cloud, method: &Method, uri: &Uri, headers: &HeaderMap, body: &[u8]) -> Result<Identity, AwsError> {
    let refuse = |code, message: &str| (StatusCode::FORBIDDEN, code, message.to_owned());
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if body != b"Action=GetCallerIdentity&Version=2011-06-15" {
        return Err((StatusCode::BAD_REQUEST, "InvalidAction", "Could not find operation".to_owned()));
    }
    let authorization = header("authorization")
        .ok_or_else(|| refuse("MissingAuthenticationToken", "Request is missing Authentication Token"))?;
    let incomplete =
        || (StatusCode::BAD_REQUEST, "IncompleteSignature", "Authorization header is incomplete".to_owned());
    let parameters = authorization.strip_prefix("AWS4-HMAC-SHA256 ").ok_or_else(incomplete)?;
    let parameter = |name: &str| {
        parameters.split(',').find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('=')).ok_or_else(incomplete)
    };
    let (credential, signed_headers, signature) =
        (parameter("Credential")?, parameter("SignedHeaders")?, parameter("Signature")?);
    let [access_key, date, region, "sts", "aws4_request"] = credential.split('/').collect::<Vec<_>>()[..] else {
        return Err(incomplete());
    };

    let amz_date = header("x-amz-date").ok_or_else(incomplete)?;
    let at = DateTime::strptime("%Y%m%dT%H%M%SZ", amz_date)
        .and_then(|at| TimeZone::UTC.to_timestamp(at))
        .map_err(|_| incomplete())?;
    if !amz_date.starts_with(date) {
        return Err(refuse(
            "SignatureDoesNotMatch",
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP",
        ));
    }
    let skew = Timestamp::now().duration_since(at);
    if skew.abs() > SignedDuration::from_mins(15) {
        let way = if skew.is_positive() { "expired" } else { "not yet current" };
        return Err(refuse("SignatureDoesNotMatch", &format!("Signature {way}: {amz_date}")));
    }
    let host = header("host").unwrap_or_default();
    let of_region = format!("sts.{region}.");
    if !host.starts_with(&of_region) {
        return Err(refuse("SignatureDoesNotMatch", "Credential should be scoped to a valid region."));
    }
    let token = header("x-amz-security-token")
        .ok_or_else(|| refuse("InvalidClientTokenId", "The security token included in the request is invalid."))?;
    let identity = cloud
        .open(token)
        .ok_or_else(|| refuse("InvalidClientTokenId", "The security token included in the request is invalid."))?;
    let credentials = cloud.of_token(token.to_owned(), identity.expiration);
    if credentials.access_key_id != access_key {
        return Err(refuse("InvalidClientTokenId", "The security token included in the request is invalid."));
    }
    if identity.expiration <= Timestamp::now() {
        return Err(refuse("ExpiredToken", "The security token included in the request is expired"));
    }

    let signed: Vec<&str> = signed_headers.split(';').collect();
    let sorted = signed.is_sorted() && signed.windows(2).all(|pair| pair[0] != pair[1]);
    // Headers that AWS wants signed: host, and whatever begins with x-amz-.
    let unsigned = headers.keys().find(|name| {
        (name.as_str() == "host" || name.as_str().starts_with("x-amz-")) && !signed.contains(&name.as_str())
    });
    if let Some(name) = unsigned.filter(|_| sorted).map(|name| name.as_str()).or((!sorted).then_some(signed_headers)) {
        return Err(refuse(
            "SignatureDoesNotMatch",
            &format!("'{name}' must be a 'SignedHeader' in the AWS Authorization."),
        ));
    }
    let mut canonical = format!("{method}\n{}\n{}\n", uri.path(), uri.query().unwrap_or_default());
    for name in &signed {
        let values: Vec<_> = headers
            .get_all(*name)
            .iter()
            .map(|value| value.to_str().unwrap_or_default().split_ascii_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        let _ = writeln!(canonical, "{name}:{}", values.join(","));
    }
    let _ = write!(canonical, "\n{signed_headers}\n{}", hex(digest(&SHA256, body).as_ref()));
    let scope = format!("{date}/{region}/sts/aws4_request");
    let to_sign =
        format!("AWS4-HMAC-SHA256\n{amz_date}\n{scope}\n{}", hex(digest(&SHA256, canonical.as_bytes()).as_ref()));
    let mut key = format!("AWS4{}", credentials.secret_access_key).into_bytes();
    for part in [date, region, "sts", "aws4_request"] {
        key = hmac(&key, part.as_bytes());
    }
    let expected = hex(&hmac(&key, to_sign.as_bytes()));
    verify_slices_are_equal(expected.as_bytes(), signature.as_bytes()).map_err(|_| {
        refuse(
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key and signing method. Consult the service documentation for details.",
        )
    })?;
    Ok(identity)
}

fn identity_or_error(outcome: Result<Identity, AwsError>) -> Response {
    let (status, body) = match outcome {
        Ok(Identity { arn, user_id, account, .. }) => (
            StatusCode::OK,
            format!(
                "<GetCallerIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\n  <GetCallerIdentityResult>\n    <Arn>{arn}</Arn>\n    <UserId>{user_id}</UserId>\n    <Account>{account}</Account>\n  </GetCallerIdentityResult>\n  <ResponseMetadata>\n    <RequestId>01234567-89ab-cdef-0123-456789abcdef</RequestId>\n  </ResponseMetadata>\n</GetCallerIdentityResponse>\n"
            ),
        ),
        Err((status, code, message)) => (
            status,
            format!(
                "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\n  <Error>\n    <Type>Sender</Type>\n    <Code>{code}</Code>\n    <Message>{message}</Message>\n  </Error>\n  <RequestId>01234567-89ab-cdef-0123-456789abcdef</RequestId>\n</ErrorResponse>\n"
            ),
        ),
    };
    (status, [("content-type", "text/xml")], body).into_response()
}

fn hmac(key: &[u8], message: &[u8]) -> Vec<u8> {
    sign(&Key::new(HMAC_SHA256, key), message).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign as sigv4};
    use aws_sigv4::sign::v4;
    use std::time::SystemTime;

    const BODY: &str = "Action=GetCallerIdentity&Version=2011-06-15";

    /// Signed by AWS's own library; what it signed and the headers that it added.
    fn signed(credentials: &Credentials, binding: &str) -> HeaderMap {
        let identity = aws_credential_types::Credentials::new(
            &credentials.access_key_id,
            &credentials.secret_access_key,
            Some(credentials.session_token.clone()),
            None,
            "test",
        )
        .into();
        let parameters = v4::SigningParams::builder()
            .identity(&identity)
            .region("us-east-2")
            .name("sts")
            .time(SystemTime::now())
            .settings(SigningSettings::default())
            .build()
            .unwrap()
            .into();
        let headers = [("content-type", "application/x-www-form-urlencoded"), ("x-onboarding-binding", binding)];
        let request = SignableRequest::new(
            "POST",
            "https://sts.us-east-2.amazonaws.com/",
            headers.into_iter(),
            SignableBody::Bytes(BODY.as_bytes()),
        )
        .unwrap();
        let (instructions, _) = sigv4(request, &parameters).unwrap().into_parts();
        let mut all = HeaderMap::new();
        all.insert("host", "sts.us-east-2.amazonaws.com".parse().unwrap());
        for (name, value) in headers.into_iter().chain(instructions.headers()) {
            all.insert(http::HeaderName::try_from(name).unwrap(), value.parse().unwrap());
        }
        all
    }

    fn code(outcome: Result<Identity, AwsError>) -> &'static str {
        outcome.map(|_| "").unwrap_or_else(|(_, code, _)| code)
    }

    #[test]
    fn what_the_aws_library_signs_is_recognised_and_nothing_else() {
        let cloud = Cloud::generate().unwrap();
        let until = Timestamp::now() + SignedDuration::from_hours(1);
        let credentials =
            cloud.instance_credentials("us-east-2", "123456789012", "i-1234567890abcdef0", until).unwrap();
        let uri = Uri::from_static("/");
        let ask = |cloud: &Cloud, headers: &HeaderMap| verify(cloud, &Method::POST, &uri, headers, BODY.as_bytes());
        let good = signed(&credentials, "abc");
        assert_eq!(
            ask(&cloud, &good).unwrap().arn,
            "arn:aws:sts::123456789012:assumed-role/aws:ec2-instance/i-1234567890abcdef0"
        );

        let mut other_binding = good.clone();
        other_binding.insert("x-onboarding-binding", "abd".parse().unwrap());
        assert_eq!(code(ask(&cloud, &other_binding)), "SignatureDoesNotMatch");
        let mut other_host = good.clone();
        other_host.insert("host", "sts.us-east-1.amazonaws.com".parse().unwrap());
        assert_eq!(code(ask(&cloud, &other_host)), "SignatureDoesNotMatch");
        assert_eq!(code(ask(&Cloud::generate().unwrap(), &good)), "InvalidClientTokenId");
        let expired =
            cloud.instance_credentials("us-east-2", "123456789012", "i-1234567890abcdef0", Timestamp::now()).unwrap();
        assert_eq!(code(ask(&cloud, &signed(&expired, "abc"))), "ExpiredToken");
        assert_eq!(code(verify(&cloud, &Method::POST, &uri, &good, b"Action=GetSessionToken")), "InvalidAction");
    }
}
