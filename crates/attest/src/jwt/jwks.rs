//! The issuers' keys: fetched when they are needed, kept while they are good, fetched anew at a bounded rate.
//!
//! Failing to fetch isn't a withdrawal: keys that were fetched stay in use for a day. An issuer whose configuration changed is another
//! issuer here, so that a change takes effect at once.

use super::verify::Keys;
use super::{Issuer, KeySource};
use crate::AttestError;
use crate::fetch::{Answer, Fetcher, Scheme};
use crate::strict_json;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const LARGEST_ANSWER: usize = 256 * 1024;
/// After this the keys are asked for again, so that a key that the issuer withdrew is soon no key.
const FRESH_FOR: SignedDuration = SignedDuration::from_mins(5);
/// So long they are used when the issuer doesn't answer.
const GOOD_FOR: SignedDuration = SignedDuration::from_hours(24);
/// An issuer is asked once in this time, and a few times more at the beginning.
const ASK_EVERY: Duration = Duration::from_secs(10);
const ASK_AT_ONCE: NonZeroU32 = NonZeroU32::MIN.saturating_add(2);

/// The keys of all issuers.
pub struct KeyStore {
    fetcher: Fetcher,
    issuers: Mutex<HashMap<Name, Arc<Entry>>>,
}

/// An issuer as it is configured.
type Name = (String, KeySource);

struct Entry {
    current: Mutex<Current>,
    /// Held while fetching: who waits for it finds what the holder fetched.
    fetching: tokio::sync::Mutex<()>,
    limit: DefaultDirectRateLimiter,
}

#[derive(Default)]
struct Current {
    keys: Option<(Arc<Keys>, Timestamp)>,
    /// What the last attempt failed with.
    problem: Option<String>,
}

impl KeyStore {
    /// `extra_roots`: PEM of CAs to trust besides the system's.
    pub fn new(extra_roots: Option<&str>) -> Result<Self, String> {
        Ok(Self { fetcher: Fetcher::new(Scheme::HttpsOnly, extra_roots)?, issuers: Mutex::default() })
    }

    /// The keys of `issuer`, which is one of `configured`; those of issuers that aren't configured any more are forgotten.
    pub async fn keys(&self, issuer: &Issuer, configured: &[Issuer], now: Timestamp) -> Result<Arc<Keys>, AttestError> {
        let entry = self.entry(issuer, configured)?;
        match entry.known(now) {
            Some((keys, at)) if now.duration_since(at) < FRESH_FOR => return Ok(keys),
            // Somebody is fetching already: what is known serves until then.
            Some((keys, _)) if entry.fetching.try_lock().is_err() => return Ok(keys),
            _ => {}
        }
        let before = entry.known(now).map(|(keys, _)| keys);
        self.fetch(issuer, &entry, before.as_ref(), now).await;
        entry.known(now).map(|(keys, _)| keys).ok_or_else(|| unavailable(issuer, &entry))
    }

    /// Keys that are newer than `known`, which lacks one that a token names. The same keys where the issuer was asked and has no others.
    pub async fn refresh(
        &self,
        issuer: &Issuer,
        configured: &[Issuer],
        known: &Arc<Keys>,
        now: Timestamp,
    ) -> Result<Arc<Keys>, AttestError> {
        if matches!(issuer.keys, KeySource::Inline(_)) {
            return Ok(known.clone());
        }
        let entry = self.entry(issuer, configured)?;
        if self.fetch(issuer, &entry, Some(known), now).await {
            Ok(entry.known(now).map_or_else(|| known.clone(), |(keys, _)| keys))
        } else {
            Err(unavailable(issuer, &entry))
        }
    }

    fn entry(&self, issuer: &Issuer, configured: &[Issuer]) -> Result<Arc<Entry>, AttestError> {
        let name = (issuer.issuer.clone(), issuer.keys.clone());
        let mut issuers = self.issuers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = issuers.get(&name) {
            return Ok(entry.clone());
        }
        issuers.retain(|(url, keys), _| configured.iter().any(|kept| kept.issuer == *url && kept.keys == *keys));
        let quota = Quota::with_period(ASK_EVERY)
            .ok_or_else(|| AttestError::Unavailable("the rate of asking issuers is zero".to_owned()))?
            .allow_burst(ASK_AT_ONCE);
        let entry = Arc::new(Entry {
            current: Mutex::default(),
            fetching: tokio::sync::Mutex::default(),
            limit: RateLimiter::direct(quota),
        });
        issuers.insert(name, entry.clone());
        Ok(entry)
    }

