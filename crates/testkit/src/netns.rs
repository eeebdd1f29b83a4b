//! Network namespaces as virtual machines: a [`Lab`] is a bridge in namespaces of its own, a [`Machine`] a host on it.
//!
//! A lab is a *process namespace* too, and everything in it (processes, interfaces, mounts, files on a tmpfs) is held by that
//! namespace's first process alone. Nothing is named globally but a machine's control group, where it has one, so runs can't collide;
//! and however the lab ends, by return, panic, Ctrl-C or SIGKILL, the kernel takes all of it away. Works as root, and unprivileged
//! through a user namespace.
//!
//! The program runs itself three times: the *outer* process, which stays outside, waits and watches for signals; the *init* of the
//! process namespace, which makes mounts and network and reaps orphans; and the *main* one, in which [`inside`] calls its argument.
//! A machine's namespaces are kept by a fourth kind, the *holder*, which shows in `ps` as `onboarding-vm NAME`.

use crate::process::{self, Process};
use anyhow::{Context, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getegid, geteuid, getpid, getppid, sethostname};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

/// Which of its parts the program plays: absent, `init`, `main` or `holder`.
const STAGE: &str = "ONBOARDING_LAB_STAGE";
/// The lab's directory.
const DIRECTORY: &str = "ONBOARDING_LAB_DIRECTORY";
/// How an init that couldn't make its namespaces ends; the reason is on standard error.
const CANNOT: i32 = 125;
const BRIDGE: &str = "lab";

/// Why there can be no lab here.
#[derive(Debug, thiserror::Error)]
#[error(
    "network namespaces can't be made here: {0}; run as root, or allow unprivileged user namespaces (`sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` on Ubuntu, `sudo sysctl -w kernel.unprivileged_userns_clone=1` on Debian)"
)]
pub struct Unavailable(String);

/// Calls `main` in a lab and gives its exit code. Must be the first thing that a program does: it has to be single-threaded yet.
///
/// An interrupt (SIGINT, SIGTERM, SIGHUP) ends everything in the lab at once; the exit code is then 130.
pub fn inside(main: impl FnOnce(&Lab) -> ExitCode) -> Result<ExitCode, Unavailable> {
    let stage = std::env::var(STAGE).unwrap_or_default();
    let directory = std::env::var_os(DIRECTORY).map(PathBuf::from);
    // A program that runs inside a lab and wants one of its own inherits the variables, but not the place in the family.
    match (stage.as_str(), directory) {
        ("init", Some(directory)) if getpid().as_raw() == 1 => Ok(init(&directory)),
        ("main", Some(directory)) if getppid().as_raw() == 1 => Ok(main(&Lab { directory })),
        ("holder", Some(directory)) => Ok(match hold(&directory) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "a machine's namespaces can't be made: {error:#}");
                ExitCode::FAILURE
            }
        }),
        _ => outer().map_err(|error| Unavailable(format!("{error:#}"))),
    }
}

/// Whether this is the process that a person started: none of a lab's own, which must call [`inside`] before anything else.
pub fn is_outside() -> bool {
    std::env::var_os(STAGE).is_none()
}

/// The same for a test: where there can be no lab it says why, and is skipped; in CI that is a failure.
pub fn test_inside(main: impl FnOnce(&Lab) -> ExitCode) -> ExitCode {
    let unavailable = match inside(main) {
        Ok(code) => return code,
        Err(unavailable) => unavailable,
    };
    let (word, code) = match std::env::var_os("CI") {
        None => ("skipped", ExitCode::SUCCESS),
        Some(_) => ("failed", ExitCode::FAILURE),
    };
    // Nobody is left to tell where that can't be written.
    let _ = writeln!(std::io::stdout(), "{word}: {unavailable}");
    code
}

/// A network of machines, and a directory for their files. Only [`inside`] makes one.
#[derive(Debug, Clone)]
pub struct Lab {
    directory: PathBuf,
}

impl Lab {
    /// On a tmpfs that is gone with the lab.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Starts a machine with address `10.99.0.<host>`, the host name `name`, its own loopback, `/etc/hosts` and `/etc/resolv.conf`.
    /// `name`: at most 11 characters, letters, digits and `-`.
    pub fn machine(&self, name: &str, host: u8) -> anyhow::Result<Machine> {
        ensure!(
            !name.is_empty() && name.len() <= 11 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
            "{name:?} can't be a machine's name"
        );
        let address = Ipv4Addr::new(10, 99, 0, host);
        let directory = self.directory.join("machines").join(name);
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join("hosts"), format!("127.0.0.1 localhost\n::1 localhost\n{address} {name}\n"))?;
        std::fs::write(directory.join("resolv.conf"), "# this machine has no name server\n")?;

        let mut command = Command::new(std::env::current_exe()?);
        // `ps` and `pgrep -f` show argv, so a person can find the machine to enter it.
        command.arg0("onboarding-vm").arg(name).env(STAGE, "holder").env(DIRECTORY, &directory).stdin(Stdio::piped());
        let holder = Process::start(&format!("{name}: holder"), command, None)?;
        holder.wait_for_line(Duration::from_secs(10), |line| line == "holding")?;
        let pid = holder.pid();

