//! The key that packages and indexes are signed with, and its public half.
//!
//! An OpenPGP key of version 4 with RSA: what gpgv of Debian buster, sqv of trixie and rpm 4.11 all verify (rpm before 4.15 has no
//! Ed25519). It doesn't expire, nor do its signatures: a machine that was off for months must be able to verify what it finds then.

use pgp::composed::{
    ArmorOptions, CleartextSignedMessage, Deserializable, DetachedSignature, KeyType, SecretKeyParamsBuilder,
    SignedPublicKey, SignedSecretKey,
};
use pgp::crypto::hash::HashAlgorithm;
use pgp::crypto::public_key::PublicKeyAlgorithm;
use pgp::packet::{Signature, SignatureConfig, SignatureType, Subpacket, SubpacketData};
use pgp::types::{KeyDetails, KeyVersion, Password, Timestamp};
use rand_08::rngs::OsRng;
use rpm::signature::pgp::{Signer, Verifier};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const BITS: u32 = 3072;
const USER: &str = "Workload Onboarding packages";
/// A file of one key.
const LARGEST_FILE: u64 = 256 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{doing} {}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{} lies in the directory of packages, where a server could read it: --signing-key FILE elsewhere", .0.display())]
    InLibrary(PathBuf),
    #[error("others than its owner may read {} (mode {mode:04o}): chmod 600 it, and think whether they did", .path.display())]
    Open { path: PathBuf, mode: u32 },
    #[error("{} is no OpenPGP secret key in ASCII armor (gpg --export-secret-keys --armor)", .0.display())]
    NoKey(PathBuf, #[source] Option<pgp::errors::Error>),
    #[error("the key in {} can't be used: it must be RSA of version 4 that signs, without a passphrase", .0.display())]
    OtherKey(PathBuf),
    #[error("making a key: {0}")]
    Parameters(String),
    #[error("signing")]
    Sign(#[from] pgp::errors::Error),
    #[error("signing an RPM package")]
    Rpm(#[from] rpm::Error),
}

/// Signs.
pub struct SigningKey {
    key: SignedSecretKey,
    signer: Signer,
}

impl SigningKey {
    /// The key of this file, which is made, for its owner alone, where there is none. Says whether it was made.
    ///
    /// # Errors
    /// It lies below `library`, is open to others, or is no key of ours.
    pub fn load_or_make(path: &Path, library: &Path, now: u32) -> Result<(Self, bool), Error> {
        let io = |doing| move |source| Error::Io { doing, path: path.to_owned(), source };
        let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        let real = fs::canonicalize(folder).map_err(io("finding the directory of"))?;
        if real.starts_with(fs::canonicalize(library).map_err(io("finding the packages beside"))?) {
            return Err(Error::InLibrary(path.to_owned()));
        }
        let made = match File::open(path) {
            Ok(_) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let armored = generate(now)?;
                // Made with mode 0600, and never over one that another process made meanwhile.
                let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io("writing"))?;
                file.write_all(armored.as_bytes()).map_err(io("writing"))?;
                file.as_file().sync_all().map_err(io("writing"))?;
                file.persist_noclobber(path).map_err(|error| io("writing")(error.error))?;
                File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("writing"))?;
                true
            }
            Err(error) => return Err(io("opening")(error)),
        };
        Ok((Self::load(path)?, made))
    }

    fn load(path: &Path) -> Result<Self, Error> {
        let io = |source| Error::Io { doing: "reading", path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let mode = file.metadata().map_err(io)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(Error::Open { path: path.to_owned(), mode });
        }
        let mut text = String::new();
        file.take(LARGEST_FILE).read_to_string(&mut text).map_err(io)?;
        let (key, _) =
            SignedSecretKey::from_string(&text).map_err(|error| Error::NoKey(path.to_owned(), Some(error)))?;
        key.verify_bindings().map_err(|error| Error::NoKey(path.to_owned(), Some(error)))?;
        let primary = &key.primary_key;
        let signs = key.details.users.iter().flat_map(|user| &user.signatures).any(|sig| sig.key_flags().sign());
        let usable = primary.version() == KeyVersion::V4
            && primary.algorithm() == PublicKeyAlgorithm::RSA
            && !primary.secret_params().is_encrypted()
            && signs;
        if !usable {
            return Err(Error::OtherKey(path.to_owned()));
        }
        let signer = Signer::from_asc(&text)?.with_signing_key(primary.fingerprint().as_bytes())?;
        Ok(Self { key, signer })
    }

    /// In ASCII armor, for `/etc/apt/keyrings` and `gpgkey=`.
    ///
    /// # Errors
    /// It can't be written.
    pub fn public(&self) -> Result<String, Error> {
        Ok(self.key.to_public_key().to_armored_string(options())?)
    }

    /// Lower-case hexadecimal.
    pub fn fingerprint(&self) -> String {
        format!("{:x}", self.key.primary_key.fingerprint())
    }

    /// `text` with its signature in one: `InRelease`.
    ///
    /// # Errors
    /// It can't be signed.
    pub fn clear(&self, text: &str, now: u32) -> Result<String, Error> {
        let config = self.config(SignatureType::Text, now)?;
        // The last line's end isn't part of what is signed (RFC 9580, section 7.2).
        let text = text.trim_end_matches('\n');
        let signed = CleartextSignedMessage::new(text, config, &self.key.primary_key, &Password::empty())?;
        Ok(signed.to_armored_string(options())?)
    }

    /// A signature beside what it is of.
    ///
    /// # Errors
    /// It can't be signed.
    pub fn detached(&self, data: &[u8], now: u32) -> Result<String, Error> {
        let config = self.config(SignatureType::Binary, now)?;
        let signature = config.sign(&self.key.primary_key, &Password::empty(), data)?;
        Ok(DetachedSignature::new(signature).to_armored_string(options())?)
    }

    /// The RPM package with this key's signature in place of whatever it had. The same package gives the same bytes: the signature is dated by
    /// the package, or by the key where that is younger.
    ///
    /// # Errors
    /// It is no RPM package that can be signed.
    pub fn sign_rpm(&self, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let mut package = rpm::Package::parse(&mut &bytes[..])?;
        let built = package.metadata.get_build_time().ok().and_then(|time| u32::try_from(time).ok()).unwrap_or(0);
        package.clear_signatures()?;
        // An RPM says its length where only the signature is new; what a reader trusts must not shrink with it.
        package.sign_with_timestamp(&self.signer, built.max(self.signs_since()))?;
        let mut signed = Vec::with_capacity(bytes.len() + 4096);
        package.write(&mut signed)?;
        Ok(signed)
    }

    /// From when on it signs: no signature is good that is older than the key, or than the key's own word that it may sign (its
    /// self-signature, which is made a moment later).
    fn signs_since(&self) -> u32 {
        let own = self.key.details.users.iter().flat_map(|user| &user.signatures).filter_map(Signature::created);
        own.chain([self.key.primary_key.created_at()]).map(|time| time.as_secs()).max().unwrap_or_default()
    }

    fn config(&self, kind: SignatureType, now: u32) -> Result<SignatureConfig, Error> {
        let key = &self.key.primary_key;
        let mut config = SignatureConfig::v4(kind, key.algorithm(), HashAlgorithm::Sha512);
        let time = Timestamp::from_secs(now.max(self.signs_since()));
        config.hashed_subpackets = vec![
            Subpacket::regular(SubpacketData::SignatureCreationTime(time))?,
            Subpacket::regular(SubpacketData::IssuerFingerprint(key.fingerprint()))?,
        ];
        config.unhashed_subpackets = vec![Subpacket::regular(SubpacketData::IssuerKeyId(key.legacy_key_id()))?];
        Ok(config)
    }
}

