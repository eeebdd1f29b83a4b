//! What the mesh is told, beside what people write.

use super::*;
use onboarding_core::label::LabelSelector;
use onboarding_core::policy::{AwsComputeMatcher, AwsMatcher, Matcher, Policy, PolicySet, Rule};
use onboarding_endpoint::backend::PlaneSettings;

pub(super) async fn edits_of_others_survive_and_nothing_is_written_twice(cluster: &Cluster) {
    let home = Home::new(cluster, "edits").await;
    let plane = home.plane().await;
    let (name, live) = home.live(1, 1);
    plane.store_live(&name, &live).await;
    let (read, version) = plane.live(&name).await;
    plane.registry.store(&name, version, &live_state(&ready(&connected(&read, "s")))).await.unwrap();
    home.until_entry(&name, "health", |entry| has(entry, "Healthy", "True")).await;

    let edit = json!({"metadata": {"labels": {"team": "red"}, "annotations": {"note": "mine"}}});
    let by_hand = PatchParams { field_manager: Some("kubectl".to_owned()), ..PatchParams::default() };
    home.wars().patch(&name.name, &by_hand, &Patch::Merge(&edit)).await.unwrap();
    let edit = json!({
        "metadata": {"labels": {"team": "red"}},
        "spec": {"weight": 7, "labels": {"mine": "too"}, "address": "10.9.9.9"},
    });
    home.entries().patch(&name.name, &by_hand, &Patch::Merge(&edit)).await.unwrap();
    // What is ours is put back; the rest stays.
    let entry = home.until_entry(&name, "the address", |entry| entry["spec"]["address"] == "10.0.0.4").await;
    assert_eq!(entry["metadata"]["labels"]["team"], "red");
    assert_eq!((&entry["spec"]["weight"], &entry["spec"]["labels"]["mine"]), (&json!(7), &json!("too")));

    // A change of what decides.
    plane
        .insist(&name, |stored| {
            let State::Live(live) = &stored.state else { panic!("{stored:?}") };
            let mut live = live.clone();
            live.report.labels.insert("version".to_owned(), "v4".to_owned());
            live.token_expires_at += SignedDuration::from_hours(1);
            State::Live(live)
        })
        .await;
    let entry = home.until_entry(&name, "the label", |entry| entry["spec"]["labels"]["version"] == "v4").await;
    assert_eq!((&entry["spec"]["weight"], &entry["spec"]["labels"]["mine"]), (&json!(7), &json!("too")));
    let war = home.until_war(&name, "the war", |_| true).await;
    assert_eq!(war["metadata"]["labels"]["team"], "red");
    assert_eq!(war["metadata"]["annotations"]["note"], "mine");
    assert!(has(&war, "AgentConnected", "True"));

    // Nothing changes: nothing is written.
    let versions = |war: &Value, entry: &Value| [war, entry].map(|it| it["metadata"]["resourceVersion"].clone());
    let before = versions(&war, &entry);
    let counted = counts(&plane).await;
    let (read, version) = plane.live(&name).await;
    let same = plane.registry.store(&name, version, &live_state(&read)).await.unwrap();
    assert_eq!(same, version);
    plane.groups.send_replace(home.changed(|_| {}));
    // Another registration goes through the same reconciler afterwards, and a replica starts that looks at all of them.
    let other = home.plane().await;
    let (last, live) = home.live(2, 1);
    plane.store_live(&last, &live).await;
    home.until_entry(&last, "the entry", |_| true).await;
    drop(other);
    let war = home.until_war(&name, "the war", |_| true).await;
    let entry = home.until_entry(&name, "the entry", |_| true).await;
    assert_eq!(versions(&war, &entry), before);
    // The other's entry, once.
    assert_eq!(counts(&plane).await, [counted[0] + 1, counted[1], counted[2]]);
}

/// Requests that write what the reconciler sees to.
async fn counts(plane: &Plane) -> [u64; 3] {
    plane.requests(["apply entry", "update entry status", "update war status"]).await
}

