//! `onboardctl` against a plane with live workloads: what it lists, what it plans, what it deletes, and what it says when it can't.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use anyhow::{Context, ensure};
use onboarding_testkit::process::{Ended, Process};
use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::until::until;
use onboarding_tests::vm::Vm;
use onboarding_tests::world::{Pair, Setup, World, binary};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const SCENARIOS: &[Scenario] = &[
    ("live_workloads_are_listed_as_people_and_programs_want_them", listed),
    ("what_a_plan_says_of_a_narrower_policy_is_what_happens", planned),
    ("who_a_corrected_policy_would_readmit_is_planned", readmitted),
    ("a_workload_that_is_deleted_onboards_again", deleted),
    ("a_host_that_was_rebuilt_comes_in_once_its_old_key_is_forgotten", rebuilt),
    ("a_plane_that_is_not_ready_or_not_there_is_said_with_the_way_out", not_there),
];

fn main() -> ExitCode {
    run(Setup::default(), SCENARIOS)
}

/// What it prints, once it ended like this.
fn prints(ended: &Ended, code: i32, out: &[&str]) -> anyhow::Result<()> {
    ensure!(ended.status.code() == Some(code), "not exit code {code}: {ended:?}");
    for part in out {
        ensure!(ended.stdout.contains(part), "{part:?} isn't on standard output: {ended:?}");
    }
    Ok(())
}

fn complains(ended: &Ended, code: i32, parts: &[&str]) -> anyhow::Result<()> {
    prints(ended, code, &[])?;
    ensure!(ended.stdout.is_empty(), "it prints: {ended:?}");
    for part in parts {
        ensure!(ended.stderr.contains(part), "{part:?} isn't on standard error: {ended:?}");
    }
    Ok(())
}

