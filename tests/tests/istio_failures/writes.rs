//! What the API server was asked to write, by its own count.

use anyhow::Context;
use onboarding_tests::world::World;
use std::collections::BTreeMap;

/// Of wars, WorkloadEntries and ConfigMaps: `PUT workloadautoregistrations/status` and how many, whatever was answered.
pub struct Writes(BTreeMap<String, u64>);

impl Writes {
    pub fn now(world: &World) -> anyhow::Result<Self> {
        let text = world.mesh()?.cluster.kubectl(["get", "--raw", "/metrics"])?;
        let mut all = BTreeMap::new();
        for line in text.lines().filter_map(|line| line.strip_prefix("apiserver_request_total{")) {
            let (labels, count) = line.rsplit_once("} ").context("a metric has a value")?;
            let label = |name: &str| {
                let rest = labels.split_once(&format!("{name}=\""))?.1;
                rest.split_once('"').map(|(value, _)| value)
            };
            let (Some(verb), Some(resource)) = (label("verb"), label("resource")) else { continue };
            if !matches!(verb, "POST" | "PUT" | "PATCH" | "APPLY" | "DELETE" | "DELETECOLLECTION")
                || !matches!(resource, "workloadautoregistrations" | "workloadentries" | "configmaps")
            {
                continue;
            }
            let part = label("subresource")
                .filter(|part| !part.is_empty())
                .map_or_else(String::new, |part| format!("/{part}"));
            *all.entry(format!("{verb} {resource}{part}")).or_default() += count.parse::<f64>()? as u64;
        }
        Ok(Self(all))
    }

    /// What came since `before`, by kind; only what did.
    pub fn since(&self, before: &Self) -> BTreeMap<&str, u64> {
        let new = |(kind, count): (&'_ String, &u64)| count - before.0.get(kind).copied().unwrap_or(0);
        self.0.iter().map(|it| (it.0.as_str(), new(it))).filter(|(_, count)| *count > 0).collect()
    }
}
