//! Plugins: an executable that stands for one unary call (reference, section 2). The request goes to its standard input, the response
//! or a `google.rpc.Status` comes from its standard output, and what it says on standard error goes to the log.
//!
//! A plugin is somebody else's program: it may hang, print megabytes, leave children behind or die, and each of these has an error
//! that names it.

use crate::host::Evidence;
use jiff::Timestamp;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use onboarding_core::registration::{ConnectedOver, HostAddress};
use onboarding_kinds::agent::{ConnectionSettings, Plugin};
use onboarding_runtime::backoff::Backoff;
use onboarding_wire::JWT_CREDENTIAL;
use onboarding_wire::onboarding::JwtCredential;
use prost::Message;
use serde_json::{Map, Value};
use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::time::timeout;

/// Calls plugins with the AgentConfiguration's timeout and retry policy.
#[derive(Debug)]
pub struct Plugins {
    settings: ConnectionSettings,
}

/// What `GetCredential` gave.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    pub token: String,
    pub expires_at: Timestamp,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credential(until {})", self.expires_at)
    }
}

/// What went wrong with which plugin.
#[derive(Debug, thiserror::Error)]
#[error("plugin {name}: {problem}")]
pub struct PluginError {
    pub name: String,
    pub problem: Problem,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("{0} is missing; install it, or set the plugin's path in agent.config.yaml")]
    Missing(String),
    #[error("{0} is not executable by the agent's user; run `chmod a+x` on it")]
    NotExecutable(String),
    #[error("{path} can't be started: {why}")]
    NotStarted { path: String, why: String },
    #[error("did not finish within {0:?} and was killed, with everything that it started")]
    Hung(Duration),
    #[error("was killed by signal {0}")]
    Killed(i32),
    #[error("printed more than {MOST_OUTPUT} bytes")]
    TooMuch,
    #[error("exited with 0 and printed nothing; a response in JSON was expected")]
    Nothing,
    #[error("printed what is not {expected}: {why}")]
    Garbage { expected: &'static str, why: String },
    #[error("exited with {0} and printed no google.rpc.Status in JSON")]
    Failed(i32),
    #[error("answered {message:?} (code {code})")]
    Status { code: i32, message: String },
}

impl Problem {
    /// Worth trying again by itself: google.rpc.Code UNAVAILABLE, DEADLINE_EXCEEDED, and deaths that may be accidents.
    fn is_transient(&self) -> bool {
        matches!(self, Self::Hung(_) | Self::Killed(_) | Self::Status { code: 4 | 14, .. })
    }
}

/// The most that a plugin may print.
const MOST_OUTPUT: usize = 1024 * 1024;
const MOST_LOG_LINES: usize = 100;
const LONGEST_LOG_LINE: usize = 2000;
const MOST_ADDRESSES: usize = 64;
const LONGEST_TOKEN: usize = 64 * 1024;
const TRIES: u32 = 4;
/// All tries of one call together; the agent's own attempt starts over after it.
const ALL_TRIES_WITHIN: Duration = Duration::from_secs(120);
/// For output that is still on its way when the plugin has exited.
const AFTER_EXIT: Duration = Duration::from_millis(500);

const PACKAGE: &str = "tetrateio.api.onboarding.private.component.agent.plugin";

impl Plugins {
    pub fn new(settings: ConnectionSettings) -> Self {
        Self { settings }
    }

    /// `GetCredential` for the plane of this UID.
    pub async fn credential(
        &self,
        plugin: &Plugin,
        plane_uid: &str,
        now: Timestamp,
    ) -> Result<Credential, PluginError> {
        let request = serde_json::json!({ "audience": plane_uid }).to_string();
        let service = format!("{PACKAGE}.credential.v1alpha1.CredentialPlugin");
        let output = self.call(plugin, &service, "GetCredential", &request).await?;
        let credential =
            parse_credential(&output).map_err(|problem| PluginError { name: plugin.name.clone(), problem })?;
        if credential.expires_at <= now {
            return Err(PluginError {
                name: plugin.name.clone(),
                problem: Problem::Garbage {
                    expected: "a credential that can be used",
                    why: format!("it expired at {}", credential.expires_at),
                },
            });
        }
        Ok(credential)
    }

