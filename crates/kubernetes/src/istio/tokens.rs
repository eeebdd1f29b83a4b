//! istio-tokens: what a sidecar shows to istiod's CA. One per service account, shared by all workloads of it, renewed at half its life.
//!
//! A task per account asks, one request at a time, while somebody follows the account; it ends at a renewal that nobody waits for.
//! Failing to renew isn't expiring: a token is given out until its end.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{Api, PostParams};
use onboarding_runtime::backoff::Backoff;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What istiod's CA wants to be addressed as.
pub const AUDIENCE: &str = "istio-ca";
/// As that of pods, and of `istioctl x workload entry configure`.
const DEFAULT_LIFE: Duration = Duration::from_secs(3600);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// A service account that is made now has a token this much later at most.
const LONGEST_RETRY: Duration = Duration::from_secs(10);
/// Requests to the API server at a time, whatever the number of accounts.
const AT_A_TIME: usize = 16;
/// Whoever renews with others shouldn't renew at the moment that they do.
const EARLIER_BY: f64 = 0.1;
const SHORTEST_WAIT: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Default)]
pub struct TokenOptions {
    /// `None`: 1 h. An API server gives none shorter than 10 min, and may give shorter ones than asked for.
    pub life: Option<Duration>,
    /// `None`: when half of a token's life is over; never later than that.
    pub renew_after: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Account {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Valid when it was given out.
#[derive(Clone)]
pub struct Token {
    value: String,
    /// By the API server's clock.
    pub expires_at: Timestamp,
    /// By this process's, which may be another.
    ends: Instant,
}

impl Token {
    pub fn value(&self) -> &str {
        &self.value
    }
    pub fn is_valid(&self) -> bool {
        Instant::now() < self.ends
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token until {}", self.expires_at)
    }
}

/// Of one account, as it is now.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// The newest; look at [`Token::is_valid`].
    pub token: Option<Arc<Token>>,
    /// Why the last request failed, for people.
    pub problem: Option<Arc<TokenError>>,
}

#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error(
        "the ServiceAccount {0}, which the WorkloadGroup names, doesn't exist; make it (kubectl create serviceaccount {name} -n {namespace}), or change spec.template.serviceAccount",
        name = .0.name, namespace = .0.namespace
    )]
    NoAccount(Account),
    #[error(
        "the plane may not ask for tokens of the ServiceAccount {account}: it needs the verb create on serviceaccounts/token in that namespace ({answer})"
    )]
    Forbidden { account: Account, answer: String },
    #[error("the API server gave no token of the ServiceAccount {account}: {answer}")]
    Refused { account: Account, answer: String },
    #[error("can't ask the API server for a token of the ServiceAccount {account}")]
    Unreachable { account: Account, source: Option<Box<kube::Error>> },
}

/// The tokens of all accounts that are followed.
#[derive(Clone)]
pub struct Tokens(Arc<Shared>);

