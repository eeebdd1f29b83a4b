//! Whether what `dev/bench` measures can still be measured: tiny counts, and no limit in time but that it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "all of it is tests")]

use onboarding_bench::crowd::{Crowd, Habits};
use onboarding_bench::figures::{Bench, Name};
use onboarding_bench::plane::{MANIFESTS, Plane, World};
use std::time::Duration;

/// `dev/test` builds the plane before it tests.
fn bench() -> Bench {
    let own = std::env::current_exe().unwrap();
    let binaries = own.ancestors().nth(2).unwrap().to_owned();
    assert!(binaries.join("onboarding-plane").exists(), "build it first: cargo build -p onboarding-plane");
    let descriptors = onboarding_bench::machine::raise_limit().unwrap().try_into().unwrap();
    Bench { quick: true, one_core: false, repeat: 1, descriptors, binaries, directory: std::env::temp_dir() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_joins_by_both_kinds_of_evidence_and_comes_back_to_a_plane_that_was_killed() {
    let bench = bench();
    let world = World::start().await.unwrap();
    let mut plane = Plane::start(&bench, &world).await.unwrap();
    let habits = Habits::default();
    let mut crowds = Vec::new();
    for evidence in [world.jwt(), world.ec2_document()] {
        let crowd = Crowd::new(&plane.target(), evidence, world.whereto()).unwrap();
        let joins = crowd.join(crowd.newcomers(20).unwrap(), 8).await;
        assert_eq!(joins.failures, Vec::<String>::new());
        assert_eq!((joins.joined.len(), joins.latencies.len()), (20, 20));
        crowds.push(crowd.stay(joins.joined, habits.clone()));
    }
    let within = Duration::from_secs(60);
    for members in &crowds {
        members.until(within, |status| status.connected && status.boots == 1).await.unwrap();
    }
    assert_eq!(plane.metric("onboarding_sessions").await.unwrap(), 40.0);
    assert_eq!(plane.metric("onboarding_registry_registrations").await.unwrap(), 40.0);
    let before = plane.cpu_time().unwrap();
    assert!(before > Duration::ZERO && plane.memory().unwrap().resident > 0);

    plane.kill_and_start().unwrap();
    for members in &crowds {
        members.until(within, |status| status.connected && status.sessions == 2).await.unwrap();
        // By their tokens, with what they had.
        assert!(members.statuses().all(|status| status.authorized_again == 0 && status.boots == 1));
    }
    assert_eq!(plane.metric("onboarding_registry_registrations").await.unwrap(), 40.0);

    // Who isn't admitted is told so, and counted as a failure.
    let crowd = Crowd::new(&plane.target(), world.jwt(), world.whereto()).unwrap();
    std::fs::remove_file(plane.directory().join(MANIFESTS).join("policy.yaml")).unwrap();
    for members in &crowds {
        members.until(within, |status| status.ended.is_some()).await.unwrap();
    }
    let joins = crowd.join(crowd.newcomers(2).unwrap(), 2).await;
    assert!(joins.joined.is_empty());
    assert!(
        joins.failures.iter().all(|why| why.contains("Not authorized by OnboardingPolicy")),
        "{:?}",
        joins.failures
    );
}

/// Of those that need nothing but the plane. A figure that has fewer samples is an error of `Name::run`.
#[tokio::test(flavor = "multi_thread")]
async fn a_figure_has_a_sample_for_each_repetition_and_so_has_its_floor() {
    let bench = Bench { repeat: 2, ..bench() };
    for name in [Name::Join, Name::Decision, Name::Memory, Name::Restart, Name::Mesh] {
        for figure in name.run(&bench).await.unwrap() {
            let floors = figure.against.iter().filter(|against| against.source.is_none());
            let all: Vec<f64> = floors.flat_map(|floor| &floor.samples).chain(&figure.ours).copied().collect();
            assert!(all.len() >= 4 && all.iter().all(|sample| sample.is_finite()), "{figure:?}");
            assert!(figure.lines().contains(&figure.name), "{}", figure.lines());
        }
    }
}
