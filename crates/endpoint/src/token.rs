//! Workload Onboarding Tokens as JWTs: ES256, signed by keys that are kept in the [`KeyStore`] and rotated with overlap.

use crate::backend::{KeyStore, RegistryError};
use arc_swap::ArcSwap;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::Timestamp;
use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation, decode, decode_header};
use onboarding_core::identity::{Attested, Identity, Replay};
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::registration::LONGEST_TOKEN_LIFE;
use onboarding_core::token::Claims;
use onboarding_kinds::identity::{Case, from_json, stated_to_json, to_json};
use onboarding_runtime::readiness::Readiness;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How long a key signs before the next one does.
const SIGNS_FOR: Duration = Duration::from_secs(24 * 60 * 60);
/// How much longer it signs where the next one can't be made: failing to renew isn't expiring.
const OVERTIME: Duration = Duration::from_secs(24 * 60 * 60);
/// How long it verifies: until the longest token that it may have signed has ended.
const VERIFIES_FOR: Duration = SIGNS_FOR.saturating_add(OVERTIME).saturating_add(LONGEST_TOKEN_LIFE);
const ROTATION_EVERY: Duration = Duration::from_secs(60);
/// A token of ours is under 2 KiB.
const LONGEST_TOKEN: usize = 16 * 1024;
/// How often a token with an unknown key makes the store be asked: whoever can connect can send such tokens.
const RELOAD_EVERY: Duration = Duration::from_secs(1);
const KEYS: &str = "tokenKeys";

/// Signs and verifies.
pub(crate) struct Tokens {
    store: Arc<dyn KeyStore>,
    ring: ArcSwap<Ring>,
    reloaded: tokio::sync::Mutex<Option<Instant>>,
}

#[derive(Default)]
struct Ring {
    version: u64,
    signing: Option<SigningKey>,
    verifying: HashMap<String, DecodingKey>,
}

/// Ready to sign: `jsonwebtoken::encode` reads the key anew for each token, which takes longer than signing with it.
struct SigningKey {
    pair: EcdsaKeyPair,
    random: SystemRandom,
    /// The protected header with its dot: all tokens of a key have the same.
    header: String,
    created_at: Timestamp,
}

impl SigningKey {
    fn new(id: &str, pair: EcdsaKeyPair, created_at: Timestamp) -> Result<Self, serde_json::Error> {
        let header = Header { kid: Some(id.to_owned()), ..Header::new(Algorithm::ES256) };
        let header = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&header)?) + ".";
        Ok(Self { pair, random: SystemRandom::new(), header, created_at })
    }

    /// In JWS Compact Serialization (RFC 7515, section 7.1).
    fn sign(&self, claims: &Wire) -> Result<String, TokenError> {
        let failed = |why: String| TokenError::Unavailable(format!("signing: {why}"));
        let payload = serde_json::to_vec(claims).map_err(|error| failed(error.to_string()))?;
        let mut token = self.header.clone();
        URL_SAFE_NO_PAD.encode_string(payload, &mut token);
        let signature =
            self.pair.sign(&self.random, token.as_bytes()).map_err(|_| failed("the library refuses".to_owned()))?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(token)
    }
}

/// As kept in the store.
#[derive(Serialize, Deserialize)]
struct StoredKey {
    kid: String,
    /// PKCS #8, base64.
    key: String,
    created_at: Timestamp,
}

impl StoredKey {
    fn age_is_below(&self, age: Duration, now: Timestamp) -> bool {
        self.created_at.checked_add(age).is_ok_and(|end| now < end)
    }
}

/// Why a token can't be signed or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("the token is not one of this plane's: {0}; onboard again")]
    NotOurs(&'static str),
    #[error("the keys of tokens can't be used now: {0}")]
    Unavailable(String),
}

