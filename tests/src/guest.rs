//! A VM with systemd: a Debian, booted by systemd-nspawn in the network of a [`Machine`], with what a cloud's image has and nothing of ours.

use crate::until::until;
use crate::vm::METADATA;
use crate::world::{ENDPOINT, REGION, World, binary};
use anyhow::{Context, ensure};
use onboarding_testkit::netns::Machine;
use onboarding_testkit::process::{self, Ended, Process};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// In `productpage`, proven by a JWT of the company's issuer.
pub struct Guest {
    pub machine: Machine,
    /// As this process sees it; it is mounted in the machine alone.
    root: PathBuf,
    running: Option<Running>,
    /// Of the cloud around it.
    services: Vec<Process>,
}

struct Running {
    nspawn: Process,
    /// The guest's first process, as seen from here.
    leader: i32,
}

const APPLICATION: &str = "[Service]
ExecStart=/opt/onboarding-testkit application --name guest --listen 127.0.0.1:%i
[Install]
WantedBy=multi-user.target
";

impl Guest {
    /// A machine of the company: it trusts the company's CA, its DNS knows the endpoint, its application listens on 127.0.0.1:8080 and :80.
    /// Off; see [`Self::boot`]. `image`: which of `dev/vm`'s, `bookworm` or `dnf`.
    pub fn new(world: &World, image: &str, name: &str, host: u8, subject: &str) -> anyhow::Result<Self> {
        let machine = world.lab().machine(name, host)?;
        let folder = machine.directory().to_owned();
        for part in ["upper", "work", "root"] {
            // A machine of this name may have been there before.
            let _ = std::fs::remove_dir_all(folder.join(part));
            std::fs::create_dir_all(folder.join(part))?;
        }
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            debian(image)?.display(),
            folder.join("upper").display(),
            folder.join("work").display()
        );
        let mounted = folder.join("root");
        let mounted = mounted.to_str().context("a path that isn't text")?;
        machine.check("mount", ["-t", "overlay", "overlay", "-o", &layers, mounted])?;
        machine.check("mkdir", ["-p", "/run/systemd/nspawn"])?;
        machine.check("mount", ["-t", "tmpfs", "tmpfs", "/run/systemd/nspawn"])?;
        let root = PathBuf::from(format!("/proc/{}/root{mounted}", machine.holder_pid()));
        let guest = Self { machine, root, running: None, services: Vec::new() };
        let own = guest.machine.address();
        guest.write(
            "etc/hosts",
            &format!(
                "127.0.0.1 localhost\n{own} {name}\n{} {ENDPOINT}\n{} mycompany.corp\n",
                world.way_in(),
                world.cloud.address()
            ),
        )?;
        guest.write("etc/hostname", &format!("{name}\n"))?;
        guest.write("etc/machine-id", "0123456789abcdef0123456789abcdef\n")?;
        guest.write("usr/local/share/ca-certificates/your-company.crt", world.ca_certificate())?;
        guest.write("etc/systemd/system/application@.service", APPLICATION)?;
        let plugin = "usr/local/bin/onboarding-agent-my-jwt-plugin";
        guest.write(plugin, &world.credential_plugin_script(None, subject, "us-east", "app-productpage"))?;
        std::fs::set_permissions(guest.root.join(plugin), std::fs::Permissions::from_mode(0o755))?;
        Ok(guest)
    }

    /// Makes it an instance of EC2: the metadata service answers in it.
    pub fn is_on_ec2(&mut self, world: &World, instance: &str, role: &str) -> anyhow::Result<()> {
        self.machine.add_loopback_address(METADATA)?;
        self.services.push(world.metadata_server(&self.machine, instance, &format!("{REGION}b"), role)?);
        Ok(())
    }

    /// `path` without a leading `/`.
    pub fn write(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let file = self.root.join(path);
        std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
    }

    pub fn read(&self, path: &str) -> anyhow::Result<String> {
        let file = self.root.join(path);
        std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    }

    /// From here into the machine; `path` without a leading `/`.
    pub fn copy(&self, from: &Path, path: &str) -> anyhow::Result<()> {
        std::fs::copy(from, self.root.join(path)).with_context(|| format!("copying {}", from.display()))?;
        Ok(())
    }

    /// Switches it on, and waits until systemd has started everything.
    pub fn boot(&mut self) -> anyhow::Result<()> {
        ensure!(self.running.is_none(), "{} is on", self.machine.name());
        let name = self.machine.name();
        let mut command = self.machine.command_in_group("systemd-nspawn")?;
        command.arg("-D").arg(self.machine.directory().join("root")).args(["--boot", "--register=no", "--keep-unit"]);
        command.args(["--console=pipe", "--settings=no", "--link-journal=no", "--resolv-conf=off", "--timezone=off"]);
        command.arg(format!("--machine={name}")).arg(format!("--hostname={name}"));
        command.arg(format!("--bind-ro={}:/opt/onboarding-testkit", binary("onboarding-testkit")?.display()));
        let nspawn =
            Process::start(&format!("{name}: systemd"), command, Some(&self.machine.directory().join("boot.log")))?;
        let leader = until(&format!("{name} has booted"), Duration::from_secs(60), || {
            if let Some(status) = nspawn.status() {
                return Ok(Err(anyhow::anyhow!("systemd-nspawn ended ({status}):\n{}", nspawn.tail())));
            }
            let leader = child_of(nspawn.pid()).context("systemd-nspawn has no child yet")?;
            let state = inside(leader, "systemctl is-system-running || true", Duration::from_secs(10))?;
            let state = state.stdout.trim();
            ensure!(state == "running" || state == "degraded", "systemd says {state:?}");
            Ok(Ok(leader))
        })??;
        let groups = std::fs::read_to_string(format!("/proc/{leader}/cgroup"))?;
        ensure!(
            groups.contains(&self.machine.control_group()?),
            "{name} shares a control group with others:\n{groups}"
        );
        self.running = Some(Running { nspawn, leader });
        Ok(())
    }

    /// `systemctl poweroff`, and waits until it is off.
    pub fn power_off(&mut self) -> anyhow::Result<()> {
        self.sh("systemctl poweroff")?;
        let running = self.running.take().context("it is off")?;
        let status = running.nspawn.wait(Duration::from_secs(90))?;
        ensure!(status.success(), "systemd-nspawn ended with {status}:\n{}", running.nspawn.tail());
        Ok(())
    }

    /// What an administrator types: to its end, within three minutes.
    pub fn try_sh(&self, script: &str) -> anyhow::Result<Ended> {
        let running = self.running.as_ref().with_context(|| format!("{} is off", self.machine.name()))?;
        inside(running.leader, script, Duration::from_secs(180))
    }

    /// The same, where it must succeed; standard output.
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        let ended = self.try_sh(script)?;
        ensure!(
            ended.status.success(),
            "in {}: {script}: {}\n{}{}",
            self.machine.name(),
            ended.status,
            ended.stdout,
            ended.stderr
        );
        Ok(ended.stdout)
    }

    /// Every file with its kind, mode and owner, and in /etc with its content; without what programs of Debian write as they go.
    pub fn files(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let list = self.sh(
            r"find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /var/tmp -o -path /var/cache \
                -o -path /var/lib/dpkg -o -path /var/lib/apt -o -path /var/lib/dnf -o -path /var/log/journal -o -path /var/log/apt -o -path /root \
                -o -path /var/lib/systemd -o -name '*.log' -o -path '/etc/*-' \) -prune -o -printf '%p\t%y %m %u:%g %l\n'",
        )?;
        let mut files: BTreeMap<String, String> = list
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .map(|(path, is)| (path.to_owned(), is.trim_end().to_owned()))
            .collect();
        // Users stay, and are in files; the linker's cache is written anew by Debian.
        let sums = self.sh(
            r"find /etc -xdev -type f ! -name '*-' ! -name passwd ! -name shadow ! -name group ! -name gshadow ! -name subuid ! -name subgid \
                ! -name ld.so.cache -exec sha256sum {} +",
        )?;
        for (sum, path) in sums.lines().filter_map(|line| line.split_once("  ")) {
            files.entry(path.to_owned()).or_default().push_str(sum);
        }
        Ok(files)
    }

    /// For the message of a failed scenario.
    pub fn report(&self) -> String {
        let journal = self.try_sh(
            "journalctl --no-pager -n 60 -o cat -u onboarding-agent; systemctl --no-pager status onboarding-agent",
        );
        format!(
            "last lines of {}:\n{}",
            self.machine.name(),
            journal.map_or_else(|error| format!("{error:#}"), |ended| ended.stdout)
        )
    }
}

