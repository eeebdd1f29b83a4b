//! A decision among many policies, compiling them, and going through live sessions after a change.

use super::Bench;
use crate::crowd::{Crowd, Habits, Members};
use crate::plane::{GROUP, MANIFESTS, NAMESPACE, Plane, World};
use crate::table::Figure;
use crate::{floor, machine};
use anyhow::{Context, ensure};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::identity::Identity;
use onboarding_core::policy::{Decision, Policy, PolicySet};
use onboarding_kinds::manifest::{self, Object};
use saphyr_parser::Parser;
use std::collections::HashMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

const LINES: usize = 32;
const CONNECTED_WITHIN: Duration = Duration::from_secs(180);
const TOLD_WITHIN: Duration = Duration::from_secs(60);

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let started = Instant::now();
    let mut figures = Vec::new();
    let sizes: &[usize] = if bench.quick { &[10, 1000] } else { &[10, 1000, 10_000, 100_000] };
    for &size in sizes {
        bench.say(started, &format!("a decision among {size} policies"));
        figures.extend(decide(bench, size)?);
    }
    figures.extend(recheck(bench, started).await?);
    Ok(figures)
}

/// In one file, which may have 16 MiB.
const PER_FILE: usize = 10_000;

/// Policies of one namespace, as they are written: account, zone, role and group of each its own.
fn policies(size: usize) -> anyhow::Result<(Vec<Policy>, Vec<String>)> {
    let numbers: Vec<usize> = (0..size).collect();
    let texts: Vec<String> = numbers.chunks(PER_FILE).map(written).collect::<anyhow::Result<_>>()?;
    let mut policies = Vec::new();
    for text in &texts {
        let read = manifest::read("policies.yaml", text);
        ensure!(read.faults.is_empty(), "{:?}", read.faults.first());
        policies.extend(read.items.into_iter().filter_map(|item| match item.object {
            Object::OnboardingPolicy(policy) => Some(policy),
            _ => None,
        }));
    }
    Ok((policies, texts))
}

fn written(numbers: &[usize]) -> anyhow::Result<String> {
    let mut text = String::new();
    for number in numbers {
        writeln!(
            text,
            "---\napiVersion: authorization.onboarding.tetrate.io/v1alpha1\nkind: OnboardingPolicy\nmetadata: {{name: policy-{number:06}, namespace: {NAMESPACE}}}\nspec:\n  allow:\n  - workloads:\n    - aws: {{accounts: ['{:012}'], regions: [us-east-2], ec2: {{iamRoleNames: [role-{number}]}}}}\n    onboardTo:\n    - workloadGroupSelector: {{matchLabels: {{app: {GROUP}}}}}",
            // A hundred policies of each account.
            100_000_000_000_u64 + *number as u64 / 100
        )?;
    }
    Ok(text)
}

fn instance(account: u64, number: usize) -> anyhow::Result<Identity> {
    let document = serde_json::json!({"aws": {
        "partition": "aws", "account": format!("{account:012}"), "region": "us-east-2", "zone": "us-east-2b",
        "ec2": {"instanceId": "i-1234567890abcdef0", "iamRole": {"name": role(number)}},
    }});
    onboarding_kinds::identity::from_json(&document, &[]).map_err(anyhow::Error::msg)
}

fn group() -> anyhow::Result<WorkloadGroup> {
    let text = format!(
        "apiVersion: networking.istio.io/v1alpha3\nkind: WorkloadGroup\nmetadata: {{name: {GROUP}, namespace: {NAMESPACE}, labels: {{app: {GROUP}}}}}\nspec: {{template: {{serviceAccount: ratings-vm}}}}\n"
    );
    let read = manifest::read("group.yaml", &text);
    read.items
        .into_iter()
        .find_map(|item| match item.object {
            Object::WorkloadGroup(group) => Some(group),
            _ => None,
        })
        .context("a WorkloadGroup")
}

fn decide(bench: &Bench, size: usize) -> anyhow::Result<Vec<Figure>> {
    let (policies, texts) = policies(size)?;
    let group = group()?;
    let last = size - 1;
    let account = 100_000_000_000_u64 + last as u64 / 100;
    let (admitted, refused) = (instance(account, last)?, instance(account, size + 1)?);
    let (mut yes, mut no, mut hit, mut miss) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut compile, mut map, mut read, mut parse) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.repeat {
        let (again, keys): (_, Vec<String>) = (policies.clone(), (0..size).map(role).collect());
        let began = Instant::now();
        let set = PolicySet::compile(again);
        compile.push(began.elapsed().as_secs_f64() * 1e3);
        let began = Instant::now();
        let roles: HashMap<String, usize> = keys.into_iter().zip(0..).collect();
        map.push(began.elapsed().as_secs_f64() * 1e3);
        let began = Instant::now();
        for text in &texts {
            ensure!(manifest::read("policies.yaml", text).faults.is_empty());
        }
        read.push(began.elapsed().as_secs_f64() * 1e3);
        let began = Instant::now();
        for text in &texts {
            Parser::new_from_str(text).try_for_each(|event| event.map(drop))?;
        }
        parse.push(began.elapsed().as_secs_f64() * 1e3);

        let us = |call: &dyn Fn() -> bool| -> anyhow::Result<f64> {
            let each = machine::per_call(bench.count(1000, 100_000), || {
                ensure!(std::hint::black_box(call()));
                Ok(())
            })?;
            Ok(each * 1e6)
        };
        yes.push(us(&|| matches!(set.decide(&admitted, &group), Decision::Allowed { .. }))?);
        no.push(us(&|| set.decide(&refused, &group) == Decision::Refused)?);
        let (there, absent) = (role(last), role(size + 1));
        hit.push(us(&|| roles.contains_key(std::hint::black_box(&there)))?);
        miss.push(us(&|| !roles.contains_key(std::hint::black_box(&absent)))?);
    }
    let lookup = "a lookup in a HashMap of as many roles";
    let mut compile =
        Figure::new(format!("compiling {size} policies"), "ms", compile, ("a HashMap of as many roles", map));
    if size == 10_000 {
        compile = compile.goal("with the recheck of 10,000 below: 100 ms");
    }
    Ok(vec![
        Figure::new(format!("decision among {size} policies: allowed"), "us", yes, (lookup, hit)).goal("2 us, flat"),
        Figure::new(format!("decision among {size} policies: refused"), "us", no, (lookup, miss)).goal("2 us, flat"),
        compile,
        Figure::new(
            format!("reading {size} policies from YAML"),
            "ms",
            read,
            ("the YAML parser's events alone", parse),
        ),
    ])
}

