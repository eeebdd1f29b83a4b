//! The agent's own key: P-256, made on this host at the first start, and never anywhere else.

use crate::store::{self, StoreError};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use onboarding_core::identity::Thumbprint;
use onboarding_wire::onboarding::KeyProof;
use onboarding_wire::proof::{self, Purpose};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The key that every proof is made with. Its private half can't be read out of this type.
pub struct AgentKey {
    pair: EcdsaKeyPair,
    public_key: Vec<u8>,
}

/// Why there is no key to work with.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the agent's key {path} can be read by others (mode {mode:04o}); make it private with `chmod 600 {path}`, or remove it if somebody may have copied it: the agent makes a new one, and the registration must be deleted once", path = path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the agent's key {path} is not a P-256 key in PKCS #8 PEM; remove the file to have a new one made, and delete the registration once", path = path.display())]
    Unreadable { path: PathBuf },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("making a P-256 key failed in the crypto library")]
    Crypto,
}

impl AgentKey {
    /// Reads `path`, or makes the key there. The file is PKCS #8 in PEM, mode 0600; one that others can read is refused.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        match store::read_bounded(path, 16 * 1024)? {
            Some(text) => Self::load(path, &text),
            None => {
                let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(|_| KeyError::Crypto)?;
                let pkcs8 = pair.to_pkcs8v1().map_err(|_| KeyError::Crypto)?;
                let text = pem::encode(&pem::Pem::new("PRIVATE KEY", pkcs8.as_ref()));
                store::write_atomically(path, text.as_bytes(), 0o600)?;
                tracing::info!(file = %path.display(), "made the agent's key");
                Self::new(pair)
            }
        }
    }

    fn load(path: &Path, text: &[u8]) -> Result<Self, KeyError> {
        let mode = std::fs::metadata(path).map_err(|source| StoreError::read(path, source))?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        let unreadable = || KeyError::Unreadable { path: path.to_owned() };
        let block = pem::parse(text).map_err(|_| unreadable())?;
        if block.tag() != "PRIVATE KEY" {
            return Err(unreadable());
        }
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, block.contents()).map_err(|_| unreadable())?;
        Self::new(pair)
    }

    fn new(pair: EcdsaKeyPair) -> Result<Self, KeyError> {
        let public_key = pair.public_key().as_der().map_err(|_| KeyError::Crypto)?.as_ref().to_vec();
        Ok(Self { pair, public_key })
    }

    /// SHA-256 of the public key: the key's name.
    pub fn thumbprint(&self) -> Thumbprint {
        proof::thumbprint(&self.public_key)
    }

    /// Proves this key for one purpose, over a challenge of the connection that it is sent on.
    pub fn prove(&self, plane_uid: &str, challenge: &[u8], purpose: Purpose<'_>) -> Result<KeyProof, KeyError> {
        let message = proof::signed_bytes(plane_uid, challenge, purpose);
        let signature = self.pair.sign(&SystemRandom::new(), &message).map_err(|_| KeyError::Crypto)?;
        Ok(KeyProof { public_key: self.public_key.clone(), signature: signature.as_ref().to_vec() })
    }
}

impl fmt::Debug for AgentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgentKey({})", self.thumbprint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn is_made_once_and_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.key");
        let first = AgentKey::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let second = AgentKey::load_or_create(&path).unwrap();
        assert_eq!(first.thumbprint(), second.thumbprint());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.key");
        AgentKey::load_or_create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = AgentKey::load_or_create(&path).unwrap_err();
        assert!(matches!(error, KeyError::Exposed { mode: 0o640, .. }), "{error}");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn garbage_and_other_curves_are_refused_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.key");
        let p384 = EcdsaKeyPair::generate(&aws_lc_rs::signature::ECDSA_P384_SHA384_ASN1_SIGNING).unwrap();
        let p384 = pem::encode(&pem::Pem::new("PRIVATE KEY", p384.to_pkcs8v1().unwrap().as_ref()));
        for text in ["", "garbage", &p384] {
            store::write_atomically(&path, text.as_bytes(), 0o600).unwrap();
            let error = AgentKey::load_or_create(&path).unwrap_err();
            assert!(matches!(error, KeyError::Unreadable { .. }), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn a_proof_verifies_for_its_purpose_only() {
        let directory = tempfile::tempdir().unwrap();
        let key = AgentKey::load_or_create(&directory.path().join("agent.key")).unwrap();
        let purpose = Purpose::Authorize { evidence: b"evidence", group: "bookinfo/ratings" };
        let made = key.prove("uid", b"challenge", purpose).unwrap();
        let (_, spki) = x509_parser::x509::SubjectPublicKeyInfo::from_der(&made.public_key).unwrap();
        let verify = |message: &[u8]| {
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &*spki.subject_public_key.data)
                .verify(message, &made.signature)
                .is_ok()
        };
        assert!(verify(&proof::signed_bytes("uid", b"challenge", purpose)));
        assert!(!verify(&proof::signed_bytes("uid", b"another", purpose)));
        assert!(!verify(&proof::signed_bytes("uid", b"challenge", Purpose::UseToken { token: "evidence" })));
    }

    use x509_parser::prelude::FromDer;
}
