//! Tasks of ECS, and the container images: built without a daemon, run without a runtime, as their own user on a read-only root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_testkit::process::{self, Process};
use onboarding_tests::image::{self, Image, USER};
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::vm::{Evidence, Vm};
use onboarding_tests::world::{ENDPOINT, Setup, World};
use serde_json::Value;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[
    ("an_ecs_task_joins_by_its_role_and_is_called", task_joins),
    ("an_ecs_task_is_refused_with_the_fact_that_is_only_claimed", task_is_refused),
    ("the_images_are_what_they_say_and_the_same_each_time", images),
    ("the_repository_serves_the_packages_of_its_image_and_the_operator_starts", repository),
    ("plane_and_agent_run_from_their_images_as_ecs_runs_them", containers),
];

/// For tasks whose role is `ratings-role`; `{}` of them.
const POLICY: &str = "\
apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata:
  name: allow-ecs-tasks
  namespace: bookinfo
spec:
  allow:
  - workloads:
    - aws:
        accounts: ['123456789012']
        ecs:
          iamRoleNames: [ratings-role]
    onboardTo:
    - workloadGroupSelector:
        matchLabels:
          app: ratings
";
const TASK: &str = "16aeded318d842bb8226e5bc678cd446";
const NAMES: [&str; 4] = ["onboarding-plane", "onboarding-operator", "onboarding-repository", "onboarding-agent"];

fn main() -> ExitCode {
    run(Setup::default(), SCENARIOS)
}

fn task_joins(world: &mut World) -> anyhow::Result<()> {
    world.write_manifest("ecs-policy.yaml", POLICY)?;
    let mut task = world.vm("task1", 21, "ratings", Evidence::ecs(TASK, "ratings-role"))?;
    let mut caller = world.vm("vm2", 22, "productpage", Evidence::jwt("us-east-datacenter1-vm021"))?;
    task.join()?;
    caller.join()?;
    world.connected(&format!("ratings-aws-aws-123456789012-us-east-2b-ecs-bookinfo-{TASK}"))?;
    let war = war(world, &task)?;
    // What was proven, and nothing else; the address is the task's own.
    let proven = serde_json::json!({"aws": {
        "partition": "aws", "account": "123456789012", "ecs": {"iamRole": {"name": "ratings-role"}},
    }});
    ensure!(war["spec"]["identity"] == proven, "{war}");
    let addresses = serde_json::json!([{"ip": task.machine.address().to_string(), "type": "VPC"}]);
    ensure!(war["spec"]["registration"]["host"]["addresses"] == addresses, "{war}");
    until("the task is called", Duration::from_secs(20), || {
        let answer = caller.call("ratings.bookinfo:8080")?;
        ensure!(answer.server.as_deref() == Some("spiffe://cluster.local/ns/bookinfo/sa/ratings-vm"), "{answer:?}");
        Ok(())
    })?;

    // Another plane process: token and registration are read again, with what is only claimed in them.
    world.kill_plane();
    world.start_plane()?;
    until("the task is back", Duration::from_secs(40), || world.connected(&task.registration()))?;
    // The policy goes, and with it what lived by it.
    world.remove_manifest("ecs-policy.yaml")?;
    until("the task's registration is gone", Duration::from_secs(20), || match self::war(world, &task) {
        Ok(war) => anyhow::bail!("{war}"),
        Err(_) => Ok(()),
    })?;
    for vm in [&mut task, &mut caller] {
        vm.stop_agent()?;
    }
    Ok(())
}