pub(super) async fn a_group_reaches_its_entries(cluster: &Cluster) {
    let home = Home::new(cluster, "group").await;
    let plane = home.plane().await;
    let hosts: Vec<_> = (1..=20).map(|host| home.live(host, 1)).collect();
    for (name, live) in &hosts {
        plane.store_live(name, live).await;
        plane.insist(name, |_| live_state(&connected(live, "s"))).await;
        home.until_entry(name, "the entry", |_| true).await;
        plane.registry.stands(name, Some(applied(&plane)));
        home.until_war(name, "the report", |war| has(war, "UpToDate", "True")).await;
    }
    let started = Instant::now();
    plane.groups.send_replace(home.changed(|group| {
        group.weight = Some(3);
        group.network = None;
        group.ports = [("http".to_owned(), 9090)].into();
        group.locality = Some("here/there".to_owned());
        group.workload_labels.insert("tier".to_owned(), "gold".to_owned());
    }));
    for (name, _) in &hosts {
        let entry = home.until_entry(name, "the weight", |entry| entry["spec"]["weight"] == 3).await;
        let spec = &entry["spec"];
        assert_eq!(spec["network"], Value::Null, "what the group no longer sets is gone");
        assert_eq!(spec["ports"], json!({"http": 9090}));
        assert_eq!(spec["locality"], "here/there");
        assert_eq!((&spec["labels"]["tier"], &spec["labels"]["version"]), (&json!("gold"), &json!("v3")));
    }
    println!("  a change of the group reached {} entries in {:?}", hosts.len(), started.elapsed());
    // What a sidecar takes in only when it starts anew.
    plane.groups.send_replace(home.changed(|group| group.service_account = "other".to_owned()));
    for (name, _) in &hosts {
        home.until_entry(name, "the account", |entry| entry["spec"]["serviceAccount"] == "other").await;
        let war = home.until_war(name, "the condition", |war| has(war, "UpToDate", "False")).await;
        let message = condition(&war, "UpToDate").unwrap()["message"].as_str().unwrap();
        assert!(message.contains("\"other\"") && message.contains("\"ratings-vm\""), "{message}");
    }
    // A new session alone says nothing of the sidecar.
    plane.insist(&hosts[1].0, |_| live_state(&connected(&hosts[1].1, "later"))).await;
    for (name, _) in &hosts[..2] {
        let war = home.until_war(name, "the condition", |war| has(war, "UpToDate", "False")).await;
        assert_eq!(condition(&war, "UpToDate").unwrap()["reason"], "GroupChanged");
        plane.registry.stands(name, Some(applied(&plane)));
        home.until_war(name, "the condition", |war| has(war, "UpToDate", "True")).await;
    }
}

/// The group as this plane knows it is what the sidecar runs with.
fn applied(plane: &Plane) -> Standing {
    let groups = plane.groups.borrow();
    Standing::Applied(groups.values().next().unwrap().group.clone())
}

/// What a sidecar makes of its boot configuration, on one replica and on the next.
pub(super) async fn a_war_says_how_far_its_sidecar_is(cluster: &Cluster) {
    let home = Home::new(cluster, "standing").await;
    let plane = home.plane().await;
    let (name, live) = home.live(1, 1);
    plane.store_live(&name, &live).await;
    let reason = |war: &Value| condition(war, "UpToDate").map(|it| it["reason"].as_str().unwrap().to_owned());
    let war = home.until_war(&name, "its status", |war| war["status"]["conditions"].is_array()).await;
    assert_eq!(reason(&war), None, "it was never connected");
    plane.insist(&name, |_| live_state(&connected(&live, "s"))).await;
    home.until_war(&name, "no report yet", |war| reason(war).as_deref() == Some("NotApplied")).await;
    plane.registry.stands(&name, Some(applied(&plane)));
    let war = home.until_war(&name, "the report", |war| has(war, "UpToDate", "True")).await;

    // What passes within moments isn't written; what somebody has to see to is.
    let writes = counts(&plane).await;
    let behind = |reason, message: &str| Some(Standing::Behind(Behind { reason, message: message.to_owned() }));
    plane.registry.stands(&name, behind(BehindReason::NotApplied, "soon"));
    plane.registry.stands(&name, Some(applied(&plane)));
    plane.registry.stands(&name, behind(BehindReason::Refused, "no such filter"));
    let refused = home.until_war(&name, "the refusal", |war| reason(war).as_deref() == Some("Refused")).await;
    assert!(condition(&refused, "UpToDate").unwrap()["message"].as_str().unwrap().contains("no such filter"));
    assert_eq!(counts(&plane).await.iter().sum::<u64>(), writes.iter().sum::<u64>() + 1, "one write");
    assert_ne!(war["metadata"]["resourceVersion"], refused["metadata"]["resourceVersion"]);

    // Another replica knows as much, and says it again with what it writes itself.
    plane.registry.stands(&name, None);
    let next = home.plane().await;
    next.insist(&name, |_| live_state(&connected(&live, "later"))).await;
    let war = home.until_war(&name, "the next session", |war| war["status"]["lease"]["session"] == "later").await;
    assert_eq!(reason(&war).as_deref(), Some("Refused"));
    next.registry.stands(&name, Some(applied(&next)));
    home.until_war(&name, "the report", |war| has(war, "UpToDate", "True")).await;
}

