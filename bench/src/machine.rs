//! What the machine is, what a process used of it, and which cores who gets.

use anyhow::Context;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// As many open files as the hard limit allows: each agent of a crowd is one here and one in the plane.
///
/// # Errors
/// The limit can't be read or set.
pub fn raise_limit() -> anyhow::Result<u64> {
    onboarding_runtime::descriptors::raise_limit().context("raising the limit of open files")
}

/// The processor, its cores, the kernel.
pub fn describe() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!("{model}, {cores} cores of it, Linux {}, load {load}", kernel.trim())
}

/// The core that the plane gets in a run with `--one-core`.
pub const PLANES_CORE: usize = 0;

/// Leaves [`PLANES_CORE`] to the plane; to be called before threads are made, which inherit it.
///
/// # Errors
/// There is no other core.
pub fn keep_to_other_cores() -> anyhow::Result<()> {
    let own = Pid::from_raw(0);
    let mut cores = sched_getaffinity(own).context("asking for the cores of this process")?;
    cores.unset(PLANES_CORE)?;
    anyhow::ensure!(
        (0..CpuSet::count()).any(|core| cores.is_set(core).unwrap_or(false)),
        "--one-core needs a core for the load besides the plane's"
    );
    sched_setaffinity(own, &cores).context("leaving a core to the plane")
}

/// A program that ends with this value.
pub struct Killed(pub Child);

impl Killed {
    pub fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // Nothing to do for one that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program that is measured: with `one_core` on [`PLANES_CORE`] alone.
pub fn on_planes_core(binary: &Path, one_core: bool) -> Command {
    if !one_core {
        return Command::new(binary);
    }
    let mut command = Command::new("taskset");
    command.arg("--cpu-list").arg(PLANES_CORE.to_string()).arg(binary);
    command
}

/// User and system time that a process has used, its ended threads included.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: i32) -> anyhow::Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid)).with_context(|| format!("the CPU clock of process {pid}"))?;
    Ok(clock_gettime(clock)?.into())
}

/// Of a process, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    pub resident: u64,
    /// Of it what no file backs: heaps and stacks.
    pub anonymous: u64,
}

/// # Errors
/// There is no such process.
pub fn memory(pid: i32) -> anyhow::Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(Memory { resident: kilobytes(&text, "Rss:")?, anonymous: kilobytes(&text, "Anonymous:")? })
}

/// The most that was resident at any time, in bytes.
///
/// # Errors
/// There is no such process.
pub fn peak_memory(pid: i32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    kilobytes(&std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?, "VmHWM:")
}

fn kilobytes(text: &str, name: &str) -> anyhow::Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok());
    Ok(value.with_context(|| format!("the kernel says no {name}"))? * 1024)
}

/// The CPU time that each of `count` calls takes in this thread, in seconds.
///
/// # Errors
/// The call's.
pub fn per_call(count: usize, mut call: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let clock = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    // Once outside the measurement: what is made on first use isn't a part of every call.
    call()?;
    let before = clock()?;
    for _ in 0..count {
        call()?;
    }
    Ok((clock()? - before).as_secs_f64() / count as f64)
}

/// Seconds of an append of 4 KiB and its fdatasync, for each of `count`.
///
/// # Errors
/// The file can't be made or written.
pub fn fsync(directory: &Path, count: usize) -> anyhow::Result<Vec<f64>> {
    use std::io::Write;
    let mut file = tempfile::tempfile_in(directory).context("making a file to sync")?;
    let mut seconds = Vec::with_capacity(count);
    for _ in 0..count {
        let started = Instant::now();
        file.write_all(&[7; 4096])?;
        file.sync_data()?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(seconds)
}
