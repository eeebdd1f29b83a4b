//! A task of Amazon ECS: what its role's credentials prove, and what the task metadata endpoint says besides.
//!
//! Both are found by environment variables that ECS gives to every container of a task.

use crate::host::aws::{ANSWER_WITHIN, AwsError, Metadata, RoleCredentials, sign_caller_identity};
use crate::host::{Audience, Evidence, Host, HostError};
use async_trait::async_trait;
use http::{Method, Uri};
use jiff::Timestamp;
use onboarding_core::registration::{ConnectedOver, HostAddress};
use onboarding_wire::AWS_ECS_CREDENTIAL;
use onboarding_wire::onboarding::AwsEcsCredential;
use prost::Message;
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// What ECS tells a container by its environment. It has no `Debug`: it may hold a secret.
#[derive(Clone, Default)]
pub struct Environment {
    /// [`METADATA_VARIABLE`]: `http://169.254.170.2/v4/<container>`.
    pub metadata_uri: Option<String>,
    /// [`RELATIVE_URI_VARIABLE`]: a path at 169.254.170.2.
    pub credentials_relative_uri: Option<String>,
    /// [`FULL_URI_VARIABLE`], where there is no relative one.
    pub credentials_full_uri: Option<String>,
    /// [`TOKEN_VARIABLE`]: what the full URI wants to be given.
    pub authorization_token: Option<String>,
    /// [`TOKEN_FILE_VARIABLE`]: the same in a file, which is read each time.
    pub authorization_token_file: Option<PathBuf>,
}

pub const METADATA_VARIABLE: &str = "ECS_CONTAINER_METADATA_URI_V4";
pub const RELATIVE_URI_VARIABLE: &str = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI";
pub const FULL_URI_VARIABLE: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
pub const TOKEN_VARIABLE: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN";
pub const TOKEN_FILE_VARIABLE: &str = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE";

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        let get = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            metadata_uri: get(METADATA_VARIABLE),
            credentials_relative_uri: get(RELATIVE_URI_VARIABLE),
            credentials_full_uri: get(FULL_URI_VARIABLE),
            authorization_token: get(TOKEN_VARIABLE),
            authorization_token_file: get(TOKEN_FILE_VARIABLE).map(PathBuf::from),
        }
    }

    /// Whether this container is one of an ECS task.
    pub fn is_of_a_task(&self) -> bool {
        self.metadata_uri.is_some()
    }
}

/// This task.
#[derive(Clone)]
pub struct Ecs {
    metadata: Endpoint,
    /// `None`: the task has no role.
    credentials: Option<Endpoint>,
    token: Option<String>,
    token_file: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum EcsError {
    #[error(transparent)]
    Aws(#[from] AwsError),
    #[error(
        "the environment variable {METADATA_VARIABLE} isn't set: this is no container of an ECS task (or its platform version is older than 1.4.0)"
    )]
    NotATask,
    #[error("the environment variable {variable} {problem}")]
    Variable { variable: &'static str, problem: String },
    #[error(
        "the task has no IAM role, and nothing else proves who it is: set taskRoleArn in its task definition (executionRoleArn isn't it)"
    )]
    NoRole,
    #[error("can't read the file that {TOKEN_FILE_VARIABLE} names")]
    TokenFile(#[source] std::io::Error),
    #[error(
        "the task's network mode is {0:?}: set networkMode awsvpc in its task definition, so that the task has an address of its own"
    )]
    NetworkMode(String),
}

/// Where ECS hands out the credentials of a task's role.
const CREDENTIALS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)), 80);
const LONGEST_TOKEN: usize = 16 * 1024;

#[derive(Clone)]
struct Endpoint {
    service: Metadata,
    path: String,
}

/// `${ECS_CONTAINER_METADATA_URI_V4}/task`
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Task {
    cluster: String,
    #[serde(rename = "TaskARN")]
    task_arn: String,
    availability_zone: String,
}

/// `${ECS_CONTAINER_METADATA_URI_V4}`
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    #[serde(default)]
    networks: Vec<Network>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Network {
    #[serde(default)]
    network_mode: String,
    #[serde(default, rename = "IPv4Addresses")]
    ipv4_addresses: Vec<IpAddr>,
    #[serde(default, rename = "IPv6Addresses")]
    ipv6_addresses: Vec<IpAddr>,
}

impl Ecs {
    /// Errors say which variable is missing, or isn't what ECS makes it.
    pub fn new(environment: &Environment) -> Result<Self, EcsError> {
        let metadata = environment.metadata_uri.as_deref().ok_or(EcsError::NotATask)?;
        let metadata = endpoint(METADATA_VARIABLE, metadata, None)?;
        let relative = environment.credentials_relative_uri.as_deref();
        let credentials = match (relative, environment.credentials_full_uri.as_deref()) {
            (Some(path), _) => Some(endpoint(RELATIVE_URI_VARIABLE, path, Some(CREDENTIALS))?),
            (None, Some(uri)) => Some(endpoint(FULL_URI_VARIABLE, uri, None)?),
            (None, None) => None,
        };
        // The token is for whom the full URI names, and for nobody else.
        let full = relative.is_none();
        Ok(Self {
            metadata,
            credentials,
            token: environment.authorization_token.clone().filter(|_| full),
            token_file: environment.authorization_token_file.clone().filter(|_| full),
        })
    }

