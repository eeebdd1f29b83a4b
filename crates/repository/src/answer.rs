//! One representation and one request to an answer: conditions, ranges, HEAD (RFC 9110, sections 13 and 14).

use crate::catalog::Version;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream;
use headers::{
    AcceptRanges, ContentLength, ContentRange, ETag, HeaderMapExt, IfMatch, IfModifiedSince, IfNoneMatch,
    IfUnmodifiedSince, LastModified,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

/// Bytes of a package that are read, and held for one download, at a time.
const CHUNK: u64 = 64 << 10;

pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What a URI has.
pub(crate) struct Representation {
    pub content: Content,
    pub content_type: &'static str,
    /// Of the package, for its checksum's URI too: so a client can tell whether both are of one package.
    pub digest: String,
    pub modified: SystemTime,
    /// The URI names the content, so that it is never another.
    pub immutable: bool,
}

pub(crate) enum Content {
    Package(Arc<Version>),
    Text(Bytes),
}

impl Content {
    fn length(&self) -> u64 {
        match self {
            Self::Package(version) => version.length(),
            Self::Text(text) => text.len() as u64,
        }
    }

    /// `from` to `to`, which is not in it.
    fn body(&self, from: u64, to: u64) -> Body {
        match self {
            Self::Text(text) => {
                let place = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                full(text.slice(place(from)..place(to)))
            }
            Self::Package(version) => {
                let version = version.clone();
                let chunks = stream::try_unfold((from, None), move |(offset, before)| {
                    let version = version.clone();
                    async move {
                        if offset >= to {
                            return Ok(None);
                        }
                        let chunk = read(version, offset, CHUNK.min(to - offset), before).await?;
                        let next = offset + chunk.len() as u64;
                        Ok(Some((Frame::data(chunk.clone()), (next, Some(chunk)))))
                    }
                });
                StreamBody::new(chunks).boxed_unsync()
            }
        }
    }
}

/// What everybody downloads is in the page cache, and to go to another thread for it costs more than to encrypt it. `before` is the piece
/// that was sent last, whose memory serves again when it is gone.
async fn read(version: Arc<Version>, offset: u64, length: u64, before: Option<Bytes>) -> io::Result<Bytes> {
    let mut block = before.and_then(|before| before.try_into_mut().ok()).unwrap_or_default();
    block.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
    if version.read_at_once(offset, &mut block)? {
        return Ok(block.freeze());
    }
    let read = move || version.read(offset, &mut block).map(|()| block.freeze());
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
}

/// To a GET or HEAD of it.
pub(crate) fn answer(method: &Method, request: &HeaderMap, representation: &Representation) -> Response<Body> {
    let mut response = Response::new(nothing());
    let length = representation.content.length();
    let etag = format!("\"{}\"", representation.digest).parse::<ETag>().ok();
    let headers = response.headers_mut();
    headers.typed_insert(AcceptRanges::bytes());
    headers.typed_insert(LastModified::from(representation.modified.min(SystemTime::now())));
    if let Some(etag) = &etag {
        headers.typed_insert(etag.clone());
    }
    let caching = if representation.immutable { "public, max-age=31536000, immutable" } else { "no-cache" };
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));

    if let Some(status) = condition(request, etag.as_ref(), representation.modified) {
        *response.status_mut() = status;
        if status == StatusCode::PRECONDITION_FAILED {
            *response.body_mut() = full("it is another by now: its ETag says which\n");
            plain(response.headers_mut());
        }
        return response;
    }
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(representation.content_type));
    if let (Content::Package(_), Some(digest)) = (&representation.content, of_representation(&representation.digest)) {
        headers.insert(HeaderName::from_static("repr-digest"), digest);
    }
    let (from, to) = match asked(method, request, etag.as_ref(), representation.immutable, length) {
        Asked::Whole => (0, length),
        Asked::Part(from, to) => {
            if let Ok(range) = ContentRange::bytes(from..to, length) {
                headers.typed_insert(range);
            }
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            (from, to)
        }
        Asked::Nothing => {
            headers.typed_insert(ContentRange::unsatisfied_bytes(length));
            headers.remove("repr-digest");
            plain(headers);
            *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
            *response.body_mut() = full(format!("it has {length} bytes\n"));
            return response;
        }
    };
    response.headers_mut().typed_insert(ContentLength(to - from));
    if method != Method::HEAD {
        *response.body_mut() = representation.content.body(from, to);
    }
    response
}

