//! `onboardctl explain`: may this identity join this group, and why (not).

use crate::manifests::{self, Admission};
use crate::outcome::{Format, Outcome, json};
use crate::plane::Access;
use anyhow::anyhow;
use onboarding_core::group::WorkloadGroup;
use onboarding_core::identity::Identity;
use onboarding_core::name::{self, GroupName, NameError, is_resource_name};
use onboarding_core::policy::Decision;
use onboarding_kinds::identity::read_identity_file;
use serde_json::json;
use std::fmt::Write;
use std::path::PathBuf;

/// Decide whether an identity may join a WorkloadGroup, and say why
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl explain -f policies/ --identity identity.yaml --group bookinfo/ratings
  onboardctl attest document.txt | \\
    onboardctl explain -f policies/ --identity - --group bookinfo/ratings -o json
  onboardctl explain --cluster --identity identity.yaml --group bookinfo/ratings

The identity file is an identity as in a registration's spec.identity; its key claimedOnly
names facts that are not proven, as in claimedOnly: [aws.ec2.iamRole].
An invalid policy counts as absent, with a warning. Where the manifests have a ControlPlane, an
identity by JWT whose issuer isn't listed there is refused; without one, issuers aren't judged.
In JSON, reasons has what stood in the way in each policy that doesn't admit the identity.

Exit codes: 0 allowed; 2 refused; 1 an input that can't be used, or wrong usage.")]
pub struct Explain {
    /// Manifests: files, directories, or - for standard input
    #[arg(short = 'f', long = "filename", num_args = 1.., value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Take policies, groups and the ControlPlane from the cluster
    #[arg(long, conflicts_with = "paths")]
    cluster: bool,
    /// The identity: a file, or - for standard input
    #[arg(long, value_name = "FILE")]
    identity: PathBuf,
    /// The WorkloadGroup
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = group_name)]
    group: GroupName,
    /// How to say it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

const REFUSED: u8 = 2;

impl Explain {
    pub fn run(&self, access: &Access) -> anyhow::Result<Outcome> {
        manifests::stdin_once(self.paths.iter().chain([&self.identity]))?;
        let loaded = match access.is_of_cluster(self.cluster, &self.paths)? {
            true => manifests::of_cluster(&access.cluster()?, Some(&self.group.namespace))?,
            false => manifests::load(&self.paths),
        };
        loaded.all_read()?;
        if let Some(fault) = loaded.unintelligible().next() {
            return Err(anyhow!("{fault}"));
        }
        let identity = self.identity()?;
        let mut notes: Vec<String> =
            loaded.faults.iter().map(|fault| format!("warning: counts as absent: {fault}")).collect();
        notes.extend(loaded.warnings.iter().map(|warning| format!("warning: {warning}")));
        let doubtful = format!("WorkloadGroup {}", self.group);
        let is_faulty = loaded.faults.iter().any(|fault| fault.object == doubtful);
        let admission = loaded.admission();
        let mut verdict = match admission.groups.get(&self.group) {
            Some(group) => admission.verdict(&identity, group),
            None => Verdict::refused(admission.no_group(&self.group, is_faulty)),
        };
        if let (Some(_), Some(group)) = (&verdict.allowed, admission.groups.get(&self.group)) {
            notes.extend(unnameable(&identity, &self.group));
            verdict.reasons = admission.obstacles(&identity, group);
        }
        let code = if verdict.allowed.is_some() { 0 } else { REFUSED };
        Ok(Outcome { out: self.say(&verdict), notes, code })
    }

    fn identity(&self) -> anyhow::Result<Identity> {
        let text = manifests::read_file(&self.identity)?;
        read_identity_file(&self.identity.display().to_string(), &text).map_err(|faults| {
            anyhow!(
                "the identity can't be used: {}",
                faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
            )
        })
    }

