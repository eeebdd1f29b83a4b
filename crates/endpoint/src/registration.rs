//! RegisterWorkload and UnregisterWorkload: durable when they answer.

use crate::authority::{Authority, Caller, apply_status};
use crate::authorization::admission;
use crate::connection::Connection;
use crate::lifecycle::ApplyError;
use crate::refusal::Refused;
use onboarding_core::group::WorkloadEntry;
use onboarding_core::registration::{Event, HostReport, Refusal, Register, SidecarReport};
use onboarding_kinds::{label_key, label_value};
use onboarding_wire::onboarding as pb;
use std::net::IpAddr;
use tonic::{Request, Status};

const MOST_ADDRESSES: usize = 64;
const MOST_LABELS: usize = 64;
/// Of a version or a revision.
const LONGEST_WORD: usize = 128;

impl Authority {
    pub(crate) async fn register(
        &self,
        connection: &Connection,
        request: Request<pb::RegisterWorkloadRequest>,
    ) -> Result<pb::RegisterWorkloadResponse, Status> {
        let caller = self.caller(connection, &request, request.get_ref().proof.as_ref()).await?;
        match self.put_on_record(&caller, request.into_inner().registration).await {
            Ok(()) => {
                let name = &caller.claims.subject;
                tracing::info!(registration = %name, peer = %connection.peer, "registered");
                Ok(pb::RegisterWorkloadResponse { name: name.to_string() })
            }
            Err(refused) => Err(self.refuse(connection, &caller.claims, refused).await),
        }
    }

    async fn put_on_record(&self, caller: &Caller, registration: Option<pb::Registration>) -> Result<(), Refused> {
        let Caller { claims, snapshot, .. } = caller;
        let registration = registration
            .ok_or_else(|| Status::invalid_argument("registration: what the agent says of itself is missing"))?;
        let report = HostReport::try_from(registration).map_err(|error| Status::invalid_argument(error.to_string()))?;
        check(&report).map_err(Status::invalid_argument)?;
        let group = admission(snapshot, &claims.attested.identity, &claims.group)?.group;
        WorkloadEntry::new(claims.subject.clone(), group, &claims.attested.identity, &report)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let event = Event::Register(Box::new(Register {
            group: claims.group.clone(),
            attested: claims.attested.clone(),
            key: claims.key,
            report,
            token_issued_at: claims.issued_at,
            token_expires_at: claims.expires_at,
        }));
        let name = &claims.subject;
        let state = self.lifecycle.apply(name, event).await.map_err(apply_status)?;
        let now = self.snapshot();
        if !self.lifecycle.enforce(name, &state, &now).await.map_err(apply_status)? {
            return Err(not_admitted_any_more(&now, &claims.attested.identity, &claims.group));
        }
        Ok(())
    }

    pub(crate) async fn unregister(
        &self,
        connection: &Connection,
        request: Request<pb::UnregisterWorkloadRequest>,
    ) -> Result<pb::UnregisterWorkloadResponse, Status> {
        let Caller { claims, plane, .. } = self.caller(connection, &request, request.get_ref().proof.as_ref()).await?;
        match self.lifecycle.apply(&claims.subject, Event::Unregister { key: claims.key }).await {
            // Whoever says goodbye twice has left.
            Ok(_) | Err(ApplyError::Refused(Refusal::Gone)) => {}
            Err(error) => return Err(apply_status(error)),
        }
        tracing::info!(registration = %claims.subject, "unregistered");
        Ok(pb::UnregisterWorkloadResponse { propagation_delay: plane.propagation_delay.try_into().ok() })
    }
}

/// What a call says whose admission ended while it was served.
pub(crate) fn not_admitted_any_more(
    snapshot: &crate::backend::Snapshot,
    identity: &onboarding_core::identity::Identity,
    group: &onboarding_core::name::GroupName,
) -> Refused {
    match admission(snapshot, identity, group) {
        Err(refused) => refused,
        Ok(_) => Status::aborted("the policies changed meanwhile; onboard again").into(),
    }
}

