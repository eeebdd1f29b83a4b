//! What replicas read of each other's writes, and who wins.

use super::*;

pub(super) async fn what_is_stored_is_what_another_replica_reads(cluster: &Cluster) {
    let home = Home::new(cluster, "stored").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let mut changes = b.registry.changes();
    let (name, live) = home.live(1, 1);
    a.store_live(&name, &live).await;
    assert_eq!(a.live(&name).await.0, live, "what was stored is what is read, on this replica at once");
    assert_eq!(changes.next().await.unwrap(), name);
    assert_eq!(b.live(&name).await.0, live);

    // Its entry is there, and gets no requests yet: without the condition it is unhealthy.
    let entry = home.until_entry(&name, "the entry", |_| true).await;
    assert_eq!(entry["metadata"]["annotations"]["proxy.istio.io/health-checks-enabled"], "true");
    assert!(condition(&entry, "Healthy").is_none(), "{entry:#}");
    assert_eq!(entry["spec"]["address"], "10.0.0.4");
    assert_eq!(entry["spec"]["labels"], json!({"app": "ratings", "istio.io/rev": "x", "version": "v3"}));
    assert_eq!(
        entry["metadata"]["labels"].get("istio.io/rev"),
        None,
        "which istiod sees it isn't for a workload to say"
    );
    assert_eq!(entry["spec"]["serviceAccount"], "ratings-vm");
    assert_eq!(entry["spec"]["network"], "virtual-machines");
    assert_eq!(entry["spec"]["ports"], json!({"http": 8080}));
    assert_eq!(entry["spec"]["locality"], "us-east-2/us-east-2b");

    // Another replica goes on with it.
    let (read, version) = b.live(&name).await;
    let now = live_state(&ready(&connected(&read, "session-1")));
    let newer = b.registry.store(&name, version, &now).await.unwrap();
    assert!(newer > version);
    a.until(&name, "the session", |stored| stored.state == now).await;
    home.until_entry(&name, "health", |entry| has(entry, "Healthy", "True")).await;
    let war = home.until_war(&name, "the connection", |war| has(war, "AgentConnected", "True")).await;
    assert_eq!(war["status"]["activeAgentConnection"]["connectedTo"], "onboarding-plane-1");
    assert_eq!(
        war["spec"]["identity"]["aws"]["ec2"],
        json!({"instanceId": "i-00000000000000001"}),
        "only what was proven"
    );
    assert_eq!(war["metadata"]["ownerReferences"][0]["uid"], home.groups[&home.group()].uid.as_str());
    let up_to_date = condition(&war, "UpToDate").unwrap();
    assert_eq!(
        (&up_to_date["status"], &up_to_date["reason"]),
        (&json!("False"), &json!("NotApplied")),
        "nobody reported"
    );

    // It gets worse, and is lost.
    let (read, version) = a.live(&name).await;
    let lost = Live {
        connection: Connection::Disconnected { since: Timestamp::now(), reason: DisconnectReason::PlaneRestarted },
        health: Health { ready: false, message: "the probe says 503".to_owned() },
        ..read
    };
    a.registry.store(&name, version, &live_state(&lost)).await.unwrap();
    b.until(&name, "the loss", |stored| stored.state == live_state(&lost)).await;
    home.until_entry(&name, "ill health", |entry| has(entry, "Healthy", "False")).await;
    let listed = b.registry.list().await.unwrap();
    assert_eq!(listed.iter().filter(|(listed, _)| *listed == name).count(), 1);
    // A replica that starts now reads the same.
    let c = home.plane().await;
    assert_eq!(c.live(&name).await.0, lost);

    // One that registers and never connects says so after a while.
    let (name, live) = home.live(2, 1);
    a.store_live(&name, &live).await;
    let war = home.until_war(&name, "its status", |war| has(war, "AgentConnected", "False")).await;
    assert_eq!(condition(&war, "AgentConnected").unwrap()["reason"], "AgentNotYetConnected");
    b.until(&name, "its status", |stored| json!(stored.version.to_string()) == war["metadata"]["resourceVersion"])
        .await;
    assert_eq!(b.live(&name).await.0, live, "which changes nothing");
}

pub(super) async fn a_store_that_was_decided_on_old_knowledge_is_a_conflict(cluster: &Cluster) {
    let home = Home::new(cluster, "conflict").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let (name, live) = home.live(1, 1);
    let version = a.store_live(&name, &live).await;
    b.until(&name, "the registration", |stored| stored.version == version).await;
    let [by_a, by_b, by_c] = ["a", "b", "c"].map(|session| live_state(&connected(&live, session)));
    let newer = a.registry.store(&name, version, &by_a).await.unwrap();
    let refused = b.registry.store(&name, version, &by_b).await;
    assert!(matches!(refused, Err(RegistryError::Conflict)), "{refused:?}");
    // What is loaded after a conflict is what was written, without waiting for an informer.
    let stored = b.registry.load(&name).await.unwrap();
    assert_eq!((stored.version, &stored.state), (newer, &by_a));
    b.registry.store(&name, newer, &by_b).await.unwrap();
    // The same for its end.
    let refused = a.registry.store(&name, newer, &ended(Some(1))).await;
    assert!(matches!(refused, Err(RegistryError::Conflict)), "{refused:?}");
    assert_eq!(a.registry.load(&name).await.unwrap().state, by_b);
    let refused = a.registry.store(&name, 0, &by_c).await;
    assert!(matches!(refused, Err(RegistryError::Conflict)), "{refused:?}");
}

pub(super) async fn of_two_first_keys_one_wins(cluster: &Cluster) {
    let home = Home::new(cluster, "first-keys").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let races = (0..20).map(|host| {
        let ((name, one), (_, two)) = (home.live(host, 1), home.live(host, 2));
        let (a, b) = (&a, &b);
        async move {
            let (one, two) = (live_state(&one), live_state(&two));
            let (by_a, by_b) = tokio::join!(a.registry.store(&name, 0, &one), b.registry.store(&name, 0, &two));
            let winner = match (by_a, by_b) {
                (Ok(_), Err(RegistryError::Conflict)) => one,
                (Err(RegistryError::Conflict), Ok(_)) => two,
                other => panic!("{name}: {other:?}"),
            };
            // The loser decides again, and finds the other's key.
            for plane in [a, b] {
                plane.until(&name, "the winner's key", |stored| stored.version != 0).await;
                assert_eq!(plane.registry.load(&name).await.unwrap().state, winner, "{name}");
            }
        }
    });
    join_all(races).await;
}