impl Tokens {
    /// Loads the keys, and makes the first.
    pub(crate) async fn open(store: Arc<dyn KeyStore>, now: Timestamp) -> Result<Self, TokenError> {
        let tokens = Self { store, ring: ArcSwap::default(), reloaded: tokio::sync::Mutex::new(None) };
        tokens.rotate(now).await?;
        Ok(tokens)
    }

    /// Makes the next key in time, until `stop`.
    pub(crate) async fn keep_rotating(&self, readiness: &Readiness, stop: &CancellationToken) {
        let mut turns = tokio::time::interval(ROTATION_EVERY);
        turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = turns.tick() => {}
            }
            let now = Timestamp::now();
            match self.rotate(now).await {
                Ok(()) => readiness.ready(KEYS),
                Err(error) => {
                    tracing::error!(%error, "the next key of tokens can't be made; the one before signs on");
                    if self.ring.load().signing_key(now).is_none() {
                        readiness.missing(KEYS, error.to_string());
                    }
                }
            }
        }
    }

    pub(crate) fn sign(&self, claims: &Claims) -> Result<String, TokenError> {
        let ring = self.ring.load();
        let signing = ring
            .signing_key(claims.issued_at)
            .ok_or_else(|| TokenError::Unavailable("there is no key that may sign".to_owned()))?;
        signing.sign(&Wire::from(claims))
    }

    /// What a token of ours says. Whether it may be used is [`onboarding_core::token::accept`]'s to say.
    pub(crate) async fn read(&self, token: &str) -> Result<Claims, TokenError> {
        if token.len() > LONGEST_TOKEN {
            return Err(TokenError::NotOurs("it is too long"));
        }
        let header = decode_header(token).map_err(|_| TokenError::NotOurs("it is no JWT"))?;
        let kid = header.kid.ok_or(TokenError::NotOurs("it names no key"))?;
        let mut ring = self.ring.load_full();
        if !ring.verifying.contains_key(&kid) {
            // Another replica may have made it.
            self.reload().await?;
            ring = self.ring.load_full();
        }
        let key = ring
            .verifying
            .get(&kid)
            .ok_or(TokenError::NotOurs("it is signed by a key that isn't ours, or is ours no longer"))?;
        // The signature alone: the claims' rules are the core's.
        let mut signature_only = Validation::new(Algorithm::ES256);
        signature_only.required_spec_claims.clear();
        signature_only.validate_exp = false;
        signature_only.validate_nbf = false;
        signature_only.validate_aud = false;
        let data =
            decode::<Wire>(token, key, &signature_only).map_err(|_| TokenError::NotOurs("its signature is wrong"))?;
        Claims::try_from(data.claims)
    }

    async fn reload(&self) -> Result<(), TokenError> {
        // Those who come meanwhile wait, and find what was loaded.
        let mut reloaded = self.reloaded.lock().await;
        if reloaded.is_some_and(|at| at.elapsed() < RELOAD_EVERY) {
            return Ok(());
        }
        let (bytes, version) = self.store.load().await.map_err(unavailable)?;
        if version != self.ring.load().version {
            self.ring.store(Arc::new(Ring::new(&parse(&bytes)?, version)?));
        }
        *reloaded = Some(Instant::now());
        Ok(())
    }

    /// A key that may sign now: the store's, or a new one beside those whose tokens may still live.
    async fn rotate(&self, now: Timestamp) -> Result<(), TokenError> {
        for _ in 0..8 {
            let (bytes, version) = self.store.load().await.map_err(unavailable)?;
            let mut keys = parse(&bytes)?;
            keys.retain(|key| key.age_is_below(VERIFIES_FOR, now));
            if keys.iter().any(|key| key.age_is_below(SIGNS_FOR, now)) {
                self.ring.store(Arc::new(Ring::new(&keys, version)?));
                return Ok(());
            }
            keys.push(StoredKey::new(now)?);
            let bytes = serde_json::to_vec(&keys).map_err(|error| TokenError::Unavailable(error.to_string()))?;
            match self.store.store(version, &bytes).await {
                Ok(version) => {
                    self.ring.store(Arc::new(Ring::new(&keys, version)?));
                    return Ok(());
                }
                Err(RegistryError::Conflict) => {}
                Err(error) => return Err(unavailable(error)),
            }
        }
        Err(TokenError::Unavailable("other replicas change the keys all the time".to_owned()))
    }
}

