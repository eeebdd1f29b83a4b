//! Waiting for something to become true: bounded, and with the last thing that was seen when it doesn't.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// Between two looks: as long as a look takes, so that looking leaves half of a processor to what is looked at.
const PAUSE: RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_millis(100);

/// Looks again and again until there is a value. An error of `look` is what was seen instead.
pub fn until<T>(what: &str, within: Duration, mut look: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let started = Instant::now();
    loop {
        let began = Instant::now();
        match look() {
            Ok(value) => return Ok(value),
            Err(seen) if started.elapsed() >= within => {
                anyhow::bail!("{what}: not within {within:?}; last seen: {seen:#}");
            }
            Err(_) => std::thread::park_timeout(began.elapsed().clamp(*PAUSE.start(), *PAUSE.end())),
        }
    }
}

/// The opposite: holds for all of `during`.
pub fn always(what: &str, during: Duration, mut look: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let started = Instant::now();
    while started.elapsed() < during {
        look().map_err(|error| error.context(format!("{what}: not for all of {during:?}")))?;
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(())
}
