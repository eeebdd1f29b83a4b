//! A snapshot of the standalone mesh on its way to the agents: one registration of many changes, and every agent has to know.

use super::Bench;
use crate::crowd::{Crowd, Habits, Members};
use crate::floor;
use crate::plane::{GROUP, NAMESPACE, Plane, World};
use crate::table::{Figure, median};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How many agents join at a time before anything is measured.
const LINES: usize = 32;
/// Each of them is sent all of the others: a hundred times as much for ten times as many.
const CONNECTED_WITHIN: Duration = Duration::from_secs(600);
const KNOWN_WITHIN: Duration = Duration::from_secs(60);
/// In which nothing changes, before the next change is measured.
const STILL_FOR: Duration = Duration::from_millis(500);
const MIB: f64 = 1024.0 * 1024.0;

/// Every agent's egress leads to the service that all of them are behind.
fn service() -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {GROUP}, namespace: {NAMESPACE}}}\nspec:\n  selector: {{app: {GROUP}}}\n  ports:\n  - {{name: http, port: 8080}}\n"
    )
}

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let (world, started) = (World::start().await?, Instant::now());
    for size in [bench.count(20, 1000), bench.count(100, 10_000)] {
        let mut samples = Samples::default();
        for _ in 0..bench.repeat {
            samples.measure(bench, started, &world, size).await?;
        }
        figures.extend(samples.figures(size));
    }
    Ok(figures)
}

/// Of one number of registrations: a sample for each mesh that was made of them.
#[derive(Default)]
struct Samples {
    /// Seconds until all had the whole configuration, and of the library and the kernel for as much.
    first: Vec<f64>,
    first_floor: Vec<f64>,
    /// MiB of the plane.
    peak: Vec<f64>,
    steady: Vec<f64>,
    /// Bytes to each agent.
    change: Vec<f64>,
    whole: Vec<f64>,
    /// Milliseconds until all had the change.
    known: Vec<f64>,
    known_floor: Vec<f64>,
    /// Microseconds of CPU for each agent.
    cpu: Vec<f64>,
    cpu_floor: Vec<f64>,
}

impl Samples {
    async fn measure(&mut self, bench: &Bench, started: Instant, world: &World, size: usize) -> anyhow::Result<()> {
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
        self.first.push(opened.elapsed().as_secs_f64());
        bench.say(started, "every agent has its first configuration");
        still(&members).await;
        self.peak.push(plane.peak_memory()? as f64 / MIB);
        self.steady.push(plane.memory()?.resident as f64 / MIB);

        let boots: HashMap<String, usize> =
            members.statuses().map(|status| (status.registration, status.boots)).collect();
        let newcomer = crowd.newcomers(1)?;
        let (before, began) = (plane.cpu_time()?, Instant::now());
        let one = crowd.join_all(newcomer, 1).await?;
        let has_it = |registration: &str, now: usize| boots.get(registration).is_none_or(|before| now > *before);
        members.until(KNOWN_WITHIN, |status| has_it(&status.registration, status.boots)).await?;
        let known = began.elapsed().as_secs_f64() * 1e3;
        still(&members).await;
        self.known.push(known);
        self.cpu.push((plane.cpu_time()? - before).as_secs_f64() * 1e6 / size as f64);
        let change = median(&members.statuses().map(|status| status.boot_size as f64).collect::<Vec<_>>());
        let change = change.unwrap_or_default();
        bench.say(started, &format!("one more: every agent has it after {known:.0} ms"));

        // What one is sent that comes with nothing.
        let last = crowd.stay(one.joined, habits);
        last.until(KNOWN_WITHIN, |status| status.boots > 0).await?;
        let whole = last.statuses().map(|status| status.boot_size as f64).sum();
        self.change.push(change);
        self.whole.push(whole);
        self.first_floor.push(floor::message(size, whole as usize)? * size as f64);
        let each = floor::message(size, change as usize)?;
        self.known_floor.push(each * size as f64 * 1e3);
        self.cpu_floor.push(each * 1e6);
        Ok(())
    }

    fn figures(self, size: usize) -> Vec<Figure> {
        let name = |what: &str| format!("mesh, {size} registrations{what}");
        let written = "that many messages, encrypted and written, one core";
        vec![
            Figure::new(name(": until all have the whole"), "s", self.first, (written, self.first_floor)),
            Figure::new(name(": peak memory meanwhile"), "MiB", self.peak, ("afterwards", self.steady)),
            Figure::new(name(", one more: bytes to each"), "bytes", self.change, ("the whole", self.whole))
                .goal("as the change, not as the mesh"),
            Figure::new(name(", one more: until all have it"), "ms", self.known, (written, self.known_floor))
                .goal("100 ms are waited for more"),
            Figure::new(
                name(", one more: plane's CPU for each"),
                "us",
                self.cpu,
                ("a message, encrypted and written", self.cpu_floor),
            ),
        ]
    }
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