    /// `GetHostInfo`.
    pub async fn addresses(&self, plugin: &Plugin) -> Result<Vec<HostAddress>, PluginError> {
        let service = format!("{PACKAGE}.hostinfo.v1alpha1.HostInfoPlugin");
        let output = self.call(plugin, &service, "GetHostInfo", "{}").await?;
        parse_host_info(&output).map_err(|problem| PluginError { name: plugin.name.clone(), problem })
    }

    async fn call(&self, plugin: &Plugin, service: &str, method: &str, request: &str) -> Result<Vec<u8>, PluginError> {
        let started = std::time::Instant::now();
        let mut backoff = Backoff::new(self.settings.initial_interval, self.settings.max_interval);
        let mut tries = 0;
        loop {
            tries += 1;
            let problem = match run(plugin, service, method, request, self.settings.timeout).await {
                Ok(output) => return Ok(output),
                Err(problem) => problem,
            };
            let delay = backoff.next_delay();
            if !problem.is_transient() || tries == TRIES || started.elapsed() + delay >= ALL_TRIES_WITHIN {
                return Err(PluginError { name: plugin.name.clone(), problem });
            }
            tracing::warn!(plugin = plugin.name, problem = %problem, retry_in = ?delay, "a plugin call failed");
            tokio::time::sleep(delay).await;
        }
    }
}

impl Credential {
    pub fn into_evidence(self, plugin: &str) -> Evidence {
        let message = JwtCredential { token: self.token };
        Evidence {
            credential: prost_types::Any { type_url: JWT_CREDENTIAL.to_owned(), value: message.encode_to_vec() },
            expires_at: Some(self.expires_at),
            origin: format!("plugin {plugin}"),
        }
    }
}

/// One process, from start to end.
async fn run(
    plugin: &Plugin,
    service: &str,
    method: &str,
    request: &str,
    within: Duration,
) -> Result<Vec<u8>, Problem> {
    let path = find(plugin, std::env::var_os("PATH"))?;
    let not_started =
        |error: io::Error| Problem::NotStarted { path: path.display().to_string(), why: error.to_string() };
    let mut command = Command::new(&path);
    command
        .args(&plugin.args)
        .envs(plugin.env.iter().map(|(name, value)| (name, value)))
        .env("PLUGIN_NAME", &plugin.name)
        .env("RPC_SERVICE_NAME", service)
        .env("RPC_METHOD_NAME", method)
        // The service manager's socket is the agent's.
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .process_group(0);
    let mut child = command.spawn().map_err(not_started)?;
    let mut group = Group(child.id());
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());

    let feed = async move {
        if let Some(mut stdin) = stdin {
            // One that doesn't read its request may still answer.
            let _ = stdin.write_all(request.as_bytes()).await;
        }
    };
    let mut output = Vec::new();
    let finished = {
        let read = read_output(stdout, &mut output);
        let log = log_lines(stderr, &plugin.name);
        let io = async { tokio::join!(feed, read, log).1 };
        tokio::pin!(io);
        let all = async {
            tokio::select! {
                // Output first: too much of it must end the plugin, which may be waiting to write more.
                read = &mut io => {
                    read?;
                    child.wait().await.map_err(not_started)
                }
                status = child.wait() => {
                    let status = status.map_err(not_started)?;
                    // What it started may hold the pipes open: that isn't waited for.
                    if let Ok(read) = timeout(AFTER_EXIT, &mut io).await {
                        read?;
                    }
                    Ok(status)
                }
            }
        };
        timeout(within, all).await.unwrap_or(Err(Problem::Hung(within)))
    };
    if finished.is_ok() {
        group.has_ended();
    }
    drop(group);
    judge(finished?, output)
}

