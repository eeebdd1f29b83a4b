//! `onboardctl plan`: which live workloads would lose or gain their admission under other manifests.

use crate::manifests::{self, Admission};
use crate::outcome::{Format, Outcome, json, printable};
use crate::plane::objects::WARS;
use crate::plane::{Access, Plane};
use anyhow::{Context, anyhow, ensure};
use onboarding_core::identity::Identity;
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_kinds::identity::from_json;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::PathBuf;

/// Say which live workloads would lose or gain their admission under changed manifests
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl plan -f manifests/
  onboardctl plan -f manifests/ -o json --data-dir /srv/onboarding
  kubectl get war -A -o json > wars.json
  onboardctl plan -f manifests/ --workloads wars.json

PATH holds all manifests as they would be, not only those that change. Whether a workload is
admitted now is what the plane says (status.admitted), or what the objects of the cluster
say; in a list without that, each is, except one whose session ended because a policy can't be
read. Where PATH has a ControlPlane, an identity by JWT also needs its issuer to be listed
there: without, its token isn't renewed.

Exit codes: 0 nothing would change; 3 somebody would lose or gain admission; 1 an input that
can't be used (such as manifests with faults), or wrong usage.")]
pub struct Plan {
    /// The manifests as they would be: files, directories, or - for standard input
    #[arg(short = 'f', long = "filename", required = true, num_args = 1.., value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// The live workloads as JSON, of kubectl get war or of onboardctl workloads [default: ask the plane or the cluster]
    #[arg(long, value_name = "FILE")]
    workloads: Option<PathBuf>,
    /// Only workloads of this namespace [default: of all]
    #[arg(short, long, value_name = "NAMESPACE", value_parser = crate::cli::namespace)]
    namespace: Option<String>,
    /// How to say it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

const WOULD_CHANGE: u8 = 3;

impl Plan {
    pub fn run(&self, access: &Access) -> anyhow::Result<Outcome> {
        manifests::stdin_once(self.paths.iter().chain(&self.workloads))?;
        let loaded = manifests::load(&self.paths);
        loaded.all_read()?;
        if let Some(fault) = loaded.faults.first() {
            let more = match loaded.faults.len() - 1 {
                0 => String::new(),
                more => format!(" (and {more} more; onboardctl lint lists them)"),
            };
            return Err(anyhow!("the manifests have faults, so nobody can say what they would admit: {fault}{more}"));
        }
        let notes = loaded.warnings.iter().map(|warning| format!("warning: {warning}")).collect();
        let admission = loaded.admission();
        let (wars, now) = self.live(access)?;
        let in_question = |war: &&Value| match &self.namespace {
            Some(namespace) => war.pointer("/metadata/namespace").and_then(Value::as_str) == Some(namespace),
            None => true,
        };
        let workloads = wars.iter().filter(in_question).map(Workload::read).collect::<anyhow::Result<Vec<_>>>()?;
        let workloads: Vec<Workload> = match &now {
            // An object of a cluster doesn't say whether it is admitted: what admits is there to be asked.
            Some(now) => workloads.into_iter().map(|it| Workload { admitted: now.admits(&it).is_ok(), ..it }).collect(),
            None => workloads,
        };
        let changes: Vec<Change> = workloads.iter().filter_map(|workload| admission.change(workload)).collect();
        let code = if changes.is_empty() { 0 } else { WOULD_CHANGE };
        Ok(Outcome { out: self.say(&changes, workloads.len()), notes, code })
    }

    /// The workloads, and of a cluster what admits them now.
    fn live(&self, access: &Access) -> anyhow::Result<(Vec<Value>, Option<Admission>)> {
        let Some(file) = &self.workloads else {
            return Ok(match access.plane()? {
                Plane::Socket(socket) => (socket.workloads()?, None),
                Plane::Cluster(cluster) => {
                    let namespace = self.namespace.as_deref();
                    let now = manifests::of_cluster(&cluster, namespace)?.admission();
                    (cluster.list(&WARS, namespace)?, Some(now))
                }
            });
        };
        let text = manifests::read_file(file)?;
        let list: Value = serde_json::from_str(&text).with_context(|| format!("{} isn't JSON", file.display()))?;
        let items = list.get("items").unwrap_or(&list).as_array().cloned();
        let items = items.with_context(|| format!("{} isn't a list of WorkloadAutoRegistrations", file.display()))?;
        Ok((items, None))
    }