fn task_is_refused(world: &mut World) -> anyhow::Result<()> {
    let mut task = world.vm("task2", 23, "ratings", Evidence::ecs(&TASK.replace('1', "2"), "ratings-role"))?;
    let asking = POLICY.replace("ecs:\n", "ecs:\n          clusters: [bookinfo]\n");
    world.write_manifest("ecs-policy.yaml", &asking)?;
    task.start_agent()?;
    task.agent()?.wait_for_line(Duration::from_secs(20), |line| line.contains("Not authorized by OnboardingPolicy"))?;
    let reason = "aws.ecs.clusters: \"bookinfo\" is only claimed, not proven, wanted \"bookinfo\"";
    until("the audit log says why", Duration::from_secs(5), || {
        let log = std::fs::read_to_string(world.audit_log())?;
        let said = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).any(|entry| {
            entry["decision"] == "refused" && entry["reasons"].to_string().contains(&reason.replace('"', "\\\""))
        });
        ensure!(said, "{}", log.lines().next_back().unwrap_or_default());
        Ok(())
    })?;
    // Without the constraint it is let in, by itself.
    world.write_manifest("ecs-policy.yaml", POLICY)?;
    task.wait_live(Duration::from_secs(30))?;
    task.stop_agent()?;
    world.remove_manifest("ecs-policy.yaml")
}

fn images(world: &mut World) -> anyhow::Result<()> {
    if !image::can_run()? {
        return Ok(());
    }
    let images = unpacked(world)?;
    for image in images {
        let name = &image.name;
        let labels = &image.config["Labels"];
        ensure!(labels["org.opencontainers.image.title"] == name.as_str(), "{name}: {labels}");
        ensure!(labels["org.opencontainers.image.licenses"] == "Apache-2.0", "{name}: {labels}");
        let ended = process::run(image.command(&world.cloud, &[], &[], &["--version"])?, Duration::from_secs(20))?;
        ensure!(ended.status.success() && ended.stdout.trim() == format!("{name} 0.1.0"), "{name}: {ended:?}");
        let sbom = std::fs::read(image.path(&format!("usr/share/doc/{name}/sbom.cdx.json")))?;
        let sbom: Value = serde_json::from_slice(&sbom)?;
        let components = sbom["components"].as_array().context("no components")?;
        for wanted in ["rustls", "glibc"] {
            ensure!(components.iter().any(|it| it["name"] == wanted), "{name}: {wanted} isn't among them");
        }
        // No shell, and nothing that is run as somebody else.
        ensure!(!image.path("bin").exists() && !image.path("usr/bin").exists(), "{name}: programs of others");
    }
    let directory = world.lab().directory().join("again");
    let again = image::build(&directory, &packages(world)?, &NAMES[2..3])?;
    let again = Image::unpack("again", &again[0], &directory)?;
    let first = images.iter().find(|image| image.name == NAMES[2]).context("no repository")?;
    ensure!(again.digest == first.digest, "{} became {}", first.digest, again.digest);
    Ok(())
}

fn repository(world: &mut World) -> anyhow::Result<()> {
    if !image::can_run()? {
        return Ok(());
    }
    let images = unpacked(world)?;
    let image = |name: &str| images.iter().find(|image| image.name == name).context("no such image");
    let help = process::run(
        image("onboarding-operator")?.command(&world.cloud, &[], &[], &["--help"])?,
        Duration::from_secs(20),
    )?;
    ensure!(help.status.success() && help.stdout.contains("Usage: onboarding-operator"), "{help:?}");

    let tls = world.lab().directory().join("repository-tls");
    std::fs::create_dir_all(&tls)?;
    let (certificate, key) = world.issue_endpoint_certificate()?;
    std::fs::write(tls.join("tls.crt"), certificate)?;
    std::fs::write(tls.join("tls.key"), key)?;
    process::output(own(&tls), Duration::from_secs(10))?;
    let machine = world.lab().machine("repo", 26)?;
    let volumes: [(&Path, &str); 1] = [(&tls, "/etc/onboarding-repository/tls")];
    // Its packages are where it looks for them by itself.
    let arguments = ["--certificate-directory", "/etc/onboarding-repository/tls", "--listen", "0.0.0.0:8443"];
    let command = image("onboarding-repository")?.command(&machine, &volumes, &[], &arguments)?;
    let server = Process::start("repository (container)", command, Some(&machine.directory().join("repository.log")))?;
    let resolve = format!("{ENDPOINT}:8443:{}", machine.address());
    let ca = world.ca_file();
    let script = format!(
        "cd {} && curl -fsSO --resolve {resolve} --cacert {ca} {url} && curl -fsSO --resolve {resolve} --cacert {ca} {url}.sha256 \
            && sha256sum --check onboarding-agent.deb.sha256",
        machine.directory().display(),
        ca = ca.display(),
        url = format_args!("https://{ENDPOINT}:8443/install/deb/amd64/onboarding-agent.deb"),
    );
    let said = until("it serves", Duration::from_secs(20), || world.cloud.check("sh", ["-c", &script]))?;
    ensure!(said.contains("onboarding-agent.deb: OK"), "{said}");
    let (got, put) =
        (machine.directory().join("onboarding-agent.deb"), packages(world)?.join("deb/amd64/onboarding-agent.deb"));
    ensure!(std::fs::read(got)? == std::fs::read(put)?, "another package");
    let uids = uids(server.pid())?;
    ensure!(uids == format!("{USER} {USER} {USER} {USER}"), "the repository runs as {uids}");
    let status = server.terminate(Duration::from_secs(20))?;
    ensure!(status.success(), "it ended with {status}:\n{}", server.tail());
    Ok(())
}