    fn say(&self, verdict: &Verdict) -> String {
        let Verdict { allowed, reasons } = verdict;
        match (self.output, allowed) {
            (Format::Json, _) => json(&json!({
                "allowed": allowed.is_some(),
                "policy": allowed.as_ref().map(|(policy, _)| policy),
                "reasons": reasons,
            })),
            (Format::Text, Some((policy, rule))) => format!(
                "allowed: policy {policy} admits this identity to the WorkloadGroup {} by its rule spec.allow[{rule}]\n",
                self.group
            ),
            (Format::Text, None) => {
                let mut out = format!("refused: nothing admits this identity to the WorkloadGroup {}\n", self.group);
                for reason in reasons {
                    let _ = writeln!(out, "  {reason}");
                }
                out
            }
        }
    }
}

/// A decision with its explanation.
pub struct Verdict {
    /// The policy, and which of its rules.
    pub allowed: Option<(String, usize)>,
    /// Why it was refused, or why not every policy allows it.
    pub reasons: Vec<String>,
}

impl Verdict {
    fn refused(reason: String) -> Self {
        Self { allowed: None, reasons: vec![reason] }
    }
}

impl Admission {
    /// Without the reasons of an approval, which take a walk through all policies.
    pub fn verdict(&self, identity: &Identity, group: &WorkloadGroup) -> Verdict {
        if let Some(why) = self.unlisted_issuer(identity) {
            let reasons = std::iter::once(why).chain(self.obstacles(identity, group)).collect();
            return Verdict { allowed: None, reasons };
        }
        if let Decision::Allowed { policy, rule } = self.policies.decide(identity, group) {
            return Verdict { allowed: Some((policy, rule)), reasons: Vec::new() };
        }
        let reasons = self.obstacles(identity, group);
        if reasons.is_empty() {
            return Verdict::refused(self.no_policy(&group.name.namespace));
        }
        Verdict { allowed: None, reasons }
    }

    /// What stood in the way in each policy of the group's namespace that doesn't allow it.
    fn obstacles(&self, identity: &Identity, group: &WorkloadGroup) -> Vec<String> {
        self.policies.reasons(identity, group, usize::MAX, usize::MAX).iter().map(ToString::to_string).collect()
    }

    /// Why the plane of these manifests takes no token of this identity's issuer.
    fn unlisted_issuer(&self, identity: &Identity) -> Option<String> {
        let Identity::Jwt(jwt) = identity else { return None };
        let issuer = jwt.issuer.stated();
        let is_listed = self.planes.iter().flat_map(|plane| &plane.issuers).any(|listed| listed.issuer == *issuer);
        (!self.planes.is_empty() && !is_listed).then(|| {
            format!("the ControlPlane doesn't list the issuer {issuer:?}, so its token isn't taken or renewed")
        })
    }

    fn no_policy(&self, namespace: &str) -> String {
        let elsewhere = match self.policies.policies().len() {
            0 => String::new(),
            count => format!("; there are {count} elsewhere, and a policy is about groups of its own namespace"),
        };
        format!("the namespace {namespace} has no valid OnboardingPolicy{elsewhere}")
    }

    pub fn no_group(&self, group: &GroupName, is_faulty: bool) -> String {
        if is_faulty {
            return format!("the WorkloadGroup {group} has faults, so it counts as absent");
        }
        let known: Vec<_> = self.groups.keys().take(5).map(ToString::to_string).collect();
        match known.as_slice() {
            [] => format!("the WorkloadGroup {group} doesn't exist; there is none here"),
            known => format!("the WorkloadGroup {group} doesn't exist; there are {}", known.join(", ")),
        }
    }
}

/// The plane also needs a name for the registration, and makes it of proven facts (of a task's also of what it says).
fn unnameable(identity: &Identity, group: &GroupName) -> Option<String> {
    match name::registration_name(group, identity, Some("any")) {
        Err(error @ (NameError::NotProven { .. } | NameError::NotStated { .. })) => {
            Some(format!("warning: the policy allows it, but the plane would refuse: {error}"))
        }
        _ => None,
    }
}

fn group_name(text: &str) -> Result<GroupName, String> {
    match text.split_once('/') {
        Some((namespace, name)) if is_resource_name(namespace) && is_resource_name(name) => {
            Ok(GroupName { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => Err("must be NAMESPACE/NAME, as in bookinfo/ratings".to_owned()),
    }
}