/// What `kubectl describe war` tells of who it is and why it may be there, as the policies change.
pub(super) async fn a_war_says_which_policy_admits_it(cluster: &Cluster) {
    let home = Home::new(cluster, "admitted").await;
    let plane = home.plane().await;
    // By name, and so many rules in each of which the last one admits.
    let follow = |policies: &[(&str, usize)], policy_unreadable: bool| {
        let rule = |account: &str| Rule {
            workloads: vec![Matcher::Aws(AwsMatcher {
                partitions: Vec::new(),
                accounts: vec![account.to_owned()],
                regions: Vec::new(),
                zones: Vec::new(),
                compute: AwsComputeMatcher::Ec2 { iam_role_names: Vec::new() },
            })],
            onboard_to: vec![LabelSelector::default()],
        };
        let policy = |(name, rules): &(&str, usize)| Policy {
            namespace: home.namespace.clone(),
            name: (*name).to_owned(),
            rules: (1..*rules).map(|_| rule("999999999999")).chain([rule("123456789012")]).collect(),
        };
        let groups = home.groups.iter().map(|(name, object)| (name.clone(), object.group.clone()));
        plane.snapshots.send_replace(Arc::new(Snapshot {
            plane: Some(Arc::new(PlaneSettings {
                uid: "0b6c".to_owned(),
                hosts: Vec::new(),
                token_life: WITHIN,
                propagation_delay: WITHIN,
                issuers: Vec::new(),
                local_repository: false,
            })),
            policies: Arc::new(PolicySet::compile(policies.iter().map(policy).collect())),
            groups: groups.collect(),
            policy_unreadable,
            ..Snapshot::default()
        }));
    };
    follow(&[("our-vms", 3)], false);
    let (name, live) = home.live(1, 1);
    plane.store_live(&name, &live).await;
    let writes = counts(&plane).await[2];
    plane.insist(&name, |_| live_state(&ready(&connected(&live, "s")))).await;
    plane.registry.stands(&name, Some(applied(&plane)));
    let war = home.until_war(&name, "its conditions", |war| has(war, "UpToDate", "True")).await;
    assert_eq!(condition(&war, "Admitted").unwrap()["message"], "OnboardingPolicy our-vms, rule spec.allow[2]");
    assert_eq!(counts(&plane).await[2], writes + 2, "it goes with what is written anyhow");

    let described = cluster.kubectl(["describe", "war", &name.name, "-n", &home.namespace]).unwrap();
    let said: Vec<String> =
        described.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for wanted in [
        "Account: 123456789012",
        "Instance Id: i-00000000000000001",
        "Ip: 10.0.0.4",
        "Reason: AgentEstablishedConnection",
        "Reason: ApplicationReady",
        "Reason: AsWanted",
        "Message: OnboardingPolicy our-vms, rule spec.allow[2]",
        "Reason: AllowedByPolicy",
    ] {
        assert!(said.iter().any(|line| line == wanted), "{wanted:?} isn't in {described}");
    }

    // Another one that comes first, then none that can be read; a registration that nobody admits keeps what it said, and ends.
    let message =
        |wanted: &'static str| move |war: &Value| condition(war, "Admitted").is_some_and(|it| it["message"] == wanted);
    follow(&[("a-first", 1), ("our-vms", 3)], false);
    let since = condition(&war, "Admitted").unwrap()["lastTransitionTime"].clone();
    let war = home.until_war(&name, "the other policy", message("OnboardingPolicy a-first, rule spec.allow[0]")).await;
    assert_eq!(condition(&war, "Admitted").unwrap()["lastTransitionTime"], since);
    follow(&[], true);
    home.until_war(&name, "that nobody can say", |war| has(war, "Admitted", "Unknown")).await;
    follow(&[], false);
    follow(&[("our-vms", 1)], false);
    home.until_war(&name, "the policy", message("OnboardingPolicy our-vms, rule spec.allow[0]")).await;
    // What doesn't change who admits is written nowhere.
    let writes = counts(&plane).await[2];
    follow(&[("our-vms", 1), ("z-last", 1)], false);
    plane
        .store_live(
            &name,
            &Live { health: Health { ready: false, message: "probe".to_owned() }, ..connected(&live, "s") },
        )
        .await;
    home.until_war(&name, "its health", |war| has(war, "Healthy", "False")).await;
    assert_eq!(counts(&plane).await[2], writes + 1);
    plane.stop().await;
}

