//! How registrations end, half-done or by somebody's hand, and what is remembered.

use super::*;

pub(super) async fn an_end_is_remembered_and_binds_the_next(cluster: &Cluster) {
    let home = Home::new(cluster, "remembered").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let (name, live) = home.live(1, 1);
    let version = a.store_live(&name, &live).await;
    home.until_entry(&name, "the entry", |_| true).await;
    let end = ended(Some(1));
    let version = a.registry.store(&name, version, &end).await.unwrap();
    assert_eq!(a.registry.load(&name).await.unwrap().state, end, "at once");
    home.until_gone(&home.entries(), &name).await;
    home.until_gone(&home.wars(), &name).await;
    for plane in [&a, &b] {
        let stored = plane.until(&name, "its memory", |stored| stored.state == end && stored.version > version).await;
        assert!(admits_key(&stored.state, Thumbprint([2; 32]), Replay::Forever, Timestamp::now()).is_err());
    }
    let listed = a.registry.list().await.unwrap();
    assert!(listed.iter().any(|(listed, stored)| *listed == name && stored.state == end));

    // The same key comes back, on the other replica; the memory stays behind the new registration.
    let (_, again) = home.live(1, 1);
    b.store_live(&name, &again).await;
    a.until(&name, "its return", |stored| stored.state == live_state(&again)).await;
    let c = home.plane().await;
    assert_eq!(c.live(&name).await.0, again);

    // It ends again, and is registered anew before, or while, what is left of it is cleaned up.
    let (_, version) = a.live(&name).await;
    a.registry.store(&name, version, &ended(Some(1))).await.unwrap();
    let third = live_state(&home.live(1, 1).1);
    a.insist(&name, |stored| {
        assert!(matches!(stored.state, State::Ended(_)), "{stored:?}");
        third.clone()
    })
    .await;
    b.until(&name, "the third", |stored| stored.state == third).await;

    // Operators say that any key may come, of one that ended; then it is forgotten.
    let (_, version) = b.live(&name).await;
    b.registry.store(&name, version, &ended(Some(1))).await.unwrap();
    home.until_gone(&home.wars(), &name).await;
    a.until(&name, "its end", |stored| matches!(stored.state, State::Ended(_))).await;
    let any_key = ended(None);
    a.insist(&name, |stored| {
        assert!(step(&stored.state, Event::Delete, Timestamp::now(), Duration::ZERO).is_ok());
        any_key.clone()
    })
    .await;
    let stored = b.until(&name, "any key", |stored| stored.state == any_key).await;
    assert_eq!(b.registry.store(&name, stored.version, &State::Absent).await.unwrap(), 0);
    assert_eq!(b.registry.load(&name).await.unwrap().version, 0);
    a.until(&name, "forgetting", |stored| stored.state == State::Absent && stored.version == 0).await;
    assert!(home.memory(&name).await.is_none());
}

/// What each account may do: all but the next step.
const HALF: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: no-memory}
rules:
- apiGroups: ['*']
  resources: [workloadautoregistrations, workloadautoregistrations/status, workloadentries, workloadentries/status]
  verbs: ['*']
- {apiGroups: [''], resources: [configmaps], verbs: [get, list, watch]}
- {apiGroups: ['*'], resources: [workloadgroups/finalizers, workloadautoregistrations/finalizers], verbs: [update]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: no-delete}
rules:
- apiGroups: ['*']
  resources: [workloadautoregistrations, workloadautoregistrations/status]
  verbs: [get, list, watch, create, update, patch]
- {apiGroups: ['*'], resources: [workloadentries, workloadentries/status], verbs: ['*']}
- {apiGroups: [''], resources: [configmaps], verbs: ['*']}
- {apiGroups: ['*'], resources: [workloadgroups/finalizers, workloadautoregistrations/finalizers], verbs: [update]}
";