/// A directory of packages with one small one in it.
fn packages(world: &World) -> anyhow::Result<std::path::PathBuf> {
    let (folder, packages) =
        (world.lab().directory().join("package"), world.lab().directory().join("packages-of-image"));
    let deb = packages.join("deb/amd64/onboarding-agent.deb");
    if !deb.exists() {
        std::fs::create_dir_all(folder.join("DEBIAN"))?;
        std::fs::create_dir_all(packages.join("deb/amd64"))?;
        let control = "Package: onboarding-agent\nVersion: 1\nArchitecture: amd64\nMaintainer: x <x@example.org>\nDescription: x\n";
        std::fs::write(folder.join("DEBIAN/control"), control)?;
        let mut command = std::process::Command::new("dpkg-deb");
        command.args(["-Zxz", "-b"]).arg(&folder).arg(&deb);
        process::output(command, Duration::from_secs(20))?;
    }
    Ok(packages)
}

fn containers(world: &mut World) -> anyhow::Result<()> {
    if !image::can_run()? {
        return Ok(());
    }
    let images = unpacked(world)?;
    let image = |name: &str| images.iter().find(|image| image.name == name).context("no such image");
    world.write_manifest("ecs-policy.yaml", POLICY)?;

    world.stop_plane()?;
    let data = world.data_dir();
    process::output(own(&data), Duration::from_secs(10))?;
    let (manifests, flags) = (world.manifests_dir(), world.cloud_flags());
    let lab = world.lab().directory().to_owned();
    let volumes: [(&Path, &str); 3] = [
        (&data, "/var/lib/onboarding-plane"),
        (&manifests, "/etc/onboarding-plane"),
        (&lab, lab.to_str().context("a path that isn't text")?),
    ];
    let mut arguments =
        vec!["standalone", "--manifests", "/etc/onboarding-plane", "--data-dir", "/var/lib/onboarding-plane"];
    arguments.extend(["--listen", "0.0.0.0:15443", "--admin-listen", "127.0.0.1:15080", "--audit-log", "-"]);
    // A user without capabilities has no port below 1024; runtimes differ in whether they let it.
    arguments.extend(["--repository-listen", "0.0.0.0:8443"]);
    arguments.extend(flags.iter().map(String::as_str));
    let command = image("onboarding-plane")?.command(&world.plane_machine, &volumes, &[], &arguments)?;
    world.plane = Some(Process::start("plane (container)", command, Some(&lab.join("plane.log")))?);
    world.wait_ready(Duration::from_secs(30))?;

    // The agent: three variables, and nothing else; a volume for its state.
    let mut task = world.vm("task3", 24, "ratings", Evidence::ecs(&TASK.replace('1', "3"), "ratings-role"))?;
    let state = task.state_dir();
    std::fs::create_dir_all(&state)?;
    process::output(own(&state), Duration::from_secs(10))?;
    let onboarding = format!(
        r#"{{"apiVersion": "config.agent.onboarding.tetrate.io/v1alpha1", "kind": "OnboardingConfiguration",
            "onboardingEndpoint": {{"host": "{ENDPOINT}"}}, "workloadGroup": {{"namespace": "bookinfo", "name": "ratings"}},
            "workload": {{"labels": {{"version": "v5"}}}}}}"#
    );
    let agent =
        "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: AgentConfiguration\nhost: {aws: {ecs: {}}}\n";
    let mut environment = task.environment();
    environment.extend([("ONBOARDING_CONFIG", onboarding), ("AGENT_CONFIG", agent.to_owned())]);
    let volumes: [(&Path, &str); 1] = [(&state, "/var/lib/onboarding-agent")];
    let in_task =
        |arguments: &[&str]| image("onboarding-agent")?.command(&task.machine, &volumes, &environment, arguments);
    let agent = Process::start("task3: agent", in_task(&[])?, Some(&task.file("agent.log")))?;
    task.agent = Some(agent);
    task.wait_live(Duration::from_secs(30))?;
    world.connected(&task.registration())?;
    // The container's health check, by the image's own program.
    let ready = process::run(in_task(&["ready"])?, Duration::from_secs(20))?;
    ensure!(ready.status.success() && ready.stdout.trim() == "LIVE", "{ready:?}");
    let uids = uids(task.agent()?.pid())?;
    ensure!(uids == format!("{USER} {USER} {USER} {USER}"), "the agent runs as {uids}");

    let mut caller = world.vm("vm4", 25, "productpage", Evidence::jwt("us-east-datacenter1-vm024"))?;
    caller.join()?;
    until("the container is called", Duration::from_secs(20), || caller.call("ratings.bookinfo:8080").map(drop))?;

    // ECS's stop: SIGTERM, and stopTimeout (30 s at first) until SIGKILL. The entry goes first.
    let took = task.stop_agent()?;
    ensure!(took < Duration::from_secs(29), "it took {took:?}");
    ensure!(war(world, &task).is_err(), "still registered");
    let ready = process::run(
        image("onboarding-agent")?.command(&task.machine, &volumes, &environment, &["ready"])?,
        Duration::from_secs(20),
    )?;
    ensure!(!ready.status.success(), "{ready:?}");
    caller.stop_agent()?;
    world.stop_plane()?;
    world.remove_manifest("ecs-policy.yaml")?;
    world.start_plane()
}