fn parsed(ended: &Ended) -> anyhow::Result<Value> {
    serde_json::from_str(&ended.stdout).with_context(|| format!("it prints no JSON: {ended:?}"))
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn war(world: &World, vm: &Vm) -> anyhow::Result<Value> {
    let wars = world.registrations()?;
    let found = wars.into_iter().find(|war| war["metadata"]["name"] == *vm.registration());
    found.with_context(|| format!("{} isn't registered", vm.registration()))
}

fn wait_connected(world: &World, vm: &Vm) -> anyhow::Result<()> {
    until(&format!("{} is connected", vm.name()), Duration::from_secs(40), || world.connected(&vm.registration()))
}

fn keep(world: &mut World, pair: Pair) -> anyhow::Result<()> {
    wait_connected(world, &pair.ratings)?;
    wait_connected(world, &pair.productpage)?;
    pair.wait_reachable()?;
    world.keep(pair);
    Ok(())
}

/// A copy of the plane's manifests to change.
struct Changed(PathBuf);

impl Changed {
    fn of(world: &World, name: &str) -> anyhow::Result<Self> {
        let directory = world.lab().directory().join(name);
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(world.manifests_dir())? {
            let entry = entry?;
            fs::copy(entry.path(), directory.join(entry.file_name()))?;
        }
        Ok(Self(directory))
    }

    fn replace(&self, file: &str, from: &str, to: &str) -> anyhow::Result<()> {
        let path = self.0.join(file);
        let text = fs::read_to_string(&path)?;
        ensure!(text.contains(from), "{file} has no {from:?}");
        Ok(fs::write(path, text.replace(from, to))?)
    }

    fn plan(&self, world: &World, more: &[&str]) -> anyhow::Result<Ended> {
        let directory = self.0.to_str().context("a path that isn't text")?;
        world.onboardctl(&[&["plan", "-f", directory], more].concat())
    }
}

const ROLE: (&str, &str) = ("- ratings-role", "- reviews-role");

fn listed(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let (ratings, productpage) = (pair.ratings.registration(), pair.productpage.registration());

    let table = world.onboardctl(&["workloads"])?;
    prints(&table, 0, &[])?;
    let lines: Vec<_> = table.stdout.lines().map(words).collect();
    ensure!(lines.len() == 3 && lines[0] == ["NAME", "AGENT", "CONNECTED", "AGE"], "{table:?}");
    for (line, name) in lines[1..].iter().zip([&productpage, &ratings]) {
        ensure!(line[..2] == [name, "True"] && line.len() == 3 && line[2].ends_with('s'), "{table:?}");
    }
    let all = world.onboardctl(&["workloads", "-A"])?;
    prints(&all, 0, &[&format!("bookinfo    {ratings}")])?;
    ensure!(all.stdout.starts_with("NAMESPACE   NAME "), "{all:?}");

    let wide = world.onboardctl(&["workloads", "-n", "bookinfo", "-o", "wide"])?;
    prints(&wide, 0, &["GROUP", "HEALTHY", "ADDRESS", "CONNECTED TO"])?;
    for vm in [&pair.ratings, &pair.productpage] {
        let line = wide.stdout.lines().map(words).find(|line| line[0] == vm.registration()).context("no line")?;
        let address = vm.machine.address().to_string();
        ensure!(line[1] == "True" && line[3..6] == [&*vm.group, "True", &address], "{wide:?}");
        ensure!(line.len() == 8 && line[6] == "onboarding-plane", "{wide:?}");
    }

    let list = world.onboardctl(&["workloads", "-o", "json"])?;
    prints(&list, 0, &[])?;
    let list = parsed(&list)?;
    ensure!(list["kind"] == "List" && list["items"].as_array().is_some_and(|items| items.len() == 2), "{list}");
    let war = war(world, &pair.ratings)?;
    let identity = json!({ "aws": {
        "partition": "aws", "account": "123456789012", "region": "us-east-2", "zone": "us-east-2b",
        "ec2": { "instanceId": "i-1234567890abcdef0", "iamRole": { "name": "ratings-role" } },
    }});
    ensure!(war["kind"] == "WorkloadAutoRegistration" && war["spec"]["identity"] == identity, "{war}");
    ensure!(war["metadata"]["ownerReferences"][0]["name"] == "ratings" && war["status"]["admitted"] == true, "{war}");

    let yaml = world.onboardctl(&["workloads", "-o", "yaml"])?;
    prints(&yaml, 0, &["kind: List\n", "account: '123456789012'\n", &ratings, &productpage])?;
    // It is a manifest as others are, to the last field.
    let file = world.lab().directory().join("wars.yaml");
    fs::write(&file, &yaml.stdout)?;
    let linted = world.onboardctl(&["lint", file.to_str().context("a path that isn't text")?])?;
    ensure!(linted.status.success() && linted.stdout.is_empty() && linted.stderr.is_empty(), "{linted:?}");

    let none = world.onboardctl(&["workloads", "-n", "other"])?;
    complains(&none, 0, &["No workloads are registered in the namespace other."])?;

    let status = world.onboardctl(&["status"])?;
    prints(
        &status,
        0,
        &[
            "The plane is ready.\n",
            "Hosts          onboarding-endpoint.your-company.corp\n",
            "Sessions       2\n",
            "Configuration  generation ",
        ],
    )?;
    let status = world.onboardctl(&["status", "-o", "json"])?;
    prints(&status, 0, &[])?;
    let status = parsed(&status)?;
    ensure!(status["ready"] == true && status["sessions"] == 2 && status["uid"].is_string(), "{status}");
    keep(world, pair)
}

fn planned(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let ratings = pair.ratings.registration();
    let changed = Changed::of(world, "narrower")?;
    let same = "2 live workloads: 0 would lose their admission, 0 would gain it, nothing changes for 2.\n";
    let plan = changed.plan(world, &[])?;
    prints(&plan, 0, &[])?;
    ensure!(plan.stdout == same, "{plan:?}");

    changed.replace("ratings.yaml", ROLE.0, ROLE.1)?;
    let loses = format!(
        "bookinfo/{ratings} (WorkloadGroup bookinfo/ratings) would lose its admission\n  policy allow-narrow-subset-of-aws-ec2-instances: spec.allow[0].workloads[0].aws.ec2.iamRoleNames: is \"ratings-role\", wanted \"reviews-role\"\n"
    );
    let plan = changed.plan(world, &[])?;
    prints(&plan, 3, &[&loses, "1 would lose their admission, 0 would gain it, nothing changes for 1.\n"])?;
    let as_json = changed.plan(world, &["-o", "json"])?;
    prints(&as_json, 3, &[])?;
    let as_json = parsed(&as_json)?;
    ensure!(as_json["lose"].as_array().is_some_and(|lose| lose.len() == 1), "{as_json}");
    ensure!(as_json["lose"][0]["name"] == *ratings && as_json["lose"][0]["group"] == "ratings", "{as_json}");
    ensure!(as_json["gain"] == json!([]) && as_json["unchanged"] == 1, "{as_json}");
    // A list that was written down says the same, without a plane.
    let list = world.lab().directory().join("wars.json");
    fs::write(&list, world.onboardctl(&["workloads", "-o", "json"])?.stdout)?;
    let list = list.to_str().context("a path that isn't text")?;
    let nowhere = ["--workloads", list, "--data-dir", "/nowhere"];
    ensure!(changed.plan(world, &nowhere)?.stdout == plan.stdout, "not what the plane's list gives");

    let issuer = Changed::of(world, "other-issuer")?;
    issuer.replace("controlplane.yaml", "issuer: https://mycompany.corp", "issuer: https://other.example")?;
    let why = "the ControlPlane doesn't list the issuer \"https://mycompany.corp\"";
    prints(&issuer.plan(world, &[])?, 3, &[&pair.productpage.registration(), why, "1 would lose"])?;

    let faulty = Changed::of(world, "faulty")?;
    faulty.replace("ratings.yaml", "zones:", "zone:")?;
    let why = ["the manifests have faults", "aws.zone: is unknown here; did you mean zones?"];
    complains(&faulty.plan(world, &[])?, 1, &why)?;

    // As it was said: it loses its session and its registration, the other nothing.
    let sessions = pair.productpage.agent()?.mark();
    let before = world.manifest("ratings.yaml")?;
    world.write_manifest("ratings.yaml", &before.replace(ROLE.0, ROLE.1))?;
    until("its registration has ended", Duration::from_secs(5), || {
        ensure!(war(world, &pair.ratings).is_err(), "it is still there");
        Ok(())
    })?;
    prints(&changed.plan(world, &[])?, 0, &["1 live workloads: 0 would lose"])?;
    world.connected(&pair.productpage.registration())?;
    let since = pair.productpage.agent()?.lines_since(sessions);
    ensure!(!since.iter().any(|line| line.contains("session")), "{since:?}");
    world.write_manifest("ratings.yaml", &before)?;
    keep(world, pair)
}

fn readmitted(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    let (ratings, productpage) = (pair.ratings.registration(), pair.productpage.registration());
    let corrected = Changed::of(world, "corrected")?;
    let before = world.manifest("ratings.yaml")?;
    world.write_manifest("ratings.yaml", &before.replace("zones:", "zone:"))?;
    until("its session is suspended", Duration::from_secs(5), || {
        let war = war(world, &pair.ratings)?;
        ensure!(war["status"]["admitted"] == false && world.connected(&ratings).is_err(), "{}", war["status"]);
        Ok(())
    })?;
    let fault = "ratings.yaml:32: OnboardingPolicy bookinfo/allow-narrow-subset-of-aws-ec2-instances";
    let status = world.onboardctl(&["status"])?;
    prints(&status, 0, &["A policy can't be read: sessions are suspended", "Faults of the configuration:", fault])?;
    let table = world.onboardctl(&["workloads"])?;
    let line = table.stdout.lines().map(words).find(|line| line[0] == ratings).context("it isn't listed")?;
    ensure!(line[1] == "False", "{table:?}");

    let gains = format!(
        "bookinfo/{ratings} (WorkloadGroup bookinfo/ratings) would gain its admission\n  policy allow-narrow-subset-of-aws-ec2-instances admits it\n"
    );
    let plan = corrected.plan(world, &[])?;
    prints(&plan, 3, &[&gains, "0 would lose their admission, 1 would gain it, nothing changes for 1.\n"])?;
    // One of each.
    corrected.replace("productpage.yaml", "app-productpage", "app-details")?;
    let loses = format!("bookinfo/{productpage} (WorkloadGroup bookinfo/productpage) would lose its admission\n");
    prints(&corrected.plan(world, &[])?, 3, &[&gains, &loses, "1 would lose their admission, 1 would gain it"])?;

    world.write_manifest("ratings.yaml", &before)?;
    keep(world, pair)
}

fn deleted(world: &mut World) -> anyhow::Result<()> {
    let pair = world.pair()?;
    for (vm, in_namespace) in [(&pair.ratings, false), (&pair.productpage, true)] {
        let name = vm.registration();
        let before = war(world, vm)?;
        let full = format!("bookinfo/{name}");
        let ended = match in_namespace {
            false => world.onboardctl(&["workloads", "delete", &full])?,
            true => world.onboardctl(&["workloads", "delete", "-n", "bookinfo", &name])?,
        };
        prints(&ended, 0, &[])?;
        ensure!(
            ended.stdout == format!("{full} deleted; its host may come back, also with another key\n"),
            "{ended:?}"
        );
        until("the agent onboarded again", Duration::from_secs(40), || {
            let now = war(world, vm)?;
            let created = |war: &Value| war["metadata"]["creationTimestamp"].clone();
            ensure!(now["metadata"]["name"] == before["metadata"]["name"], "{now}");
            ensure!(created(&now) != created(&before), "it is the same one still");
            world.connected(&name)
        })?;
    }
    let names = [
        ("bookinfo/nobody", "there is no registration bookinfo/nobody"),
        ("bookinfo/nobody", "onboardctl workloads lists those that there are"),
        ("nobody", "name its namespace too, as in bookinfo/nobody or with -n bookinfo"),
        ("bookinfo/No_Body", "isn't a name of Kubernetes"),
    ];
    for (name, why) in names {
        complains(&world.onboardctl(&["workloads", "delete", name])?, 1, &[why])?;
    }
    keep(world, pair)
}

fn rebuilt(world: &mut World) -> anyhow::Result<()> {
    let mut pair = world.pair()?;
    let vm = &mut pair.productpage;
    vm.stop_agent()?;
    fs::remove_dir_all(vm.state_dir())?;
    vm.start_agent()?;
    // Its token can be replayed for an hour, so the plane believes the first key.
    let refused = "this identity is registered with another key";
    vm.agent()?.wait_for_line(Duration::from_secs(20), |line| line.contains(refused))?;
    let name = format!("bookinfo/{}", vm.registration());
    let ended = world.onboardctl(&["workloads", "delete", &name])?;
    let said = "had ended already; its key is forgotten, so its host may come with another\n";
    prints(&ended, 0, &[&format!("{name} {said}")])?;
    keep(world, pair)
}

fn not_there(world: &mut World) -> anyhow::Result<()> {
    let directory = world.lab().directory().join("bare");
    let data = directory.join("data");
    let there = data.to_str().context("a path that isn't text")?;
    let start = || {
        let mut command = world.plane_machine.command(binary("onboarding-plane")?);
        command.args(["standalone", "--listen", "127.0.0.1:25443", "--admin-listen", "127.0.0.1:25080"]);
        command.arg("--manifests").arg(directory.join("manifests")).arg("--data-dir").arg(&data);
        Process::start("a bare plane", command, None)
    };
    let onboardctl = |arguments: &[&str]| world.onboardctl(&[arguments, &["--data-dir", there]].concat());
    fs::create_dir_all(directory.join("manifests"))?;

    // Not started yet.
    let way_out = "is a standalone plane running on this machine? Name its data directory with --data-dir";
    complains(&onboardctl(&["workloads"])?, 1, &[&format!("asking the plane at {there}/admin.sock: "), way_out])?;

    // Up, and without anything that it needs.
    let plane = start()?;
    until("its admin socket answers", Duration::from_secs(10), || {
        let ended = onboardctl(&["status"])?;
        prints(&ended, 1, &["The plane is not ready.\n", "  missing: controlPlane", "  missing: certificate"])
    })?;
    let status = onboardctl(&["status", "-o", "json"])?;
    prints(&status, 1, &[])?;
    ensure!(parsed(&status)?["ready"] == false, "{status:?}");
    complains(&onboardctl(&["workloads"])?, 0, &["No workloads are registered."])?;

    // Killed: its socket is there still.
    plane.kill();
    plane.wait(Duration::from_secs(5))?;
    for verb in [&["status"][..], &["workloads"], &["plan", "-f", there]] {
        complains(&onboardctl(verb)?, 1, &["no plane listens there: it was killed, or isn't up yet"])?;
    }
    let ended = onboardctl(&["workloads", "delete", "bookinfo/somebody"])?;
    complains(&ended, 1, &["deleting bookinfo/somebody: ", "no plane listens there"])?;

    // Stopped: it isn't.
    let plane = start()?;
    until("it answers again", Duration::from_secs(10), || prints(&onboardctl(&["status"])?, 1, &["not ready"]))?;
    ensure!(plane.terminate(Duration::from_secs(10))?.success(), "it didn't end well:\n{}", plane.tail());
    complains(&onboardctl(&["status"])?, 1, &[way_out])
}