/// A key's file, in ASCII armor.
fn generate(now: u32) -> Result<String, Error> {
    let parameters = SecretKeyParamsBuilder::default()
        .version(KeyVersion::V4)
        .key_type(KeyType::Rsa(BITS))
        .can_sign(true)
        .can_certify(true)
        .created_at(Timestamp::from_secs(now))
        .preferred_hash_algorithms([HashAlgorithm::Sha512, HashAlgorithm::Sha256].into_iter().collect())
        .primary_user_id(USER.to_owned())
        .build()
        .map_err(|error| Error::Parameters(error.to_string()))?;
    Ok(parameters.generate(OsRng)?.to_armored_string(options())?)
}

fn options() -> ArmorOptions<'static> {
    ArmorOptions::default()
}

/// The public half; verifies.
pub struct PublicKey {
    key: SignedPublicKey,
    verifier: Verifier,
}

impl PublicKey {
    /// Of `onboarding.asc`. `None`: it is no public key.
    pub fn parse(armored: &str) -> Option<Self> {
        let (key, _) = SignedPublicKey::from_string(armored).ok()?;
        key.verify_bindings().ok()?;
        let verifier = Verifier::from_asc(armored).ok()?;
        Some(Self { key, verifier })
    }

    /// What was signed, if it was by this key.
    pub fn clear(&self, signed: &str) -> Option<String> {
        let (message, _) = CleartextSignedMessage::from_string(signed).ok()?;
        message.verify(&self.key.primary_key).ok()?;
        Some(message.signed_text().replace("\r\n", "\n").trim_end_matches('\n').to_owned() + "\n")
    }

