//! Callers by STS: the host signs `GetCallerIdentity` with its credentials, the plane sends it, and AWS says who that is.
//!
//! The request is *rebuilt* from parts that can't mean anything else; the header that binds it to plane, challenge and key
//! is the plane's own computation. So a request captured elsewhere has a signature that AWS refuses.
//! Building the request and understanding the answer are pure; asking stands behind [`CallerIdentitySource`].

use super::document::{is_account, is_instance_id};
use super::region;
use crate::fetch::{Answer, FetchError, Fetcher, Scheme};
use crate::{AttestError, shown};
use async_trait::async_trait;
use aws_lc_rs::digest::{Context as Hash, SHA256};
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use onboarding_core::identity::Thumbprint;
use onboarding_wire::onboarding::SignedCallerIdentity;
use onboarding_wire::proof::{STS_BINDING_HEADER, STS_BODY, STS_CONTENT_TYPE, sts_host};
use quick_xml::Reader;
use quick_xml::events::Event;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Who signed a request, as AWS says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallerIdentity {
    pub partition: String,
    /// 12 digits.
    pub account: String,
    pub principal: Principal,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// `assumed-role/aws:ec2-instance/<instance id>`: only AWS hands out these credentials, on that instance.
    Instance { id: String },
    /// `assumed-role/<role>/<session>`. Whoever may assume the role chooses the session's name.
    Role { name: String, session: String },
}

/// A request for `GetCallerIdentity`. It has no `Debug`: it carries a session token.
pub struct Request {
    /// `sts.<region>.amazonaws.com`
    pub host: String,
    region: String,
    amz_date: String,
    access_key_id: String,
    session_token: String,
    binding: String,
    signature: String,
}

/// AWS's limit for a signature's age is 15 minutes; an agent signs when it is about to ask.
const LARGEST_SKEW: SignedDuration = SignedDuration::from_mins(5);

impl Request {
    /// From the parts that a host presents. `region` is where the host is, `binding` that of `onboarding_wire::proof`.
    /// Errors say what is wrong with which part; they don't quote credentials.
    pub fn rebuild(
        parts: &SignedCallerIdentity,
        region: &str,
        binding: String,
        now: Timestamp,
    ) -> Result<Self, String> {
        if parts.region != region || region::partition(region).is_none() {
            return Err(format!("it is made for region {}, but the host is in {region:?}", shown(&parts.region)));
        }
        let at = DateTime::strptime("%Y%m%dT%H%M%SZ", &parts.amz_date)
            .and_then(|at| TimeZone::UTC.to_timestamp(at))
            .ok()
            .filter(|at| at.strftime("%Y%m%dT%H%M%SZ").to_string() == parts.amz_date)
            .ok_or_else(|| "its date isn't of the form 20261124T110000Z".to_owned())?;
        if now.duration_since(at).abs() > LARGEST_SKEW {
            return Err(format!("it was signed at {at}, but here it is {now:.0}; set the clock of the host"));
        }
        let key = parts.access_key_id.as_str();
        if !(16..=128).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit()) {
            return Err("its access key ID isn't one".to_owned());
        }
        let token = parts.session_token.as_str();
        if !(1..=8192).contains(&token.len()) || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("its session token isn't one".to_owned());
        }
        if parts.signature.len() != 64 || !parts.signature.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err("its signature isn't 64 hexadecimal digits".to_owned());
        }
        Ok(Self {
            host: sts_host(region),
            region: region.to_owned(),
            amz_date: parts.amz_date.clone(),
            access_key_id: parts.access_key_id.clone(),
            session_token: parts.session_token.clone(),
            binding,
            signature: parts.signature.clone(),
        })
    }

    /// All headers but `host`.
    pub fn headers(&self) -> [(&'static str, String); 5] {
        let Self { region, amz_date, access_key_id, .. } = self;
        let date = &amz_date[..8];
        let authorization = format!(
            "AWS4-HMAC-SHA256 Credential={access_key_id}/{date}/{region}/sts/aws4_request, SignedHeaders=content-type;host;x-amz-date;x-amz-security-token;{STS_BINDING_HEADER}, Signature={}",
            self.signature
        );
        [
            ("authorization", authorization),
            ("content-type", STS_CONTENT_TYPE.to_owned()),
            ("x-amz-date", amz_date.clone()),
            ("x-amz-security-token", self.session_token.clone()),
            (STS_BINDING_HEADER, self.binding.clone()),
        ]
    }

    /// The credentials' name in the cache.
    fn credentials(&self) -> [u8; 32] {
        let mut hash = Hash::new(&SHA256);
        for part in [&self.access_key_id, &self.session_token] {
            hash.update(&(part.len() as u64).to_be_bytes());
            hash.update(part.as_bytes());
        }
        let mut out = [0; 32];
        out.copy_from_slice(hash.finish().as_ref());
        out
    }
}

/// What STS said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub status: u16,
    /// At most 64 KiB.
    pub body: Vec<u8>,
}

/// Somebody who asks STS. An error is a sentence that begins with what STS did: it answered nothing that could be judged.
#[async_trait]
pub trait CallerIdentitySource: Send + Sync {
    async fn ask(&self, request: &Request) -> Result<Said, String>;
}

