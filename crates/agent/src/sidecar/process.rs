//! The sidecar as a child process: how it is started, what becomes of its output, and that no earlier one is left.

use super::Options;
use anyhow::Context;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

/// What of a line is kept.
const LONGEST_LINE: usize = 8 * 1024;
/// What of Envoy's words travels to the plane.
const LONGEST_WORDS: usize = 2 * 1024;
/// Refusals and errors that are remembered.
const REMEMBERED: usize = 8;
const FRESH: Duration = Duration::from_secs(5);
/// Whether what was killed is gone is looked at so often at most: for two seconds.
const LOOKS: u32 = 400;
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);
const PID_FILE: &str = "envoy.pid";

/// What is started, in [`Options::directory`].
pub(super) struct Launch {
    /// For the log: `envoy`, `pilot-agent`.
    pub name: &'static str,
    pub binary: PathBuf,
    pub arguments: Vec<OsString>,
    /// All of it; `None`: the agent's own.
    pub environment: Option<BTreeMap<String, OsString>>,
}

/// The sidecar, in a process group of its own so that a terminal's Ctrl-C reaches only the agent, and so that Envoy ends with a
/// pilot-agent that started it. Dropping it kills the group.
pub(super) struct Process {
    child: Child,
    /// Until everything in it was killed.
    group: Option<Pid>,
    words: Words,
    readers: Vec<JoinHandle<()>>,
    pid_file: PathBuf,
}

/// What Envoy said on standard error that is worth repeating.
#[derive(Clone, Default)]
pub(super) struct Words(Arc<Mutex<Said>>);

#[derive(Default)]
struct Said {
    refusals: VecDeque<String>,
    last_error: Option<(Instant, String)>,
}

