//! The mesh at one moment: who is in it, what is behind each service, what each Sidecar's workloads are given. Pure.
//!
//! The next world is made of the last one and of what changed: what came out the same stays the same object, so that whoever
//! looks only at its own part sees by a pointer that nothing happened.

use crate::envoy::catalog::{Catalog, Upstream};
use crate::envoy::{self, Backend, Changes, Inbound, Member, Outbound, Resource, Resources};
use crate::mesh::MeshConfig;
use aws_lc_rs::digest::{Context, SHA256};
use onboarding_core::group::WorkloadEntry;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{ConnectedOver, Live, State};
use onboarding_endpoint::backend::Stored;
use onboarding_kinds::mesh::Sidecar;
use onboarding_wire::onboarding::{self as pb, XdsType};
use prost::Message;
use rpds::RedBlackTreeMapSync;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// More faults than anybody reads.
const MAX_FAULTS: usize = 100;

#[derive(Debug)]
pub struct World {
    trust_domain: String,
    pub mesh: Arc<MeshConfig>,
    catalog: Arc<Catalog>,
    /// Of the catalog's upstreams, in their order.
    backends: Vec<Backend>,
    /// Of the mesh's Sidecars, in their order.
    outbounds: Vec<Arc<Outbound>>,
    /// Shares with the world before all that didn't change.
    seats: Seats,
}

type Seats = RedBlackTreeMapSync<RegistrationName, Seat>;

/// A live registration.
#[derive(Debug, Clone)]
struct Seat {
    stored: Arc<Stored>,
    member: Result<Arc<Member>, String>,
    /// Index of the Sidecar that selects it.
    sidecar: Option<usize>,
}

/// All that one workload is given.
#[derive(Debug, Clone)]
pub struct Rendered {
    pub version: String,
    mesh: Arc<MeshConfig>,
    member: Arc<Member>,
    outbound: Option<Arc<Outbound>>,
    inbound: Arc<Inbound>,
    trust_domain: String,
}

/// What a workload finds in a world.
#[derive(Debug)]
pub enum Look {
    /// It isn't in the mesh.
    Gone,
    /// Just what it had.
    Same,
    New(Box<Rendered>),
    /// It is registered, but can't be in the mesh; for people.
    Impossible(String),
}

impl World {
    pub fn empty(trust_domain: &str) -> Self {
        Self {
            trust_domain: trust_domain.to_owned(),
            mesh: Arc::default(),
            catalog: Arc::default(),
            backends: Vec::new(),
            outbounds: Vec::new(),
            seats: Seats::new_sync(),
        }
    }

    /// The world with this configuration, after these registrations changed (`None`: no longer live).
    pub fn next(&self, mesh: Arc<MeshConfig>, changed: Vec<(RegistrationName, Option<Arc<Stored>>)>) -> Self {
        let configured = !Arc::ptr_eq(&mesh, &self.mesh) && mesh != self.mesh;
        let mesh = if configured { mesh } else { self.mesh.clone() };
        let mut seats = self.seats.clone();
        // Those whose endpoints may be others now: before and after.
        let mut touched: Vec<Arc<Member>> = Vec::new();
        let names: Vec<RegistrationName> = changed.iter().map(|(name, _)| name.clone()).collect();
        touched.extend(names.iter().filter_map(|name| self.member(name)));
        for (name, stored) in changed {
            match stored {
                Some(stored) => {
                    let seat = self.seat(&mesh, &name, stored);
                    seats.insert_mut(name, seat);
                }
                None => {
                    seats.remove_mut(&name);
                }
            }
        }
        if configured {
            seats =
                seats.iter().map(|(name, seat)| (name.clone(), self.seat(&mesh, name, seat.stored.clone()))).collect();
        }
        touched.extend(names.iter().filter_map(|name| seats.get(name)?.member.clone().ok()));

        let mut next = Self {
            trust_domain: self.trust_domain.clone(),
            catalog: if configured { Arc::new(Catalog::new(&mesh)) } else { self.catalog.clone() },
            mesh,
            backends: self.backends.clone(),
            outbounds: self.outbounds.clone(),
            seats,
        };
        if configured {
            next.rebuild(self);
        } else {
            next.refresh(&touched);
        }
        next
    }

    fn member(&self, name: &RegistrationName) -> Option<Arc<Member>> {
        self.seats.get(name)?.member.clone().ok()
    }

