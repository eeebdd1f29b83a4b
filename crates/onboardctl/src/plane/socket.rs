//! The plane's admin socket: HTTP/1.1 with JSON over a Unix socket that only the plane's user may open.

use anyhow::{Context, anyhow, bail};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// Where the plane is
#[derive(Debug, Clone, clap::Args)]
pub struct Socket {
    /// The plane's admin socket [env: ONBOARDING_ADMIN_SOCKET=] [default: admin.sock in the data directory]
    #[arg(long, global = true, value_name = "PATH", help_heading = "Of a standalone plane")]
    socket: Option<PathBuf>,
    /// The plane's data directory [env: ONBOARDING_DATA_DIR=] [default: /var/lib/onboarding-plane]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Of a standalone plane")]
    data_dir: Option<PathBuf>,
}

const DATA_DIR: &str = "/var/lib/onboarding-plane";
const NAME: &str = "admin.sock";
/// The socket; the data directory.
const VARIABLES: [&str; 2] = ["ONBOARDING_ADMIN_SOCKET", "ONBOARDING_DATA_DIR"];
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// A hundred thousand registrations have less.
const LARGEST_ANSWER: usize = 512 << 20;

impl Socket {
    /// On the command line.
    pub fn is_given(&self) -> bool {
        self.socket.is_some() || self.data_dir.is_some()
    }

    /// On the command line or in the environment.
    pub fn is_named(&self) -> bool {
        self.is_given() || VARIABLES.iter().any(|name| set(name).is_some())
    }

    /// Also one that this user may not open.
    pub fn is_there(&self) -> bool {
        !matches!(self.path().symlink_metadata(), Err(error) if error.kind() != io::ErrorKind::PermissionDenied)
    }

    /// What the command line says goes before what the environment says.
    pub fn path(&self) -> PathBuf {
        let below = |dir: PathBuf| dir.join(NAME);
        self.socket
            .clone()
            .or_else(|| self.data_dir.clone().map(below))
            .or_else(|| set(VARIABLES[0]))
            .or_else(|| set(VARIABLES[1]).map(below))
            .unwrap_or_else(|| below(DATA_DIR.into()))
    }

    /// The answer to a GET that succeeded.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, path)
    }

    pub fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::DELETE, path)
    }

    pub fn post(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::POST, path)
    }

    /// Every live registration, as WorkloadAutoRegistration resources.
    pub fn workloads(&self) -> anyhow::Result<Vec<Value>> {
        match self.get("/v1/workloads")? {
            Value::Object(mut list) => match list.remove("items") {
                Some(Value::Array(items)) => Ok(items),
                _ => bail!("the plane's list of workloads has no items: is it of another version?"),
            },
            _ => bail!("the plane's list of workloads isn't one: is it of another version?"),
        }
    }

    fn call(&self, method: Method, path: &str) -> anyhow::Result<Value> {
        let socket = self.path();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting up")?;
        let answer = runtime.block_on(async {
            tokio::time::timeout(ANSWER_WITHIN, exchange(&socket, method, path))
                .await
                .unwrap_or_else(|_| Err(anyhow!("the plane didn't answer within {} s", ANSWER_WITHIN.as_secs())))
        });
        let (status, body) = answer.with_context(|| format!("asking the plane at {}", socket.display()))?;
        let value: Result<Value, _> = serde_json::from_slice(&body);
        match value {
            Ok(value) if status.is_success() => Ok(value),
            Ok(value) => match value.get("message").and_then(Value::as_str) {
                // Only a name that is deleted is looked for.
                Some(message) if status == StatusCode::NOT_FOUND => {
                    bail!("{message}; onboardctl workloads lists those that there are")
                }
                Some(message) => bail!("{message}"),
                None => bail!("the plane answered {status} to {path}"),
            },
            Err(error) if status.is_success() => {
                Err(anyhow::Error::new(error).context(format!("the plane's answer to {path} isn't JSON")))
            }
            Err(_) => bail!("the plane answered {status} to {path}"),
        }
    }
}

async fn exchange(socket: &Path, method: Method, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
    let stream = UnixStream::connect(socket).await.map_err(|error| anyhow!("{error}; {}", way_out(&error)))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the runtime, after the answer.
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "onboarding-plane")
        .header(header::ACCEPT, "application/json")
        .body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), LARGEST_ANSWER).collect().await.map_err(|error| anyhow!(error))?;
    Ok((status, body.to_bytes()))
}

fn set(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "only the plane's user may ask it: run this as that user or as root (sudo)",
        io::ErrorKind::ConnectionRefused => "no plane listens there: it was killed, or isn't up yet",
        _ => {
            "is a standalone plane running on this machine? Name its data directory with --data-dir, or the socket with --socket; one in a cluster is asked with --kubeconfig or --context"
        }
    }
}