/// Replicas that die in the middle: their accounts may not do the next step.
pub(super) async fn an_end_that_was_left_half_done_is_finished_by_another(cluster: &Cluster) {
    let home = Home::new(cluster, "half-done").await;
    cluster.apply(HALF).unwrap();
    for user in ["no-memory", "no-delete"] {
        let (role, subject) = (format!("--clusterrole={user}"), format!("--user={user}"));
        cluster.kubectl(["create", "clusterrolebinding", user, &role, &subject]).unwrap();
    }
    for (host, user, remembered) in [(1, "no-memory", false), (2, "no-delete", true)] {
        let dying = Plane::start(client(cluster, Some(user)).await, PLANE, &home.groups).await;
        let (name, live) = home.live(host, 1);
        let version = dying.store_live(&name, &live).await;
        let end = ended(Some(1));
        dying.registry.store(&name, version, &end).await.unwrap();
        // The entry goes before what it may not do.
        home.until_gone(&home.entries(), &name).await;
        if remembered {
            let deadline = Instant::now() + WITHIN;
            while home.memory(&name).await.is_none() {
                assert!(Instant::now() < deadline, "{user}: the memory never came");
                pause().await;
            }
        }
        dying.stop().await;
        assert_eq!(home.memory(&name).await.is_some(), remembered, "{user}");
        let war = home.until_war(&name, "the war that ended", |_| true).await;
        assert!(war["metadata"]["annotations"][LEASE].as_str().unwrap().contains("\"ended\""));
        // Whoever comes next knows that it ended, before and after it has finished it.
        let next = home.plane().await;
        assert_eq!(next.registry.load(&name).await.unwrap().state, end, "{user}");
        home.until_gone(&home.wars(), &name).await;
        let stored = next.until(&name, "its memory", |stored| stored.state == end).await;
        assert!(home.memory(&name).await.is_some(), "{user}");
        let refused = admits_key(&stored.state, Thumbprint([2; 32]), Replay::Forever, Timestamp::now());
        assert!(matches!(refused, Err(Refusal::AnotherKey { .. })));
        drop(next);

        // One that comes back while it is half done: `store` does what is left first, beside the reconciler.
        let half = Plane::start(client(cluster, Some(user)).await, PLANE, &home.groups).await;
        half.insist(&name, |_| live_state(&home.live(host, 1).1)).await;
        half.insist(&name, |_| ended(Some(1))).await;
        home.until_gone(&home.entries(), &name).await;
        half.stop().await;
        let brisk = home.plane().await;
        let third = home.live(host, 1).1;
        brisk
            .insist(&name, |stored| {
                assert!(matches!(stored.state, State::Ended(_)), "{stored:?}");
                live_state(&third)
            })
            .await;
        assert_eq!(brisk.live(&name).await.0, third);
    }
}

/// A replica that dies between making a war and looking at what is remembered leaves what one leaves that doesn't know the memory at all.
pub(super) async fn a_registration_made_without_knowing_an_end_is_taken_back(cluster: &Cluster) {
    let home = Home::new(cluster, "ignorant").await;
    let a = home.plane().await;
    let (name, live) = home.live(1, 1);
    let version = a.store_live(&name, &live).await;
    let end = ended(Some(1));
    a.registry.store(&name, version, &end).await.unwrap();
    home.until_gone(&home.wars(), &name).await;
    let (_, thief) = home.live(1, 2);
    let ignorant = Plane::start(client(cluster, None).await, ELSEWHERE, &home.groups).await;
    ignorant.store_live(&name, &thief).await;
    ignorant.stop().await;
    // Never read as a registration, and gone soon, also where the replica starts only now.
    let b = home.plane().await;
    for plane in [&a, &b] {
        assert_eq!(plane.registry.load(&name).await.unwrap().state, end);
    }
    home.until_gone(&home.wars(), &name).await;
    home.until_gone(&home.entries(), &name).await;
    for plane in [&a, &b] {
        plane.until(&name, "the old memory", |stored| stored.state == end).await;
    }
}