    /// Keeps the member that it was, if it came out the same.
    fn seat(&self, mesh: &MeshConfig, name: &RegistrationName, stored: Arc<Stored>) -> Seat {
        let member = member(mesh, name, &stored).map(|member| match self.member(name) {
            Some(before) if *before == member => before,
            _ => Arc::new(member),
        });
        let sidecar = member.as_ref().ok().and_then(|member| selected(&mesh.sidecars, member).first().copied());
        Seat { stored, member, sidecar }
    }

    fn members(&self) -> impl Iterator<Item = &Arc<Member>> {
        self.seats.values().filter_map(|seat| seat.member.as_ref().ok())
    }

    fn backend(&self, upstream: &Upstream) -> Backend {
        envoy::backend(upstream, self.mesh.groups.values(), self.members(), &self.trust_domain)
    }

    /// After the configuration changed: everything.
    fn rebuild(&mut self, before: &Self) {
        let known: HashMap<&[u8; 32], &Arc<Resource>> = before
            .backends
            .iter()
            .flat_map(|backend| std::iter::once(&backend.cluster).chain(&backend.endpoints))
            .map(|resource| (&resource.digest, resource))
            .collect();
        let same = |resource: Arc<Resource>| known.get(&resource.digest).map_or(resource, |known| (*known).clone());
        self.backends = self
            .catalog
            .upstreams
            .iter()
            .map(|upstream| {
                let backend = self.backend(upstream);
                Backend {
                    cluster: same(backend.cluster),
                    endpoints: backend.endpoints.map(same),
                    faults: backend.faults,
                }
            })
            .collect();
        let known: HashMap<&[u8; 32], &Arc<Outbound>> =
            before.outbounds.iter().map(|outbound| (&outbound.digest, outbound)).collect();
        self.outbounds = self
            .mesh
            .sidecars
            .iter()
            .map(|sidecar| {
                let outbound = envoy::outbound(sidecar, &self.catalog, &self.backends);
                match known.get(&outbound.digest) {
                    Some(known) if ***known == outbound => (*known).clone(),
                    _ => Arc::new(outbound),
                }
            })
            .collect();
    }

    /// After registrations changed: what is behind the services that select them.
    fn refresh(&mut self, touched: &[Arc<Member>]) {
        let mut replaced: HashMap<(XdsType, String), Arc<Resource>> = HashMap::new();
        for index in 0..self.backends.len() {
            let upstream = &self.catalog.upstreams[index];
            if !touched.iter().any(|member| envoy::is_behind(upstream, member)) {
                continue;
            }
            let mut backend = self.backend(upstream);
            let before = &self.backends[index];
            for (resource, before) in std::iter::once((&mut backend.cluster, Some(&before.cluster)))
                .chain(backend.endpoints.as_mut().map(|endpoints| (endpoints, before.endpoints.as_ref())))
            {
                match before {
                    Some(before) if before.digest == resource.digest => *resource = before.clone(),
                    _ => {
                        replaced.insert((resource.kind, resource.name.clone()), resource.clone());
                    }
                }
            }
            self.backends[index] = backend;
        }
        if replaced.is_empty() {
            return;
        }
        for outbound in &mut self.outbounds {
            if let Some(next) = outbound.with(&replaced) {
                *outbound = Arc::new(next);
            }
        }
    }

    /// What this workload is given, compared to what it had.
    pub fn look(&self, name: &RegistrationName, had: Option<&Rendered>) -> Look {
        let Some(seat) = self.seats.get(name) else { return Look::Gone };
        let member = match &seat.member {
            Ok(member) => member,
            Err(problem) => return Look::Impossible(problem.clone()),
        };
        let outbound = seat.sidecar.and_then(|index| self.outbounds.get(index));
        // Of the mesh's configuration and of the member alone.
        let mut inbound = None;
        if let Some(had) = had
            && Arc::ptr_eq(&had.mesh, &self.mesh)
            && Arc::ptr_eq(&had.member, member)
        {
            let same_outbound = match (&had.outbound, outbound) {
                (Some(had), Some(outbound)) => Arc::ptr_eq(had, outbound),
                (None, None) => true,
                _ => false,
            };
            if same_outbound {
                return Look::Same;
            }
            inbound = Some(had.inbound.clone());
        }
        let make_inbound = || match seat.sidecar.and_then(|index| self.mesh.sidecars.get(index)) {
            Some(sidecar) => envoy::inbound(sidecar, member, &self.trust_domain),
            None => Inbound::default(),
        };
        let mut rendered = Rendered {
            version: String::new(),
            mesh: self.mesh.clone(),
            member: member.clone(),
            outbound: outbound.cloned(),
            inbound: inbound.unwrap_or_else(|| Arc::new(make_inbound())),
            trust_domain: self.trust_domain.clone(),
        };
        rendered.version = rendered.make_version();
        Look::New(Box::new(rendered))
    }

