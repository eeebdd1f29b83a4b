//! What ECS puts beside one task: the task metadata endpoint (version 4), and the credentials of the task's role.

use crate::emulator::{self, Emulator, Shared};
use crate::imds::Role;
use crate::sts::Cloud;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::net::IpAddr;
use std::sync::PoisonError;
use tokio::net::TcpListener;

/// Where ECS has both.
pub const ADDRESS: &str = "169.254.170.2:80";
/// `ECS_CONTAINER_METADATA_URI_V4` is `http://169.254.170.2` and this.
pub const METADATA_PATH: &str = "/v4/cd189a933e5849daa93386466019ab50-2495160603";
/// `AWS_CONTAINER_CREDENTIALS_RELATIVE_URI`.
pub const CREDENTIALS_PATH: &str = "/v2/credentials/3fe6a5d4-2c08-4dcd-8b5a-bd0c0d4f3c8e";

/// One task, as it can be written to a file for another process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub task_arn: String,
    /// A name, or an ARN as on container instances.
    pub cluster: String,
    /// `None`: an old platform version.
    pub zone: Option<String>,
    pub network_mode: String,
    pub addresses: Vec<IpAddr>,
    pub role: Option<Role>,
    /// What `authorization` must be where credentials are asked for.
    #[serde(default)]
    pub authorization: Option<String>,
}

/// What a task is, before its role's credentials are made.
#[derive(Debug, Clone)]
pub struct Task {
    pub account: String,
    pub region: String,
    pub zone: String,
    pub cluster: String,
    pub task_id: String,
    pub role: Option<String>,
    pub address: IpAddr,
}

impl Config {
    /// A task of `cloud` with `networkMode: awsvpc`; its role's session has the task's name, as ECS does it. Good for six hours.
    pub fn new(task: &Task, cloud: &Cloud) -> anyhow::Result<Self> {
        let Task { account, region, zone, cluster, task_id, role, address } = task;
        let until = Timestamp::now() + SignedDuration::from_hours(6);
        let role = match role {
            Some(name) => {
                let credentials = cloud.role_credentials(region, account, name, task_id, until)?;
                Some(Role { name: name.clone(), credentials })
            }
            None => None,
        };
        Ok(Self {
            task_arn: format!("arn:aws:ecs:{region}:{account}:task/{cluster}/{task_id}"),
            cluster: cluster.clone(),
            zone: Some(zone.clone()),
            network_mode: "awsvpc".to_owned(),
            addresses: vec![*address],
            role,
            authorization: None,
        })
    }
}

/// What runs beside one task; it ends with this value.
pub type Ecs = Emulator<Config>;

/// On a free port of 127.0.0.1.
pub async fn start(config: Config) -> anyhow::Result<Ecs> {
    Emulator::start(config, router).await
}

/// Until the process ends.
pub async fn serve(listener: TcpListener, config: Config) -> anyhow::Result<()> {
    emulator::serve(listener, config, router).await
}

fn router(config: Shared<Config>) -> Router {
    Router::new().fallback(answer).with_state(config)
}

async fn answer(State(config): State<Shared<Config>>, request: Request) -> Response {
    let config = config.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if request.method() != Method::GET {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let said = match request.uri().path() {
        METADATA_PATH => container(&config),
        path if path.strip_prefix(METADATA_PATH) == Some("/task") => task(&config),
        CREDENTIALS_PATH => {
            let given = request.headers().get("authorization").and_then(|value| value.to_str().ok());
            if config.authorization.is_some() && given != config.authorization.as_deref() {
                return StatusCode::UNAUTHORIZED.into_response();
            }
            let Some(Role { name, credentials }) = &config.role else {
                return (StatusCode::BAD_REQUEST, json!({"code": "NoRole", "message": "no role"}).to_string())
                    .into_response();
            };
            let account = config.task_arn.split(':').nth(4).unwrap_or_default();
            json!({
                "RoleArn": format!("arn:aws:iam::{account}:role/{name}"),
                "AccessKeyId": credentials.access_key_id,
                "SecretAccessKey": credentials.secret_access_key,
                "Token": credentials.session_token,
                "Expiration": credentials.expiration.to_string(),
            })
        }
        _ => return StatusCode::NOT_FOUND.into_response(),
    };
    ([("content-type", "application/json")], said.to_string()).into_response()
}

fn task(config: &Config) -> serde_json::Value {
    let mut task = json!({
        "Cluster": config.cluster,
        "TaskARN": config.task_arn,
        "Family": "ratings",
        "Revision": "3",
        "DesiredStatus": "RUNNING",
        "KnownStatus": "RUNNING",
        "Limits": {"CPU": 0.25, "Memory": 512},
        "PullStartedAt": "2026-11-24T10:59:01.000000000Z",
        "Containers": [container(config)],
        "LaunchType": "FARGATE",
    });
    if let Some(zone) = &config.zone {
        task["AvailabilityZone"] = json!(zone);
    }
    task
}

fn container(config: &Config) -> serde_json::Value {
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = config.addresses.iter().copied().partition(IpAddr::is_ipv4);
    let mut network = json!({ "NetworkMode": config.network_mode, "IPv4Addresses": v4, "AttachmentIndex": 0 });
    if !v6.is_empty() {
        network["IPv6Addresses"] = json!(v6);
    }
    json!({
        "DockerId": "cd189a933e5849daa93386466019ab50-2495160603",
        "Name": "onboarding-agent",
        "DockerName": "onboarding-agent",
        "Image": "123456789012.dkr.ecr.us-east-2.amazonaws.com/onboarding-agent:latest",
        "Labels": {
            "com.amazonaws.ecs.cluster": config.cluster,
            "com.amazonaws.ecs.task-arn": config.task_arn,
        },
        "DesiredStatus": "RUNNING",
        "KnownStatus": "RUNNING",
        "Type": "NORMAL",
        "Networks": [network],
    })
}