/// What an exit status and the output mean together.
fn judge(status: ExitStatus, output: Vec<u8>) -> Result<Vec<u8>, Problem> {
    if let Some(signal) = status.signal() {
        return Err(Problem::Killed(signal));
    }
    match status.code().unwrap_or(-1) {
        0 if output.iter().all(u8::is_ascii_whitespace) => Err(Problem::Nothing),
        0 => Ok(output),
        code => Err(parse_status(&output).unwrap_or(Problem::Failed(code))),
    }
}

/// The plugin's process group; what is left of it is killed at the end, also when the call is given up.
struct Group(Option<u32>);

impl Group {
    fn has_ended(&mut self) {
        // Reaped, and its pipes are closed or were given up: the number may soon be another's. Children that it left are its own affair.
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(id) = self.0.take().and_then(|id| i32::try_from(id).ok()) {
            // Gone already is fine.
            let _ = killpg(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

/// The plugin's program: its path, or what the directories of `search` (as PATH has them) hold.
///
/// Errors: it is missing, or not executable.
pub fn find(plugin: &Plugin, search: Option<OsString>) -> Result<PathBuf, Problem> {
    let name = match &plugin.path {
        Some(path) => path.clone(),
        None => format!("onboarding-agent-{}-plugin", plugin.name),
    };
    let candidates: Vec<PathBuf> = if name.contains('/') {
        vec![PathBuf::from(&name)]
    } else {
        std::env::split_paths(&search.unwrap_or_default()).map(|directory| directory.join(&name)).collect()
    };
    match candidates.iter().find(|path| path.is_file()) {
        None if name.contains('/') => Err(Problem::Missing(name)),
        None => Err(Problem::Missing(format!("{name} (on PATH)"))),
        Some(path) if !is_executable(path) => Err(Problem::NotExecutable(path.display().to_string())),
        Some(path) => Ok(path.clone()),
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0)
        && nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok()
}

async fn read_output(pipe: Option<impl AsyncRead + Unpin>, output: &mut Vec<u8>) -> Result<(), Problem> {
    let Some(pipe) = pipe else { return Ok(()) };
    // An error of the pipe ends it; what was read is judged.
    let _ = pipe.take(MOST_OUTPUT as u64 + 1).read_to_end(output).await;
    if output.len() > MOST_OUTPUT { Err(Problem::TooMuch) } else { Ok(()) }
}

/// To the end of the pipe, so that the plugin never waits for us; only the first lines are logged.
async fn log_lines(pipe: Option<impl AsyncRead + Unpin>, name: &str) {
    let Some(mut pipe) = pipe else { return };
    let (mut buffer, mut line, mut lines) = ([0; 4096], Vec::new(), 0);
    let mut log = |line: &mut Vec<u8>| {
        if !line.is_empty() && lines < MOST_LOG_LINES {
            lines += 1;
            tracing::info!(plugin = name, line = %String::from_utf8_lossy(line).escape_debug(), "a plugin says");
        }
        line.clear();
    };
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        for &byte in &buffer[..count] {
            match byte {
                b'\n' => log(&mut line),
                b'\r' => {}
                byte if line.len() < LONGEST_LOG_LINE => line.push(byte),
                _ => {}
            }
        }
    }
    log(&mut line);
}

const RESPONSE: &str = "a GetCredentialResponse in JSON";
const HOST_INFO: &str = "a GetHostInfoResponse in JSON";

fn garbage(expected: &'static str, why: impl Into<String>) -> Problem {
    Problem::Garbage { expected, why: why.into() }
}

fn object(expected: &'static str, output: &[u8]) -> Result<Map<String, Value>, Problem> {
    match serde_json::from_slice(output) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(garbage(expected, "it is not an object")),
        // The position, never the content: it may be a credential.
        Err(error) => Err(garbage(expected, format!("line {}, column {}", error.line(), error.column()))),
    }
}

/// `{"credential": {"@type": ".../JwtCredential", "token": "..."}, "expiresAt": "<RFC 3339>"}`; both are required.
pub fn parse_credential(output: &[u8]) -> Result<Credential, Problem> {
    let response = object(RESPONSE, output)?;
    let credential = match response.get("credential") {
        Some(Value::Object(credential)) => credential,
        None | Some(Value::Null) => return Err(garbage(RESPONSE, "credential is missing")),
        Some(_) => return Err(garbage(RESPONSE, "credential is not an object")),
    };
    let kind = match credential.get("@type") {
        Some(Value::String(kind)) => kind,
        _ => return Err(garbage(RESPONSE, "credential.@type is missing")),
    };
    let last = kind.rsplit(['/', '.']).next().unwrap_or_default();
    if !last.eq_ignore_ascii_case("JwtCredential") {
        let kind: String = kind.chars().take(200).collect();
        return Err(garbage(RESPONSE, format!("credential.@type is {kind:?}; only a JwtCredential is understood")));
    }
    let token = ["token", "jwt", "value"]
        .iter()
        .find_map(|name| credential.get(*name).and_then(Value::as_str))
        .map(str::trim)
        .ok_or_else(|| garbage(RESPONSE, "credential has no token (nor jwt, nor value)"))?;
    let is_part = |part: &str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if token.len() > LONGEST_TOKEN || token.split('.').count() != 3 || !token.split('.').all(is_part) {
        return Err(garbage(RESPONSE, "credential.token is not a signed JWT (three parts in base64url)"));
    }
    let expires_at = match response.get("expiresAt").or_else(|| response.get("expires_at")) {
        Some(Value::String(text)) => {
            text.parse().map_err(|_| garbage(RESPONSE, "expiresAt is not a time as in 2026-11-24T11:00:00Z"))?
        }
        _ => return Err(garbage(RESPONSE, "expiresAt is missing")),
    };
    Ok(Credential { token: token.to_owned(), expires_at })
}

/// `{"host":{"addresses":[{"ip":"10.0.0.4","type":"VPC"}]}}`
pub fn parse_host_info(output: &[u8]) -> Result<Vec<HostAddress>, Problem> {
    let response = object(HOST_INFO, output)?;
    let addresses = match response.get("host").and_then(|host| host.get("addresses")) {
        Some(Value::Array(addresses)) if !addresses.is_empty() => addresses,
        _ => return Err(garbage(HOST_INFO, "host.addresses is missing or empty")),
    };
    if addresses.len() > MOST_ADDRESSES {
        return Err(garbage(HOST_INFO, format!("host.addresses has more than {MOST_ADDRESSES} items")));
    }
    addresses
        .iter()
        .enumerate()
        .map(|(index, address)| {
            let at = |what: &str| garbage(HOST_INFO, format!("host.addresses[{index}].{what}"));
            let ip: IpAddr = address
                .get("ip")
                .and_then(Value::as_str)
                .and_then(|ip| ip.parse().ok())
                .ok_or_else(|| at("ip is not an IP address"))?;
            if ip.is_unspecified() || ip.is_multicast() {
                return Err(at("ip is not an address that a host can be reached at"));
            }
            let kind = match address.get("type").and_then(Value::as_str) {
                Some("VPC") => ConnectedOver::Vpc,
                Some("INTERNET") => ConnectedOver::Internet,
                _ => return Err(at("type is neither VPC nor INTERNET")),
            };
            Ok(HostAddress { ip, kind })
        })
        .collect()
}

/// A `google.rpc.Status`: `{"code":14,"message":"..."}`. `None`: it isn't one.
pub fn parse_status(output: &[u8]) -> Option<Problem> {
    let status: Map<String, Value> = serde_json::from_slice(output).ok()?;
    let code = status.get("code")?.as_i64().and_then(|code| i32::try_from(code).ok()).filter(|code| *code != 0)?;
    let message = status.get("message").and_then(Value::as_str).unwrap_or_default();
    Some(Problem::Status { code, message: message.chars().take(LONGEST_LOG_LINE).collect() })
}

#[cfg(test)]
#[path = "plugin_tests.rs"]
mod tests;