    pub fn has(&self, name: &RegistrationName) -> bool {
        self.seats.contains_key(name)
    }

    /// How many are in the mesh.
    pub fn population(&self) -> usize {
        self.seats.size()
    }

    /// What is wrong with the mesh, for people. Looks at everybody in it.
    pub fn faults(&self) -> Vec<String> {
        let mut faults: BTreeSet<String> = self.catalog.faults.iter().cloned().collect();
        faults.extend(self.backends.iter().flat_map(|backend| backend.faults.iter().cloned()));
        faults.extend(self.outbounds.iter().flat_map(|outbound| outbound.faults.iter().cloned()));
        let mut shown = BTreeSet::new();
        let mut addresses: HashMap<(&str, Option<&str>), &RegistrationName> = HashMap::with_capacity(self.seats.size());
        for (name, seat) in &self.seats {
            let member = match &seat.member {
                Ok(member) => member,
                Err(problem) => {
                    faults.insert(format!("WorkloadAutoRegistration {name}: {problem}"));
                    continue;
                }
            };
            let entry = &member.entry;
            if let Some(other) = addresses.insert((&entry.address, entry.network.as_deref()), name) {
                faults.insert(format!(
                    "WorkloadAutoRegistration {name}: its address {} is also that of {other}: traffic for one may reach the other",
                    entry.address
                ));
            }
            // What is wrong with a Sidecar is so for all whom it selects.
            let group = &member.group.name;
            match seat.sidecar.and_then(|index| Some((index, self.mesh.sidecars.get(index)?))) {
                Some((index, sidecar)) => {
                    if shown.insert((Some(index), group)) {
                        faults.extend(envoy::inbound(sidecar, member, &self.trust_domain).faults);
                        faults.extend(ambiguous(&self.mesh.sidecars, member));
                    }
                }
                None => {
                    if shown.insert((None, group)) {
                        faults.insert(format!(
                            "WorkloadGroup {group}: no Sidecar of the namespace selects its workloads: they get no listeners"
                        ));
                    }
                }
            }
        }
        let more = faults.len().saturating_sub(MAX_FAULTS);
        let mut faults: Vec<String> = faults.into_iter().take(MAX_FAULTS).collect();
        if more > 0 {
            faults.push(format!("{more} more faults of the mesh aren't shown"));
        }
        faults
    }
}

fn member(mesh: &MeshConfig, name: &RegistrationName, stored: &Stored) -> Result<Member, String> {
    let State::Live(live) = &stored.state else { return Err("it isn't live".to_owned()) };
    let group = mesh
        .groups
        .get(&live.group)
        .ok_or_else(|| format!("its WorkloadGroup {} isn't in the manifests", live.group))?;
    let entry = WorkloadEntry::new(name.clone(), group, &live.attested.identity, &live.report)
        .map_err(|error| error.to_string())?;
    let listen = listen(live).unwrap_or_else(|| entry.address.clone());
    Ok(Member { entry, group: group.clone(), listen, ready: live.health.ready })
}

/// An address that the host has itself: one by which it is known outside may be a gateway's.
fn listen(live: &Live) -> Option<String> {
    let inside = live.report.addresses.iter().find(|address| address.kind == ConnectedOver::Vpc);
    inside.map(|address| address.ip).or_else(|| live.report.mesh_address().ok()).map(|ip| ip.to_string())
}

/// The Sidecars for this workload, the one that counts first: by its labels, else that of the whole namespace.
fn selected(sidecars: &[Sidecar], member: &Member) -> Vec<usize> {
    let of_namespace = |sidecar: &Sidecar| sidecar.namespace == member.group.name.namespace;
    let by_labels = |sidecar: &Sidecar| {
        let selector = &sidecar.workload_selector;
        !selector.is_empty() && selector.iter().all(|(key, value)| member.entry.labels.get(key) == Some(value))
    };
    let all = |wanted: &dyn Fn(&Sidecar) -> bool| -> Vec<usize> {
        let found = sidecars.iter().enumerate().filter(|(_, sidecar)| of_namespace(sidecar) && wanted(sidecar));
        found.map(|(index, _)| index).collect()
    };
    let selecting = all(&by_labels);
    if selecting.is_empty() { all(&|sidecar| sidecar.workload_selector.is_empty()) } else { selecting }
}