    /// Fetches unless somebody has since `before` was read. Says whether there are newer keys than `before`.
    async fn fetch(&self, issuer: &Issuer, entry: &Entry, before: Option<&Arc<Keys>>, now: Timestamp) -> bool {
        let _one_at_a_time = entry.fetching.lock().await;
        let is_newer = |keys: &Arc<Keys>| before.is_none_or(|before| !Arc::ptr_eq(before, keys));
        if entry.known(now).is_some_and(|(keys, _)| is_newer(&keys)) {
            return true;
        }
        let fetched = match Keys::inline(&issuer.keys) {
            Some(read) => read.map_err(|problem| format!("the JWKS in the ControlPlane can't be used: {problem}")),
            None if entry.limit.check().is_err() => {
                return false;
            }
            None => self.ask(issuer).await,
        };
        let mut current = entry.current.lock().unwrap_or_else(PoisonError::into_inner);
        match fetched {
            Ok(keys) => {
                *current = Current { keys: Some((Arc::new(keys), now)), problem: None };
                true
            }
            Err(problem) => {
                tracing::warn!(issuer = issuer.issuer, problem, "the keys of an issuer could not be fetched");
                current.problem = Some(problem);
                false
            }
        }
    }

    async fn ask(&self, issuer: &Issuer) -> Result<Keys, String> {
        let uri = match &issuer.keys {
            KeySource::Uri(uri) => uri.clone(),
            _ => self.discover(&issuer.issuer).await?,
        };
        let body = self.get(&uri).await?;
        let keys = Keys::read(&body).map_err(|problem| format!("{uri} has no JWKS: {problem}"))?;
        if keys.is_empty() {
            return Err(format!("{uri} has no key that could be used"));
        }
        Ok(keys)
    }

    /// OpenID Connect Discovery 1.0 section 4: `jwks_uri` of a document that says it is of this issuer.
    async fn discover(&self, issuer: &str) -> Result<String, String> {
        let url = format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'));
        let document = strict_json::object(&self.get(&url).await?).map_err(|problem| format!("{url}: {problem}"))?;
        match document.get("issuer") {
            Some(Value::String(stated)) if stated == issuer => {}
            stated => {
                let stated = stated.map_or_else(|| "nobody".to_owned(), Value::to_string);
                return Err(format!("{url} is of another issuer: {stated:.200}"));
            }
        }
        match document.get("jwks_uri") {
            Some(Value::String(uri)) if uri.starts_with("https://") => Ok(uri.clone()),
            _ => Err(format!("{url} names no jwks_uri with https")),
        }
    }

    async fn get(&self, url: &str) -> Result<Vec<u8>, String> {
        let request = self.fetcher.get(url).header("accept", "application/json");
        let answer = self.fetcher.send(request, ANSWER_WITHIN, LARGEST_ANSWER).await;
        match answer.map_err(|error| format!("{url} {error}"))? {
            Answer { status: 200, body } => Ok(body),
            Answer { status, .. } => Err(format!("{url} answered {status}")),
        }
    }
}

impl Entry {
    /// Keys that may still be used, and when they were fetched.
    fn known(&self, now: Timestamp) -> Option<(Arc<Keys>, Timestamp)> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.keys.clone().filter(|(_, at)| now.duration_since(*at) < GOOD_FOR)
    }
}

fn unavailable(issuer: &Issuer, entry: &Entry) -> AttestError {
    let current = entry.current.lock().unwrap_or_else(PoisonError::into_inner);
    let problem = current.problem.clone().unwrap_or_else(|| {
        format!("they were fetched a moment ago, and are fetched at most every {} s", ASK_EVERY.as_secs())
    });
    AttestError::Unavailable(format!("newer keys of issuer {:?} can't be had: {problem}", issuer.issuer))
}