impl Process {
    /// Kills what an earlier agent left behind, and starts the sidecar.
    pub(super) fn start(options: &Options, launch: Launch) -> anyhow::Result<Self> {
        let pid_file = options.directory.join(PID_FILE);
        end_leftover(&pid_file, options);
        let words = Words::default();
        let stdout = Output::open(&options.stdout)?;
        let stderr = Output::open(&options.stderr)?;
        let mut command = Command::new(&launch.binary);
        if let Some(environment) = launch.environment {
            command.env_clear().envs(environment);
        }
        command
            .args(launch.arguments)
            .current_dir(&options.directory)
            .process_group(0)
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stdout(stdout.stdio()?)
            // Always read: Envoy says nowhere else why it refused clusters, endpoints and routes.
            .stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| {
            format!("starting the sidecar {}; is the package that has it installed?", launch.binary.display())
        })?;
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(tokio::spawn(copy(pipe, launch.name, stdout, words.clone())));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(tokio::spawn(copy(pipe, launch.name, stderr, words.clone())));
        }
        if let Some(pid) = child.id()
            && let Some(started) = start_time(pid)
            && let Err(error) = std::fs::write(&pid_file, format!("{pid} {started}\n"))
        {
            tracing::warn!(%error, "can't note the sidecar's process; it would outlive an agent that is killed");
        }
        let group = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
        Ok(Self { child, group, words, readers, pid_file })
    }

    pub(super) fn words(&self) -> &Words {
        &self.words
    }

    /// `None` while it runs.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub(super) async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        self.child.wait().await
    }

    /// How it ended, with its last error: to be asked after [`Process::wait`].
    pub(super) async fn epitaph(&mut self, status: ExitStatus) -> String {
        self.end_group().await;
        // The pipe ends with the process; should something else hold it, its words so far will do.
        for reader in &mut self.readers {
            let _ = tokio::time::timeout(Duration::from_millis(500), reader).await;
        }
        self.readers.clear();
        match self.words.last_error() {
            Some(error) => format!("{status}: {error}"),
            None => status.to_string(),
        }
    }

    /// SIGTERM, then SIGKILL at the deadline; returns when it is gone, and what it started with it.
    pub(super) async fn stop(mut self, deadline: Duration) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // Until it is waited for, its id belongs to no other process.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if tokio::time::timeout(deadline, self.child.wait()).await.is_err() {
            tracing::warn!(?deadline, "the sidecar ignores SIGTERM; killing it");
            self.kill_group();
            let _ = self.child.wait().await;
        }
        self.end_group().await;
        let _ = std::fs::remove_file(&self.pid_file);
    }

    /// The process, and what it started and left. A group's number is not given away while somebody is in it; when nobody is, it was
    /// this one's until a moment ago.
    fn kill_group(&self) {
        if let Some(group) = self.group {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }

    /// Its own process has ended: what it left is killed, and waited for until its sockets are closed.
    async fn end_group(&mut self) {
        self.kill_group();
        if let Some(group) = self.group.take() {
            for _ in 0..LOOKS {
                if !is_anybody_of(group.as_raw()) {
                    return;
                }
                tokio::time::sleep(BETWEEN_LOOKS).await;
            }
            tracing::warn!(group = group.as_raw(), "what the sidecar left doesn't end");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill_group();
    }
}

impl Words {
    /// Forgets the refusals that were said before.
    pub(super) fn clear(&self) {
        self.lock().refusals.clear();
    }

    /// What was refused since then.
    pub(super) fn refusals(&self) -> Option<String> {
        let said = self.lock();
        (!said.refusals.is_empty()).then(|| said.refusals.iter().map(String::as_str).collect::<Vec<_>>().join("; "))
    }

    /// What may have been its end; an error of an hour ago wasn't.
    fn last_error(&self) -> Option<String> {
        let said = self.lock();
        said.last_error.as_ref().filter(|(at, _)| at.elapsed() < FRESH).map(|(_, error)| error.clone())
    }

    fn hear(&self, line: &Line<'_>) {
        const REFUSED: &str = "Filesystem config update rejected: ";
        const UNREADABLE: &str = "Filesystem config update failure: ";
        let refusal = line.text.strip_prefix(REFUSED).or_else(|| line.text.strip_prefix(UNREADABLE));
        let mut said = self.lock();
        if let Some(refusal) = refusal {
            if said.refusals.len() == REMEMBERED {
                said.refusals.pop_front();
            }
            said.refusals.push_back(cut(refusal.trim_end_matches("\\n")));
        }
        if matches!(line.level, "error" | "critical" | "fatal" | "panic") {
            said.last_error = Some((Instant::now(), cut(line.text)));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Said> {
        // Strings are whole whatever panicked while they were held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cut(text: &str) -> String {
    text.chars().take(LONGEST_WORDS).collect()
}

/// A line in the format that `bootstrap::arguments` asks for (`[time][level][logger] text`), or in pilot-agent's, which its Envoy has
/// too (`time<TAB>level<TAB>text`); anything else is text at level `info`.
struct Line<'a> {
    level: &'a str,
    text: &'a str,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Self {
        let of_envoy = || {
            let (_time, rest) = line.strip_prefix('[')?.split_once("][")?;
            let (level, rest) = rest.split_once("][")?;
            let (_logger, text) = rest.split_once("] ")?;
            Some(Line { level, text })
        };
        let of_pilot_agent = || {
            let (time, rest) = line.split_once('\t')?;
            let (level, text) = rest.split_once('\t')?;
            const LEVELS: [&str; 9] =
                ["trace", "debug", "info", "warn", "warning", "error", "critical", "fatal", "panic"];
            (time.ends_with('Z') && LEVELS.contains(&level)).then_some(Line { level, text })
        };
        of_envoy().or_else(of_pilot_agent).unwrap_or(Line { level: "info", text: line })
    }

    fn log(&self, sidecar: &'static str) {
        match self.level {
            "panic" | "fatal" | "critical" | "error" => {
                tracing::error!(sidecar, text = self.text, "the sidecar says");
            }
            "warning" | "warn" => tracing::warn!(sidecar, text = self.text, "the sidecar says"),
            "debug" | "trace" => tracing::debug!(sidecar, text = self.text, "the sidecar says"),
            _ => tracing::info!(sidecar, text = self.text, "the sidecar says"),
        }
    }
}

/// Where a stream of the sidecar's goes.
enum Output {
    /// The agent's own log: `/dev/stdout` and `/dev/stderr` are whatever the agent's are, and its lines must not be torn by Envoy's.
    Log,
    File(std::fs::File),
}

impl Output {
    fn open(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("/dev/stdout") || path == Path::new("/dev/stderr") {
            return Ok(Self::Log);
        }
        let file = std::fs::File::options().create(true).append(true).open(path);
        Ok(Self::File(file.with_context(|| format!("opening the sidecar's output file {}", path.display()))?))
    }

    fn stdio(&self) -> anyhow::Result<Stdio> {
        Ok(match self {
            Self::Log => Stdio::piped(),
            Self::File(file) => file.try_clone().context("handing the sidecar its output file")?.into(),
        })
    }
}

/// Until the pipe ends.
async fn copy(pipe: impl AsyncRead + Unpin, name: &'static str, output: Output, words: Words) {
    let mut file = match output {
        Output::Log => None,
        Output::File(file) => Some(tokio::fs::File::from_std(file)),
    };
    let mut pipe = BufReader::new(pipe);
    let mut bytes = Vec::new();
    while let Ok(true) = read_line(&mut pipe, &mut bytes).await {
        let text = String::from_utf8_lossy(&bytes);
        let line = Line::parse(&text);
        words.hear(&line);
        match &mut file {
            None => line.log(name),
            Some(file) => {
                bytes.push(b'\n');
                // A full disk costs lines, not the sidecar.
                let _ = file.write_all(&bytes).await;
                let _ = file.flush().await;
            }
        }
    }
}

/// One line without its end; what is longer than [`LONGEST_LINE`] is dropped. False at the end of the stream.
async fn read_line(from: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> std::io::Result<bool> {
    line.clear();
    let mut any = false;
    loop {
        let buffer = from.fill_buf().await?;
        if buffer.is_empty() {
            return Ok(any);
        }
        any = true;
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let part = &buffer[..end.unwrap_or(buffer.len())];
        line.extend_from_slice(&part[..part.len().min(LONGEST_LINE - line.len())]);
        let used = end.map_or(buffer.len(), |end| end + 1);
        from.consume(used);
        if end.is_some() {
            return Ok(true);
        }
    }
}

/// Ends the sidecar of an earlier agent that was killed: it holds the listeners' ports. Never another process: the noted one must have
/// started at the noted time, run one of these binaries, and work in this directory.
fn end_leftover(pid_file: &Path, options: &Options) {
    let Ok(text) = std::fs::read_to_string(pid_file) else { return };
    let _ = std::fs::remove_file(pid_file);
    let mut parts = text.split_whitespace();
    let (Some(pid), Some(started)) = (parts.next().and_then(|pid| pid.parse().ok()), parts.next()) else { return };
    if !is_ours(pid, started, options) {
        return;
    }
    let Ok(raw) = i32::try_from(pid) else { return };
    tracing::warn!(pid, "killing the sidecar of an earlier agent");
    // What it started is in the group that it leads.
    let _ = killpg(Pid::from_raw(raw), Signal::SIGKILL);
    if let Err(error) = kill(Pid::from_raw(raw), Signal::SIGKILL)
        && error != Errno::ESRCH
    {
        tracing::warn!(pid, %error, "can't kill the sidecar of an earlier agent");
        return;
    }
    // SIGKILL takes effect when the kernel comes to it, and the listeners' ports are free after that. That is milliseconds; the agent
    // has nothing else to do before its sidecar starts.
    for _ in 0..LOOKS {
        if !is_anybody_of(raw) {
            return;
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
    tracing::warn!(pid, "the sidecar of an earlier agent doesn't end");
}

fn is_ours(pid: u32, started: &str, options: &Options) -> bool {
    let link = |name: &str| std::fs::read_link(format!("/proc/{pid}/{name}")).ok();
    let binaries = options.binaries().filter_map(|binary| binary.canonicalize().ok());
    let runs = link("exe").map(|path| {
        // So the kernel names a binary that a package's update has replaced.
        let path = path.to_string_lossy().into_owned();
        PathBuf::from(path.strip_suffix(" (deleted)").unwrap_or(&path))
    });
    let directory = options.directory.canonicalize().ok();
    start_time(pid).as_deref() == Some(started)
        && runs.is_some_and(|runs| binaries.into_iter().any(|binary| binary == runs))
        && directory.is_some()
        && link("cwd") == directory
}

/// Whether a process of this group still holds what it had open. One that was killed loses its `/proc/<pid>/exe` before its sockets are
/// closed, and is a zombie without further threads only after that.
fn is_anybody_of(group: i32) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return false };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(stat)
        .any(|stat| stat.group == group.to_string() && !(matches!(stat.state.as_str(), "Z" | "X") && stat.threads <= 1))
}

fn start_time(pid: u32) -> Option<String> {
    Some(stat(pid)?.started)
}

/// Of proc(5), `stat`.
struct Stat {
    /// Field 3.
    state: String,
    /// Field 5.
    group: String,
    /// Field 20.
    threads: u64,
    /// Field 22, in clock ticks since the machine's start.
    started: String,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    // The command, in parentheses, may have any bytes in it.
    let fields: Vec<_> = text.rsplit_once(')')?.1.split_whitespace().collect();
    // The first after the command is field 3.
    let field = |number: usize| fields.get(number - 3).map(|field| (*field).to_owned());
    Some(Stat { state: field(3)?, group: field(5)?, threads: field(20)?.parse().ok()?, started: field(22)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_bounded_and_none_is_lost() {
        let long = "x".repeat(100_000);
        let text = format!("one\n\n{long}\nlast");
        let mut from = BufReader::with_capacity(7, text.as_bytes());
        let (mut line, mut lines) = (Vec::new(), Vec::new());
        while read_line(&mut from, &mut line).await.unwrap() {
            lines.push(String::from_utf8(line.clone()).unwrap());
        }
        assert_eq!(lines, ["one", "", &long[..LONGEST_LINE], "last"]);
    }

    #[test]
    fn a_refusal_is_remembered_and_other_lines_are_text() {
        let words = Words::default();
        let hear = |line: &str| words.hear(&Line::parse(line));
        hear("[2026-11-24 12:57:44.339][warning][config] Filesystem config update rejected: Error adding [l1]: no\\n");
        hear("[2026-11-24 12:57:44.339][warning][config] something else");
        hear("Filesystem config update rejected: by somebody else's format");
        assert_eq!(words.refusals().unwrap(), "Error adding [l1]: no; by somebody else's format");
        assert_eq!(words.last_error(), None);
        hear("[2026-11-24 12:57:44.339][critical][main] error initializing: no");
        assert_eq!(words.last_error().unwrap(), "error initializing: no");
        words.clear();
        assert_eq!(words.refusals(), None);
        let of_pilot_agent = Line::parse("2026-11-24T15:00:00.123456Z\twarn\tca\tretrying\tin 1s");
        assert_eq!((of_pilot_agent.level, of_pilot_agent.text), ("warn", "ca\tretrying\tin 1s"));
        for odd in ["a\tb\tc", "2026Z\tb", "", "[", "[a][b", "[a][b][c]", "][", "\u{fffd}"] {
            assert_eq!(Line::parse(odd).text, odd);
        }
        for _ in 0..100 {
            hear(&format!("Filesystem config update rejected: {}", "y".repeat(5000)));
        }
        assert!(words.refusals().unwrap().len() < (LONGEST_WORDS + 2) * REMEMBERED);
    }
}
