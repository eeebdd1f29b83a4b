use super::*;
use crate::registry::memory::{self, Content};
use onboarding_core::identity::{Replay, Thumbprint};
use onboarding_core::registration::{HostReport, State};
use onboarding_kinds::war::strategies::{key, live, timestamp, word};
use proptest::option;
use proptest::prelude::*;

fn name(live: &Live) -> RegistrationName {
    registration_name(&live.group, &live.attested.identity, live.attested.issuer_short_name.as_deref()).unwrap()
}

/// As the API server would give it back.
fn served(mut object: DynamicObject, version: u64) -> DynamicObject {
    object.metadata.uid = Some("uid-1".to_owned());
    object.metadata.resource_version = Some(version.to_string());
    object.metadata.generation = Some(3);
    // Through text, as on the wire.
    serde_json::from_str(&serde_json::to_string(&object).unwrap()).unwrap()
}

fn live_of(war: &War) -> &LiveWar {
    war.live().unwrap_or_else(|| panic!("{:?}", war.meaning))
}

proptest! {
    #[test]
    fn a_state_comes_back_from_its_objects_as_it_was(live in live(), after in option::of(word()), other in live()) {
        let name = name(&live);
        let war = War::read(&name, served(new_war(&name, &live, "group-1", after.as_deref()).unwrap(), 7)).unwrap();
        let fresh = Live {
            connection: Connection::Disconnected { since: live.created_at, reason: DisconnectReason::NotYetConnected },
            health: Health { ready: false, message: NOT_UP.to_owned() },
            health_since: live.created_at,
            ..live.clone()
        };
        prop_assert_eq!(&live_of(&war).live, &fresh);
        prop_assert_eq!((war.version, &live_of(&war).after, live_of(&war).has_status), (7, &after, false));

        // With its status.
        let mut object = war.object().unwrap();
        object.data["status"] = status(&object, &name, &live, &BootState::default(), Vec::new(), Timestamp::UNIX_EPOCH);
        let war = War::read(&name, served(object, 8)).unwrap();
        prop_assert_eq!(&live_of(&war).live, &live);
        prop_assert!(live_of(&war).has_status);

        // With all that may change in it changed.
        let changed = Live { group: live.group.clone(), attested: live.attested.clone(), connection: live.connection.clone(), health: live.health.clone(), health_since: live.health_since, ..other };
        let object = with_live(&name, &war, live_of(&war), &changed).unwrap();
        let war = War::read(&name, served(object, 9)).unwrap();
        prop_assert_eq!(&live_of(&war).live, &changed);
        prop_assert_eq!(&live_of(&war).after, &after);
    }

    #[test]
    fn an_end_comes_back_from_the_war_and_from_the_memory(live in live(), key in option::of(key()), at in timestamp(), after in option::of(word())) {
        let name = name(&live);
        let ended = Ended { key, at };
        let war = War::read(&name, served(new_war(&name, &live, "group-1", after.as_deref()).unwrap(), 7)).unwrap();
        let ended_war = War::read(&name, served(with_end(&name, &war, Some(&ended)).unwrap(), 8)).unwrap();
        prop_assert_eq!(ended_war.meaning, Meaning::Ended { ended: ended.clone(), after: after.clone() });
        let forgotten = War::read(&name, served(with_end(&name, &war, None).unwrap(), 8)).unwrap();
        prop_assert_eq!(forgotten.meaning, Meaning::Forgotten);

        let content = Content { id: "id-1".to_owned(), war: "uid-1".to_owned(), ended };
        let mut object = memory::to_object(&name, &content, Some(4));
        object.metadata.uid = Some("uid-2".to_owned());
        let read = memory::from_object(&name, &object).unwrap();
        prop_assert_eq!((read.version, read.content), (4, content));
        prop_assert_eq!(memory::registration_of(&object), Some(name.clone()));
        // Under another name it is nobody's.
        let mut moved = object;
        moved.metadata.name = Some("onboarding-memory-0".to_owned());
        prop_assert_eq!(memory::registration_of(&moved), None);
        prop_assert!(memory::from_object(&name, &moved).is_err());
    }
}

