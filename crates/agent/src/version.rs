//! The sidecar's version, as its binary tells it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::time::timeout;

/// Why the binary's version isn't known.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    #[error("{0} is missing; install the istio-sidecar package, or name Envoy with --envoy-binary")]
    Missing(String),
    #[error("{0} is missing; install the istio-sidecar package, or name pilot-agent with --pilot-agent-binary")]
    NoPilotAgent(String),
    #[error("{binary} can't be run: {why}")]
    NotRun { binary: String, why: String },
    #[error("{binary} did not tell its version within {seconds} s")]
    TooSlow { binary: String, seconds: u64 },
    #[error("{0} --version does not answer as Envoy does")]
    NotEnvoy(String),
    #[error("{0} version does not answer as pilot-agent does")]
    NotPilotAgent(String),
}

const WITHIN: Duration = Duration::from_secs(10);

/// `1.40.0`, of `envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL`.
pub async fn envoy(binary: &Path) -> Result<String, VersionError> {
    parse(&output(binary, &["--version"]).await?).ok_or_else(|| VersionError::NotEnvoy(binary.display().to_string()))
}

/// `1.30.0`, of `pilot-agent version --short`.
pub async fn pilot_agent(binary: &Path) -> Result<String, VersionError> {
    let text = output(binary, &["version", "--short"]).await.map_err(|error| match error {
        VersionError::Missing(name) => VersionError::NoPilotAgent(name),
        other => other,
    })?;
    // `client version: 1.30.0`
    let version = text.trim().rsplit(' ').next().unwrap_or_default();
    plain(version).ok_or_else(|| VersionError::NotPilotAgent(binary.display().to_string()))
}

async fn output(binary: &Path, arguments: &[&str]) -> Result<String, VersionError> {
    let name = binary.display().to_string();
    if !binary.is_file() {
        return Err(VersionError::Missing(name));
    }
    let output = Command::new(binary)
        .args(arguments)
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match timeout(WITHIN, output).await {
        Err(_) => Err(VersionError::TooSlow { binary: name, seconds: WITHIN.as_secs() }),
        Ok(Err(error)) => Err(VersionError::NotRun { binary: name, why: error.to_string() }),
        Ok(Ok(output)) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
    }
}

fn parse(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("version:")?;
    plain(rest.split('/').nth(1)?.trim())
}

/// One word, as versions are.
fn plain(version: &str) -> Option<String> {
    let is_version = !version.is_empty()
        && version.len() <= 64
        && version.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_+".contains(&byte));
    is_version.then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_envoy_prints() {
        let text = "\n/usr/bin/envoy  version: 9b2f/1.40.0/Clean/RELEASE/BoringSSL\n\n";
        assert_eq!(parse(text).as_deref(), Some("1.40.0"));
        assert_eq!(parse("GNU bash, version 5.2"), None);
        assert_eq!(parse("version: a/\u{7}/b"), None);
    }

    #[tokio::test]
    async fn a_missing_binary_says_what_to_do() {
        let error = envoy(Path::new("/no/such/envoy")).await.unwrap_err().to_string();
        assert!(error.contains("--envoy-binary"), "{error}");
    }
}
