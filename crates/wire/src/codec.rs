//! Protobuf over gRPC with small buffers: of ten thousand idle streams each holds one for each direction. They grow with a message.

use prost::Message;
use std::marker::PhantomData;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// What a stream holds before its first message, in bytes; tonic's own codec takes eight times as much.
const BUFFER: usize = 1024;
/// Messages that wait are sent together until they have this size: the buffer grows no further than for one more part.
const SENT_AT: usize = crate::parts::LARGEST_PART;

/// The generated services and clients use it.
#[derive(Debug)]
pub struct SmallBuffers<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SmallBuffers<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SmallBuffers<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(BUFFER, SENT_AT))
    }
    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(BUFFER, SENT_AT))
    }
}
