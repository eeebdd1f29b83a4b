//! The roots of the mesh, and how one takes the place of another without a request failing.
//!
//! Every certificate that an agent gets comes with the roots of that moment, and it gets a new one within the life of the last. So
//! 1. **introducing**: a new root is made and handed out beside the old one, which still signs. When every certificate of before has ended,
//!    whoever has a valid one knows both roots.
//! 2. **retiring**: the new one signs; the old one is still handed out, and its key is gone. When every certificate that it signed has ended,
//! 3. it is **steady** again, with the new root alone.
//!
//! All that counts is in one file that is replaced whole, so that whoever starts next goes on from there: a step that was not written was
//! not taken. A sidecar whose agent has been away for longer than a certificate lives is out of the mesh meanwhile in any case.

use super::SKEW;
use super::root::Root;
use anyhow::{anyhow, bail, ensure};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A root that has no longer than this left is replaced without being asked to.
const RENEWED_BEFORE: Duration = Duration::from_secs(180 * 24 * 3600);
/// In the file, beside certificates and keys.
const NOTES: &str = "ONBOARDING MESH ROOTS";

pub(super) struct Roots {
    /// The one that signs.
    pub signing: Root,
    stage: Stage,
    notes: Notes,
}

enum Stage {
    Steady,
    Introducing { new: Box<Root>, since: Timestamp },
    Retiring { old: Box<Root>, since: Timestamp },
}

/// What the file says besides.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Notes {
    /// `introducing` or `retiring`; absent: steady.
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<StageName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<Timestamp>,
    /// The longest life, in seconds, that certificates were issued with.
    longest_life: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum StageName {
    Introducing,
    Retiring,
}

impl Roots {
    pub fn make(trust_domain: &str, leaf_life: Duration, now: Timestamp) -> anyhow::Result<Self> {
        let notes = Notes { longest_life: leaf_life.as_secs(), ..Notes::default() };
        Ok(Self { signing: Root::make(trust_domain, now)?, stage: Stage::Steady, notes })
    }

    /// Also of a file of before there were notes in it: one certificate and its key.
    pub fn read(text: &str, trust_domain: &str) -> anyhow::Result<Self> {
        let mut notes = Notes::default();
        let mut roots: Vec<(pem::Pem, Option<pem::Pem>)> = Vec::new();
        for block in pem::parse_many(text)? {
            let tag = block.tag().to_owned();
            match (tag.as_str(), roots.last_mut()) {
                ("CERTIFICATE", _) => roots.push((block, None)),
                ("PRIVATE KEY", Some((_, key))) if key.is_none() => *key = Some(block),
                (NOTES, _) => {
                    notes = serde_json::from_slice(block.contents()).map_err(|error| anyhow!("{NOTES}: {error}"))?;
                }
                (tag, _) => bail!("a block {tag:?} is out of place"),
            }
        }
        let mut roots = roots.into_iter().map(|(certificate, key)| Root::read(certificate, key, trust_domain));
        let signing = roots.next().ok_or_else(|| anyhow!("there is no CERTIFICATE in it"))??;
        signing.issuer()?;
        let other = roots.next().transpose()?;
        ensure!(roots.next().is_none(), "there are more than two certificates in it");
        let since = notes.since.ok_or_else(|| anyhow!("{NOTES}: since is missing"));
        let stage = match (notes.stage, other) {
            (None, None) => Stage::Steady,
            (Some(StageName::Introducing), Some(new)) => {
                new.issuer()?;
                Stage::Introducing { new: Box::new(new), since: since? }
            }
            (Some(StageName::Retiring), Some(old)) => Stage::Retiring { old: Box::new(old), since: since? },
            (stage, other) => bail!("it has {} certificates and is {stage:?}", 1 + usize::from(other.is_some())),
        };
        Ok(Self { signing, stage, notes })
    }

