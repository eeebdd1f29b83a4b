use super::super::memory::Content;
use super::*;
use jiff::Timestamp;
use onboarding_core::registration::Ended;

fn war(uid: &str, version: u64, meaning: Meaning) -> War {
    War { uid: uid.to_owned(), version, deleting: false, meaning, raw: Box::default() }
}

fn ended() -> Ended {
    Ended { key: None, at: Timestamp::UNIX_EPOCH }
}

fn over(uid: &str, version: u64) -> War {
    war(uid, version, Meaning::Ended { ended: ended(), after: None })
}

fn memory(war: &str, version: u64) -> Memory {
    let name = RegistrationName { namespace: "bookinfo".to_owned(), name: "ratings-1".to_owned() };
    let content = Content { id: "id".to_owned(), war: war.to_owned(), ended: ended() };
    Memory { name, uid: "memory".to_owned(), version, content }
}

fn version(record: &Record) -> u64 {
    match record.view() {
        View::Known(stored) => stored.version,
        View::Foreign(_) | View::Look => panic!("it isn't known"),
    }
}

#[test]
fn older_news_changes_nothing() {
    let mut slot = Slot::default();
    assert!(slot.put(over("a", 5)));
    assert!(!slot.put(over("a", 5)), "our own write, heard of");
    assert!(!slot.put(over("a", 4)));
    assert!(slot.put(over("b", 7)), "deleted, and made anew");
    assert!(!slot.put(over("a", 6)));
    assert!(slot.ended("a").is_none());
    assert_eq!(slot.get().unwrap().uid, "b");
}

#[test]
fn what_was_deleted_here_does_not_come_back() {
    let mut slot = Slot::default();
    slot.put(over("a", 5));
    slot.deleted("a");
    assert!(!slot.put(over("a", 6)), "on the way before the deletion");
    assert!(slot.put(over("b", 8)));
    assert!(slot.ended("a").is_none());
    assert_eq!(slot.get().unwrap().uid, "b");
}

#[test]
fn a_war_that_ended_is_not_lost_when_it_goes() {
    let mut record = Record::default();
    record.war.put(over("a", 5));
    assert_eq!(version(&record), 5);
    record.memory.put(memory("a", 6));
    record.war_ended("a", None);
    assert!(record.lost.is_none());
    assert_eq!(version(&record), 6);
    record.memory.deleted("memory");
    assert_eq!(version(&record), 0);
}

#[test]
fn what_a_list_lacks_is_looked_up() {
    let cache = Cache::default();
    let name = memory("a", 1).name;
    cache.edit(&name, |record| record.suspect = true);
    assert!(matches!(cache.view(&name), View::Look));
    cache.edit(&name, |record| record.suspect = false);
    assert!(cache.names(|_| true).is_empty(), "nothing is kept of what isn't there");
}

#[tokio::test]
async fn names_come_once_each_in_order() {
    let names = Names::default();
    let name = |name: &str| RegistrationName { namespace: "n".to_owned(), name: name.to_owned() };
    for it in ["b", "a", "b"] {
        names.add(name(it));
    }
    assert_eq!(names.next().await, name("b"));
    names.add(name("b"));
    assert_eq!(names.next().await, name("a"));
    assert_eq!(names.next().await, name("b"));
    assert!(names.lock().take().is_none());
}

#[tokio::test]
async fn whoever_is_first_is_looked_at_before_those_who_wait_and_once() {
    let name = |name: &str| RegistrationName { namespace: "bookinfo".to_owned(), name: name.to_owned() };
    let names = Names::default();
    for waits in ["a", "b", "a", "c"] {
        names.add(name(waits));
    }
    names.add_first(name("d"));
    names.add_first(name("b"));
    let mut order = Vec::new();
    for _ in 0..4 {
        order.push(names.next().await.name);
    }
    assert_eq!(order, ["b", "d", "a", "c"]);
    assert!(names.lock().take().is_none());
}