    pub fn detached(&self, data: &[u8], signature: &str) -> bool {
        let Ok((signature, _)) = DetachedSignature::from_string(signature) else { return false };
        signature.verify(&self.key.primary_key, data).is_ok()
    }

    pub fn is_of_rpm(&self, package: &rpm::PackageMetadata) -> bool {
        package.verify_signature(&self.verifier).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_for_its_owner_and_never_among_the_packages() {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("packages");
        fs::create_dir(&library).unwrap();
        let path = dir.path().join("key.asc");
        let (key, made) = SigningKey::load_or_make(&path, &library, 1_790_000_000).unwrap();
        assert!(made);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let (again, made) = SigningKey::load_or_make(&path, &library, 1_790_000_001).unwrap();
        assert!(!made && again.fingerprint() == key.fingerprint());

        // However old the request is: the key's self-signature was made just now.
        let armored = key.detached(b"data", 1_790_000_000).unwrap();
        let (signature, _) = DetachedSignature::from_string(&armored).unwrap();
        let bound = key.key.details.users[0].signatures[0].created().unwrap();
        assert!(bound.as_secs() > 1_790_000_000 && signature.signature.created().unwrap() >= bound);

        let public = PublicKey::parse(&key.public().unwrap()).unwrap();
        let clear = key.clear("a: 1\n- b\n", 1_790_000_002).unwrap();
        assert_eq!(public.clear(&clear).as_deref(), Some("a: 1\n- b\n"));
        assert_eq!(public.clear(&clear.replace("a: 1", "a: 2")), None);
        let signature = key.detached(b"data", 1_790_000_002).unwrap();
        assert!(public.detached(b"data", &signature) && !public.detached(b"date", &signature));

        let refused = |path: &Path| SigningKey::load_or_make(path, &library, 0).err().unwrap().to_string();
        assert!(refused(&library.join("key.asc")).contains("lies in the directory of packages"));
        fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        assert!(refused(&path).contains("others than its owner may read"));
        let other = dir.path().join("other.asc");
        fs::write(&other, key.public().unwrap()).unwrap();
        fs::set_permissions(&other, PermissionsExt::from_mode(0o600)).unwrap();
        assert!(refused(&other).contains("is no OpenPGP secret key"));
    }
}
