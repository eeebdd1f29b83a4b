//! Objects that no plane made, and objects that the API server would refuse today.

use crate::crowd::Crowd;
use anyhow::{Context, ensure};
use onboarding_testkit::cluster::Cluster;
use onboarding_tests::until::until;
use onboarding_tests::world::World;
use serde_json::Value;
use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

const WITHIN: Duration = Duration::from_secs(60);
const POLICIES: &str = "onboardingpolicies.authorization.onboarding.tetrate.io";

/// Made by hand under the names of hosts that come later.
pub fn objects_of_others(world: &mut World) -> anyhow::Result<()> {
    let mut crowd = Crowd::new(world, "foreign")?;
    let [taken, published] = [0, 1].map(|number| crowd.name(number));
    let cluster = &world.mesh()?.cluster;
    cluster.apply(&format!(
        "apiVersion: runtime.onboarding.tetrate.io/v1alpha1\nkind: WorkloadAutoRegistration\nmetadata: {{name: {taken}, namespace: bookinfo}}\n\
         spec:\n  identity: {{jwt: {{issuer: 'https://a.example', subject: x}}}}\n  registration: {{agent: {{version: 0.1.0}}}}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {published}, namespace: bookinfo}}\nspec: {{address: 10.7.7.7}}\n---\n\
         apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: somebodys-own, namespace: bookinfo}}\nspec: {{address: 10.7.7.8}}\n"
    ))?;
    let theirs = [("war", taken.as_str()), ("workloadentry", published.as_str()), ("workloadentry", "somebodys-own")];
    let before = versions(cluster, &theirs)?;
    crowd.grow(3);
    // The first is refused with the way out; the second joins, and its war says what the mesh doesn't know.
    let way_out = format!("kubectl delete war -n bookinfo {taken}");
    until("the way out is said", WITHIN, || {
        ensure!(crowd.refusals().keys().any(|words| words.contains(&way_out)), "{:?}", crowd.refusals());
        Ok(())
    })?;
    until("the war says whose the entry is", WITHIN, || {
        let condition = condition(&get(cluster, "war", &published)?, "Published")?;
        ensure!(condition["reason"] == "WorkloadEntryNotOurs", "{condition}");
        let words = condition["message"].as_str().unwrap_or_default();
        ensure!(words.contains(&format!("kubectl delete workloadentry -n bookinfo {published}")), "{words}");
        Ok(())
    })?;
    until("the third joins as ever", WITHIN, || {
        ensure!(crowd.entries(world)?.contains_key(&crowd.name(2)), "it isn't there");
        Ok(())
    })?;
    ensure!(versions(cluster, &theirs)? == before, "something of others was written");

    cluster.kubectl(["delete", "war", &taken, "-n", "bookinfo"])?;
    cluster.kubectl(["delete", "workloadentry", &published, "-n", "bookinfo"])?;
    crowd.wait_connected(WITHIN)?;
    until("both have entries of their own", WITHIN, || {
        let entries = crowd.entries(world)?;
        for name in [&taken, &published] {
            let owner = &entries.get(name).context("no entry")?["metadata"]["ownerReferences"][0]["kind"];
            ensure!(owner == "WorkloadAutoRegistration", "{owner}");
        }
        Ok(())
    })?;
    ensure!(
        versions(cluster, &theirs[2..])? == before[2..],
        "an entry that stands for nobody's registration was written"
    );
    cluster.kubectl(["delete", "workloadentry", "somebodys-own", "-n", "bookinfo"])?;
    crowd.leave(world)
}

/// Written while the API server had no schema for them.
pub fn of_before_the_schema(world: &mut World) -> anyhow::Result<()> {
    let mut crowd = Crowd::new(world, "old")?;
    let mut other = Crowd::new(world, "other")?;
    crowd.grow(20);
    other.grow(5);
    crowd.wait_connected(WITHIN)?;
    other.wait_connected(WITHIN)?;
    let cluster = &world.mesh()?.cluster;
    let good = world.manifest("old.yaml")?;
    let lax = "[{\"op\":\"replace\",\"path\":\"/spec/versions/0/schema/openAPIV3Schema\",\"value\":{\"type\":\"object\",\"x-kubernetes-preserve-unknown-fields\":true}}]";
    let crds = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds/onboardingpolicies.yaml"));
    cluster.kubectl(["patch", "crd", POLICIES, "--type=json", "-p", lax])?;
    // In the place of the policy that admits the crowd. With its schema back the API server leaves out what it doesn't know.
    let faulty = good.replace("issuer:", "isuer:");
    ensure!(faulty != good, "{good}");
    // It takes a moment until the API server serves by another schema.
    until("the API server takes what it refused", WITHIN, || cluster.apply(&faulty))?;
    let apply = ["apply", "--server-side", "--force-conflicts", "-f"].map(OsStr::new);
    cluster.kubectl(apply.into_iter().chain([crds.as_os_str()]))?;

    // It admits nobody: the sessions end, their entries live on for the grace period; whom another policy admits isn't concerned.
    until("it counts as absent", WITHIN, || {
        let connected = crowd.connected();
        ensure!(connected == 0, "{connected} sessions go on");
        Ok(())
    })?;
    ensure!(crowd.entries(world)?.len() == 20, "the entries went with the sessions");
    ensure!(other.connected() == 5 && other.sessions() == 5, "others' sessions ended: {:?}", other.refusals());
    until("its status says so", WITHIN, || {
        let accepted = condition(&get(cluster, "op", "old")?, "Accepted")?;
        ensure!(accepted["status"] == "False" && accepted["reason"] == "Invalid", "{accepted}");
        let words = accepted["message"].as_str().unwrap_or_default();
        ensure!(words.contains("spec.allow[0].workloads[0].jwt.issuer: is required"), "{words}");
        Ok(())
    })?;
    let log = world.plane()?.lines_since(Default::default());
    ensure!(
        log.iter().any(|line| line.contains("OnboardingPolicy bookinfo/old") && line.contains("issuer: is required")),
        "the log says nothing"
    );
    // Who comes now is let in by the policies that can be read.
    other.grow(1);
    until("the plane goes on", WITHIN, || {
        ensure!(other.connected() == 6, "{:?}", other.refusals());
        Ok(())
    })?;

    let before = crowd.wars(world)?;
    world.write_manifest("old.yaml", &good)?;
    crowd.wait_connected(WITHIN)?;
    let uids = |wars: &std::collections::BTreeMap<String, Value>| -> Vec<Value> {
        wars.values().map(|war| war["metadata"]["uid"].clone()).collect()
    };
    ensure!(uids(&crowd.wars(world)?) == uids(&before), "a typing error cost registrations");
    crowd.leave(world)?;
    other.leave(world)
}

fn get(cluster: &Cluster, kind: &str, name: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&cluster.kubectl(["get", kind, name, "-n", "bookinfo", "-o", "json"])?)?)
}

fn condition(object: &Value, kind: &str) -> anyhow::Result<Value> {
    let conditions = object["status"]["conditions"].as_array().context("it has no conditions")?;
    conditions
        .iter()
        .find(|condition| condition["type"] == kind)
        .cloned()
        .with_context(|| format!("no condition {kind}"))
}

fn versions(cluster: &Cluster, objects: &[(&str, &str)]) -> anyhow::Result<Vec<Value>> {
    objects.iter().map(|(kind, name)| Ok(get(cluster, kind, name)?["metadata"]["resourceVersion"].clone())).collect()
}
