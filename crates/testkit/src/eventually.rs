//! Waiting for a value: bounded, paced in one place, and with the last thing that was seen when it doesn't come.

use std::fmt::Debug;
use std::time::Duration;
use tokio::time::Instant;

/// Between two looks: what is waited for is another task's or process's, and says nothing by itself.
const PACE: Duration = Duration::from_millis(10);

/// Looks until there is a value; an error of `look` is what was seen instead.
///
/// # Panics
/// Not within `within`: with `what` was waited for, and what was seen last.
pub async fn eventually<T, E: Debug>(what: &str, within: Duration, mut look: impl AsyncFnMut() -> Result<T, E>) -> T {
    let deadline = Instant::now() + within;
    loop {
        match look().await {
            Ok(value) => return value,
            #[allow(clippy::panic, reason = "for tests")]
            Err(seen) if Instant::now() >= deadline => panic!("{what}: not within {within:?}; last seen: {seen:#?}"),
            Err(_) => tokio::time::sleep(PACE).await,
        }
    }
}