    async fn task(&self) -> Result<Task, AwsError> {
        let path = format!("{}/task", self.metadata.path);
        self.metadata.json(&path).await
    }

    async fn credentials(&self) -> Result<RoleCredentials, EcsError> {
        let Endpoint { service, path } = self.credentials.as_ref().ok_or(EcsError::NoRole)?;
        let token = match &self.token_file {
            Some(file) => Some(read_token(file).await.map_err(EcsError::TokenFile)?),
            None => self.token.clone(),
        };
        let header = token.as_deref().map(|token| ("authorization", token));
        let text = service.ask(Method::GET, path, header.as_slice(), ANSWER_WITHIN).await?;
        Ok(RoleCredentials::read(path, &text)?)
    }
}

impl Endpoint {
    async fn json<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, AwsError> {
        let text = self.service.ask(Method::GET, path, &[], ANSWER_WITHIN).await?;
        serde_json::from_str(&text).map_err(|error| AwsError::Garbage { path: path.to_owned(), why: error.to_string() })
    }
}

async fn read_token(file: &std::path::Path) -> std::io::Result<String> {
    let text = tokio::fs::read_to_string(file).await?;
    let text = text.trim();
    match !text.is_empty() && text.len() <= LONGEST_TOKEN && text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        true => Ok(text.to_owned()),
        false => Err(std::io::Error::other("it isn't one line of text")),
    }
}

/// `at`: the value is a path there. Otherwise it is `http://ADDRESS[:PORT]/PATH`, of an address that is on no network:
/// what is asked there is sent credentials in plain text.
fn endpoint(variable: &'static str, value: &str, at: Option<SocketAddr>) -> Result<Endpoint, EcsError> {
    let wrong = |problem: &str| EcsError::Variable { variable, problem: problem.to_owned() };
    if at.is_some() && !value.starts_with('/') {
        return Err(wrong("must be a path"));
    }
    let uri: Uri = value.parse().map_err(|_| wrong("isn't a URI"))?;
    let address = match at {
        Some(address) => address,
        None => {
            if uri.scheme_str() != Some("http") {
                return Err(wrong("must begin with http://"));
            }
            let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
            let ip: IpAddr = host.parse().map_err(|_| wrong("must name an IP address"))?;
            if !is_local(ip) {
                return Err(wrong("names an address that isn't of this host or link-local"));
            }
            SocketAddr::new(ip, uri.port_u16().unwrap_or(80))
        }
    };
    let path = uri.path_and_query().map_or("/", |path| path.as_str()).trim_end_matches('/').to_owned();
    let hint = "is the ECS agent of this task's host still there?";
    Ok(Endpoint { service: Metadata { address, hint }, path })
}

fn is_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_link_local(),
        // AWS's own link-local services of IPv6 are at fd00:ec2::.
        IpAddr::V6(ip) => ip.is_loopback() || ip.segments()[..2] == [0xfd00, 0x0ec2],
    }
}

/// `us-east-2` of `arn:aws:ecs:us-east-2:123456789012:task/...`
fn region(task_arn: &str) -> Option<&str> {
    let region = task_arn.split(':').nth(3)?;
    let all = region.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    ((1..=64).contains(&region.len()) && all).then_some(region)
}

#[async_trait]
impl Host for Ecs {
    /// What the task says of itself, and its role's request to STS.
    async fn evidence(&self, audience: &Audience, now: Timestamp) -> Result<Evidence, HostError> {
        let task = self.task().await.map_err(EcsError::Aws)?;
        let region = region(&task.task_arn).ok_or_else(|| AwsError::Garbage {
            path: format!("{}/task", self.metadata.path),
            why: "its TaskARN names no region".to_owned(),
        });
        let region = region.map_err(EcsError::Aws)?.to_owned();
        let credentials = self.credentials().await?;
        let role = sign_caller_identity(&credentials, &region, audience, now).map_err(EcsError::Aws)?;
        let message = AwsEcsCredential {
            task_arn: task.task_arn,
            cluster: task.cluster,
            availability_zone: task.availability_zone,
            role: Some(role),
        };
        Ok(Evidence {
            credential: prost_types::Any { type_url: AWS_ECS_CREDENTIAL.to_owned(), value: message.encode_to_vec() },
            expires_at: None,
            origin: "ECS task role".to_owned(),
        })
    }

    /// Those of the task's own interface. A public one is on no interface, and the metadata endpoint doesn't tell it.
    async fn addresses(&self) -> Result<Vec<HostAddress>, HostError> {
        let container: Container = self.metadata.json(&self.metadata.path).await.map_err(EcsError::Aws)?;
        let mut addresses = Vec::new();
        for network in container.networks {
            if network.network_mode != "awsvpc" {
                return Err(EcsError::NetworkMode(network.network_mode.chars().take(40).collect()).into());
            }
            for ip in network.ipv4_addresses.into_iter().chain(network.ipv6_addresses) {
                tracing::info!(address = %ip, "took an address from the task metadata endpoint");
                addresses.push(HostAddress { ip, kind: ConnectedOver::Vpc });
            }
        }
        match addresses.is_empty() {
            false => Ok(addresses),
            true => Err(EcsError::Aws(AwsError::Garbage {
                path: self.metadata.path.clone(),
                why: "it names no address".to_owned(),
            })
            .into()),
        }
    }

    fn describe(&self) -> String {
        "AWS ECS task".to_owned()
    }
}

#[cfg(test)]
#[path = "ecs_tests.rs"]
mod tests;