struct Shared {
    client: kube::Client,
    options: TokenOptions,
    accounts: Mutex<HashMap<Account, watch::Receiver<Status>>>,
    permits: Semaphore,
    tasks: TaskTracker,
    stop: CancellationToken,
    requests: Family<Outcome, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl Tokens {
    /// Its tasks end with `stop`; [`Self::stopped`] waits for that.
    pub fn new(
        client: kube::Client,
        options: TokenOptions,
        metrics: &mut prometheus_client::registry::Registry,
        stop: CancellationToken,
    ) -> Self {
        let requests = Family::default();
        metrics.register(
            "onboarding_istio_token_requests",
            "Requests to the API server for istio-tokens",
            requests.clone(),
        );
        Self(Arc::new(Shared {
            client,
            options,
            accounts: Mutex::default(),
            permits: Semaphore::new(AT_A_TIME),
            tasks: TaskTracker::new(),
            stop,
            requests,
        }))
    }

    /// The token of this account now, or soon, and each later one.
    pub fn follow(&self, account: &Account) -> watch::Receiver<Status> {
        let mut accounts = self.0.lock();
        // One whose task ended has no sender any more.
        if let Some(held) = accounts.get(account).filter(|held| held.has_changed().is_ok()) {
            return held.clone();
        }
        let (sender, receiver) = watch::channel(Status::default());
        accounts.insert(account.clone(), receiver.clone());
        self.0.tasks.spawn(renew(self.0.clone(), account.clone(), sender));
        receiver
    }

    pub fn is_stopping(&self) -> bool {
        self.0.stop.is_cancelled()
    }

    /// When nothing asks for tokens any more.
    pub async fn stopped(&self) {
        self.0.stop.cancelled().await;
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// How many accounts have a token or are waiting for one.
    pub fn accounts(&self) -> usize {
        self.0.lock().len()
    }
}

async fn renew(shared: Arc<Shared>, account: Account, sender: watch::Sender<Status>) {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    loop {
        let requested = tokio::select! {
            () = shared.stop.cancelled() => return,
            requested = shared.request(&account) => requested,
        };
        let wait = match requested {
            Ok((token, life)) => {
                backoff.reset();
                tracing::debug!(%account, expires_at = %token.expires_at, "got an istio-token");
                sender.send_replace(Status { token: Some(Arc::new(token)), problem: None });
                shared.options.renewal(life)
            }
            Err(error) => {
                let words = error.to_string();
                let known = sender.borrow().problem.as_ref().is_some_and(|held| held.to_string() == words);
                if !known {
                    let source = std::error::Error::source(&error).map(|source| format!("{source:#}"));
                    tracing::warn!(%account, %error, source, "no istio-token; trying again");
                }
                sender.send_if_modified(|status| {
                    status.problem = Some(Arc::new(error));
                    !known
                });
                backoff.next_delay()
            }
        };
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
        if shared.forget_if_unused(&account, &sender) {
            return;
        }
    }
}

impl TokenOptions {
    fn life(&self) -> Duration {
        self.life.unwrap_or(DEFAULT_LIFE)
    }

    /// How long after a token of this life the next one is asked for.
    fn renewal(&self, life: Duration) -> Duration {
        let half = life / 2;
        let after = self.renew_after.map_or(half, |after| after.min(half));
        let spread = 1.0 - EARLIER_BY * fraction();
        after.mul_f64(spread).max(SHORTEST_WAIT)
    }
}

/// At random between 0 and 1.
fn fraction() -> f64 {
    let (first, _) = uuid::Uuid::new_v4().as_u64_pair();
    (first >> 11) as f64 / (1_u64 << 53) as f64
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<Account, watch::Receiver<Status>>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody but the table waits for it; then it is out of the table.
    fn forget_if_unused(&self, account: &Account, sender: &watch::Sender<Status>) -> bool {
        let mut accounts = self.lock();
        let unused = sender.receiver_count() <= 1;
        if unused {
            accounts.remove(account);
        }
        unused
    }

    /// A token and its life.
    async fn request(&self, account: &Account) -> Result<(Token, Duration), TokenError> {
        let requested = self.request_once(account).await;
        let outcome = match &requested {
            Ok(_) => "issued",
            Err(TokenError::NoAccount(_)) => "no_account",
            Err(TokenError::Forbidden { .. }) => "forbidden",
            Err(TokenError::Refused { .. }) => "refused",
            Err(TokenError::Unreachable { .. }) => "unreachable",
        };
        self.requests.get_or_create(&Outcome { outcome }).inc();
        requested
    }

    async fn request_once(&self, account: &Account) -> Result<(Token, Duration), TokenError> {
        let unreachable = |source| TokenError::Unreachable { account: account.clone(), source };
        let _permit = self.permits.acquire().await.map_err(|_| unreachable(None))?;
        let request = TokenRequest {
            spec: TokenRequestSpec {
                audiences: vec![AUDIENCE.to_owned()],
                expiration_seconds: Some(i64::try_from(self.options.life().as_secs()).unwrap_or(i64::MAX)),
                bound_object_ref: None,
            },
            ..TokenRequest::default()
        };
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &account.namespace);
        let asked = Instant::now();
        let parameters = PostParams::default();
        let answer = accounts.create_token_request(&account.name, &parameters, &request);
        let answer = match tokio::time::timeout(REQUEST_TIMEOUT, answer).await {
            Err(_) => return Err(unreachable(None)),
            Ok(Err(kube::Error::Api(status))) => return Err(refusal(account, status.code, &status.message)),
            Ok(Err(error)) => return Err(unreachable(Some(Box::new(error)))),
            Ok(Ok(answer)) => answer,
        };
        let refused = |answer: &str| TokenError::Refused { account: account.clone(), answer: answer.to_owned() };
        let status = answer.status.ok_or_else(|| refused("its answer has no status"))?;
        // The client's `jiff` is an older one than ours.
        let end = status.expiration_timestamp.0;
        let expires_at = Timestamp::new(end.as_second(), end.subsec_nanosecond());
        let expires_at = expires_at.map_err(|_| refused("its answer has no usable end"))?;
        let value = status.token;
        if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(refused("its answer has no token"));
        }
        let life = life_of(&value).or_else(|| Duration::try_from(expires_at.duration_since(Timestamp::now())).ok());
        let life = life.filter(|life| !life.is_zero()).ok_or_else(|| refused("its token has already expired"))?;
        let ends = asked.checked_add(life).ok_or_else(|| refused("its token never ends"))?;
        Ok((Token { value, expires_at, ends }, life))
    }
}