    /// For the plane's own file.
    pub fn text(&self) -> String {
        let other = match &self.stage {
            Stage::Steady => None,
            Stage::Introducing { new, .. } => Some(new),
            Stage::Retiring { old, .. } => Some(old),
        };
        let mut blocks: Vec<pem::Pem> = self.signing.blocks().collect();
        blocks.extend(other.iter().flat_map(|root| root.blocks()));
        blocks.push(pem::Pem::new(NOTES, serde_json::to_vec(&self.notes).unwrap_or_default()));
        pem::encode_many_config(&blocks, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
    }

    /// PEM of all that are trusted now, the one that signs first.
    pub fn bundle(&self) -> String {
        match &self.stage {
            Stage::Steady => self.signing.pem(),
            Stage::Introducing { new: other, .. } | Stage::Retiring { old: other, .. } => {
                self.signing.pem() + &other.pem()
            }
        }
    }

    /// Until when every certificate that was issued before `since` has ended.
    fn overlap_ends(&self, since: Timestamp) -> Timestamp {
        let overlap = Duration::from_secs(self.notes.longest_life) + SKEW;
        since.checked_add(overlap).unwrap_or(Timestamp::MAX)
    }

    /// When this stage is over; `None`: it is steady.
    pub fn next_at(&self) -> Option<Timestamp> {
        match &self.stage {
            Stage::Steady => None,
            Stage::Introducing { since, .. } | Stage::Retiring { since, .. } => Some(self.overlap_ends(*since)),
        }
    }

    /// In words.
    pub fn describe(&self) -> (&'static str, String) {
        match &self.stage {
            Stage::Steady => ("steady", format!("one root, {}", self.signing.fingerprint())),
            Stage::Introducing { new, .. } => (
                "introducing",
                format!("{} signs, {} is made known beside it", self.signing.fingerprint(), new.fingerprint()),
            ),
            Stage::Retiring { old, .. } => (
                "retiring",
                format!("{} signs, {} is trusted beside it", self.signing.fingerprint(), old.fingerprint()),
            ),
        }
    }

    /// With certificates of this life; `None`: nothing changes.
    pub fn with_life(&self, leaf_life: Duration, trust_domain: &str) -> anyhow::Result<Option<Self>> {
        let longest_life = leaf_life.as_secs().max(self.notes.longest_life);
        if longest_life == self.notes.longest_life {
            return Ok(None);
        }
        let mut next = self.again(trust_domain)?;
        next.notes.longest_life = longest_life;
        Ok(Some(next))
    }

    /// As the next start will read it.
    fn again(&self, trust_domain: &str) -> anyhow::Result<Self> {
        Self::read(&self.text(), trust_domain)
    }

    /// A new root beside the one there is, which must be steady.
    pub fn begin(&self, trust_domain: &str, now: Timestamp) -> anyhow::Result<Self> {
        ensure!(matches!(self.stage, Stage::Steady), "one is being replaced already");
        let mut next = self.again(trust_domain)?;
        next.stage = Stage::Introducing { new: Box::new(Root::make(trust_domain, now)?), since: now };
        Ok(next.noted())
    }

    /// What is due; `None`: nothing.
    pub fn due(&self, trust_domain: &str, now: Timestamp) -> anyhow::Result<Option<Self>> {
        if let Stage::Steady = self.stage {
            let left = RENEWED_BEFORE.max(Duration::from_secs(self.notes.longest_life) * 4);
            let ends = now.checked_add(left).unwrap_or(Timestamp::MAX) >= self.signing.ends_at;
            // One that has ended helps nobody over to the next.
            return if ends && now < self.signing.ends_at { self.begin(trust_domain, now).map(Some) } else { Ok(None) };
        }
        if self.next_at().is_none_or(|at| now < at) {
            return Ok(None);
        }
        let mut next = self.again(trust_domain)?;
        if let Stage::Introducing { new, .. } = std::mem::replace(&mut next.stage, Stage::Steady) {
            let old = std::mem::replace(&mut next.signing, *new).without_key();
            next.stage = Stage::Retiring { old: Box::new(old), since: now };
        }
        Ok(Some(next.noted()))
    }

    fn noted(mut self) -> Self {
        (self.notes.stage, self.notes.since) = match &self.stage {
            Stage::Steady => (None, None),
            Stage::Introducing { since, .. } => (Some(StageName::Introducing), Some(*since)),
            Stage::Retiring { since, .. } => (Some(StageName::Retiring), Some(*since)),
        };
        self
    }
}
