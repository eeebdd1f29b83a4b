//! One line of JSON for every decision, written before its token leaves.
//!
//! A thread of its own writes: a sink that hangs (a pipe that nobody reads, a disk that is gone) stops decisions, never the sessions.

use jiff::Timestamp;
use onboarding_core::identity::{Identity, Thumbprint};
use onboarding_kinds::identity::{Case, to_json};
use onboarding_runtime::batch;
use serde::Serialize;
use std::io::{self, Write};
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Where the lines go.
pub struct Audit {
    lines: mpsc::Sender<Line>,
}

struct Line {
    json: Vec<u8>,
    written: oneshot::Sender<Result<(), io::ErrorKind>>,
}

/// Decisions that wait for the sink; further ones are refused.
const QUEUE: usize = 1024;
/// How long a decision waits for its line.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was decided, about whom, and why.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry<'a> {
    pub time: Timestamp,
    pub decision: Decision,
    /// `namespace/name`.
    pub workload_group: String,
    /// `namespace/name` of the registration, once the identity has a name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registration: Option<String>,
    /// Only what was proven.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<serde_json::Value>,
    /// Thumbprint, once it was proven.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<IpAddr>,
    /// The policy and the rule that allow it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<usize>,
    /// Why it was refused.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    pub reasons: &'a [String],
    /// Of the token that this decision allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_id: Option<&'a str>,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Decision {
    /// A token is issued.
    Allowed,
    Refused,
    /// No policy admits a live registration any more: it ends.
    Withdrawn,
    /// Nobody can say whether a policy admits it: its session ends, its entry stays for the grace period.
    Suspended,
}

impl<'a> Entry<'a> {
    pub(crate) fn new(time: Timestamp, decision: Decision, workload_group: String) -> Self {
        Self {
            time,
            decision,
            workload_group,
            registration: None,
            identity: None,
            agent_key: None,
            peer: None,
            policy: None,
            rule: None,
            reasons: &[],
            token_id: None,
        }
    }
    pub(crate) fn about(self, identity: Option<&Identity>, key: Option<Thumbprint>) -> Self {
        Self {
            identity: identity.map(|identity| to_json(identity, Case::Camel)),
            agent_key: key.map(|key| key.to_string()),
            ..self
        }
    }
}

impl Audit {
    /// Starts the thread that writes; it ends after this value.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn new(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let (lines, queue) = mpsc::channel(QUEUE);
        std::thread::Builder::new().name("audit".to_owned()).spawn(move || write_lines(queue, sink))?;
        Ok(Self { lines })
    }

    /// An error means that the line may be missing: nothing may be allowed then.
    pub(crate) async fn write(&self, entry: &Entry<'_>) -> io::Result<()> {
        let mut json = serde_json::to_vec(entry)?;
        json.push(b'\n');
        let (written, answer) = oneshot::channel();
        self.lines
            .try_send(Line { json, written })
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it is slower than the decisions come"))?;
        match tokio::time::timeout(PATIENCE, answer).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(kind))) => Err(kind.into()),
            Ok(Err(_)) => Err(io::Error::other("its writer has ended")),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "it takes no lines")),
        }
    }
}

fn write_lines(mut queue: mpsc::Receiver<Line>, mut sink: Box<dyn Write + Send>) {
    // After a write that failed half way the next line must not become part of what is left of that one.
    let mut torn = false;
    while let Some(batch) = batch::blocking_next(&mut queue, QUEUE) {
        let mut bytes = Vec::with_capacity(batch.iter().map(|line| line.json.len()).sum::<usize>() + 1);
        if torn {
            bytes.push(b'\n');
        }
        for line in &batch {
            bytes.extend_from_slice(&line.json);
        }
        let outcome = sink.write_all(&bytes).and_then(|()| sink.flush());
        torn = outcome.is_err();
        for line in batch {
            // Whoever waited may have given up.
            let _ = line.written.send(outcome.as_ref().copied().map_err(io::Error::kind));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// Fails as often as it is told, after half of what it was given.
    #[derive(Clone, Default)]
    struct Sink {
        bytes: Arc<Mutex<Vec<u8>>>,
        failures: Arc<Mutex<usize>>,
    }

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut failures = self.failures.lock().unwrap();
            match *failures {
                0 => {
                    self.bytes.lock().unwrap().extend_from_slice(bytes);
                    Ok(bytes.len())
                }
                // An even number: the first half; an odd one: no more.
                left if left % 2 == 0 => {
                    *failures -= 1;
                    let half = bytes.len() / 2;
                    self.bytes.lock().unwrap().extend_from_slice(&bytes[..half]);
                    Ok(half)
                }
                _ => {
                    *failures -= 1;
                    Err(io::ErrorKind::StorageFull.into())
                }
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_line_after_one_that_was_torn_stands_alone() {
        let sink = Sink { failures: Arc::new(Mutex::new(2)), ..Sink::default() };
        let audit = Audit::new(Box::new(sink.clone())).unwrap();
        let entry = |group: &str| Entry::new(Timestamp::UNIX_EPOCH, Decision::Refused, group.to_owned());
        let error = audit.write(&entry("a/lost")).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        audit.write(&entry("a/kept")).await.unwrap();
        let text = String::from_utf8(sink.bytes.lock().unwrap().clone()).unwrap();
        let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last["workloadGroup"], "a/kept");
        assert_eq!(last["decision"], "refused");
    }
}
