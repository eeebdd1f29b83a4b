//! Many at once, and an API server that goes away.

use super::*;

pub(super) async fn many_come_and_go(cluster: &Cluster) {
    const HOSTS: u32 = 300;
    let home = Home::new(cluster, "many").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let hosts: Vec<_> = (0..HOSTS).map(|host| home.live(host, 1)).collect();
    let started = Instant::now();
    for round in 0..2 {
        let joins = hosts.iter().enumerate().map(|(i, (name, live))| {
            let plane = if i % 2 == 0 { &a } else { &b };
            let live = live_state(live);
            async move { plane.insist(name, |_| live.clone()).await }
        });
        join_all(joins).await;
        println!("  round {round}: {HOSTS} registered after {:?}", started.elapsed());
        let deadline = Instant::now() + WITHIN;
        while home.count(&home.entries()).await < HOSTS as usize {
            assert!(Instant::now() < deadline, "the entries never came");
            pause().await;
        }
        println!("  round {round}: {HOSTS} entries after {:?}", started.elapsed());
        join_all(hosts.iter().map(|(name, _)| a.insist(name, |_| ended(Some(1))))).await;
        println!("  round {round}: {HOSTS} ended after {:?}", started.elapsed());
    }
    let deadline = Instant::now() + WITHIN * 2;
    loop {
        match (home.count(&home.wars()).await, home.count(&home.entries()).await) {
            (0, 0) => break,
            (wars, entries) => {
                assert!(Instant::now() < deadline, "{wars} wars and {entries} entries are left");
            }
        }
        pause().await;
    }
    println!("  all gone after {:?}", started.elapsed());
    for plane in [&a, &b] {
        let ended = plane.registry.list().await.unwrap().into_iter().filter(|(name, stored)| {
            name.namespace == "many" && matches!(&stored.state, State::Ended(end) if end.key == Some(key_memory(1)))
        });
        assert_eq!(ended.count(), HOSTS as usize);
    }
}

pub(super) async fn the_api_server_goes_and_comes(cluster: &Cluster) {
    let home = Home::new(cluster, "outage").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let (name, live) = home.live(1, 1);
    let version = a.store_live(&name, &live).await;
    home.until_entry(&name, "the entry", |_| true).await;
    b.until(&name, "the registration", |stored| stored.version == version).await;
    let mut changes = b.registry.changes();

    cluster.kill_api().unwrap();
    // What is known can be read; what can't be stored isn't, within bounds, and says why.
    assert_eq!(a.live(&name).await, (live.clone(), version));
    let started = Instant::now();
    let refused = a.registry.store(&name, version, &live_state(&connected(&live, "s"))).await;
    assert!(matches!(&refused, Err(RegistryError::Unavailable(words)) if words.contains("API server")), "{refused:?}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(a.live(&name).await.0, live);
    cluster.start_api().unwrap();

    let version = a.insist(&name, |_| live_state(&connected(&live, "s"))).await;
    b.until(&name, "the session", |stored| stored.version == version).await;
    tokio::time::timeout(WITHIN, async { while changes.next().await.unwrap() != name {} }).await.unwrap();

    // Frozen for a while: connections are open, and nothing answers. A store waits it out where it can.
    cluster.freeze_api(true).unwrap();
    let lost = Live {
        connection: Connection::Disconnected { since: Timestamp::now(), reason: DisconnectReason::ConnectionLost },
        ..a.live(&name).await.0
    };
    let state = live_state(&lost);
    let retried = a.retried();
    let store = a.registry.store(&name, version, &state);
    let thaw = async {
        let deadline = Instant::now() + WITHIN;
        while a.retried() == retried {
            assert!(Instant::now() < deadline, "no try is given up");
            pause().await;
        }
        cluster.freeze_api(false).unwrap();
    };
    let (stored, ()) = tokio::join!(store, thaw);
    // It may have been written by the try that was given up, which the next one finds.
    assert!(matches!(stored, Ok(_) | Err(RegistryError::Conflict)), "{stored:?}");
    b.until(&name, "the loss", |stored| stored.state == state).await;

    cluster.kubectl(["delete", "war", &name.name, "-n", &name.namespace]).unwrap();
    a.until(&name, "the deletion", |stored| matches!(&stored.state, State::Ended(end) if end.key.is_none())).await;
}
