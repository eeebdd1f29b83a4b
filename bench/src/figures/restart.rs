//! The plane killed, and started again under its agents.

use super::Bench;
use crate::crowd::{Crowd, Habits};
use crate::floor::Tls;
use crate::plane::{Plane, World};
use crate::table::Figure;
use std::time::{Duration, Instant};

const LINES: usize = 32;
const CONNECTED_WITHIN: Duration = Duration::from_secs(180);
const BACK_WITHIN: Duration = Duration::from_secs(120);

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let started = Instant::now();
    let world = World::start().await?;
    let size = bench.count(200, 10_000);
    let tls = Tls::new(world.tls())?;
    let handshakes: Vec<f64> = (0..bench.repeat)
        .map(|_| Ok(tls.server_seconds(bench.count(20, 500))? * size as f64))
        .collect::<anyhow::Result<_>>()?;

    let mut plane = Plane::start(bench, &world).await?;
    let crowd = Crowd::new(&plane.target(), world.cheap(), world.whereto())?;
    bench.say(started, &format!("{size} agents join"));
    let joins = crowd.join_all(crowd.newcomers(size)?, LINES).await?;
    let members = crowd.stay(joins.joined, Habits::default());
    members.until(CONNECTED_WITHIN, |status| status.connected && status.boots > 0).await?;

    let (mut back, mut half, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    let (mut peak, mut steady) = (Vec::new(), Vec::new());
    let (mut lost, mut registered) = (Vec::new(), Vec::new());
    for turn in 1..=bench.repeat {
        bench.say(started, &format!("SIGKILL under {size} agents"));
        steady.push(plane.memory()?.resident as f64 / 1024.0 / 1024.0);
        let before = plane.metric("onboarding_registry_registrations").await?;
        let killed = Instant::now();
        plane.kill_and_start()?;
        members.until(BACK_WITHIN, |status| status.connected && status.sessions > turn).await?;
        let mut times: Vec<f64> = members
            .statuses()
            .filter_map(|status| Some(status.since?.saturating_duration_since(killed).as_secs_f64()))
            .collect();
        times.sort_by(f64::total_cmp);
        back.extend(times.last());
        half.extend(times.get(times.len() / 2));
        cpu.push(plane.cpu_time()?.as_secs_f64());
        peak.push(plane.peak_memory()? as f64 / 1024.0 / 1024.0);
        let again = members.statuses().map(|status| status.authorized_again).sum::<usize>();
        let missing = before - plane.metric("onboarding_registry_registrations").await?;
        lost.push(missing.max(0.0) + again as f64);
        registered.push(before);
    }
    let name = |what: &str| format!("{size} agents after SIGKILL: {what}");
    let half_of_them = handshakes.iter().map(|all| all / 2.0).collect();
    Ok(vec![
        Figure::new(name("all back"), "s", back, ("their handshakes alone, one core", handshakes.clone()))
            .goal("10 s on 2 cores"),
        Figure::new(name("half back"), "s", half, ("their handshakes alone, one core", half_of_them)),
        Figure::new(name("plane's CPU"), "s", cpu, ("their handshakes alone", handshakes)),
        Figure::new(name("peak memory"), "MiB", peak, ("before, all connected", steady)).goal("flat"),
        Figure::new(name("lost"), "agents", lost, ("registered before", registered)).goal("none"),
    ])
}
