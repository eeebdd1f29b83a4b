//! The registry's promises: durable before the answer, one winner, nothing half made.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod fixture;

use fixture::{live, name};
use onboarding_core::registration::{Connection, Ended, Live, State};
use onboarding_endpoint::backend::{Registry, RegistryError, Stored};
use onboarding_standalone::data_dir::DataDir;
use onboarding_standalone::sqlite::SqliteRegistry;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry as Metrics;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

fn open(dir: &Path) -> anyhow::Result<SqliteRegistry> {
    open_with(dir, &mut Metrics::default())
}

fn open_with(dir: &Path, metrics: &mut Metrics) -> anyhow::Result<SqliteRegistry> {
    SqliteRegistry::open(Arc::new(DataDir::open(dir)?), metrics)
}

/// Once the last one let go of the directory.
fn reopen(dir: &Path) -> SqliteRegistry {
    drop(reopen_lock(dir));
    open(dir).unwrap()
}

fn reopen_lock(dir: &Path) -> DataDir {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match DataDir::open(dir) {
            Ok(data) => return data,
            Err(error) if Instant::now() > deadline => panic!("{error:#}"),
            Err(_) => std::thread::yield_now(),
        }
    }
}

fn ended(second: i64) -> State {
    State::Ended(Ended { key: None, at: jiff::Timestamp::from_second(second).unwrap() })
}

fn metric(metrics: &Metrics, name: &str) -> f64 {
    let mut text = String::new();
    encode(&mut text, metrics).unwrap();
    let line =
        text.lines().find(|line| line.split(' ').next() == Some(name)).unwrap_or_else(|| panic!("{name}\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn what_was_stored_is_there_after_a_restart_and_versions_never_come_twice() {
    let dir = tempfile::tempdir().unwrap();
    let registry = open(dir.path()).unwrap();
    let vm1 = name("ratings-vm1");
    assert!(matches!(registry.load(&vm1).await.unwrap(), Stored { state: State::Absent, version: 0 }));
    let first = live("ratings", "vm1", "10.0.0.1", true);
    let one = registry.store(&vm1, 0, &first).await.unwrap();
    assert!(matches!(registry.store(&vm1, 0, &first).await, Err(RegistryError::Conflict)));
    let two = registry.store(&vm1, one, &ended(7)).await.unwrap();
    assert_eq!(registry.store(&vm1, two, &State::Absent).await.unwrap(), 0);
    let three = registry.store(&vm1, 0, &first).await.unwrap();
    assert!(one < two && two < three, "{one} {two} {three}");
    let vm2 = registry.store(&name("ratings-vm2"), 0, &ended(9)).await.unwrap();
    drop(registry);

    let registry = reopen(dir.path());
    let all = registry.list().await.unwrap();
    assert_eq!(
        all.iter().map(|(name, stored)| (name.name.as_str(), stored.version)).collect::<Vec<_>>(),
        [("ratings-vm1", three), ("ratings-vm2", vm2)]
    );
    assert_eq!(all[0].1.state, first);
    assert_eq!(all[1].1.state, ended(9));
    assert!(registry.store(&name("ratings-vm3"), 0, &first).await.unwrap() > vm2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_those_who_race_exactly_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let registry = open(dir.path()).unwrap();
    for round in 0..20 {
        let vm = name(&format!("ratings-{round}"));
        let racers: Vec<_> = (0..16)
            .map(|second| {
                let (registry, vm) = (registry.clone(), vm.clone());
                tokio::spawn(async move { (second, registry.store(&vm, 0, &ended(second)).await) })
            })
            .collect();
        let mut won = Vec::new();
        for racer in racers {
            match racer.await.unwrap() {
                (second, Ok(version)) => won.push((second, version)),
                (_, Err(RegistryError::Conflict)) => {}
                (_, Err(error)) => panic!("{error}"),
            }
        }
        let [(second, version)] = won.as_slice() else { panic!("{won:?}") };
        let stored = registry.load(&vm).await.unwrap();
        assert_eq!((stored.state, stored.version), (ended(*second), *version));
    }
}

#[tokio::test]
async fn concurrent_stores_share_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let mut metrics = Metrics::default();
    let registry = open_with(dir.path(), &mut metrics).unwrap();
    let stores = (0..400).map(|index| {
        let registry = registry.clone();
        async move { registry.store(&name(&format!("ratings-{index}")), 0, &ended(index)).await }
    });
    for result in futures_util::future::join_all(stores).await {
        result.unwrap();
    }
    assert_eq!(metric(&metrics, "onboarding_registry_stores_total"), 400.0);
    let commits = metric(&metrics, "onboarding_registry_commits_total");
    assert!(commits < 100.0, "{commits} commits for 400 stores");
    assert_eq!(metric(&metrics, "onboarding_registry_registrations"), 400.0);
}

#[tokio::test]
async fn the_mesh_hears_only_of_what_it_sees() {
    let dir = tempfile::tempdir().unwrap();
    let registry = open(dir.path()).unwrap();
    let changes = registry.changes();
    let vm = name("ratings-vm1");
    let changed = || changes.take().into_iter().map(|name| name.name).collect::<Vec<_>>();
    let ready = live("ratings", "vm1", "10.0.0.1", true);
    let one = registry.store(&vm, 0, &ready).await.unwrap();
    assert_eq!(changed(), ["ratings-vm1"]);
    let State::Live(mut renewed) = ready.clone() else { panic!() };
    renewed.token_expires_at = jiff::Timestamp::MAX;
    let two = registry.store(&vm, one, &State::Live(renewed)).await.unwrap();
    assert!(changed().is_empty(), "a renewed token is none of its business");
    let three = registry.store(&vm, two, &live("ratings", "vm1", "10.0.0.1", false)).await.unwrap();
    assert_eq!(changed(), ["ratings-vm1"]);
    assert!(registry.live(&vm).is_some());
    registry.store(&vm, three, &ended(1)).await.unwrap();
    assert_eq!(changed(), ["ratings-vm1"]);
    assert!(registry.live(&vm).is_none());
    registry.store(&name("ratings-vm2"), 0, &ready).await.unwrap();
    drop((registry, changes));
    // All that is live is news to a plane that starts.
    let registry = reopen(dir.path());
    assert_eq!(registry.changes().take().into_iter().map(|name| name.name).collect::<Vec<_>>(), ["ratings-vm2"]);
}

#[test]
fn a_file_that_is_not_whole_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("registry.sqlite");
    let refused = |wanted: &str| {
        let before = std::fs::read(&file).unwrap();
        let error = format!("{:#}", open(dir.path()).err().unwrap_or_else(|| panic!("opened, wanted: {wanted}")));
        assert!(error.contains(wanted) && error.contains("registry.sqlite"), "{error}");
        assert!(std::fs::read(&file).unwrap() == before, "it was changed");
    };
    std::fs::write(&file, "not a database at all, and long enough to be looked at".repeat(10)).unwrap();
    refused("move");

    std::fs::remove_file(&file).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let registry = open(dir.path()).unwrap();
        for index in 0..200 {
            let state = live("ratings", "vm", "10.0.0.1", true);
            registry.store(&name(&format!("ratings-{index}")), 0, &state).await.unwrap();
        }
    });
    // SQLite's own log goes into the file when it is closed, before the directory is free again.
    drop(reopen_lock(dir.path()));
    let whole = std::fs::read(&file).unwrap();
    let mut torn = whole.clone();
    let middle = torn.len() / 2;
    torn[middle..middle + 4096].fill(0xaa);
    std::fs::write(&file, &torn).unwrap();
    refused("damaged");

    std::fs::write(&file, &whole).unwrap();
    let change = |sql: &str| rusqlite::Connection::open(&file).unwrap().execute_batch(sql).unwrap();
    change("UPDATE registration SET report = '{' WHERE name = 'ratings-7'");
    refused("ratings-7: report");
    std::fs::write(&file, &whole).unwrap();
    change("PRAGMA user_version = 3");
    refused("its schema is version 3");
    std::fs::remove_file(&file).unwrap();
    change("CREATE TABLE other (x)");
    refused("something else");
}