fn refusal(account: &Account, code: u16, message: &str) -> TokenError {
    let account = account.clone();
    let answer: String = message.chars().filter(|c| !c.is_control()).take(300).collect();
    match code {
        404 => TokenError::NoAccount(account),
        401 | 403 => TokenError::Forbidden { account, answer },
        _ => TokenError::Refused { account, answer },
    }
}

/// `exp` less `iat`: by one clock, whichever it is. The API server's word is taken for it, as no other than it can be asked.
fn life_of(token: &str) -> Option<Duration> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&claims).ok()?;
    let number = |name| claims.get(name).and_then(serde_json::Value::as_i64);
    u64::try_from(number("exp")?.checked_sub(number("iat")?)?).ok().map(Duration::from_secs)
}

#[cfg(test)]
impl Token {
    pub(super) fn for_tests(value: &str, expires_at: Timestamp) -> Self {
        Self { value: value.to_owned(), expires_at, ends: Instant::now() + Duration::from_secs(60) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewed_at_half_its_life_or_a_little_earlier() {
        let hour = Duration::from_secs(3600);
        for _ in 0..100 {
            let after = TokenOptions::default().renewal(hour);
            assert!(after <= hour / 2 && after >= hour.mul_f64(0.45), "{after:?}");
        }
        let sooner = TokenOptions { renew_after: Some(Duration::from_secs(10)), life: None };
        assert!(sooner.renewal(hour) <= Duration::from_secs(10));
        let later = TokenOptions { renew_after: Some(hour), life: None };
        assert!(later.renewal(hour) <= hour / 2);
        // However short a life, the API server isn't asked without end.
        assert_eq!(TokenOptions::default().renewal(Duration::ZERO), SHORTEST_WAIT);
    }

    #[test]
    fn its_life_is_told_by_one_clock() {
        let token = |claims: &str| format!("e30.{}.x", URL_SAFE_NO_PAD.encode(claims));
        assert_eq!(life_of(&token(r#"{"iat":100,"exp":700}"#)), Some(Duration::from_secs(600)));
        for bad in [r#"{"iat":700,"exp":100}"#, r#"{"exp":100}"#, "no", r#"{"iat":"1","exp":2}"#] {
            assert_eq!(life_of(&token(bad)), None, "{bad}");
        }
        assert_eq!(life_of(""), None);
        assert_eq!(life_of("a.!.c"), None);
    }

    #[test]
    fn refusals_say_the_way_out() {
        let account = Account { namespace: "bookinfo".to_owned(), name: "ratings-vm".to_owned() };
        let words = |code, message| refusal(&account, code, message).to_string();
        assert_eq!(
            words(404, "not found"),
            "the ServiceAccount bookinfo/ratings-vm, which the WorkloadGroup names, doesn't exist; make it (kubectl create serviceaccount ratings-vm -n bookinfo), or change spec.template.serviceAccount"
        );
        assert!(words(403, "no\u{1b}[2J").contains("create on serviceaccounts/token in that namespace (no[2J)"));
        assert!(words(422, "at least 10 minutes").ends_with("bookinfo/ratings-vm: at least 10 minutes"));
    }

    #[test]
    fn a_token_is_in_no_log() {
        let token = Token::for_tests("secret", Timestamp::UNIX_EPOCH);
        assert!(!format!("{:?}", Status { token: Some(Arc::new(token)), problem: None }).contains("secret"));
    }
}
