//! The instance metadata service of one EC2 instance: IMDSv2, as far as agents and their tests ask it.

use crate::cms::RegionKey;
use crate::emulator::{self, Emulator, Shared};
use crate::sts::{Cloud, Credentials};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;

/// One instance, as it can be written to a file for another process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub region: String,
    pub zone: String,
    pub account: String,
    pub instance_id: String,
    #[serde(default)]
    pub private_ip: Option<String>,
    #[serde(default)]
    pub public_ip: Option<String>,
    /// The identity document in JSON.
    pub document: String,
    /// The same signed, as `rsa2048` serves it.
    pub signed_document: String,
    /// The instance's own identity; `None`: 404, as on instances that don't have it.
    #[serde(default)]
    pub instance_credentials: Option<Credentials>,
    /// The instance profile's role.
    #[serde(default)]
    pub role: Option<Role>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Role {
    pub name: String,
    pub credentials: Credentials,
}

/// What an instance is, before its papers are made.
#[derive(Debug, Clone)]
pub struct Instance {
    pub account: String,
    pub region: String,
    pub zone: String,
    pub instance_id: String,
    pub role: Option<String>,
    pub private_ip: String,
}

impl Instance {
    /// The content of its identity document, laid out as AWS lays it out.
    pub fn document(&self) -> String {
        let Self { account, region, zone, instance_id, private_ip, .. } = self;
        let pending = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
        format!(
            "{{\n  \"accountId\" : \"{account}\",\n  \"architecture\" : \"x86_64\",\n  \"availabilityZone\" : \"{zone}\",\n  \"billingProducts\" : null,\n  \"devpayProductCodes\" : null,\n  \"marketplaceProductCodes\" : null,\n  \"imageId\" : \"ami-0fa9e1f64142cde17\",\n  \"instanceId\" : \"{instance_id}\",\n  \"instanceType\" : \"t3.medium\",\n  \"kernelId\" : null,\n  \"pendingTime\" : \"{pending}\",\n  \"privateIp\" : \"{private_ip}\",\n  \"ramdiskId\" : null,\n  \"region\" : \"{region}\",\n  \"version\" : \"2017-09-30\"\n}}"
        )
    }
}

impl Config {
    /// An instance of `cloud`, with its own identity and the credentials of its role, good for six hours.
    pub fn new(instance: &Instance, key: &RegionKey, cloud: &Cloud) -> anyhow::Result<Self> {
        let until = Timestamp::now() + SignedDuration::from_hours(6);
        let document = instance.document();
        Ok(Self {
            region: instance.region.clone(),
            zone: instance.zone.clone(),
            account: instance.account.clone(),
            instance_id: instance.instance_id.clone(),
            private_ip: Some(instance.private_ip.clone()),
            public_ip: None,
            signed_document: key.document(document.as_bytes())?,
            document,
            instance_credentials: Some(cloud.instance_credentials(
                &instance.region,
                &instance.account,
                &instance.instance_id,
                until,
            )?),
            role: match &instance.role {
                Some(name) => Some(Role {
                    name: name.clone(),
                    credentials: cloud.role_credentials(
                        &instance.region,
                        &instance.account,
                        name,
                        &instance.instance_id,
                        until,
                    )?,
                }),
                None => None,
            },
        })
    }
}

/// A running metadata service; it ends with this value.
pub type Imds = Emulator<Config>;

/// On a free port of 127.0.0.1.
pub async fn start(config: Config) -> anyhow::Result<Imds> {
    Emulator::start(config, router).await
}

/// Until the process ends.
pub async fn serve(listener: TcpListener, config: Config) -> anyhow::Result<()> {
    emulator::serve(listener, config, router).await
}

struct Service {
    config: Shared<Config>,
    /// Each token with its end.
    tokens: Mutex<HashMap<String, Timestamp>>,
}

fn router(config: Shared<Config>) -> Router {
    Router::new().fallback(answer).with_state(Arc::new(Service { config, tokens: Mutex::default() }))
}

const TOKEN_PATH: &str = "/latest/api/token";
const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";