fn unavailable(error: RegistryError) -> TokenError {
    TokenError::Unavailable(error.to_string())
}

fn parse(bytes: &[u8]) -> Result<Vec<StoredKey>, TokenError> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(bytes)
        .map_err(|_| TokenError::Unavailable("the stored keys are damaged; remove them to make new ones".to_owned()))
}

impl StoredKey {
    fn new(now: Timestamp) -> Result<Self, TokenError> {
        let broken = |_| TokenError::Unavailable("a key could not be made".to_owned());
        let document =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).map_err(broken)?;
        let mut id = [0; 8];
        aws_lc_rs::rand::fill(&mut id).map_err(broken)?;
        Ok(Self { kid: URL_SAFE_NO_PAD.encode(id), key: STANDARD.encode(document.as_ref()), created_at: now })
    }
}

impl Ring {
    fn new(keys: &[StoredKey], version: u64) -> Result<Self, TokenError> {
        let damaged =
            || TokenError::Unavailable("a stored key is damaged; remove the keys to make new ones".to_owned());
        let mut ring = Self { version, ..Self::default() };
        for stored in keys {
            let pkcs8 = STANDARD.decode(&stored.key).map_err(|_| damaged())?;
            let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pkcs8).map_err(|_| damaged())?;
            ring.verifying.insert(stored.kid.clone(), DecodingKey::from_ec_der(pair.public_key().as_ref()));
            if ring.signing.as_ref().is_none_or(|newest| newest.created_at <= stored.created_at) {
                let signing = SigningKey::new(&stored.kid, pair, stored.created_at);
                ring.signing = Some(signing.map_err(|error| TokenError::Unavailable(error.to_string()))?);
            }
        }
        Ok(ring)
    }

    fn signing_key(&self, now: Timestamp) -> Option<&SigningKey> {
        let end = |key: &&SigningKey| key.created_at.checked_add(SIGNS_FOR + OVERTIME).is_ok_and(|end| now < end);
        self.signing.as_ref().filter(end)
    }
}

/// The claims as they travel (reference, section 7).
#[derive(Serialize, Deserialize)]
struct Wire {
    iss: String,
    azp: String,
    aud: String,
    sub: String,
    exp: i64,
    iat: i64,
    jti: String,
    claims: WireWorkload,
    cnf: Confirmation,
    /// How long the evidence could be replayed, and the issuer's short name: what a registration has to remember.
    evidence: WireEvidence,
}

#[derive(Serialize, Deserialize)]
struct WireWorkload {
    workload: serde_json::Value,
    workload_group: WireGroup,
}

#[derive(Serialize, Deserialize)]
struct WireGroup {
    namespace: String,
    name: String,
}

/// RFC 7800: the holder of the token proves this key.
#[derive(Serialize, Deserialize)]
struct Confirmation {
    jkt: String,
}

#[derive(Serialize, Deserialize)]
struct WireEvidence {
    replay: WireReplay,
    #[serde(skip_serializing_if = "Option::is_none")]
    issuer_short_name: Option<String>,
    /// Where not all of the identity was proven: with what is only claimed, which the registration's name may be made of.
    #[serde(skip_serializing_if = "Option::is_none")]
    stated: Option<WireStated>,
}

#[derive(Serialize, Deserialize)]
struct WireStated {
    workload: serde_json::Value,
    claimed_only: Vec<String>,
}

