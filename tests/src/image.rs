//! Container images as `dev/images` makes them, run as a runtime would run them, but without one: a read-only root filesystem, the
//! image's user, no capabilities, no new privileges, volumes.

use anyhow::{Context, ensure};
use onboarding_testkit::netns::Machine;
use onboarding_testkit::process;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Our images' user and group.
pub const USER: u32 = 65532;
/// Of a build of all images: what takes time is compressing Envoy.
const WITHIN: Duration = Duration::from_secs(300);

/// One that was unpacked.
pub struct Image {
    pub name: String,
    /// Digest of its manifest.
    pub digest: String,
    /// `config` of its image configuration: `User`, `Entrypoint`, `Labels`, ...
    pub config: Value,
    root: PathBuf,
}

/// Whether containers can be run here: files have to be given to their user. Where they can't it says why, and in CI that is a failure.
pub fn can_run() -> anyhow::Result<bool> {
    // All users are mapped, or there is nothing to map.
    let map = std::fs::read_to_string("/proc/self/uid_map")?;
    let last = map.split_whitespace().last().and_then(|count| count.parse::<u64>().ok()).unwrap_or_default();
    if last > u64::from(USER) {
        return Ok(true);
    }
    let why = "without root there is no other user to run a container as";
    ensure!(std::env::var_os("CI").is_none(), "{why}");
    println!("skipped: {why}");
    Ok(false)
}

/// Builds them of this workspace's binaries, in their debug form, the repository's with these packages; gives where the archives are.
pub fn build(to: &Path, packages: &Path, names: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    let binaries = crate::world::binary("onboarding-plane")?;
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/images"));
    command.arg("--binaries").arg(binaries.parent().context("the folder of binaries")?);
    command.arg("--envoy").arg(crate::world::envoy()?).arg("--packages").arg(packages).arg("-o").arg(to).args(names);
    let said = process::output(command, WITHIN)?;
    let archives: Vec<PathBuf> = said.lines().map(PathBuf::from).collect();
    ensure!(archives.len() == names.len(), "dev/images said:\n{said}");
    Ok(archives)
}

impl Image {
    /// Of an OCI archive (image-layout 1.0.0), below `to`.
    pub fn unpack(name: &str, archive: &Path, to: &Path) -> anyhow::Result<Self> {
        let (layout, root) = (to.join(format!("{name}.oci")), to.join(name));
        for directory in [&layout, &root] {
            std::fs::create_dir_all(directory)?;
        }
        untar(&["-xf"], archive, &layout)?;
        let blob = |descriptor: &Value| -> anyhow::Result<PathBuf> {
            let digest = descriptor["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:"));
            Ok(layout.join("blobs/sha256").join(digest.context("a descriptor without a SHA-256")?))
        };
        let json = |file: PathBuf| -> anyhow::Result<Value> { Ok(serde_json::from_slice(&std::fs::read(file)?)?) };
        let index = json(layout.join("index.json"))?;
        let [descriptor] = index["manifests"].as_array().map(Vec::as_slice).unwrap_or_default() else {
            anyhow::bail!("not one image: {index}")
        };
        let manifest = json(blob(descriptor)?)?;
        let config = json(blob(&manifest["config"])?)?;
        for layer in manifest["layers"].as_array().context("no layers")? {
            untar(&["--same-owner", "--same-permissions", "-xzf"], &blob(layer)?, &root)?;
        }
        std::fs::remove_dir_all(&layout)?;
        // What a runtime mounts over, it makes where it isn't there.
        for directory in ["proc", "dev", "etc"] {
            std::fs::create_dir_all(root.join(directory))?;
        }
        for file in ["etc/hosts", "etc/resolv.conf"] {
            std::fs::write(root.join(file), "")?;
        }
        let digest = descriptor["digest"].as_str().unwrap_or_default().to_owned();
        Ok(Self { name: name.to_owned(), digest, config: config["config"].clone(), root })
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Its entry point in this machine. `volumes`: what is mounted, read-write, and where; `environment`: all of it but PATH.
    pub fn command(
        &self,
        machine: &Machine,
        volumes: &[(&Path, &str)],
        environment: &[(&str, String)],
        arguments: &[&str],
    ) -> anyhow::Result<Command> {
        let [entry] = self.config["Entrypoint"].as_array().map(Vec::as_slice).unwrap_or_default() else {
            anyhow::bail!("{}: no entry point of one word: {}", self.name, self.config)
        };
        let entry = entry.as_str().context("an entry point that isn't text")?;
        ensure!(self.config["User"] == format!("{USER}:{USER}"), "{}: {}", self.name, self.config["User"]);
        let mut mounts = String::new();
        for (from, to) in volumes {
            std::fs::create_dir_all(self.path(to))?;
            mounts.push_str(&format!("mount --bind {} $root{to}\n", from.display()));
        }
        let script = CONTAINER.replace("MOUNTS\n", &mounts).replace("USER", &USER.to_string());
        let mut command = machine.command("/usr/bin/unshare");
        command.env_clear().envs(environment.iter().map(|(name, value)| (*name, value.as_str())));
        command.args(["--mount", "--propagation", "private", "/bin/sh", "-euc", &script, "container"]);
        command.arg(&self.root).arg(entry).args(arguments);
        Ok(command)
    }
}

const CONTAINER: &str = "\
PATH=/usr/sbin:/usr/bin:/sbin:/bin
root=$1
shift
mount --bind $root $root
for file in hosts resolv.conf; do mount --bind /etc/$file $root/etc/$file; done
mount -t proc -o nosuid,nodev,noexec proc $root/proc
mount -t tmpfs -o nosuid,mode=0755,size=64k dev $root/dev
for device in null zero random urandom; do : >$root/dev/$device; mount --bind /dev/$device $root/dev/$device; done
ln -s /proc/self/fd $root/dev/fd
for number in 0 1 2; do ln -s /proc/self/fd/$number $root/dev/std$(echo in out err | cut -d ' ' -f $((number + 1))); done
MOUNTS
mount -o remount,bind,ro $root
# As runc does: the container's user may open them again, by name.
for number in 0 1 2; do [ ! -p /proc/self/fd/$number ] || chown USER:USER /proc/self/fd/$number; done
PATH=/usr/local/bin exec /usr/bin/setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+setuid,+setgid,+sys_chroot \\
    /usr/sbin/chroot --userspec=USER:USER $root \"$@\"
";

fn untar(flags: &[&str], archive: &Path, to: &Path) -> anyhow::Result<()> {
    let mut command = Command::new("tar");
    command.args(flags).arg(archive).arg("-C").arg(to);
    process::output(command, Duration::from_secs(60)).map(drop)
}