    fn say(&self, changes: &[Change], live: usize) -> String {
        let (losing, gaining): (Vec<&Change>, Vec<&Change>) = changes.iter().partition(|change| change.loses);
        if self.output == Format::Json {
            let list = |changes: &[&Change]| changes.iter().map(|change| change.to_json()).collect::<Vec<_>>();
            return json(&json!({
                "lose": list(&losing),
                "gain": list(&gaining),
                "unchanged": live - changes.len(),
            }));
        }
        let mut out = String::new();
        for Change { workload, loses, why } in changes {
            let verb = if *loses { "lose" } else { "gain" };
            let name = printable(&workload.name.to_string());
            let _ = writeln!(out, "{name} (WorkloadGroup {}) would {verb} its admission", workload.group);
            for reason in why {
                let _ = writeln!(out, "  {reason}");
            }
        }
        let _ = writeln!(
            out,
            "{live} live workloads: {} would lose their admission, {} would gain it, nothing changes for {}.",
            losing.len(),
            gaining.len(),
            live - changes.len()
        );
        out
    }
}

/// One that lives.
struct Workload {
    name: RegistrationName,
    group: GroupName,
    identity: Identity,
    /// As things are configured now.
    admitted: bool,
}

impl Workload {
    /// From its WorkloadAutoRegistration.
    fn read(war: &Value) -> anyhow::Result<Self> {
        let text = |pointer: &str| war.pointer(pointer).and_then(Value::as_str).map(str::to_owned);
        let name = text("/metadata/namespace").zip(text("/metadata/name"));
        let (namespace, name) = name.context("a WorkloadAutoRegistration has no namespace or no name")?;
        let of = || format!("the WorkloadAutoRegistration {namespace}/{name}");
        let owners = war.pointer("/metadata/ownerReferences").and_then(Value::as_array);
        let owner = owners.into_iter().flatten().find(|owner| owner["kind"] == "WorkloadGroup");
        let group = owner.and_then(|owner| owner["name"].as_str());
        let group = group.with_context(|| format!("{} has no WorkloadGroup among its ownerReferences", of()))?;
        let identity = war.pointer("/spec/identity").with_context(|| format!("{} has no spec.identity", of()))?;
        let identity = from_json(identity, &[]).map_err(|problem| anyhow!("{}: spec.identity: {problem}", of()))?;
        let admitted = match war.pointer("/status/admitted") {
            Some(admitted) => admitted.as_bool().with_context(|| format!("{}: status.admitted is no boolean", of()))?,
            None => {
                let conditions = war.pointer("/status/conditions").and_then(Value::as_array);
                !conditions.into_iter().flatten().any(|is| is["reason"] == SUSPENDED)
            }
        };
        ensure!(!group.is_empty(), "{} is of a WorkloadGroup without a name", of());
        Ok(Self {
            group: GroupName { namespace: namespace.clone(), name: group.to_owned() },
            name: RegistrationName { namespace, name },
            identity,
            admitted,
        })
    }
}

/// As `kinds::war` says it of a session that ended because a policy can't be read.
const SUSPENDED: &str = "AgentDisconnectedPolicyUnreadable";

struct Change<'a> {
    workload: &'a Workload,
    loses: bool,
    why: Vec<String>,
}

impl Change<'_> {
    fn to_json(&self) -> Value {
        json!({
            "namespace": self.workload.name.namespace,
            "name": self.workload.name.name,
            "group": self.workload.group.name,
            "reasons": self.why,
        })
    }
}

impl Admission {
    fn change<'a>(&self, workload: &'a Workload) -> Option<Change<'a>> {
        match (workload.admitted, self.admits(workload)) {
            (true, Err(why)) => Some(Change { workload, loses: true, why }),
            (false, Ok(policy)) => {
                Some(Change { workload, loses: false, why: vec![format!("policy {policy} admits it")] })
            }
            _ => None,
        }
    }

    /// The policy that admits it, or why none does.
    fn admits(&self, workload: &Workload) -> Result<String, Vec<String>> {
        let group = self.groups.get(&workload.group);
        let group = group.ok_or_else(|| vec![self.no_group(&workload.group, false)])?;
        let verdict = self.verdict(&workload.identity, group);
        verdict.allowed.map(|(policy, _)| policy).ok_or(verdict.reasons)
    }
}