impl WireStated {
    fn of(identity: &Identity) -> Option<Self> {
        let (workload, claimed_only) = stated_to_json(identity, Case::Snake);
        (!claimed_only.is_empty()).then_some(Self { workload, claimed_only })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WireReplay {
    BoundToKey,
    Until(Timestamp),
    Forever,
}

impl From<&Claims> for Wire {
    fn from(claims: &Claims) -> Self {
        Self {
            iss: claims.plane_uid.clone(),
            azp: claims.plane_uid.clone(),
            aud: claims.plane_uid.clone(),
            sub: claims.subject.to_string(),
            exp: claims.expires_at.as_second(),
            iat: claims.issued_at.as_second(),
            jti: claims.id.clone(),
            claims: WireWorkload {
                workload: to_json(&claims.attested.identity, Case::Snake),
                workload_group: WireGroup {
                    namespace: claims.group.namespace.clone(),
                    name: claims.group.name.clone(),
                },
            },
            cnf: Confirmation { jkt: claims.key.to_string() },
            evidence: WireEvidence {
                replay: match claims.attested.replay {
                    Replay::BoundToKey => WireReplay::BoundToKey,
                    Replay::Until(end) => WireReplay::Until(end),
                    Replay::Forever => WireReplay::Forever,
                },
                issuer_short_name: claims.attested.issuer_short_name.clone(),
                stated: WireStated::of(&claims.attested.identity),
            },
        }
    }
}

impl TryFrom<Wire> for Claims {
    type Error = TokenError;
    fn try_from(wire: Wire) -> Result<Self, TokenError> {
        let (namespace, name) = wire.sub.split_once('/').ok_or(TokenError::NotOurs("its subject is no name"))?;
        let time = |second| Timestamp::from_second(second).map_err(|_| TokenError::NotOurs("its times are no times"));
        Ok(Self {
            subject: RegistrationName { namespace: namespace.to_owned(), name: name.to_owned() },
            issued_at: time(wire.iat)?,
            expires_at: time(wire.exp)?,
            id: wire.jti,
            attested: Attested {
                identity: wire
                    .evidence
                    .stated
                    .map_or_else(
                        || from_json(&wire.claims.workload, &[]),
                        |stated| from_json(&stated.workload, &stated.claimed_only),
                    )
                    .map_err(|_| TokenError::NotOurs("its identity can't be read"))?,
                issuer_short_name: wire.evidence.issuer_short_name,
                replay: match wire.evidence.replay {
                    WireReplay::BoundToKey => Replay::BoundToKey,
                    WireReplay::Until(end) => Replay::Until(end),
                    WireReplay::Forever => Replay::Forever,
                },
            },
            group: GroupName { namespace: wire.claims.workload_group.namespace, name: wire.claims.workload_group.name },
            key: wire.cnf.jkt.parse().map_err(|_| TokenError::NotOurs("it is bound to no key"))?,
            plane_uid: wire.aud,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onboarding_core::identity::Thumbprint;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[derive(Default)]
    struct Keys {
        held: std::sync::Mutex<(Vec<u8>, u64)>,
        broken: AtomicBool,
        loads: AtomicUsize,
    }

    #[async_trait::async_trait]
    impl KeyStore for Keys {
        async fn load(&self) -> Result<(Vec<u8>, u64), RegistryError> {
            self.loads.fetch_add(1, Ordering::SeqCst);
            Ok(self.held.lock().unwrap().clone())
        }
        async fn store(&self, expected: u64, keys: &[u8]) -> Result<u64, RegistryError> {
            if self.broken.load(Ordering::SeqCst) {
                return Err(RegistryError::Unavailable("the disk is full".to_owned()));
            }
            let mut held = self.held.lock().unwrap();
            if held.1 != expected {
                return Err(RegistryError::Conflict);
            }
            *held = (keys.to_vec(), expected + 1);
            Ok(held.1)
        }
    }

    const HOUR: i64 = 3600;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn claims(issued_at: Timestamp) -> Claims {
        let identity = serde_json::json!({"jwt": {"issuer": "https://mycompany.corp", "subject": "vm007"}});
        Claims {
            plane_uid: "plane".to_owned(),
            subject: RegistrationName { namespace: "bookinfo".to_owned(), name: "ratings-1".to_owned() },
            issued_at,
            expires_at: issued_at.checked_add(LONGEST_TOKEN_LIFE).unwrap(),
            id: "1".to_owned(),
            attested: Attested {
                identity: from_json(&identity, &[]).unwrap(),
                issuer_short_name: Some("my-corp".to_owned()),
                replay: Replay::Until(at(9)),
            },
            group: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
            key: Thumbprint([7; 32]),
        }
    }

    #[tokio::test]
    async fn a_token_says_what_was_signed() {
        let tokens = Tokens::open(Arc::<Keys>::default(), at(0)).await.unwrap();
        for replay in [Replay::BoundToKey, Replay::Until(at(1_000_000)), Replay::Forever] {
            let mut claims = claims(at(0));
            claims.attested.replay = replay;
            assert_eq!(tokens.read(&tokens.sign(&claims).unwrap()).await.unwrap(), claims);
        }
    }

    /// The name of a task's registration is made of what it claims, on whichever replica it registers; none of it becomes more.
    #[tokio::test]
    async fn what_is_only_claimed_travels_as_a_claim_and_apart_from_what_is_proven() {
        let tokens = Tokens::open(Arc::<Keys>::default(), at(0)).await.unwrap();
        let identity = serde_json::json!({"aws": {"partition": "aws", "account": "123456789012", "region": "us-east-1",
            "zone": "us-east-1a", "ecs": {"taskId": "3a15", "cluster": "bookinfo", "iamRole": {"name": "ratings-role"}}}});
        let claimed = ["aws.region", "aws.zone", "aws.ecs.taskId", "aws.ecs.cluster"].map(str::to_owned);
        let mut claims = claims(at(0));
        claims.attested.identity = from_json(&identity, &claimed).unwrap();
        let token = tokens.sign(&claims).unwrap();
        assert_eq!(tokens.read(&token).await.unwrap(), claims);
        let payload: serde_json::Value =
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap()).unwrap();
        assert_eq!(
            payload["claims"]["workload"],
            serde_json::json!({"aws": {"partition": "aws", "account": "123456789012", "ecs": {"iam_role": {"name": "ratings-role"}}}})
        );
    }

    #[tokio::test]
    async fn keys_rotate_and_the_old_ones_verify_for_as_long_as_their_tokens_live() {
        let keys = Arc::<Keys>::default();
        let tokens = Tokens::open(keys.clone(), at(0)).await.unwrap();
        let kid = |token: &str| decode_header(token).unwrap().kid.unwrap();
        let first = tokens.sign(&claims(at(23 * HOUR))).unwrap();
        tokens.rotate(at(23 * HOUR)).await.unwrap();
        assert_eq!(kid(&tokens.sign(&claims(at(23 * HOUR))).unwrap()), kid(&first));
        tokens.rotate(at(24 * HOUR)).await.unwrap();
        assert_ne!(kid(&tokens.sign(&claims(at(24 * HOUR))).unwrap()), kid(&first));
        let end = i64::try_from(VERIFIES_FOR.as_secs()).unwrap();
        tokens.rotate(at(end - 1)).await.unwrap();
        tokens.read(&first).await.unwrap();
        tokens.rotate(at(end)).await.unwrap();
        let refused = tokens.read(&first).await.unwrap_err().to_string();
        assert!(refused.contains("ours no longer"), "{refused}");
        // Another replica reads what this one signs, also with a key that it hasn't seen.
        let other = Tokens::open(keys, at(end)).await.unwrap();
        tokens.rotate(at(end + 25 * HOUR)).await.unwrap();
        other.read(&tokens.sign(&claims(at(end + 25 * HOUR))).unwrap()).await.unwrap();
    }

    #[tokio::test]
    async fn a_key_that_can_not_be_replaced_signs_on_for_a_while() {
        let keys = Arc::<Keys>::default();
        let tokens = Tokens::open(keys.clone(), at(0)).await.unwrap();
        keys.broken.store(true, Ordering::SeqCst);
        tokens.rotate(at(30 * HOUR)).await.unwrap_err();
        let late = tokens.sign(&claims(at(47 * HOUR))).unwrap();
        // Its tokens are good until their end.
        keys.broken.store(false, Ordering::SeqCst);
        let end = i64::try_from(LONGEST_TOKEN_LIFE.as_secs()).unwrap() + 47 * HOUR;
        tokens.rotate(at(end)).await.unwrap();
        tokens.read(&late).await.unwrap();
        let old = Tokens { store: keys.clone(), ring: ArcSwap::default(), reloaded: Default::default() };
        old.reload().await.unwrap();
        let refused = old.sign(&claims(at(end + 48 * HOUR))).unwrap_err().to_string();
        assert!(refused.contains("no key that may sign"), "{refused}");
    }

    #[tokio::test]
    async fn a_flood_of_unknown_keys_asks_the_store_once_a_second() {
        let keys = Arc::<Keys>::default();
        let tokens = Tokens::open(keys.clone(), at(0)).await.unwrap();
        let strange = Tokens::open(Arc::<Keys>::default(), at(0)).await.unwrap().sign(&claims(at(0))).unwrap();
        let started = Instant::now();
        let before = keys.loads.load(Ordering::SeqCst);
        for _ in 0..100 {
            tokens.read(&strange).await.unwrap_err();
        }
        let loads = keys.loads.load(Ordering::SeqCst) - before;
        assert!(loads <= 1 + started.elapsed().as_secs() as usize, "{loads} loads");
    }

    #[tokio::test]
    async fn what_is_not_ours_is_refused() {
        let keys = Arc::<Keys>::default();
        let tokens = Tokens::open(keys.clone(), at(0)).await.unwrap();
        let good = tokens.sign(&claims(at(0))).unwrap();
        let [header, payload, signature] = good.split('.').collect::<Vec<_>>()[..] else { panic!("{good}") };
        let encoded = |text: String| URL_SAFE_NO_PAD.encode(text);
        let kid = decode_header(&good).unwrap().kid.unwrap();
        let none = encoded(format!(r#"{{"alg":"none","typ":"JWT","kid":"{kid}"}}"#));
        let hmac = encoded(format!(r#"{{"alg":"HS256","typ":"JWT","kid":"{kid}"}}"#));
        let mut changed = URL_SAFE_NO_PAD.decode(payload).unwrap();
        let place = changed.windows(7).position(|window| window == b"ratings").unwrap();
        changed[place] = b'R';
        for (token, words) in [
            (format!("{none}.{payload}."), "it is no JWT"),
            (format!("{hmac}.{payload}.{signature}"), "signature is wrong"),
            (format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode(changed)), "signature is wrong"),
            (format!("{header}.{payload}."), "signature is wrong"),
            (format!("{good}{}", "x".repeat(LONGEST_TOKEN)), "too long"),
        ] {
            let refused = tokens.read(&token).await.unwrap_err().to_string();
            assert!(refused.contains(words), "{refused} instead of {words}");
        }
        tokens.read(&good).await.unwrap();
    }

    #[tokio::test]
    async fn damaged_keys_are_neither_used_nor_replaced() {
        let keys = Arc::<Keys>::default();
        *keys.held.lock().unwrap() = (b"nonsense".to_vec(), 3);
        let refused = Tokens::open(keys.clone(), at(0)).await.map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("damaged"), "{refused}");
        assert_eq!(*keys.held.lock().unwrap(), (b"nonsense".to_vec(), 3));
    }
}