/// The order is that of RFC 9110, section 13.2.2. What can't be read as an entity tag matches nothing; as a date, it isn't there.
fn condition(request: &HeaderMap, etag: Option<&ETag>, modified: SystemTime) -> Option<StatusCode> {
    let fails = match request.typed_try_get::<IfMatch>() {
        Ok(Some(tags)) => !etag.is_some_and(|etag| tags.precondition_passes(etag)),
        Err(_) => true,
        Ok(None) => request.typed_get::<IfUnmodifiedSince>().is_some_and(|since| !since.precondition_passes(modified)),
    };
    if fails {
        return Some(StatusCode::PRECONDITION_FAILED);
    }
    let held = match request.typed_try_get::<IfNoneMatch>() {
        Ok(Some(tags)) => etag.is_some_and(|etag| !tags.precondition_passes(etag)),
        Err(_) => false,
        Ok(None) => request.typed_get::<IfModifiedSince>().is_some_and(|since| !since.is_modified(modified)),
    };
    held.then_some(StatusCode::NOT_MODIFIED)
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Whole,
    /// From, and up to what is not in it.
    Part(u64, u64),
    /// A range that it doesn't have.
    Nothing,
}

fn asked(method: &Method, request: &HeaderMap, etag: Option<&ETag>, immutable: bool, length: u64) -> Asked {
    let Some(range) = request.get(header::RANGE).and_then(|value| value.to_str().ok()) else { return Asked::Whole };
    // RFC 9110, section 14.2: ranges are GET's.
    if method != Method::GET {
        return Asked::Whole;
    }
    // Section 13.1.5. A date matches where there never was another content (apt resumes with it), and nowhere else: of two packages
    // built reproducibly, both may have the same.
    let same = request.get(header::IF_RANGE).is_none_or(|held| match held.to_str().map(str::parse::<ETag>) {
        Ok(Ok(held)) => Some(&held) == etag,
        Ok(Err(_)) => immutable,
        Err(_) => false,
    });
    if same { part(range, length) } else { Asked::Whole }
}

/// RFC 9110, section 14.1.2. What isn't one range of bytes is ignored, as section 14.2 allows: neither package managers nor curl ask for several.
fn part(range: &str, length: u64) -> Asked {
    let Some((unit, range)) = range.split_once('=') else { return Asked::Whole };
    let Some((first, last)) = range.trim().split_once('-') else { return Asked::Whole };
    if !unit.eq_ignore_ascii_case("bytes") {
        return Asked::Whole;
    }
    match (position(first), position(last)) {
        (None, Some(suffix)) if first.is_empty() => match suffix.min(length) {
            0 => Asked::Nothing,
            suffix => Asked::Part(length - suffix, length),
        },
        (Some(first), None) if last.is_empty() && first < length => Asked::Part(first, length),
        (Some(_), None) if last.is_empty() => Asked::Nothing,
        (Some(first), Some(last)) if last < first => Asked::Whole,
        (Some(first), Some(_)) if first >= length => Asked::Nothing,
        (Some(first), Some(last)) => Asked::Part(first, last.saturating_add(1).min(length)),
        _ => Asked::Whole,
    }
}

/// A number that is too large is beyond any end.
fn position(digits: &str) -> Option<u64> {
    let number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    number.then(|| digits.parse().unwrap_or(u64::MAX))
}

/// RFC 9530, section 3.
fn of_representation(digest: &str) -> Option<HeaderValue> {
    let bytes: Option<Vec<u8>> =
        (0..digest.len() / 2).map(|at| u8::from_str_radix(digest.get(2 * at..2 * at + 2)?, 16).ok()).collect();
    HeaderValue::from_str(&format!("sha-256=:{}:", STANDARD.encode(bytes?))).ok()
}

pub(crate) fn plain(headers: &mut HeaderMap) {
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
}

pub(crate) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).map_err(|never| match never {}).boxed_unsync()
}

pub(crate) fn nothing() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_ten_bytes() {
        use Asked::{Nothing, Part, Whole};
        for (range, expected) in [
            ("bytes=0-3", Part(0, 4)),
            ("Bytes=0-0", Part(0, 1)),
            ("bytes=4-", Part(4, 10)),
            ("bytes=9-", Part(9, 10)),
            ("bytes=0-99", Part(0, 10)),
            ("bytes=0-18446744073709551615", Part(0, 10)),
            ("bytes=0-99999999999999999999999", Part(0, 10)),
            ("bytes=-3", Part(7, 10)),
            ("bytes=-10", Part(0, 10)),
            ("bytes=-99999999999999999999999", Part(0, 10)),
            ("bytes=-0", Nothing),
            ("bytes=10-", Nothing),
            ("bytes=10-12", Nothing),
            ("bytes=99999999999999999999999-", Nothing),
            ("bytes=3-2", Whole),
            ("bytes=", Whole),
            ("bytes=-", Whole),
            ("bytes=a-b", Whole),
            ("bytes=+1-2", Whole),
            ("bytes=1-+2", Whole),
            ("bytes=--2", Whole),
            ("bytes=0-1,3-4", Whole),
            ("lines=0-1", Whole),
            ("0-1", Whole),
        ] {
            assert_eq!(part(range, 10), expected, "{range}");
        }
        assert_eq!((part("bytes=0-", 0), part("bytes=-1", 0)), (Nothing, Nothing));
    }
}