pub(super) async fn what_no_plane_made_is_left_alone(cluster: &Cluster) {
    let home = Home::new(cluster, "foreign").await;
    let plane = home.plane().await;
    let (model, live) = home.live(9, 1);
    plane.store_live(&model, &live).await;
    let (name, live) = home.live(1, 1);
    let model = home.until_war(&model, "the war", |_| true).await;
    // What a plane would have made of the other host; each case changes one thing in it.
    let with = |change: &dyn Fn(&mut Value)| {
        let text = json!({
            "apiVersion": model["apiVersion"],
            "kind": model["kind"],
            "spec": model["spec"],
            "metadata": {
                "name": name.name,
                "namespace": home.namespace,
                "annotations": {LEASE: model["metadata"]["annotations"][LEASE]},
                "ownerReferences": model["metadata"]["ownerReferences"],
            },
        });
        let mut war: Value =
            serde_json::from_str(&text.to_string().replace("i-00000000000000009", "i-00000000000000001")).unwrap();
        change(&mut war);
        serde_json::from_value::<DynamicObject>(war).unwrap()
    };
    let drop_metadata = |war: &mut Value, field: &str| drop(war["metadata"].as_object_mut().unwrap().remove(field));
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(&str, Change<'_>, &str); 6] = [
        ("by hand", &|war| drop_metadata(war, "annotations"), "it has no annotation"),
        (
            "another's annotation",
            &|war| war["metadata"]["annotations"][LEASE] = model["metadata"]["annotations"][LEASE].clone(),
            "is of \"foreign/ratings-",
        ),
        ("no owner", &|war| drop_metadata(war, "ownerReferences"), "isn't owned"),
        (
            "another group's",
            &|war| {
                let lease = &mut war["metadata"]["annotations"][LEASE];
                let text = lease.as_str().unwrap().replace("\"group\":\"ratings\"", "\"group\":\"reviews\"");
                *lease = text.into();
            },
            "isn't owned",
        ),
        (
            "another identity",
            &|war| war["spec"]["identity"]["aws"]["account"] = "999999999999".into(),
            "spec.identity isn't that of its annotation",
        ),
        (
            "no JSON",
            &|war| war["metadata"]["annotations"][LEASE] = "{".into(),
            "its annotation onboarding.tetrate.io/lease",
        ),
    ];
    for (what, change, words) in cases {
        let made = home.wars().create(&PostParams::default(), &with(change)).await.unwrap();
        let deadline = Instant::now() + WITHIN;
        let said = loop {
            match plane.registry.load(&name).await {
                Err(RegistryError::Foreign(said)) => break said,
                other => assert!(Instant::now() < deadline, "{what}: {other:?}"),
            }
            pause().await;
        };
        assert!(said.contains(words), "{what}: {said}");
        assert!(said.contains(&format!("kubectl delete war -n foreign {}", name.name)), "{said}");
        assert!(plane.registry.list().await.unwrap().iter().all(|(listed, _)| *listed != name));
        let refused = plane.registry.store(&name, 0, &live_state(&live)).await;
        assert!(matches!(refused, Err(RegistryError::Foreign(_))), "{what}: {refused:?}");
        // Left as it was; without it the name is free, as if it had never been.
        let now = home.wars().get(&name.name).await.unwrap();
        assert_eq!(now.metadata.resource_version, made.metadata.resource_version, "{what}");
        cluster.kubectl(["delete", "war", "-n", "foreign", &name.name]).unwrap();
        plane.until(&name, "the deletion", |stored| stored.state == State::Absent).await;
    }
    // With nothing changed it is one.
    home.wars().create(&PostParams::default(), &with(&|_| {})).await.unwrap();
    plane.until(&name, "the copy", |stored| matches!(stored.state, State::Live(_))).await;
}