impl World {
    /// Where a plane of one machine has packages.
    pub fn repository(&self) -> PathBuf {
        self.data_dir().join("packages")
    }

    /// All that `dev/package` made into the repository, signed.
    pub fn publish_packages(&self) -> anyhow::Result<()> {
        let from = PathBuf::from(std::env::var_os("ONBOARDING_PACKAGES").context(
            "ONBOARDING_PACKAGES isn't set: run `dev/package -o DIRECTORY` and set it to that directory, as dev/test does",
        )?);
        let all = ["onboarding-agent", "istio-sidecar"]
            .map(|package| ["deb", "rpm"].map(|format| from.join(format!("{format}/amd64/{package}.{format}"))));
        self.import_packages(all.as_flattened())
    }

    pub fn import_packages(&self, files: &[PathBuf]) -> anyhow::Result<()> {
        let mut command = Command::new(binary("onboardctl")?);
        command.args(["packages", "import"]).args(files).arg("--packages").arg(self.repository());
        process::output(command, Duration::from_secs(240)).map(drop)
    }
}

const AGENT: &str = "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1
kind: AgentConfiguration
host:
  custom:
    credential:
    - plugin:
        name: my-jwt
";

/// What the administrator of a VM edits, and then types.
pub fn configure() -> String {
    format!(
        "sed -i -e 's/<onboarding-endpoint-dns-name>/{ENDPOINT}/' -e 's/<namespace>/bookinfo/' -e 's/<workload-group>/productpage/' \
            /etc/onboarding-agent/onboarding.config.yaml
        cat > /etc/onboarding-agent/agent.config.yaml <<'END'\n{AGENT}END
        systemctl enable --now onboarding-agent"
    )
}

/// The directory of a Debian that `dev/vm` makes once.
pub fn debian(suite: &str) -> anyhow::Result<PathBuf> {
    let mut command = Command::new(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/vm")));
    command.arg(suite);
    let path = process::output(command, Duration::from_secs(900))?;
    Ok(path.trim().into())
}

fn inside(leader: i32, script: &str, within: Duration) -> anyhow::Result<Ended> {
    let mut command = Command::new("nsenter");
    command.args(["--target", &leader.to_string(), "--all", "--", "bash", "-c", script]).current_dir("/");
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8");
    command.env("DEBIAN_FRONTEND", "noninteractive").env("SYSTEMD_PAGER", "");
    process::run(command, within)
}

fn child_of(parent: i32) -> Option<i32> {
    let parent = parent.to_string();
    std::fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name in parentheses may hold anything; state and parent follow it.
        (stat.rsplit_once(") ")?.1.split(' ').nth(1)? == parent).then_some(pid)
    })
}