pub(super) async fn what_people_delete_is_told_and_remembered(cluster: &Cluster) {
    let home = Home::new(cluster, "deleted").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let mut changes = [a.registry.changes(), b.registry.changes()];
    let (name, live) = home.live(1, 1);
    a.store_live(&name, &live).await;
    home.until_entry(&name, "the entry", |_| true).await;
    b.until(&name, "the registration", |stored| stored.version != 0).await;
    let deleted_at = Timestamp::now();
    cluster.kubectl(["delete", "war", &name.name, "-n", &name.namespace]).unwrap();
    for (plane, changes) in [&a, &b].into_iter().zip(&mut changes) {
        tokio::time::timeout(WITHIN, async { while changes.next().await.unwrap() != name {} }).await.unwrap();
        let stored = plane.until(&name, "the deletion", |stored| matches!(stored.state, State::Ended(_))).await;
        let State::Ended(ended) = &stored.state else { unreachable!() };
        assert_eq!(ended.key, None, "any key may come");
        assert!(ended.at.as_second() >= deleted_at.as_second(), "tokens of before are worthless");
    }
    home.until_gone(&home.entries(), &name).await;
    // Both remember the same, once.
    let states = [a.registry.load(&name).await.unwrap().state, b.registry.load(&name).await.unwrap().state];
    assert_eq!(states[0], states[1]);
    let (_, other_key) = home.live(1, 2);
    let other_key = live_state(&other_key);
    b.insist(&name, |_| other_key.clone()).await;
    a.until(&name, "the other key", |stored| stored.state == other_key).await;

    // A finalizer of somebody holds it: it is deleted nevertheless.
    let finalizers = |finalizers: Value| Patch::Merge(json!({"metadata": {"finalizers": finalizers}}));
    home.wars().patch(&name.name, &PatchParams::default(), &finalizers(json!(["example.com/audit"]))).await.unwrap();
    home.wars().delete(&name.name, &DeleteParams::default()).await.unwrap();
    let stored = a.until(&name, "the deletion", |stored| matches!(stored.state, State::Ended(_))).await;
    home.until_gone(&home.entries(), &name).await;
    let held = a.registry.store(&name, stored.version, &other_key).await;
    assert!(matches!(&held, Err(RegistryError::Unavailable(words)) if words.contains("finalizer")), "{held:?}");
    home.wars().patch(&name.name, &PatchParams::default(), &finalizers(json!([]))).await.unwrap();
    home.until_gone(&home.wars(), &name).await;
    a.insist(&name, |_| other_key.clone()).await;
    b.until(&name, "its return", |stored| stored.state == other_key).await;

    // With its group: nobody said that another key may come.
    for plane in [&a, &b] {
        plane.groups.send_replace(Arc::default());
    }
    cluster.kubectl(["delete", "workloadgroup", "ratings", "-n", &name.namespace]).unwrap();
    home.until_gone(&home.wars(), &name).await;
    for plane in [&a, &b] {
        let stored = plane.until(&name, "the end", |stored| matches!(stored.state, State::Ended(_))).await;
        assert!(matches!(&stored.state, State::Ended(end) if end.key == Some(key_memory(2))), "{stored:?}");
    }
}

/// What garbage collection does when no plane is there.
pub(super) async fn owners_clean_up(cluster: &Cluster) {
    let home = Home::new(cluster, "owners").await;
    let plane = home.plane().await;
    let hosts: Vec<_> = (1..=2).map(|host| home.live(host, 1)).collect();
    for (name, live) in &hosts {
        plane.store_live(name, live).await;
        let entry = home.until_entry(name, "the entry", |_| true).await;
        let war = home.until_war(name, "the war", |_| true).await;
        let owner = &entry["metadata"]["ownerReferences"][0];
        assert_eq!((&owner["kind"], &owner["uid"]), (&json!("WorkloadAutoRegistration"), &war["metadata"]["uid"]));
    }
    plane.stop().await;
    let (first, second) = (&hosts[0].0, &hosts[1].0);
    cluster.kubectl(["delete", "war", &first.name, "-n", &first.namespace]).unwrap();
    home.until_gone(&home.entries(), first).await;
    cluster.kubectl(["delete", "workloadgroup", "ratings", "-n", &second.namespace]).unwrap();
    home.until_gone(&home.wars(), second).await;
    home.until_gone(&home.entries(), second).await;
}
