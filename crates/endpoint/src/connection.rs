//! What is known of one connection: its peer, its challenge, and the key that it has proven.

use crate::limits::{Budget, exhausted};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ParsedPublicKey};
use onboarding_core::identity::Thumbprint;
use onboarding_core::token::Claims;
use onboarding_wire::onboarding::KeyProof;
use onboarding_wire::proof::{Purpose, signed_bytes, thumbprint};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tonic::{Request, Status};

const MINUTE: Duration = Duration::from_secs(60);

pub(crate) type Challenge = [u8; 32];

/// A P-256 SubjectPublicKeyInfo is 91 bytes; its signature in DER at most 72.
const LONGEST_PUBLIC_KEY: usize = 128;
const LONGEST_SIGNATURE: usize = 80;
/// The algorithm identifier that a P-256 SubjectPublicKeyInfo with an uncompressed point begins with (RFC 5480).
const P256_SPKI_PREFIX: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];

/// In the extensions of each of its requests, as `Arc<Connection>`.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) peer: SocketAddr,
    facts: Mutex<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    challenge: Option<Challenge>,
    proven: Option<Thumbprint>,
    admitted: bool,
    /// The last token of ours on it.
    token: Option<Known>,
    /// Begins with the first authorization.
    authorizations: Option<Budget>,
}

/// A token that this plane signed or verified on this connection: its signature is good for as long as the connection lives.
#[derive(Debug)]
struct Known {
    /// SHA-256 of the token, which is twenty times as long.
    token: [u8; 32],
    claims: Arc<Claims>,
}

impl Connection {
    pub(crate) fn new(peer: SocketAddr) -> Self {
        Self { peer, facts: Mutex::default() }
    }

    /// The connection that a request came on.
    pub(crate) fn of<T>(request: &Request<T>) -> Result<Arc<Self>, Status> {
        request
            .extensions()
            .get::<Arc<Self>>()
            .cloned()
            .ok_or_else(|| Status::internal("the request came on no connection of this endpoint"))
    }

    /// A fresh challenge, in place of an earlier one.
    pub(crate) fn challenge(&self) -> Result<Challenge, Status> {
        let mut challenge = [0; 32];
        aws_lc_rs::rand::fill(&mut challenge).map_err(|_| Status::internal("no randomness for a challenge"))?;
        self.lock().challenge = Some(challenge);
        Ok(challenge)
    }

    /// Verifies a proof over this connection's challenge, which it uses up whether it is good or not.
    pub(crate) fn prove(
        &self,
        plane_uid: &str,
        proof: Option<&KeyProof>,
        purpose: Purpose<'_>,
    ) -> Result<(Thumbprint, Challenge), Status> {
        let challenge = self.lock().challenge.take().ok_or_else(|| {
            Status::failed_precondition(
                "this connection has no challenge: call Discover first; a challenge serves one call, on its own connection",
            )
        })?;
        let proof = proof.ok_or_else(|| Status::unauthenticated("the proof of the agent's key is missing"))?;
        if proof.public_key.len() > LONGEST_PUBLIC_KEY || !proof.public_key.starts_with(&P256_SPKI_PREFIX) {
            return Err(Status::unauthenticated("the agent's key is no P-256 SubjectPublicKeyInfo"));
        }
        if proof.signature.len() > LONGEST_SIGNATURE {
            return Err(Status::unauthenticated("the agent's signature is longer than one can be"));
        }
        let key = ParsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &proof.public_key)
            .map_err(|_| Status::unauthenticated("the agent's key is no point of P-256"))?;
        key.verify_sig(&signed_bytes(plane_uid, &challenge, purpose), &proof.signature).map_err(|_| {
            Status::unauthenticated(
                "the agent's signature does not fit its key, this connection's challenge, the evidence and the group",
            )
        })?;
        Ok((thumbprint(&proof.public_key), challenge))
    }

    /// At most so many within a minute.
    pub(crate) fn authorization(&self, most: u32) -> Result<(), Status> {
        let mut facts = self.lock();
        let budget = facts.authorizations.get_or_insert_with(|| Budget::new(most, MINUTE));
        match budget.spend() {
            true => Ok(()),
            false => Err(exhausted("too many authorizations on this connection", budget.wait())),
        }
    }

    pub(crate) fn proven(&self) -> Option<Thumbprint> {
        self.lock().proven
    }

    pub(crate) fn set_proven(&self, key: Thumbprint) {
        self.lock().proven = Some(key);
    }

    /// Whether a token was issued or accepted on it: a key alone, which anybody can make, keeps no connection open.
    pub(crate) fn admitted(&self) -> bool {
        self.lock().admitted
    }

    pub(crate) fn set_admitted(&self) {
        self.lock().admitted = true;
    }

    /// A token whose signature is ours; what it says may be used is judged each time anew.
    pub(crate) fn know(&self, token: &str, claims: &Arc<Claims>) {
        self.lock().token = Some(Known { token: sha256(token), claims: claims.clone() });
    }

    pub(crate) fn known(&self, token: &str) -> Option<Arc<Claims>> {
        let facts = self.lock();
        facts.token.as_ref().filter(|known| known.token == sha256(token)).map(|known| known.claims.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Facts> {
        // Each of them is whole whatever panicked while they were held.
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sha256(token: &str) -> [u8; 32] {
    let mut sum = [0; 32];
    sum.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
    sum
}