fn role(number: usize) -> String {
    format!("role-{number}")
}

/// From the rename of a manifest to the word that the one agent gets whom it concerns, with nobody else there and among many; and to the
/// word that all get.
async fn recheck(bench: &Bench, started: Instant) -> anyhow::Result<Vec<Figure>> {
    let world = World::start().await?;
    let plane = Plane::start(bench, &world).await?;
    let crowd = Crowd::new(&plane.target(), world.cheap(), world.whereto())?;
    let size = bench.count(200, 10_000);
    // Whoever isn't among the others comes by a policy of its own.
    let instances = Crowd::new(&plane.target(), world.ec2_document(), world.whereto())?;
    let (mut alone, mut among, mut all, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut decisions, mut messages) = (Vec::new(), Vec::new());
    for _ in 0..bench.repeat {
        plane.write_manifest("policy.yaml", &world.policy_for_jwts())?;
        bench.say(started, "a policy changes that concerns the only one");
        alone.push(one_is_withdrawn(&world, &plane, &instances).await?);
        // It may not have been read yet.
        drop(admitted(&crowd).await?);
        bench.say(started, &format!("{size} agents join"));
        let joins = crowd.join_all(crowd.newcomers(size)?, LINES).await?;
        let members = crowd.stay(joins.joined, Habits { come_back: false, ..Habits::default() });
        members.until(CONNECTED_WITHIN, |status| status.connected && status.boots > 0).await?;
        bench.say(started, "a policy changes that concerns one of them");
        among.push(one_is_withdrawn(&world, &plane, &instances).await?);
        bench.say(started, "nobody is admitted any more");
        let (before, began) = (plane.cpu_time()?, Instant::now());
        std::fs::remove_file(plane.directory().join(MANIFESTS).join("policy.yaml"))?;
        all.push(told(&members, began).await?);
        cpu.push((plane.cpu_time()? - before).as_secs_f64() * 1e3 / size as f64);
        decisions.push(decisions_alone(size)?);
        messages.push(floor::message(size, WORD)? * 1e3);
    }
    let difference = |pair: (&f64, &f64)| (pair.0 - pair.1).max(0.0);
    let added: Vec<f64> = among.iter().zip(&alone).map(difference).collect();
    let name = |what: &str| format!("recheck of {size} sessions: {what}");
    let withdrawn = |what: &str| format!("{size} sessions withdrawn, durably: {what}");
    let written = messages.iter().map(|each| each * size as f64).collect();
    Ok(vec![
        Figure::new(name("change to the one concerned"), "ms", among, ("the same with no other session", alone)),
        Figure::new(name("what they add"), "ms", added, ("that many decisions alone", decisions))
            .goal("with compiling 10,000 policies: 100 ms"),
        Figure::new(withdrawn("all told"), "ms", all, ("that many messages, encrypted and written", written)),
        Figure::new(withdrawn("plane's CPU each"), "ms", cpu, ("a message, encrypted and written", messages)),
    ])
}

/// About what is said to one that isn't admitted any more, in bytes.
const WORD: usize = 200;

/// In milliseconds.
fn decisions_alone(count: usize) -> anyhow::Result<f64> {
    let (set, group) = (PolicySet::compile(policies(10)?.0), group()?);
    let identity = instance(100_000_000_000, 9)?;
    let each = machine::per_call(count, || {
        ensure!(matches!(set.decide(&identity, &group), Decision::Allowed { .. }));
        Ok(())
    })?;
    Ok(each * count as f64 * 1e3)
}

/// In milliseconds.
async fn told(members: &Members, since: Instant) -> anyhow::Result<f64> {
    members.until(TOLD_WITHIN, |status| status.ended.is_some()).await?;
    Ok(since.elapsed().as_secs_f64() * 1e3)
}

/// An EC2 instance, which the policy of all others doesn't admit, joins by one that is then taken away. Milliseconds until it knows.
async fn one_is_withdrawn(world: &World, plane: &Plane, instances: &Crowd) -> anyhow::Result<f64> {
    plane.write_manifest("one.yaml", &world.policy_for_instances())?;
    let joined = admitted(instances).await?;
    let member = instances.stay(joined, Habits { come_back: false, ..Habits::default() });
    member.until(CONNECTED_WITHIN, |status| status.connected && status.boots > 0).await?;
    let began = Instant::now();
    std::fs::remove_file(plane.directory().join(MANIFESTS).join("one.yaml"))?;
    told(&member, began).await
}

/// The plane may not have read the policy yet.
async fn admitted(crowd: &Crowd) -> anyhow::Result<Vec<crate::crowd::Joined>> {
    let began = Instant::now();
    loop {
        let joins = crowd.join(crowd.newcomers(1)?, 1).await;
        if joins.failures.is_empty() {
            return Ok(joins.joined);
        }
        ensure!(began.elapsed() < TOLD_WITHIN, "not admitted: {:?}", joins.failures);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