        let link = format!("vm-{name}");
        ip(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &pid.to_string()])?;
        ip(&["link", "set", &link, "master", BRIDGE, "up"])?;
        let machine = Machine { name: name.to_owned(), address, directory, holder };
        machine.check("ip", ["link", "set", "lo", "up"])?;
        machine.check("ip", ["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        machine.check("ip", ["link", "set", "eth0", "up"])?;
        machine.check("ip", ["route", "add", "default", "via", "10.99.0.1"])?;
        Ok(machine)
    }
}

/// A virtual machine: network, mounts and host name of its own. Everything that runs in it ends when it is dropped.
#[derive(Debug)]
pub struct Machine {
    name: String,
    address: Ipv4Addr,
    directory: PathBuf,
    holder: Process,
}

impl Machine {
    pub fn name(&self) -> &str {
        &self.name
    }
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
    /// For the machine's files; every machine sees every other's.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The process that keeps the namespaces, for `/proc/<pid>/ns`.
    pub fn holder_pid(&self) -> i32 {
        self.holder.pid()
    }

    /// A command that will run in this machine, with a clean environment, in a process group of its own.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.holder.pid().to_string(), "--net", "--mount", "--uts", "--"])
            .arg(program)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &self.directory)
            .env("LANG", "C.UTF-8")
            .process_group(0)
            .stdin(Stdio::null());
        command
    }

    /// The same in the machine's [own group](Self::control_group).
    pub fn command_in_group(&self, program: impl AsRef<OsStr>) -> anyhow::Result<Command> {
        let mut command = self.command("sh");
        command.args(["-c", IN_A_GROUP, &self.control_group()?]).arg(program);
        Ok(command)
    }

    /// Below this process's, and gone with the lab. A systemd takes the control group that it finds itself in for all there is: of two in
    /// the same, one removes the group in which the other is about to start a service of that name.
    pub fn control_group(&self) -> anyhow::Result<String> {
        let lab = self.directory.ancestors().nth(2).and_then(Path::file_name).and_then(OsStr::to_str);
        Ok(format!("{}/{}", lab.context("a lab without a name")?, self.name))
    }

    /// Runs a command to its end, within 20 seconds, and gives its standard output; fails with its standard error when it fails.
    pub fn check<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(&self, program: &str, args: I) -> anyhow::Result<String> {
        let mut command = self.command(program);
        command.args(args);
        process::output(command, Duration::from_secs(20)).with_context(|| format!("in {}", self.name))
    }

    /// One more address on the loopback: where the metadata server of a cloud listens.
    pub fn add_loopback_address(&self, address: Ipv4Addr) -> anyhow::Result<()> {
        self.check("ip", ["addr", "add", &format!("{address}/32"), "dev", "lo"]).map(drop)
    }

    /// Adds a line to this machine's `/etc/hosts`.
    pub fn add_host(&self, address: Ipv4Addr, host: &str) -> anyhow::Result<()> {
        let mut hosts = std::fs::OpenOptions::new().append(true).open(self.directory.join("hosts"))?;
        writeln!(hosts, "{address} {host}")?;
        Ok(())
    }

    /// What `/etc/hosts` of this machine holds.
    pub fn hosts(&self) -> anyhow::Result<String> {
        self.check("cat", ["/etc/hosts"])
    }

    /// Unplugs the machine from the network, or plugs it in again.
    pub fn set_link(&self, up: bool) -> anyhow::Result<()> {
        ip(&["link", "set", &format!("vm-{}", self.name), if up { "up" } else { "down" }])
    }

    /// Ends every process in this machine with SIGKILL, as a power failure does, and returns when they are gone.
    pub fn power_off(&self) -> anyhow::Result<()> {
        let own = std::fs::read_link(format!("/proc/{}/ns/net", self.holder.pid()))?;
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let mut alive = 0;
            for entry in std::fs::read_dir("/proc")?.flatten() {
                let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
                // A zombie has no namespaces any more.
                if pid != self.holder.pid()
                    && std::fs::read_link(entry.path().join("ns/net")).is_ok_and(|net| net == own)
                {
                    alive += 1;
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
            if alive == 0 {
                return Ok(());
            }
            ensure!(std::time::Instant::now() < deadline, "{alive} processes of {} don't end", self.name);
            std::thread::yield_now();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.power_off();
        // It would go with its namespace, but that ends some time later, and the name may be wanted again at once.
        let _ = ip(&["link", "del", &format!("vm-{}", self.name)]);
    }
}

fn outer() -> anyhow::Result<ExitCode> {
    let directory = std::env::temp_dir().join(format!("onboarding-lab-{}", std::process::id()));
    std::fs::create_dir(&directory).with_context(|| format!("creating {}", directory.display()))?;
    let mut janitor = janitor(&directory)?;
    let code = supervise(&directory);
    drop(janitor.stdin.take());
    let _ = janitor.wait();
    code
}

/// Makes the control group `$0`, where systemd has its own, and runs the arguments in it.
const IN_A_GROUP: &str = r#"
while IFS=: read -r _ controllers path; do
    case $controllers in
        name=systemd) hierarchy=/sys/fs/cgroup/systemd ;;
        '') hierarchy=/sys/fs/cgroup/unified; [ -d "$hierarchy" ] || hierarchy=/sys/fs/cgroup ;;
        *) continue ;;
    esac
    [ -e "$hierarchy/cgroup.procs" ] || continue
    mkdir -p "$hierarchy$path/$0" && echo 0 >"$hierarchy$path/$0/cgroup.procs" || exit 1