/// The bounds of what an agent may say of itself: it is stored, shown to people and told to the mesh.
fn check(report: &HostReport) -> Result<(), String> {
    let word = |field: &str, word: &str| match word.len() <= LONGEST_WORD
        && word.chars().all(|c| c.is_ascii_graphic() || c == ' ')
    {
        true => Ok(()),
        false => Err(format!("{field}: must be at most {LONGEST_WORD} printable characters")),
    };
    word("registration.agent_version", &report.agent_version)?;
    match &report.sidecar {
        SidecarReport::Istio { version, revision } => {
            word("registration.sidecar.istio.version", version)?;
            word("registration.sidecar.istio.revision", revision.as_deref().unwrap_or_default())?;
        }
        SidecarReport::Envoy { version } => word("registration.sidecar.envoy.version", version)?,
    }
    if report.addresses.len() > MOST_ADDRESSES {
        return Err(format!("registration.addresses: more than {MOST_ADDRESSES}"));
    }
    if let Some(address) = report.addresses.iter().find(|address| !reachable(address.ip)) {
        return Err(format!("registration.addresses: {} can't be reached by another host", address.ip));
    }
    if report.labels.len() > MOST_LABELS {
        return Err(format!("registration.labels: more than {MOST_LABELS}"));
    }
    for (key, value) in &report.labels {
        label_key(key).map_err(|problem| format!("registration.labels: {problem}"))?;
        label_value(value).map_err(|problem| format!("registration.labels: {problem}"))?;
        if is_decided_by_the_mesh(key) {
            return Err(format!(
                "registration.labels: {key} is for the mesh to decide by, so a host can't give it to itself; set it in spec.template.labels of the WorkloadGroup"
            ));
        }
    }
    Ok(())
}

/// Labels of a workload by which istiod decides whether TLS is spoken with it, in which network and locality it is, and who configures it.
fn is_decided_by_the_mesh(key: &str) -> bool {
    ["security.istio.io/", "topology.istio.io/"].iter().any(|group| key.starts_with(group))
        || ["istio.io/rev", "istio-locality"].contains(&key)
}

/// Whether an address could be that of a host in a network.
fn reachable(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_broadcast() || ip.is_link_local())
        }
        IpAddr::V6(ip) => !(ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onboarding_core::registration::{ConnectedOver, HostAddress};

    fn report() -> HostReport {
        HostReport {
            agent_version: "0.1.0".to_owned(),
            addresses: vec![HostAddress { ip: "10.0.0.4".parse().unwrap(), kind: ConnectedOver::Vpc }],
            labels: [("version".to_owned(), "v5".to_owned())].into(),
            ..HostReport::default()
        }
    }

    #[test]
    fn each_bound_refuses_by_itself() {
        assert_eq!(check(&report()), Ok(()));
        type Change = fn(&mut HostReport);
        let changed = |change: Change| {
            let mut report = report();
            change(&mut report);
            check(&report).unwrap_err()
        };
        let cases: [(Change, &str); 12] = [
            (|it| it.agent_version = "a\nb".to_owned(), "registration.agent_version"),
            (|it| it.agent_version = "a".repeat(129), "registration.agent_version"),
            (|it| it.sidecar = SidecarReport::Envoy { version: "\u{1b}[1m".to_owned() }, "registration.sidecar.envoy"),
            (|it| it.addresses = vec![it.addresses[0].clone(); 65], "more than 64"),
            (|it| it.addresses[0].ip = "127.0.0.1".parse().unwrap(), "127.0.0.1 can't be reached"),
            (|it| it.addresses[0].ip = "::ffff:127.0.0.1".parse().unwrap(), "can't be reached"),
            (|it| drop(it.labels.insert("a b".to_owned(), "x".to_owned())), "is not a label key"),
            (|it| drop(it.labels.insert("a".to_owned(), "x y".to_owned())), "must be a label value"),
            (
                |it| drop(it.labels.insert("security.istio.io/tlsMode".to_owned(), "disabled".to_owned())),
                "security.istio.io/tlsMode is for the mesh to decide by",
            ),
            (
                |it| drop(it.labels.insert("topology.istio.io/network".to_owned(), "n".to_owned())),
                "spec.template.labels",
            ),
            (|it| drop(it.labels.insert("istio.io/rev".to_owned(), "canary".to_owned())), "istio.io/rev is"),
            (|it| drop(it.labels.insert("istio-locality".to_owned(), "a.b".to_owned())), "istio-locality is"),
        ];
        for (change, words) in cases {
            let said = changed(change);
            assert!(said.contains(words), "{said}");
        }
    }
}