fn ambiguous(sidecars: &[Sidecar], member: &Member) -> Option<String> {
    let selecting = selected(sidecars, member);
    if selecting.len() < 2 {
        return None;
    }
    let names: Vec<&str> = selecting.iter().filter_map(|index| Some(sidecars.get(*index)?.name.as_str())).collect();
    Some(format!(
        "WorkloadGroup {}: several Sidecars select its workloads ({}); the first counts",
        member.group.name,
        names.join(", ")
    ))
}

impl Rendered {
    pub fn spiffe_id(&self) -> String {
        self.member.spiffe_id(&self.trust_domain)
    }

    fn resources(&self) -> Resources<'_> {
        let mut all = self.outbound.as_ref().map(|outbound| outbound.by_name()).unwrap_or_default();
        // The ingress last: a listener of both names is the one that others reach.
        all.extend(self.inbound.resources.iter().map(|resource| ((resource.kind, resource.name.as_str()), resource)));
        all
    }

    fn changes(&self, base: Option<&Self>) -> Changes {
        if let Some(base) = base
            && Arc::ptr_eq(&base.inbound, &self.inbound)
            && let (Some(before), Some(after)) = (&base.outbound, &self.outbound)
        {
            // Worked out once for all agents; whatever is of a name of the ingress, the ingress' own is in its place before and after.
            let all = after.changes(before);
            let own = |kind: i32, name: &str| {
                self.inbound.resources.iter().any(|own| i32::from(own.kind) == kind && own.name == name)
            };
            return Changes {
                changed: all.changed.iter().filter(|of| !own(of.r#type, &of.name)).cloned().collect(),
                removed: all.removed.iter().filter(|of| !own(of.r#type, &of.name)).cloned().collect(),
            };
        }
        Changes::between(&base.map(Self::resources).unwrap_or_default(), &self.resources())
    }

    /// The message that makes this of `base`, or of nothing.
    pub fn message(&self, base: Option<&Self>) -> pb::BootConfiguration {
        let Changes { changed, removed } = self.changes(base);
        let host_aliases_kept = base.is_some_and(|base| base.host_aliases() == self.host_aliases());
        pb::BootConfiguration {
            version: self.version.clone(),
            host_aliases: if host_aliases_kept { Vec::new() } else { self.host_aliases().to_vec() },
            sidecar: Some(pb::boot_configuration::Sidecar::Envoy(pb::EnvoyBoot {
                base_version: base.map(|base| base.version.clone()).unwrap_or_default(),
                changed,
                removed,
                node_id: self.node_id(),
                cluster: format!("{}.{}", self.member.group.name.name, self.member.group.name.namespace),
                host_aliases_kept,
            })),
            ..self.head()
        }
    }

    /// Everything but the resources, the names and the version.
    fn head(&self) -> pb::BootConfiguration {
        pb::BootConfiguration {
            spiffe_id: self.spiffe_id(),
            trust_domain: self.trust_domain.clone(),
            probe: self.member.group.probe.as_ref().map(pb::Probe::from),
            ingress: self.inbound.listeners.clone(),
            propagation_delay: self.mesh.propagation_delay.try_into().ok(),
            ..Default::default()
        }
    }

    fn host_aliases(&self) -> &[pb::HostAlias] {
        self.outbound.as_ref().map(|outbound| outbound.host_aliases.as_slice()).unwrap_or_default()
    }

    /// As Istio names its proxies: the name in `istioctl proxy-status` is `<war name>.<namespace>`.
    fn node_id(&self) -> String {
        let RegistrationName { namespace, name } = &self.member.entry.name;
        format!("sidecar~{}~{name}.{namespace}~{namespace}.svc.{}", self.member.listen, envoy::CLUSTER_DOMAIN)
    }

    /// Of the content alone: the same before and after a restart of the plane.
    fn make_version(&self) -> String {
        let mut context = Context::new(&SHA256);
        context.update(self.node_id().as_bytes());
        context.update(&[0]);
        context.update(self.member.group.name.to_string().as_bytes());
        context.update(&[0]);
        let head = self.head().encode_to_vec();
        context.update(&(head.len() as u64).to_be_bytes());
        context.update(&head);
        context.update(&self.outbound.as_ref().map(|outbound| outbound.digest).unwrap_or_default());
        for resource in &self.inbound.resources {
            context.update(&resource.digest);
        }
        context.finish().as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