/// All four, built once for all scenarios: it takes a minute.
fn unpacked(world: &World) -> anyhow::Result<&'static [Image]> {
    static IMAGES: std::sync::OnceLock<Result<Vec<Image>, String>> = std::sync::OnceLock::new();
    let build = || -> anyhow::Result<Vec<Image>> {
        let directory = world.lab().directory().join("images");
        let archives = image::build(&directory, &packages(world)?, &NAMES)?;
        let unpack = |(name, archive): (&&str, &std::path::PathBuf)| {
            let image = Image::unpack(name, archive, &directory)?;
            std::fs::remove_file(archive)?;
            Ok(image)
        };
        NAMES.iter().zip(&archives).map(unpack).collect()
    };
    let images = IMAGES.get_or_init(|| build().map_err(|error| format!("{error:#}")));
    images.as_deref().map_err(|error| anyhow::anyhow!("the images can't be made: {error}"))
}

/// Gives a volume to the images' user, as its own, with all that is in it.
fn own(directory: &Path) -> std::process::Command {
    let mut command = std::process::Command::new("chown");
    command.arg("-R").arg(format!("{USER}:{USER}")).arg(directory);
    command
}

fn war(world: &World, vm: &Vm) -> anyhow::Result<Value> {
    let wars = world.registrations()?;
    let war = wars.iter().find(|war| war["metadata"]["name"] == vm.registration().as_str());
    war.cloned().with_context(|| format!("{} isn't registered", vm.registration()))
}

/// Real, effective, saved and of the file system.
fn uids(pid: i32) -> anyhow::Result<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).context("no Uid")?;
    Ok(line.split_whitespace().collect::<Vec<_>>().join(" "))
}