/// AWS's STS, by HTTP.
pub struct Sts {
    fetcher: Fetcher,
    /// Where to connect instead of to `https://<host>`.
    endpoint: Option<String>,
}

const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const LARGEST_ANSWER: usize = 64 * 1024;

impl Sts {
    /// `endpoint`: `http://127.0.0.1:8443`, without a path; `None` is AWS.
    pub fn new(endpoint: Option<String>) -> Result<Self, String> {
        let scheme = match &endpoint {
            None => Scheme::HttpsOnly,
            Some(url) => {
                let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://")).unwrap_or_default();
                if host.is_empty() || host.contains(['/', '?', '#', '@']) {
                    return Err(format!("the STS endpoint {url:?} isn't of the form http://HOST:PORT"));
                }
                Scheme::AsNamed
            }
        };
        Ok(Self { fetcher: Fetcher::new(scheme, None)?, endpoint })
    }
}

#[async_trait]
impl CallerIdentitySource for Sts {
    async fn ask(&self, request: &Request) -> Result<Said, String> {
        let url = match &self.endpoint {
            Some(endpoint) => format!("{endpoint}/"),
            None => format!("https://{}/", request.host),
        };
        let mut message = self.fetcher.post(&url).header("host", &request.host).header("accept", "text/xml");
        for (name, value) in request.headers() {
            message = message.header(name, value);
        }
        let sent = self.fetcher.send(message.body(STS_BODY), ANSWER_WITHIN, LARGEST_ANSWER).await;
        sent.map(|Answer { status, body }| Said { status, body })
            .map_err(|error: FetchError| format!("{} {error}", request.host))
    }
}

/// A source, and what it answered to each agent's key in the last five minutes.
pub struct Callers {
    source: Box<dyn CallerIdentitySource>,
    answers: Mutex<Answers>,
}

/// The agent's key is part of the name: its possession is proven anew each time, so that whoever finds an answer here is who it was given to.
type Name = (Thumbprint, [u8; 32]);

#[derive(Default)]
struct Answers {
    by_name: HashMap<Name, (CallerIdentity, Timestamp)>,
    /// Oldest first, as all live equally long.
    order: VecDeque<(Name, Timestamp)>,
}

const ANSWERS_LIVE: SignedDuration = SignedDuration::from_mins(5);
const MOST_ANSWERS: usize = 20_000;

impl Callers {
    pub fn new(source: Box<dyn CallerIdentitySource>) -> Self {
        Self { source, answers: Mutex::default() }
    }

    /// Who signed `request`. Only what AWS affirmed is remembered.
    pub async fn identify(
        &self,
        request: &Request,
        key: Thumbprint,
        now: Timestamp,
    ) -> Result<CallerIdentity, AttestError> {
        let name = (key, request.credentials());
        if let Some(known) = self.answers().get(&name, now) {
            return Ok(known);
        }
        let said = self.source.ask(request).await.map_err(AttestError::Unavailable)?;
        let caller = understand(&said, &request.host)?;
        self.answers().remember(name, caller.clone(), now);
        Ok(caller)
    }

    fn answers(&self) -> std::sync::MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Answers {
    fn get(&self, name: &Name, now: Timestamp) -> Option<CallerIdentity> {
        let (caller, at) = self.by_name.get(name)?;
        // A clock that was set back makes no answer younger.
        let age = now.duration_since(*at);
        (!age.is_negative() && age < ANSWERS_LIVE).then(|| caller.clone())
    }

    fn remember(&mut self, name: Name, caller: CallerIdentity, now: Timestamp) {
        self.by_name.insert(name, (caller, now));
        self.order.push_back((name, now));
        while let Some((oldest, at)) = self.order.front().copied() {
            if self.order.len() <= MOST_ANSWERS && now.duration_since(at) < ANSWERS_LIVE {
                break;
            }
            self.order.pop_front();
            // Unless it was given anew since.
            if self.by_name.get(&oldest).is_some_and(|(_, given)| *given == at) {
                self.by_name.remove(&oldest);
            }
        }
    }
}

/// Reads STS's answer: pure. What can't be understood is an unavailability, not an identity.
pub fn understand(said: &Said, host: &str) -> Result<CallerIdentity, AttestError> {
    let unclear = |problem: &str| AttestError::Unavailable(format!("{host} answered {}: {problem}", said.status));
    let leaves = leaves(&said.body);
    match said.status {
        200 => {
            let leaves = leaves.map_err(|problem| unclear(&format!("not its XML ({problem})")))?;
            read_caller(&leaves).map_err(AttestError::Unavailable)?.ok_or_else(|| {
                AttestError::Refused(format!(
                    "the request was signed by {}, which is neither an instance nor an assumed role",
                    shown(&single(&leaves, ARN).unwrap_or_default())
                ))
            })
        }
        400..=499 => {
            let code = leaves.ok().and_then(|leaves| single(&leaves, "ErrorResponse/Error/Code").ok());
            match code.as_deref().filter(|code| is_code(code)) {
                Some("Throttling" | "ThrottlingException" | "RequestLimitExceeded" | "RequestTimeout") => {
                    Err(unclear("it has too much to do"))
                }
                Some(code) if said.status != 429 => Err(AttestError::Refused(format!(
                    "{host} refused the request ({code}): {}",
                    match code {
                        "ExpiredToken" | "ExpiredTokenException" => "the host's credentials have expired",
                        "SignatureDoesNotMatch" =>
                            "it wasn't signed for this plane, challenge and key, or the host's clock is wrong",
                        "InvalidClientTokenId" => "the credentials are unknown to AWS",
                        _ => "ask AWS's documentation for this code",
                    }
                ))),
                _ => Err(unclear("no error that AWS documents")),
            }
        }
        _ => Err(unclear("no answer of GetCallerIdentity")),
    }
}

fn is_code(code: &str) -> bool {
    (1..=64).contains(&code.len()) && code.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'.')
}

