//! Waiting for something to become true: bounded, and with the last thing that was seen when it doesn't.

use anyhow::ensure;
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// Between two looks: as long as a look takes, so that looking leaves half of a processor to what is looked at.
const PAUSE: RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_millis(100);
/// Within which a change decides.
const EFFECTIVE: Duration = Duration::from_secs(1);
/// A machine that has other things to do gets so many times what it needs for next to nothing.
const ALLOWANCE: u32 = 15;

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

/// A change had its effect as soon as is promised, but for how busy this machine is, which `next_to_nothing` is run to find out.
pub fn was_prompt(
    what: &str,
    took: Duration,
    next_to_nothing: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let asked = Instant::now();
    next_to_nothing()?;
    let most = EFFECTIVE + ALLOWANCE * asked.elapsed();
    ensure!(took < most, "{what} took {took:?}, and should have taken {most:?} at most on a machine as busy as this");
    Ok(())
}
