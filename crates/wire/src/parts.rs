//! What the plane says in a session, in parts where it is large.
//!
//! A gRPC stream keeps the buffer that its largest message grew, for as long as it lives: ten thousand sessions whose agents each got a
//! configuration of a megabyte would keep ten gigabytes, on both sides.

use crate::onboarding::plane_message::Message as Said;
use crate::onboarding::{Part, PlaneMessage};
use bytes::{Bytes, BytesMut};
use prost::Message;
use tonic::{Status, Streaming};

/// What is larger is sent in parts of this many bytes.
pub const LARGEST_PART: usize = 8 * 1024;
/// What an agent takes in all: a complete boot configuration of a large mesh.
pub const LARGEST_MESSAGE: usize = 64 * 1024 * 1024;

/// One message after the other, as they are sent.
#[derive(Debug)]
pub struct Parts {
    whole: Option<PlaneMessage>,
    rest: Bytes,
}

impl Parts {
    pub fn of(message: PlaneMessage) -> Self {
        if message.encoded_len() <= LARGEST_PART {
            return Self { whole: Some(message), rest: Bytes::new() };
        }
        Self { whole: None, rest: message.encode_to_vec().into() }
    }
}

impl Iterator for Parts {
    type Item = PlaneMessage;

    fn next(&mut self) -> Option<PlaneMessage> {
        if self.whole.is_some() {
            return self.whole.take();
        }
        if self.rest.is_empty() {
            return None;
        }
        let data = self.rest.split_to(self.rest.len().min(LARGEST_PART));
        let part = Part { data, remaining: self.rest.len() as u64 };
        Some(PlaneMessage { message: Some(Said::Part(part)) })
    }
}

/// The whole messages of a session.
#[derive(Debug)]
pub struct Incoming {
    parts: Streaming<PlaneMessage>,
    joined: Joined,
}

impl Incoming {
    pub fn new(parts: Streaming<PlaneMessage>) -> Self {
        Self { parts, joined: Joined::default() }
    }

    /// May be given up and called again.
    ///
    /// # Errors
    /// The connection broke, or what came are no parts of one message.
    pub async fn message(&mut self) -> Result<Option<PlaneMessage>, Status> {
        while let Some(message) = self.parts.message().await? {
            if let Some(whole) = self.joined.add(message)? {
                return Ok(Some(whole));
            }
        }
        Ok(None)
    }
}

#[derive(Debug, Default)]
struct Joined {
    data: BytesMut,
    /// As the last part said.
    remaining: u64,
}

impl Joined {
    fn add(&mut self, message: PlaneMessage) -> Result<Option<PlaneMessage>, Status> {
        let Some(Said::Part(Part { data, remaining })) = message.message else {
            return match self.data.is_empty() {
                true => Ok(Some(message)),
                false => Err(Status::data_loss("another message came between the parts of one")),
            };
        };
        let follows = self.data.is_empty() || self.remaining == remaining.saturating_add(data.len() as u64);
        if data.is_empty() || !follows {
            return Err(Status::data_loss("a part doesn't continue the ones before it"));
        }
        if remaining.saturating_add((self.data.len() + data.len()) as u64) > LARGEST_MESSAGE as u64 {
            return Err(Status::out_of_range(format!("a message is larger than {LARGEST_MESSAGE} bytes")));
        }
        self.data.extend_from_slice(&data);
        self.remaining = remaining;
        if remaining > 0 {
            return Ok(None);
        }
        let whole = PlaneMessage::decode(std::mem::take(&mut self.data).freeze())
            .map_err(|error| Status::data_loss(format!("the parts are no message: {error}")))?;
        match whole.message {
            Some(Said::Part(_)) => Err(Status::data_loss("the parts are a part")),
            _ => Ok(Some(whole)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test states what must be true")]

    use super::*;
    use crate::onboarding::{BootConfiguration, SessionEnd};

    fn boot(size: usize) -> PlaneMessage {
        PlaneMessage {
            message: Some(Said::Boot(BootConfiguration { version: "x".repeat(size), ..Default::default() })),
        }
    }

    fn part(data: &[u8], remaining: u64) -> PlaneMessage {
        PlaneMessage { message: Some(Said::Part(Part { data: data.to_vec().into(), remaining })) }
    }

    #[test]
    fn what_was_taken_apart_comes_out_whole() {
        for size in [0, LARGEST_PART - 10, LARGEST_PART, LARGEST_PART + 1, 3 * LARGEST_PART, 1_000_000] {
            let (mut joined, mut out) = (Joined::default(), Vec::new());
            let parts: Vec<_> = Parts::of(boot(size)).collect();
            assert!(parts.iter().all(|part| part.encoded_len() < LARGEST_PART + 32));
            for part in parts {
                out.extend(joined.add(part).unwrap());
            }
            assert_eq!(out, [boot(size)]);
            let end = PlaneMessage { message: Some(Said::End(SessionEnd::default())) };
            assert_eq!(joined.add(end.clone()).unwrap(), Some(end));
        }
    }

    #[test]
    fn what_are_no_parts_of_one_message_is_refused() {
        let whole = boot(100).encode_to_vec();
        let rest = (whole.len() - 10) as u64;
        let after = |second: PlaneMessage| {
            let mut joined = Joined::default();
            assert_eq!(joined.add(part(&whole[..10], rest)).unwrap(), None);
            joined.add(second)
        };
        assert_eq!(after(part(&whole[10..], 0)).unwrap(), Some(boot(100)));
        for (second, why) in [
            (part(&whole[10..20], rest), "continue"),
            (part(&whole[10..], 1), "continue"),
            (part(&[], rest), "continue"),
            (part(&whole[10..20], u64::MAX), "continue"),
            (boot(1), "between"),
        ] {
            let error = after(second).unwrap_err();
            assert!(error.message().contains(why), "{error}");
        }
        let first = |message| Joined::default().add(message).unwrap_err().message().to_owned();
        assert!(first(part(&[1], LARGEST_MESSAGE as u64)).contains("larger"));
        assert!(first(part(&[1], u64::MAX)).contains("larger"));
        assert!(first(part(&[0xff], 0)).contains("no message"));
        assert!(first(part(&part(&[1], 0).encode_to_vec(), 0)).contains("are a part"));
    }
}
