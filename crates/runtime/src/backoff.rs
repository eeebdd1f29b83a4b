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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(30);

    #[test]
    fn waits_grow_apart_to_a_longest_one_and_begin_anew_after_a_success() {
        let mut series: Vec<_> = (0..100).map(|_| Backoff::new(FIRST, LONGEST)).collect();
        // Doubled each time, up to the longest; and a part of that, drawn, on top of it.
        for doubled in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300].map(|factor| FIRST * factor) {
            let drawn: BTreeSet<_> = series.iter_mut().map(Backoff::next_delay).collect();
            assert!(drawn.iter().all(|delay| (doubled..=doubled * 2).contains(delay)), "{doubled:?}: {drawn:?}");
            assert!(drawn.len() > 90 && drawn.last().unwrap() > &(doubled * 3 / 2), "{doubled:?}: {drawn:?}");
        }
        // For ever.
        let mut one = series.remove(0);
        assert!((0..10_000).all(|_| one.next_delay() >= LONGEST));
        one.reset();
        assert!(one.next_delay() <= FIRST * 2);
    }

    #[test]
    fn those_who_were_sent_away_together_come_back_apart() {
        let asked = Duration::from_secs(10);
        let drawn: BTreeSet<Duration> = (0..100).map(|_| with_jitter(asked)).collect();
        assert!(drawn.iter().all(|delay| (asked..=asked * 3 / 2).contains(delay)), "{drawn:?}");
        assert!(drawn.len() > 90, "{drawn:?}");
        // Over all of the half, and not just beside what was asked.
        assert!(drawn.first().unwrap() < &(asked * 5 / 4) && drawn.last().unwrap() > &(asked * 5 / 4), "{drawn:?}");
        assert_eq!(with_jitter(Duration::ZERO), Duration::ZERO);
    }
}
