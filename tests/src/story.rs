//! What the demo tells: steps, and the facts in them.

use crate::until::until;
use crate::vm::Vm;
use crate::world::World;
use anyhow::{Context, ensure};
use onboarding_testkit::application::Answer;
use std::time::{Duration, Instant};

/// Prints the steps, each with its number and when it was done.
pub struct Story {
    started: Instant,
    step: usize,
}

impl Story {
    pub fn start() -> Self {
        Self { started: Instant::now(), step: 0 }
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn tell(&mut self, what: impl std::fmt::Display) {
        self.step += 1;
        println!("{:>5.1} s  {:>2}. {what}", self.started.elapsed().as_secs_f64(), self.step);
    }
}

/// What the plane holds of a VM: the registration's name, and the identity that was proven, fact by fact.
pub fn proven(world: &World, vm: &Vm) -> anyhow::Result<String> {
    fn facts(path: &str, value: &serde_json::Value, into: &mut Vec<String>) {
        match value.as_object() {
            Some(members) => members.iter().for_each(|(name, value)| facts(&format!("{path}.{name}"), value, into)),
            None => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                into.push(format!("{}={text}", path.trim_start_matches('.')));
            }
        }
    }
    let wars = world.registrations()?;
    let war = wars.iter().find(|war| war["metadata"]["name"] == vm.registration().as_str());
    let war = war.with_context(|| format!("{} isn't registered: {wars:?}", vm.registration()))?;
    let mut all = Vec::new();
    facts("", &war["spec"]["identity"], &mut all);
    Ok(format!("{} (proven: {})", vm.registration(), all.join(", ")))
}

/// The reason in an agent's log line, without its time and the rest.
pub fn because(line: &str) -> String {
    let Some((_, quoted)) = line.split_once("why=\"") else {
        return line.split_once(" WARN ").map_or(line, |(_, rest)| rest).trim().to_owned();
    };
    let mut reason = String::new();
    let mut characters = quoted.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            '\\' => reason.extend(characters.next()),
            other => reason.push(other),
        }
    }
    reason
}

/// How many requests its application has answered.
pub fn count(vm: &Vm) -> anyhow::Result<u64> {
    Ok(vm.curl(&["http://127.0.0.1:8080/count"])?.trim().parse()?)
}

/// Until the mesh knows of the peer, an egress listener answers 503; the time is that of the call that was answered.
pub fn first_answer(vm: &Vm, url: &str, arguments: &[&str]) -> anyhow::Result<(Answer, u128)> {
    until(&format!("{} gets an answer of {url}", vm.name()), Duration::from_secs(10), || {
        let started = Instant::now();
        Ok((vm.get_with(url, arguments)?, started.elapsed().as_millis()))
    })
}

/// Who the sidecars proved to be to each other.
pub fn over_mutual_tls(answer: &Answer, application: &str) -> anyhow::Result<(String, String)> {
    ensure!(answer.application == application, "{answer:?}");
    let caller = answer.caller.clone().with_context(|| format!("no certificate of a caller: {answer:?}"))?;
    let server = answer.server.clone().with_context(|| format!("no certificate of the server: {answer:?}"))?;
    ensure!(caller == "spiffe://cluster.local/ns/bookinfo/sa/productpage-vm", "the caller is {caller}");
    ensure!(server == "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm", "the server is {server}");
    Ok((caller, server))
}