const ARN: &str = "GetCallerIdentityResponse/GetCallerIdentityResult/Arn";
const USER_ID: &str = "GetCallerIdentityResponse/GetCallerIdentityResult/UserId";
const ACCOUNT: &str = "GetCallerIdentityResponse/GetCallerIdentityResult/Account";

/// `None`: a caller of another kind. An error: an answer that contradicts itself.
fn read_caller(leaves: &[Leaf]) -> Result<Option<CallerIdentity>, String> {
    let (arn, user_id, account) = (single(leaves, ARN)?, single(leaves, USER_ID)?, single(leaves, ACCOUNT)?);
    if !is_account(&account) {
        return Err("STS's answer names no account of 12 digits".to_owned());
    }
    let ["arn", partition, "sts", "", of_account, resource] = arn.splitn(6, ':').collect::<Vec<_>>()[..] else {
        return Ok(None);
    };
    if of_account != account {
        return Err(format!("STS's answer contradicts itself: account {account}, but {}", shown(&arn)));
    }
    let ["assumed-role", role, session] = resource.split('/').collect::<Vec<_>>()[..] else { return Ok(None) };
    if !is_name(session) || user_id.rsplit(':').next() != Some(session) {
        return Err(format!("STS's answer contradicts itself: user ID {}, but {}", shown(&user_id), shown(&arn)));
    }
    let principal = if role == "aws:ec2-instance" {
        if !is_instance_id(session) {
            return Err(format!("STS's answer names no instance: {}", shown(&arn)));
        }
        Principal::Instance { id: session.to_owned() }
    } else if is_name(role) {
        Principal::Role { name: role.to_owned(), session: session.to_owned() }
    } else {
        return Ok(None);
    };
    Ok(Some(CallerIdentity { partition: partition.to_owned(), account, principal }))
}

/// Of a role or a session (IAM: `[\w+=,.@-]{1,64}`; a colon never occurs, so nobody's role is called `aws:ec2-instance`).
fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+=,.@-".contains(&b))
}

/// An element without children: its path, and its text.
struct Leaf {
    path: String,
    text: String,
}

fn single(leaves: &[Leaf], path: &str) -> Result<String, String> {
    let mut found = leaves.iter().filter(|leaf| leaf.path == path);
    match (found.next(), found.next()) {
        (Some(leaf), None) => Ok(leaf.text.clone()),
        _ => Err(format!("STS's answer hasn't one {path}")),
    }
}

const DEEPEST: usize = 8;
const MOST_LEAVES: usize = 64;

fn leaves(body: &[u8]) -> Result<Vec<Leaf>, String> {
    let text = std::str::from_utf8(body).map_err(|_| "not UTF-8".to_owned())?;
    let mut reader = Reader::from_str(text);
    // Each open element: its name, its text, whether it has children.
    let mut open: Vec<(String, String, bool)> = Vec::new();
    let (mut all, mut roots) = (Vec::new(), 0);
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Start(element) => {
                if open.len() == DEEPEST || all.len() == MOST_LEAVES {
                    return Err("too large".to_owned());
                }
                match open.last_mut() {
                    Some(parent) => parent.2 = true,
                    None => roots += 1,
                }
                let name: &[u8] = element.local_name().into_inner().as_ref();
                open.push((String::from_utf8_lossy(name).into_owned(), String::new(), false));
            }
            Event::End(_) => {
                let path = open.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>().join("/");
                if let Some((_, text, false)) = open.pop() {
                    all.push(Leaf { path, text: text.trim().to_owned() });
                }
            }
            Event::Text(text) => {
                if let Some((_, all, _)) = open.last_mut() {
                    all.push_str(&text.xml10_content());
                }
            }
            // No name that is wanted has a reference in it: whatever it stands for, it becomes no name.
            Event::GeneralRef(_) => {
                if let Some((_, all, _)) = open.last_mut() {
                    all.push('\u{fffd}');
                }
            }
            Event::Empty(_) | Event::Decl(_) | Event::Comment(_) => {}
            Event::CData(_) | Event::PI(_) | Event::DocType(_) => return Err("with what STS never sends".to_owned()),
            Event::Eof => break,
        }
    }
    if roots == 1 && open.is_empty() { Ok(all) } else { Err("not one whole element".to_owned()) }
}