pub(super) async fn an_entry_is_put_back_and_says_when_it_cannot_be_made(cluster: &Cluster) {
    let home = Home::new(cluster, "entry").await;
    let plane = home.plane().await;
    let (name, live) = home.live(1, 1);
    plane.store_live(&name, &live).await;
    plane.insist(&name, |_| live_state(&ready(&connected(&live, "s")))).await;
    let entry = home.until_entry(&name, "health", |entry| has(entry, "Healthy", "True")).await;
    cluster.kubectl(["delete", "workloadentry", &name.name, "-n", &name.namespace]).unwrap();
    let again = |it: &Value| it["metadata"]["uid"] != entry["metadata"]["uid"] && has(it, "Healthy", "True");
    home.until_entry(&name, "another entry", again).await;

    // Somebody has one by that name.
    let (taken, live) = home.live(2, 1);
    let theirs = format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {}, namespace: entry}}\nspec: {{address: 10.7.7.7}}\n",
        taken.name
    );
    cluster.apply(&theirs).unwrap();
    plane.store_live(&taken, &live).await;
    let war = home.until_war(&taken, "the condition", |war| has(war, "Published", "False")).await;
    let published = condition(&war, "Published").unwrap();
    assert_eq!(published["reason"], "WorkloadEntryNotOurs");
    let message = published["message"].as_str().unwrap();
    assert!(message.contains(&format!("kubectl delete workloadentry -n entry {}", taken.name)), "{message}");
    let entry = home.until_entry(&taken, "the other's entry", |_| true).await;
    assert_eq!(
        (&entry["spec"], &entry["metadata"]["ownerReferences"]),
        (&json!({"address": "10.7.7.7"}), &Value::Null)
    );
    // Who is there is said nevertheless, and what is stored next leaves that condition.
    assert!(has(&war, "AgentConnected", "False"), "{war:#}");
    plane.insist(&taken, |_| live_state(&connected(&live, "s"))).await;
    let war = home.until_war(&taken, "the session", |war| has(war, "AgentConnected", "True")).await;
    assert!(has(&war, "Published", "False"), "{war:#}");
    cluster.kubectl(["delete", "workloadentry", &taken.name, "-n", "entry"]).unwrap();
    home.until_entry(&taken, "our entry", |entry| entry["spec"]["address"] == "10.0.0.4").await;
    home.until_war(&taken, "the condition", |war| has(war, "Published", "True")).await;

    // No address of the kind that it wants.
    let (name, mut live) = home.live(3, 1);
    live.report.connected_over = ConnectedOver::Internet;
    plane.store_live(&name, &live).await;
    let war = home.until_war(&name, "the condition", |war| has(war, "Published", "False")).await;
    assert_eq!(condition(&war, "Published").unwrap()["reason"], "NoAddress");
    assert!(home.entries().get_opt(&name.name).await.unwrap().is_none());
}