async fn answer(State(service): State<Arc<Service>>, request: Request) -> Response {
    let headers = request.headers();
    // IMDSv2 gives no token to what came through a proxy.
    if headers.contains_key("x-forwarded-for") {
        return StatusCode::FORBIDDEN.into_response();
    }
    if request.uri().path() == TOKEN_PATH {
        return match *request.method() {
            Method::PUT => service.token(headers),
            _ => StatusCode::METHOD_NOT_ALLOWED.into_response(),
        };
    }
    if request.method() != Method::GET {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    if !service.knows(headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let config = service.config.lock().unwrap_or_else(PoisonError::into_inner).clone();
    match say(&config, request.uri().path()) {
        Some(text) => ([("content-type", "text/plain")], Bytes::from(text)).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

impl Service {
    fn token(&self, headers: &HeaderMap) -> Response {
        let seconds = headers
            .get(TTL_HEADER)
            .and_then(|value| value.to_str().ok()?.parse::<i64>().ok())
            .filter(|seconds| (1..=21600).contains(seconds));
        let Some(seconds) = seconds else {
            return StatusCode::BAD_REQUEST.into_response();
        };
        let mut bytes = [0; 40];
        if aws_lc_rs::rand::fill(&mut bytes).is_err() {
            return StatusCode::INTERNAL_SERVER_ERROR.into_response();
        }
        let token = format!("{}==", URL_SAFE_NO_PAD.encode(bytes));
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.insert(token.clone(), Timestamp::now() + SignedDuration::from_secs(seconds));
        ([(TTL_HEADER, seconds.to_string())], token).into_response()
    }

    fn knows(&self, headers: &HeaderMap) -> bool {
        let token = headers.get(TOKEN_HEADER).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(token).is_some_and(|until| *until > Timestamp::now())
    }
}

fn say(config: &Config, path: &str) -> Option<String> {
    let path = path.strip_prefix("/latest/")?;
    let role = config.role.as_ref();
    Some(match path {
        "dynamic/instance-identity/document" => config.document.clone(),
        "dynamic/instance-identity/rsa2048" => config.signed_document.clone(),
        "meta-data/instance-id" => config.instance_id.clone(),
        "meta-data/local-ipv4" => config.private_ip.clone()?,
        "meta-data/public-ipv4" => config.public_ip.clone()?,
        "meta-data/placement/region" => config.region.clone(),
        "meta-data/placement/availability-zone" => config.zone.clone(),
        "meta-data/identity-credentials/ec2/info" => {
            json!({"Code": "Success", "LastUpdated": now(), "AccountId": config.account}).to_string()
        }
        "meta-data/identity-credentials/ec2/security-credentials/ec2-instance" => {
            credentials(config.instance_credentials.as_ref()?)
        }
        "meta-data/iam/security-credentials" | "meta-data/iam/security-credentials/" => role?.name.clone(),
        path => {
            let name = path.strip_prefix("meta-data/iam/security-credentials/")?;
            credentials(&role.filter(|role| role.name == name)?.credentials)
        }
    })
}

fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn credentials(credentials: &Credentials) -> String {
    let answer = json!({
        "Code": "Success",
        "LastUpdated": now(),
        "Type": "AWS-HMAC",
        "AccessKeyId": credentials.access_key_id,
        "SecretAccessKey": credentials.secret_access_key,
        "Token": credentials.session_token,
        "Expiration": credentials.expiration,
    });
    format!("{answer:#}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    /// Status and body.
    async fn ask(address: SocketAddr, method: &str, path: &str, header: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: 169.254.169.254\r\nconnection: close\r\n{header}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn it_says_nothing_without_a_token_and_then_what_the_instance_is() {
        let key = RegionKey::generate("us-east-2").unwrap();
        let instance = Instance {
            account: "123456789012".to_owned(),
            region: "us-east-2".to_owned(),
            zone: "us-east-2b".to_owned(),
            instance_id: "i-1234567890abcdef0".to_owned(),
            role: Some("ratings-role".to_owned()),
            private_ip: "10.0.0.1".to_owned(),
        };
        let imds = start(Config::new(&instance, &key, &Cloud::generate().unwrap()).unwrap()).await.unwrap();
        let at = imds.address;
        assert_eq!(ask(at, "GET", "/latest/meta-data/instance-id", "").await.0, 401);
        assert_eq!(ask(at, "GET", "/latest/meta-data/instance-id", "x-aws-ec2-metadata-token: x\r\n").await.0, 401);
        assert_eq!(ask(at, "PUT", TOKEN_PATH, "").await.0, 400);
        assert_eq!(ask(at, "PUT", TOKEN_PATH, &format!("{TTL_HEADER}: 21601\r\n")).await.0, 400);
        assert_eq!(ask(at, "PUT", TOKEN_PATH, &format!("{TTL_HEADER}: 60\r\nx-forwarded-for: a\r\n")).await.0, 403);
        let (status, token) = ask(at, "PUT", TOKEN_PATH, &format!("{TTL_HEADER}: 60\r\n")).await;
        assert_eq!(status, 200);
        let header = format!("{TOKEN_HEADER}: {token}\r\n");
        let get = async |path: &str| ask(at, "GET", &format!("/latest/{path}"), &header).await;
        for (path, text) in [
            ("meta-data/instance-id", "i-1234567890abcdef0"),
            ("meta-data/local-ipv4", "10.0.0.1"),
            ("meta-data/placement/region", "us-east-2"),
            ("meta-data/iam/security-credentials/", "ratings-role"),
        ] {
            assert_eq!(get(path).await, (200, text.to_owned()), "{path}");
        }
        for path in [
            "meta-data/iam/security-credentials/ratings-role",
            "meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
        ] {
            let (status, text) = get(path).await;
            let credentials: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!((status, credentials["Code"].as_str()), (200, Some("Success")), "{path}");
        }
        assert!(get("dynamic/instance-identity/rsa2048").await.1.starts_with("MIAG"));
        assert_eq!(get("meta-data/public-ipv4").await.0, 404);
        assert_eq!(get("meta-data/iam/security-credentials/other").await.0, 404);
        imds.change(|config| config.role = None);
        assert_eq!(get("meta-data/iam/security-credentials/").await.0, 404);
    }
}
