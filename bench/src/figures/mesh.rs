//! A snapshot of the standalone mesh on its way to the agents: one registration of many changes, and every agent has to know.

use super::Bench;
use crate::crowd::{Crowd, Habits, Members};
use crate::machine;
use crate::plane::{GROUP, NAMESPACE, Plane, World};
use crate::table::{Figure, median};
use anyhow::ensure;
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How many agents join at a time before anything is measured.
const LINES: usize = 32;
/// Each of them is sent all of the others: a hundred times as much for ten times as many.
const CONNECTED_WITHIN: Duration = Duration::from_secs(600);
const KNOWN_WITHIN: Duration = Duration::from_secs(60);
/// In which nothing changes, before the next change is measured.
const MIB: f64 = 1024.0 * 1024.0;
const STILL_FOR: Duration = Duration::from_millis(500);

/// Every agent's egress leads to the service that all of them are behind.
fn service() -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {GROUP}, namespace: {NAMESPACE}}}\nspec:\n  selector: {{app: {GROUP}}}\n  ports:\n  - {{name: http, port: 8080}}\n"
    )
}

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let world = World::start().await?;
    for size in [bench.count(20, 1000), bench.count(100, 10_000)] {
        figures.extend(one_changes(bench, &world, size).await?);
    }
    Ok(figures)
}

async fn one_changes(bench: &Bench, world: &World, size: usize) -> anyhow::Result<Vec<Figure>> {
    let started = Instant::now();
    let plane = Plane::start(bench, world).await?;
    plane.write_manifest("service.yaml", &service())?;
    let crowd = Crowd::new(&plane.target(), world.cheap(), world.whereto())?;
    bench.say(started, &format!("{size} agents join"));
    let joins = crowd.join_all(crowd.newcomers(size)?, LINES).await?;
    bench.say(started, "their sessions open");
    let habits = Habits { report_health: false, ..Habits::default() };
    let opened = Instant::now();
    let members = crowd.stay(joins.joined, habits.clone());
    members.until(CONNECTED_WITHIN, |status| status.connected && status.boots > 0).await?;
    let first = opened.elapsed().as_secs_f64();
    bench.say(started, "every agent has its first configuration");
    still(&members).await;
    let (peak, steady) = (plane.peak_memory()? as f64 / MIB, plane.memory()?.resident as f64 / MIB);

    let (mut bytes, mut seconds, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..bench.repeat.max(3) {
        let known: HashMap<String, usize> =
            members.statuses().map(|status| (status.registration, status.boots)).collect();
        let newcomer = crowd.newcomers(1)?;
        let (before, began) = (plane.cpu_time()?, Instant::now());
        let one = crowd.join(newcomer, 1).await;
        ensure!(one.failures.is_empty(), "the one more agent could not join: {:?}", one.failures);
        let has_it = |registration: &str, boots: usize| known.get(registration).is_none_or(|known| boots > *known);
        members.until(KNOWN_WITHIN, |status| has_it(&status.registration, status.boots)).await?;
        seconds.push(began.elapsed().as_secs_f64() * 1e3);
        still(&members).await;
        cpu.push((plane.cpu_time()? - before).as_secs_f64() * 1e6 / size as f64);
        let sizes: Vec<f64> = members.statuses().map(|status| status.boot_size as f64).collect();
        bytes.push(median(&sizes).unwrap_or_default());
        bench.say(started, &format!("change {}: every agent has it after {:.0} ms", turn + 1, seconds[turn]));
    }
    let whole = whole(&crowd, &habits).await?;
    let message = bytes.first().copied().unwrap_or_default() as usize;
    let floor = writes(size, message)?;
    Ok(vec![
        Figure::new(format!("mesh, {size} registrations: until all have the whole configuration"), "s", vec![first]),
        Figure::new(format!("mesh, {size} registrations: peak memory of the plane meanwhile"), "MiB", vec![peak])
            .against("afterwards", vec![steady]),
        Figure::new(format!("mesh, {size} registrations, one more: bytes to each agent"), "bytes", bytes)
            .against("the whole configuration", vec![whole])
            .goal("as the change, not as the mesh"),
        Figure::new(format!("mesh, {size} registrations, one more: until all have it"), "ms", seconds)
            .against("that many records of TLS, encrypted and written", floor)
            .goal("100 ms are waited for more"),
        Figure::new(format!("mesh, {size} registrations, one more: CPU of the plane for each"), "us", cpu),
    ])
}

/// What one that comes with nothing is sent, in bytes.
async fn whole(crowd: &Crowd, habits: &Habits) -> anyhow::Result<f64> {
    let last = crowd.join(crowd.newcomers(1)?, 1).await;
    let last = crowd.stay(last.joined, habits.clone());
    last.until(KNOWN_WITHIN, |status| status.boots > 0).await?;
    Ok(last.statuses().map(|status| status.boot_size as f64).sum())
}

/// Until no configuration came for a while.
async fn still(members: &Members) {
    let boots = || members.statuses().map(|status| status.boots).sum::<usize>();
    let mut seen = boots();
    loop {
        tokio::time::sleep(STILL_FOR).await;
        let now = boots();
        if std::mem::replace(&mut seen, now) == now {
            return;
        }
    }
}

/// Milliseconds of what the library and the kernel need for `count` messages of this size: AES-256-GCM, and a write to a loopback socket.
fn writes(count: usize, size: usize) -> anyhow::Result<Vec<f64>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut to = TcpStream::connect(listener.local_addr()?)?;
    to.set_nodelay(true)?;
    let (mut from, _) = listener.accept()?;
    let reader = std::thread::spawn(move || {
        let mut block = vec![0; 64 * 1024];
        while from.read(&mut block).is_ok_and(|read| read > 0) {}
    });
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32])?);
    let mut record = vec![7; size];
    let each = machine::per_call(count, || {
        let tag = key.seal_in_place_separate_tag(Nonce::assume_unique_for_key([7; 12]), Aad::empty(), &mut record)?;
        record[..tag.as_ref().len().min(size)].fill(7);
        to.write_all(&record)?;
        Ok(())
    })?;
    drop(to);
    // It ends with the socket.
    let _ = reader.join();
    Ok(vec![each * count as f64 * 1e3])
}