fn example() -> (RegistrationName, Live) {
    let identity = json!({"jwt": {"issuer": "https://mycompany.corp", "subject": "vm007"}});
    let live = Live {
        group: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
        attested: Attested {
            identity: identity::from_json(&identity, &[]).unwrap(),
            issuer_short_name: Some("my-corp".to_owned()),
            replay: Replay::Forever,
        },
        key: KeyMemory { thumbprint: Thumbprint([1; 32]), replay: Replay::Forever },
        report: HostReport::default(),
        created_at: Timestamp::from_second(100).unwrap(),
        token_expires_at: Timestamp::from_second(200).unwrap(),
        connection: Connection::Connected {
            replica: "plane-1".to_owned(),
            session: "s".to_owned(),
            since: Timestamp::from_second(150).unwrap(),
        },
        health: Health { ready: true, message: String::new() },
        health_since: Timestamp::from_second(160).unwrap(),
    };
    (name(&live), live)
}

#[test]
fn a_status_that_is_not_whole_counts_as_never_connected() {
    let (name, live) = example();
    let mut object = served(new_war(&name, &live, "group-1", None).unwrap(), 1);
    object.data["status"] = status(&object, &name, &live, &BootState::default(), Vec::new(), Timestamp::UNIX_EPOCH);
    assert_eq!(live_of(&War::read(&name, object.clone()).unwrap()).live, live);
    let changes: [fn(&mut Value); 6] = [
        |status| *status = json!("connected"),
        |status| status["conditions"] = json!([]),
        |status| status["conditions"][0]["lastTransitionTime"] = json!("yesterday"),
        |status| status["conditions"][0]["status"] = json!("Unknown"),
        |status| status["lease"] = Value::Null,
        |status| status["activeAgentConnection"] = Value::Null,
    ];
    for change in changes {
        let mut object = object.clone();
        change(&mut object.data["status"]);
        let war = War::read(&name, object).unwrap();
        let read = live_of(&war);
        assert!(!read.has_status && !read.live.health.ready, "{read:?}");
        let never = Connection::Disconnected { since: live.created_at, reason: DisconnectReason::NotYetConnected };
        assert_eq!(read.live.connection, never);
    }
}

#[test]
fn a_status_keeps_what_is_not_its_own_and_the_time_of_what_stays() {
    let (name, live) = example();
    let mut object = served(new_war(&name, &live, "group-1", None).unwrap(), 1);
    let at = |second| Timestamp::from_second(second).unwrap();
    let applied =
        |is: bool| Condition { kind: "UpToDate", problem: (!is).then(|| ("Refused", "why".to_owned())) }.to_json();
    object.data["status"] = status(&object, &name, &live, &BootState::default(), vec![applied(true)], at(1000));
    let audited = json!({"type": "Audited", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    object.data["status"]["conditions"].as_array_mut().unwrap().push(audited.clone());
    let changed = |status: &Value, index: usize| {
        status["conditions"][index]["lastTransitionTime"].as_str().unwrap().parse::<Timestamp>().unwrap()
    };
    let same = status(&object, &name, &live, &BootState::default(), vec![applied(true)], at(2000));
    assert_eq!((changed(&same, 1), changed(&same, 2)), (live.health_since, at(1000)));
    assert_eq!(same["conditions"][3], audited);
    assert_eq!(same["observedGeneration"], 3);
    let other = status(&object, &name, &live, &BootState::default(), vec![applied(false)], at(2000));
    assert_eq!(changed(&other, 2), at(2000));
}

#[test]
fn versions_are_numbers() {
    let metadata =
        |version: Option<&str>| ObjectMeta { resource_version: version.map(str::to_owned), ..ObjectMeta::default() };
    assert_eq!(version_of(&metadata(Some("18446744073709551615"))), Ok(u64::MAX));
    for bad in [None, Some(""), Some("-1"), Some("abc"), Some("18446744073709551616")] {
        assert!(version_of(&metadata(bad)).is_err(), "{bad:?}");
    }
}

#[test]
fn nothing_of_a_state_is_lost_by_the_states_own_default() {
    // A registration as the core makes it needs no status to be what it is.
    let (name, live) = example();
    let register = onboarding_core::registration::Register {
        group: live.group.clone(),
        attested: live.attested.clone(),
        key: live.key.thumbprint,
        report: live.report.clone(),
        token_issued_at: live.created_at,
        token_expires_at: live.token_expires_at,
    };
    let event = onboarding_core::registration::Event::Register(Box::new(register));
    let step = onboarding_core::registration::step(&State::Absent, event, live.created_at, std::time::Duration::ZERO);
    let State::Live(made) = step.unwrap().state else { panic!("it isn't live") };
    let war = War::read(&name, served(new_war(&name, &made, "group-1", None).unwrap(), 1)).unwrap();
    assert_eq!(live_of(&war).live, *made);
}
