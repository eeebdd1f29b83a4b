//! How long to wait before the next try.

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use std::time::Duration;

/// Exponential with full jitter above the first interval, for ever.
#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    current: ExponentialBackoff,
    longest: Duration,
}

impl Backoff {
    pub fn new(first: Duration, longest: Duration) -> Self {
        let builder = ExponentialBuilder::new()
            .with_min_delay(first)
            .with_max_delay(longest)
            .with_factor(2.0)
            .with_jitter()
            .without_max_times();
        Self { builder, current: builder.build(), longest }
    }

    pub fn next_delay(&mut self) -> Duration {
        self.current.next().unwrap_or(self.longest)
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.current = self.builder.build();
    }
}

/// What a server asked for, plus up to half of it, so that those who were sent away together don't come back together.
pub fn with_jitter(asked: Duration) -> Duration {
    asked.mul_f64(1.0 + rand::random::<f64>() / 2.0)
}
