//! What waits to be written, a batch at a time, for a thread that writes: one sync of the disk, one waking up, for many who wait.

use std::thread;
use tokio::sync::mpsc::Receiver;

/// Waits for one, and takes at most `most` that are there with it; `None` when there are none and nobody is left to send any.
/// Blocks its thread.
pub fn blocking_next<T>(queue: &mut Receiver<T>, most: usize) -> Option<Vec<T>> {
    let mut batch = vec![queue.blocking_recv()?];
    // Whoever is about to send more goes first, where they share a processor with this thread: at 32 joins at once on one core this halves
    // the commits. Where nobody else has anything to do, it is no time at all.
    thread::yield_now();
    while batch.len() < most
        && let Ok(next) = queue.try_recv()
    {
        batch.push(next);
    }
    Some(batch)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    #[test]
    fn all_come_in_their_order_and_never_too_many_at_once() {
        let (sender, mut queue) = mpsc::channel(10);
        for number in 0..10 {
            sender.try_send(number).unwrap();
        }
        drop(sender);
        let batches: Vec<_> = std::iter::from_fn(|| blocking_next(&mut queue, 4)).collect();
        assert_eq!(batches, [vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8, 9]]);
    }
}