#[test]
fn a_file_of_before_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("registry.sqlite");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let state = live("ratings", "vm", "10.0.0.1", true);
    runtime.block_on(async {
        let registry = open(dir.path()).unwrap();
        registry.store(&name("ratings-1"), 0, &state).await.unwrap();
    });
    drop(reopen_lock(dir.path()));
    let change = |sql: &str| rusqlite::Connection::open(&file).unwrap().execute_batch(sql).unwrap();
    change("ALTER TABLE registration DROP COLUMN health_since; PRAGMA user_version = 1");
    for _ in 0..2 {
        let registry = reopen(dir.path());
        let stored = runtime.block_on(registry.load(&name("ratings-1"))).unwrap();
        let (State::Live(read), State::Live(written)) = (&stored.state, &state) else { panic!("{stored:?}") };
        // Of all that it didn't have, the nearest.
        let since = match &written.connection {
            Connection::Connected { since, .. } | Connection::Disconnected { since, .. } => *since,
        };
        assert_eq!(**read, Live { health_since: since, ..(**written).clone() });
    }
}

/// This test again as a process of its own, that does what `STANDALONE_CHILD` says in the directory `STANDALONE_DIR`.
fn child(what: &str, dir: &Path, prefix: &[&str]) -> Command {
    let exe = std::env::current_exe().unwrap();
    let mut words: Vec<std::ffi::OsString> = prefix.iter().map(Into::into).collect();
    words.push(exe.into());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(["--exact", "the_child", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env("STANDALONE_CHILD", what).env("STANDALONE_DIR", dir);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

#[test]
#[ignore = "the other side of the tests that end a process"]
fn the_child() {
    let Ok(what) = std::env::var("STANDALONE_CHILD") else { return };
    let dir = std::env::var("STANDALONE_DIR").unwrap();
    let registry = reopen(Path::new(&dir));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    match what.as_str() {
        // Stores for ever, and says what was acknowledged.
        "store" => runtime.block_on(async {
            let workers = (0..8).map(|worker| {
                let registry = registry.clone();
                tokio::spawn(async move {
                    let vm = name(&format!("ratings-{worker}"));
                    let mut version = registry.load(&vm).await.unwrap().version;
                    for second in 1.. {
                        version = registry.store(&vm, version, &ended(second)).await.unwrap();
                        println!("stored {worker} {second} {version}");
                    }
                })
            });
            futures_util::future::join_all(workers).await;
        }),
        // Until nothing can be stored; then, when told that there is space again, once more.
        "fill" => runtime.block_on(async {
            let mut stored = 0;
            let state = live("ratings", "vm", "10.0.0.1", true);
            let error = loop {
                match registry.store(&name(&format!("ratings-{stored}")), 0, &state).await {
                    Ok(_) => stored += 1,
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, RegistryError::Unavailable(_)), "{error}");
            let there = registry.list().await.unwrap().len();
            println!("full {stored} {there}");
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).unwrap();
            registry.store(&name(&format!("ratings-{stored}")), 0, &state).await.unwrap();
            println!("recovered");
        }),
        other => panic!("{other}"),
    }
}

#[test]
fn what_was_acknowledged_survives_sigkill() {
    let dir = tempfile::tempdir().unwrap();
    for round in 1..=4_usize {
        let mut process = child("store", dir.path(), &["env"]).spawn().unwrap();
        let mut acknowledged: BTreeMap<String, (i64, u64)> = BTreeMap::new();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut note = |line: String| -> bool {
            // The test harness prints its own words around ours.
            let Some(at) = line.find("stored ") else { return false };
            let words: Vec<&str> = line[at..].split(' ').collect();
            let (Some(worker), Some(second), Some(version)) = (words.get(1), words.get(2), words.get(3)) else {
                return false;
            };
            let (Ok(second), Ok(version)) = (second.parse(), version.parse()) else { return false };
            acknowledged.insert((*worker).to_owned(), (second, version));
            true
        };
        let mut seen = 0;
        while seen < 150 * round {
            seen += usize::from(note(lines.next().expect("the child ended by itself").unwrap()));
        }
        process.kill().unwrap();
        // What it still said is acknowledged too; a line that was cut isn't.
        for line in lines.map_while(Result::ok) {
            note(line);
        }
        process.wait().unwrap();

        let registry = reopen(dir.path());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(acknowledged.len(), 8);
        for (worker, (second, version)) in acknowledged {
            let stored = runtime.block_on(registry.load(&name(&format!("ratings-{worker}")))).unwrap();
            let State::Ended(ended) = &stored.state else { panic!("{stored:?}") };
            assert!(ended.at.as_second() >= second, "worker {worker}: {second} was acknowledged, {stored:?} is there");
            assert!(stored.version >= version, "worker {worker}: {version} was acknowledged, {stored:?} is there");
        }
    }
}

#[test]
fn a_full_disk_stores_nothing_and_space_is_enough_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).unwrap());
    // 512 KiB to any file, as an error instead of a signal: what a full disk is to SQLite.
    let script = "trap '' XFSZ; ulimit -S -f 512; exec \"$@\"";
    let mut process = child("fill", dir.path(), &["bash", "-c", script, "bash"]).spawn().unwrap();
    let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let mut line_with = |word: &str| loop {
        let line = lines.next().unwrap_or_else(|| panic!("the child ended before it said {word:?}")).unwrap();
        if let Some(at) = line.find(word) {
            return line[at..].to_owned();
        }
    };
    let full = line_with("full ");
    let counts: Vec<usize> = full.split(' ').skip(1).map(|count| count.parse().unwrap()).collect();
    assert_eq!(counts[0], counts[1], "what failed isn't in memory either");
    assert!(counts[0] > 10, "{full}");
    let limit =
        Command::new("prlimit").args(["--pid", &process.id().to_string(), "--fsize=unlimited"]).status().unwrap();
    assert!(limit.success());
    writeln!(process.stdin.take().unwrap(), "go on").unwrap();
    line_with("recovered");
    assert!(process.wait().unwrap().success());
    let registry = reopen(dir.path());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    assert_eq!(runtime.block_on(registry.list()).unwrap().len(), counts[0] + 1);
}
