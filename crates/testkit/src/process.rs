//! Child processes whose output is kept, and which end with their handle.

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lines that are kept in memory; the log file has all of them.
const KEPT: usize = 5000;
/// Lines that an error shows.
const SHOWN: usize = 40;
/// A line that is longer is cut; output without line ends must not fill the memory.
const LONGEST: u64 = 64 * 1024;

/// A child in a process group of its own. Dropping it kills the group.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: i32,
    child: Mutex<Child>,
    output: Arc<Output>,
}

#[derive(Debug, Default)]
struct Output {
    lines: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Lines {
    kept: VecDeque<String>,
    /// How many came before those that are kept.
    dropped: usize,
    ended: bool,
}

/// A place in a process's output: after the lines that it had written by then.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mark(usize);

impl Process {
    /// Starts `command` with standard output and error captured, and written to `log` where one is given (appended).
    pub fn start(name: &str, mut command: Command, log: Option<&Path>) -> anyhow::Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        command.process_group(0).stdout(writer.try_clone()?).stderr(writer);
        let child = command.spawn().with_context(|| format!("starting {name}: {command:?}"))?;
        // The command holds the pipe's other end; the output ends when the last process that has it does.
        drop(command);
        let log = match log {
            Some(path) => Some(File::options().create(true).append(true).open(path).context("opening a log file")?),
            None => None,
        };
        let output = Arc::new(Output::default());
        let sink = Arc::clone(&output);
        std::thread::Builder::new().name(format!("{name}: output")).spawn(move || sink.collect(reader, log))?;
        let pid = i32::try_from(child.id())?;
        Ok(Self { name: name.to_owned(), pid, child: Mutex::new(child), output })
    }

    pub fn name(&self) -> &str {
        &self.name
    }
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The child's standard input, once, if the command asked for a pipe.
    pub fn take_stdin(&self) -> Option<ChildStdin> {
        lock(&self.child).stdin.take()
    }

    /// How it ended, if it has.
    pub fn status(&self) -> Option<ExitStatus> {
        lock(&self.child).try_wait().ok().flatten()
    }

    pub fn mark(&self) -> Mark {
        let lines = lock(&self.output.lines);
        Mark(lines.dropped + lines.kept.len())
    }

    /// What was written since `mark`, as far as it is kept.
    pub fn lines_since(&self, mark: Mark) -> Vec<String> {
        let lines = lock(&self.output.lines);
        lines.kept.iter().skip(mark.0.saturating_sub(lines.dropped)).cloned().collect()
    }

    /// The last lines, for an error message.
    pub fn tail(&self) -> String {
        let lines = lock(&self.output.lines);
        let from = lines.kept.len().saturating_sub(SHOWN);
        lines.kept.iter().skip(from).map(|line| format!("    {line}\n")).collect()
    }

    /// The first line that `wanted` accepts, from the start of the output on.
    pub fn wait_for_line(&self, within: Duration, wanted: impl Fn(&str) -> bool) -> anyhow::Result<String> {
        self.wait_for_line_since(Mark::default(), within, wanted)
    }

    /// The first line after `mark` that `wanted` accepts; an error with the last lines when the time or the output ends before.
    pub fn wait_for_line_since(
        &self,
        mark: Mark,
        within: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        let deadline = Instant::now() + within;
        let mut next = mark.0;
        let mut lines = lock(&self.output.lines);
        loop {
            while let Some(line) = lines.kept.get(next.saturating_sub(lines.dropped)) {
                if wanted(line) {
                    return Ok(line.clone());
                }
                next = next.max(lines.dropped) + 1;
            }
            let ended = lines.ended;
            let left = deadline.saturating_duration_since(Instant::now());
            if ended || left.is_zero() {
                drop(lines);
                let why = if ended { "its output ended".to_owned() } else { format!("{within:?} passed") };
                bail!("{}: {why} before the line that was waited for; its last lines:\n{}", self.name, self.tail());
            }
            lines = self.output.changed.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sends a signal to the child alone.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        ensure!(self.status().is_none(), "{} has ended", self.name);
        Ok(kill(Pid::from_raw(self.pid), signal)?)
    }

    /// Waits until the child has ended.
    pub fn wait(&self, within: Duration) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(status) = self.status() {
                return Ok(status);
            }
            ensure!(
                Instant::now() < deadline,
                "{} didn't end in {within:?}; its last lines:\n{}",
                self.name,
                self.tail()
            );
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }

    /// Asks the child to end (SIGTERM) and waits.
    pub fn terminate(&self, within: Duration) -> anyhow::Result<ExitStatus> {
        if self.status().is_none() {
            self.signal(Signal::SIGTERM)?;
        }
        self.wait(within)
    }

    /// Kills the whole group, as nobody can refuse, and waits until the child is gone.
    pub fn kill(&self) {
        let mut child = lock(&self.child);
        // Until it is waited for, its id can't belong to another group.
        if child.try_wait().ok().flatten().is_none() {
            let _ = killpg(Pid::from_raw(self.pid), Signal::SIGKILL);
            let _ = child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Output {
    fn collect(&self, from: impl Read, mut log: Option<File>) {
        let mut from = BufReader::new(from);
        loop {
            let mut line = Vec::new();
            let read = from.by_ref().take(LONGEST).read_until(b'\n', &mut line);
            if !matches!(read, Ok(length) if length > 0) {
                break;
            }
            if let Some(log) = &mut log {
                let _ = log.write_all(&line);
            }
            let line = String::from_utf8_lossy(line.strip_suffix(b"\n").unwrap_or(&line)).into_owned();
            let mut lines = lock(&self.lines);
            if lines.kept.len() == KEPT {
                lines.kept.pop_front();
                lines.dropped += 1;
            }
            lines.kept.push_back(line);
            self.changed.notify_all();
        }
        lock(&self.lines).ended = true;
        self.changed.notify_all();
    }
}

/// Runs a command to its end and gives its standard output; when it fails, or takes longer, an error with its standard error.
pub fn output(command: Command, within: Duration) -> anyhow::Result<String> {
    let said = format!("{command:?}");
    let ended = run(command, within)?;
    ensure!(ended.status.success(), "{said}: {}: {}", ended.status, ended.stderr.trim());
    Ok(ended.stdout)
}

/// How a command ended, and what it wrote.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end, whatever that is; an error when it takes longer than `within`.
pub fn run(mut command: Command, within: Duration) -> anyhow::Result<Ended> {
    let said = format!("{command:?}");
    command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("starting {said}"))?;
    let stdout = child.stdout.take().map(read_all);
    let stderr = child.stderr.take().map(read_all);
    let deadline = Instant::now() + within;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = killpg(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGKILL);
            child.wait()?;
            bail!("{said} didn't end in {within:?}");
        }
        std::thread::park_timeout(Duration::from_millis(1));
    };
    let text = |reader: Option<std::thread::JoinHandle<Vec<u8>>>| {
        reader.and_then(|reader| reader.join().ok()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    Ok(Ended { status, stdout: text(stdout).unwrap_or_default(), stderr: text(stderr).unwrap_or_default() })
}

fn read_all(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
