//! Large messages on their way to agents: so many bytes of them at a time, however many agents come at once.
//!
//! A message is held whole until its agent has taken it, part by part. Ten thousand agents of a mesh with ten thousand endpoints, each with a
//! configuration of its own in memory, are more than any machine has.

use onboarding_wire::onboarding as pb;
use onboarding_wire::parts::{LARGEST_PART, Parts};
use prost::Message;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tonic::Status;

const UNIT: usize = 1024;
/// How long an agent may take until it has room for the next message.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// And for a large one a second more for so many of its bytes.
const THIN_LINE: usize = 64 * 1024;

/// Room for large messages, shared by all sessions.
#[derive(Clone)]
pub(crate) struct Room {
    free: Arc<Semaphore>,
    units: u32,
}

/// A message, and who learns that its agent has taken it.
pub(crate) struct Sent {
    message: Box<pb::PlaneMessage>,
    taken: Option<oneshot::Sender<()>>,
}

/// A large message that its agent takes at its own pace. With this value its room is free again.
pub(crate) struct Delivery {
    _place: OwnedSemaphorePermit,
    taken: oneshot::Receiver<()>,
    until: Instant,
}

/// Room that a message has waited for.
pub(crate) struct Place {
    permit: OwnedSemaphorePermit,
    size: usize,
}

impl Room {
    /// For so many bytes; what is larger than that goes alone.
    pub(crate) fn new(bytes: usize) -> Self {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).max(1);
        Self { free: Arc::new(Semaphore::new(units as usize)), units }
    }

    /// Waits until there is room for it; `None`: it needs none.
    pub(crate) async fn wait(self, message: &impl Message) -> Option<Place> {
        let size = message.encoded_len();
        if size <= LARGEST_PART {
            return None;
        }
        let units = u32::try_from(size.div_ceil(UNIT)).unwrap_or(u32::MAX).min(self.units);
        // It is never closed.
        let permit = self.free.acquire_many_owned(units).await.ok()?;
        Some(Place { permit, size })
    }
}

impl Sent {
    pub(crate) fn new(message: pb::plane_message::Message, place: Option<Place>) -> (Self, Option<Box<Delivery>>) {
        let message = Box::new(pb::PlaneMessage { message: Some(message) });
        let Some(Place { permit, size }) = place else { return (Self { message, taken: None }, None) };
        let (taken, is_taken) = oneshot::channel();
        let thin_line = Duration::from_secs((size / THIN_LINE) as u64);
        let until = Instant::now() + PATIENCE + thin_line;
        let delivery = Delivery { _place: permit, taken: is_taken, until };
        (Self { message, taken: Some(taken) }, Some(Box::new(delivery)))
    }
}

/// What a connection sends. It asks for the next part when it has sent those before, but for what its own buffers hold.
pub(crate) fn stream(
    sent: mpsc::Receiver<Sent>,
) -> impl futures_util::Stream<Item = Result<pb::PlaneMessage, Status>> + Send {
    let nothing = (None, None);
    futures_util::stream::unfold((sent, nothing), |(mut sent, (mut parts, mut taken))| async move {
        loop {
            if let Some(part) = parts.as_mut().and_then(Parts::next) {
                return Some((Ok(part), (sent, (parts, taken))));
            }
            drop((parts, taken));
            let next = sent.recv().await?;
            (parts, taken) = (Some(Parts::of(*next.message)), next.taken);
        }
    })
}

impl Delivery {
    /// Whether the agent took it in time; never returns where nothing is on its way.
    pub(crate) async fn ends(delivery: &mut Option<Box<Self>>) -> bool {
        match delivery {
            // A connection that ended takes nothing more either.
            Some(delivery) => tokio::time::timeout_at(delivery.until, &mut delivery.taken).await.is_ok(),
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test states what must be true")]

    use super::*;
    use futures_util::{FutureExt, StreamExt, pin_mut};

    fn boot(size: usize) -> pb::BootConfiguration {
        pb::BootConfiguration { version: "x".repeat(size), ..Default::default() }
    }

    fn sent(boot: pb::BootConfiguration, place: Option<Place>) -> (Sent, Option<Box<Delivery>>) {
        Sent::new(pb::plane_message::Message::Boot(boot), place)
    }

    #[tokio::test(start_paused = true)]
    async fn large_messages_wait_for_each_other_and_small_ones_for_nobody() {
        let room = Room::new(100 * UNIT);
        let large = boot(80 * UNIT);
        let (message, mut delivery) = sent(large.clone(), room.clone().wait(&large).await);
        let next = room.clone().wait(&large);
        pin_mut!(next);
        assert!(next.as_mut().now_or_never().is_none());
        assert!(room.clone().wait(&boot(100)).await.is_none());

        let (outgoing, incoming) = mpsc::channel(1);
        let messages = stream(incoming);
        pin_mut!(messages);
        outgoing.send(message).await.ok().unwrap();
        for _ in 0..=80 * UNIT / LARGEST_PART {
            messages.next().await.unwrap().unwrap();
            assert!(Delivery::ends(&mut delivery).now_or_never().is_none(), "the last part was only handed over");
        }
        assert!(messages.next().now_or_never().is_none());
        assert!(Delivery::ends(&mut delivery).await, "the connection asks for more");
        drop(delivery);
        assert!(next.await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_larger_than_all_room_goes_alone() {
        let room = Room::new(64 * UNIT);
        let place = room.clone().wait(&boot(200 * UNIT)).await;
        assert_eq!((place.is_some(), room.free.available_permits()), (true, 0));
        drop(place);
        assert_eq!(room.free.available_permits(), 64);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_takes_nothing_is_given_up() {
        let room = Room::new(100 * UNIT);
        let large = boot(80 * UNIT);
        let (_message, mut delivery) = sent(large.clone(), room.wait(&large).await);
        let began = Instant::now();
        assert!(!Delivery::ends(&mut delivery).await);
        assert_eq!(began.elapsed().as_secs(), PATIENCE.as_secs() + 1);
    }
}