done </proc/self/cgroup
exec "$@"
"#;

/// What [`IN_A_GROUP`] made is found by its name, the lab's.
const JANITOR: &str = r#"
cat
rmdir -- "$0"
find /sys/fs/cgroup -depth -type d \( -path "*/${0##*/}" -o -path "*/${0##*/}/*" \) -exec rmdir -- {} +
"#;

/// Removes the directory, and control groups of its name, when this process has ended, also by SIGKILL, or lets go of its standard
/// input. It is empty, as seen from outside: what is in it was on the lab's own tmpfs. In a process group of its own: the terminal's
/// Ctrl-C isn't for it.
fn janitor(directory: &Path) -> anyhow::Result<Child> {
    Command::new("sh")
        .args(["-c", JANITOR])
        .arg(directory)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting who removes the lab's directory")
}

fn supervise(directory: &Path) -> anyhow::Result<ExitCode> {
    let interrupts = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    let mut awaited = SigSet::empty();
    interrupts.into_iter().chain([Signal::SIGCHLD]).for_each(|signal| awaited.add(signal));
    awaited.thread_block()?;

    let (user, group) = (geteuid(), getegid());
    if user.is_root() {
        unshare(CloneFlags::CLONE_NEWPID).context("making a process namespace")?;
    } else {
        unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID).context("making a user namespace")?;
        std::fs::write("/proc/self/setgroups", "deny").context("giving up setgroups")?;
        std::fs::write("/proc/self/uid_map", format!("0 {user} 1")).context("mapping the user")?;
        std::fs::write("/proc/self/gid_map", format!("0 {group} 1")).context("mapping the group")?;
    }

    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "init")
        .env(DIRECTORY, directory)
        .spawn()
        .context("starting the lab's first process")?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    loop {
        match awaited.wait()? {
            Signal::SIGCHLD => {
                if let Some(status) = child.try_wait()? {
                    return match status.code() {
                        Some(CANNOT) => bail!("see the line above"),
                        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
                        None => Ok(ExitCode::FAILURE),
                    };
                }
            }
            _ => {
                // The end of a process namespace's first process is the end of everything in it.
                let _ = kill(pid, Signal::SIGKILL);
                child.wait()?;
                let _ = writeln!(std::io::stderr(), "\ninterrupted; everything that was started is gone");
                return Ok(ExitCode::from(130));
            }
        }
    }
}

fn init(directory: &Path) -> ExitCode {
    if let Err(error) = prepare(directory) {
        let _ = writeln!(std::io::stderr(), "a lab of network namespaces can't be made: {error:#}");
        return ExitCode::from(CANNOT as u8);
    }
    let exe = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("/proc/self/exe"));
    // Temporary files are the lab's too, and go with it.
    let main = Command::new(exe).args(std::env::args_os().skip(1)).env(STAGE, "main").env("TMPDIR", directory).spawn();
    let main = match main {
        Ok(main) => Pid::from_raw(main.id() as i32),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "the lab's program can't be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    // Orphans of the whole lab become children of this process, which only has to let them go.
    loop {
        match waitpid(None, Some(WaitPidFlag::empty())) {
            Ok(WaitStatus::Exited(pid, code)) if pid == main => return ExitCode::from(code as u8),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == main => return ExitCode::from(128 + signal as u8),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

fn prepare(directory: &Path) -> anyhow::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    SigSet::empty().thread_set_mask()?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC)
        .context("making network and mount namespaces")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("making mounts private")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("mounting /proc")?;
    mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).context("mounting a tmpfs")?;
    ip(&["link", "set", "lo", "up"])?;
    ip(&["link", "add", BRIDGE, "type", "bridge"])?;
    ip(&["addr", "add", "10.99.0.1/24", "dev", BRIDGE])?;
    ip(&["link", "set", BRIDGE, "up"])
}

/// A machine's namespaces, for as long as standard input stays open.
fn hold(directory: &Path) -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS)?;
    sethostname(std::env::args_os().nth(1).unwrap_or_default())?;
    let none = None::<&str>;
    for file in ["hosts", "resolv.conf"] {
        let target = Path::new("/etc").join(file);
        if target.exists() {
            mount(Some(&directory.join(file)), &target, none, MsFlags::MS_BIND, none)
                .with_context(|| format!("mounting {}", target.display()))?;
        }
    }
    let mut out = std::io::stdout();
    out.write_all(b"holding\n")?;
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn ip(args: &[&str]) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    command.args(args);
    process::output(command, Duration::from_secs(10)).map(drop)
}
