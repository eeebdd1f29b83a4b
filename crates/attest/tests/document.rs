//! Identity documents as AWS makes them, each of the ways in which one could be forged, and what OpenSSL makes of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use aws_lc_rs::digest::{SHA256, digest};
use onboarding_attest::aws::certificates::Certificates;
use onboarding_attest::aws::document::{DocumentError, InstanceIdentity, verify};
use onboarding_testkit::cms::{
    CONTENT_TYPE, DATA, MESSAGE_DIGEST, Parts, RegionKey, SHA1_OID, SHA1_WITH_RSA, SHA256_OID, SIGNED_DATA,
    SIGNING_TIME, Signer, algorithm, attribute, attribute_with, indefinite, lines, octet_string, oid, tlv,
};
use onboarding_testkit::imds::Instance;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

const REGION: &str = "us-east-2";

static KEY: LazyLock<RegionKey> = LazyLock::new(|| RegionKey::generate(REGION).unwrap());
/// Another region's, pinned too.
static OTHER_REGION: LazyLock<RegionKey> = LazyLock::new(|| RegionKey::generate("eu-west-1").unwrap());
/// Somebody's.
static FORGER: LazyLock<RegionKey> = LazyLock::new(|| RegionKey::generate(REGION).unwrap());
static CERTIFICATES: LazyLock<Certificates> = LazyLock::new(|| {
    let mut certificates = Certificates::default();
    certificates.add(&KEY.pinned()).unwrap();
    certificates.add(&OTHER_REGION.pinned()).unwrap();
    certificates
});

/// Made once: it has the time of the instance's launch in it.
static CONTENT: LazyLock<String> = LazyLock::new(|| {
    Instance {
        account: "123456789012".to_owned(),
        region: REGION.to_owned(),
        zone: "us-east-2b".to_owned(),
        instance_id: "i-1234567890abcdef0".to_owned(),
        role: None,
        private_ip: "10.0.0.1".to_owned(),
    }
    .document()
});

fn content() -> String {
    CONTENT.clone()
}

fn good() -> Parts {
    Parts::aws(&KEY, content().as_bytes()).unwrap()
}

/// A good document with its signer changed and signed again, by the right key: what only AWS could do.
fn resigned(change: impl FnOnce(&mut Signer)) -> Parts {
    let mut parts = good();
    change(&mut parts.signers[0]);
    parts.signers[0].sign(&KEY).unwrap();
    parts
}

fn with(change: impl FnOnce(&mut Parts)) -> Parts {
    let mut parts = good();
    change(&mut parts);
    parts
}

fn outcome(parts: &Parts) -> Result<InstanceIdentity, DocumentError> {
    verify(&lines(&parts.encode()), &CERTIFICATES)
}

fn refused(parts: &Parts) -> String {
    match outcome(parts) {
        Err(error) => error.to_string(),
        Ok(identity) => panic!("accepted: {identity:?}"),
    }
}

fn signed_content(content: &str) -> Parts {
    Parts::aws(&KEY, content.as_bytes()).unwrap()
}

#[test]
fn a_document_proves_what_it_says() {
    let identity = outcome(&good()).unwrap();
    assert_eq!(identity.partition, "aws");
    assert_eq!(identity.account, "123456789012");
    assert_eq!(identity.region, REGION);
    assert_eq!(identity.zone, "us-east-2b");
    assert_eq!(identity.instance_id, "i-1234567890abcdef0");
    assert_eq!(identity.private_ip.as_deref(), Some("10.0.0.1"));
    assert!(identity.pending_time.is_some());
}

#[test]
fn the_same_in_other_encodings_proves_the_same() {
    let expected = outcome(&good()).unwrap();
    let content = octet_string(content().as_bytes());
    let chunk = |part: &[u8]| octet_string(part);
    let text = self::content();
    let (left, right) = text.as_bytes().split_at(100);
    for (name, parts) in [
        ("definite lengths", with(|parts| parts.indefinite = false)),
        ("a primitive string", with(|parts| parts.content = Some(content.clone()))),
        ("in two pieces", with(|parts| parts.content = Some(indefinite(0x24, &[chunk(left), chunk(right)].concat())))),
        (
            "pieces of pieces",
            with(|parts| {
                parts.content = Some(tlv(0x24, &[tlv(0x24, &chunk(left)), indefinite(0x24, &chunk(right))].concat()))
            }),
        ),
        // What is inside isn't looked at: not as a key, and not as a reason to refuse.
        ("with a certificate", with(|parts| parts.certificates = vec![KEY.certificate().to_vec()])),
        ("with a forger's certificate", with(|parts| parts.certificates = vec![FORGER.certificate().to_vec()])),
        ("with garbage for certificates", with(|parts| parts.certificates = vec![vec![0x30, 3, 1, 2, 3]])),
        (
            "without a signing time",
            resigned(|signer| {
                signer
                    .attributes
                    .as_mut()
                    .unwrap()
                    .retain(|attribute| !attribute.windows(9).any(|part| part == SIGNING_TIME))
            }),
        ),
        (
            "signed with rsaEncryption",
            with(|parts| {
                parts.signers[0].signature_algorithm = algorithm(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1])
            }),
        ),
    ] {
        assert_eq!(outcome(&parts).map_err(|error| error.to_string()), Ok(expected.clone()), "{name}");
    }
    let one_line = lines(&good().encode()).replace('\n', "");
    verify(&one_line, &CERTIFICATES).unwrap();
    verify(&format!("\r\n{one_line}\r\n"), &CERTIFICATES).unwrap();
}

#[test]
fn what_is_signed_by_another_key_is_refused() {
    // The forger's key under the region's name.
    let mut forged = Parts::aws(&FORGER, content().as_bytes()).unwrap();
    forged.signers[0].identifier = good().signers[0].identifier.clone();
    forged.certificates = vec![FORGER.certificate().to_vec()];
    assert_eq!(refused(&forged), "the identity document's signature isn't that of region us-east-2");
    // Under its own.
    let forged = Parts::aws(&FORGER, content().as_bytes()).unwrap();
    assert!(refused(&forged).starts_with(
        "the identity document of region us-east-2 names as its signer the certificate with serial number "
    ));
    // Another region's key, for a document of this region, and for one that names a region without a key.
    let other = Parts::aws(&OTHER_REGION, content().as_bytes()).unwrap();
    assert!(refused(&other).contains("which isn't the one pinned for that region"));
    let elsewhere = content().replace(REGION, "ap-south-1");
    assert!(refused(&signed_content(&elsewhere)).starts_with("no certificate is pinned for region \"ap-south-1\""));
    let none = content().replace(REGION, "moon-east-1");
    assert!(refused(&signed_content(&none)).contains("\"moon-east-1\" isn't a region of AWS"));
}

#[test]
fn content_that_was_swapped_is_refused() {
    let forged = content().replace("i-1234567890abcdef0", "i-0000000000000000f");
    let swapped = with(|parts| parts.content = Some(octet_string(forged.as_bytes())));
    assert_eq!(refused(&swapped), "the identity document's digest isn't that of its content: the content was changed");
    // And its digest with it.
    let hash = digest(&SHA256, forged.as_bytes());
    let swapped = with(|parts| {
        parts.content = Some(octet_string(forged.as_bytes()));
        *parts.signers[0].attributes.as_mut().unwrap().last_mut().unwrap() =
            attribute(MESSAGE_DIGEST, &octet_string(hash.as_ref()));
    });
    assert_eq!(refused(&swapped), "the identity document's signature isn't that of region us-east-2");
    // A signature of the attributes' bytes as content, without attributes (the confusion that RFC 5652 section 5.4's tag leaves open).
    let attributes = tlv(0x31, &good().signers[0].attributes.clone().unwrap().concat());
    let confused = with(|parts| {
        parts.content = Some(octet_string(&attributes));
        parts.signers[0].attributes = None;
    });
    assert!(refused(&confused).contains("it has no signed attributes"));
    // A signature of the content alone.
    let mut plain = good();
    plain.signers[0].attributes = None;
    plain.signers[0].signature = KEY.sign(content().as_bytes()).unwrap();
    assert!(refused(&plain).contains("it has no signed attributes"));
}

#[test]
fn more_or_fewer_than_one_signer_is_refused() {
    let forger = Signer::aws(&FORGER, content().as_bytes()).unwrap();
    for (parts, problem) in [
        (with(|parts| parts.signers = Vec::new()), "it has 0 signers instead of one"),
        (with(|parts| parts.signers.push(parts.signers[0].clone())), "it has 2 signers instead of one"),
        (with(|parts| parts.signers.push(forger.clone())), "it has 2 signers instead of one"),
        (with(|parts| parts.signers.insert(0, forger)), "it has 2 signers instead of one"),
    ] {
        let why = refused(&parts);
        assert!(why.contains(problem), "{problem}: {why}");
    }
}

#[test]
fn each_part_is_what_aws_would_send() {
    let hash = octet_string(digest(&SHA256, content().as_bytes()).as_ref());
    let nested = good().encode();
    let key_identifier = tlv(0x80, &[1; 20]);
    let replace = |kind: &'static [u8], new: Vec<Vec<u8>>| {
        resigned(move |signer| {
            let attributes = signer.attributes.as_mut().unwrap();
            attributes.retain(|attribute| !attribute.windows(9).any(|part| part == kind));
            attributes.extend(new);
            attributes.sort_by(|a, b| a.len().cmp(&b.len()).then(a.cmp(b)));
        })
    };
    for (parts, problem) in [
        (with(|parts| parts.trailing = vec![0]), "1 bytes follow its end"),
        (with(|parts| parts.trailing = nested.clone()), "bytes follow its end"),
        (with(|parts| parts.content_info_type = oid(DATA)), "its content type is another"),
        (with(|parts| parts.version = vec![2, 1, 3]), "its version isn't 1"),
        (with(|parts| parts.digest_algorithms.push(algorithm(SHA1_OID))), "its digest algorithm isn't SHA-256 alone"),
        (with(|parts| parts.digest_algorithms = vec![algorithm(SHA1_OID)]), "its digest algorithm isn't SHA-256 alone"),
        (with(|parts| parts.digest_algorithms = Vec::new()), "its digest algorithm isn't SHA-256 alone"),
        (with(|parts| parts.content_type = oid(SIGNED_DATA)), "what it encloses isn't plain data"),
        (with(|parts| parts.content = None), "it encloses no content"),
        (with(|parts| parts.content = Some(indefinite(0x24, &tlv(0x0c, b"{}")))), "it isn't ASN.1 of that shape"),
        (resigned(|signer| signer.version = vec![2, 1, 3]), "its signer's version isn't 1"),
        (resigned(|signer| signer.identifier = key_identifier), "its signer isn't named by issuer and serial number"),
        (
            resigned(|signer| signer.digest_algorithm = algorithm(SHA1_OID)),
            "its signer's digest algorithm isn't SHA-256",
        ),
        (
            resigned(|signer| signer.digest_algorithm = tlv(0x30, &[oid(SHA256_OID), octet_string(b"x")].concat())),
            "its signer's digest algorithm isn't SHA-256",
        ),
        (
            resigned(|signer| signer.signature_algorithm = algorithm(SHA1_WITH_RSA)),
            "its signature algorithm isn't RSA with SHA-256",
        ),
        (
            resigned(|signer| signer.unsigned_attributes = vec![attribute(SIGNING_TIME, &hash)]),
            "it has attributes that aren't signed",
        ),
        (resigned(|signer| signer.attributes = Some(Vec::new())), "its signed attributes lack the content type"),
        (replace(CONTENT_TYPE, vec![]), "its signed attributes lack the content type"),
        (replace(MESSAGE_DIGEST, vec![]), "its signed attributes lack the message digest"),
        (
            replace(CONTENT_TYPE, vec![attribute(CONTENT_TYPE, &oid(SIGNED_DATA))]),
            "its signed content type isn't that of the content",
        ),
        (replace(CONTENT_TYPE, vec![attribute(CONTENT_TYPE, &hash)]), "its signed content type isn't one"),
        (replace(CONTENT_TYPE, vec![attribute(CONTENT_TYPE, &oid(DATA)); 2]), "a signed attribute occurs twice"),
        (replace(MESSAGE_DIGEST, vec![attribute_with(MESSAGE_DIGEST, &[])]), "its message digest hasn't one value"),
        (
            replace(MESSAGE_DIGEST, vec![attribute_with(MESSAGE_DIGEST, &[&hash, &hash])]),
            "its message digest hasn't one value",
        ),
        (replace(MESSAGE_DIGEST, vec![attribute(MESSAGE_DIGEST, &oid(DATA))]), "its message digest isn't one"),
        (replace(MESSAGE_DIGEST, vec![attribute(MESSAGE_DIGEST, &octet_string(b"short"))]), "the content was changed"),
        (resigned(|signer| signer.attributes.as_mut().unwrap().reverse()), "its signed attributes aren't in DER"),
        (
            replace(MESSAGE_DIGEST, vec![indefinite(0x30, &[oid(MESSAGE_DIGEST), tlv(0x31, &hash)].concat())]),
            "its signed attributes aren't in DER",
        ),
        // A whole document as the content of another.
        (Parts::aws(&KEY, &nested).unwrap(), "the identity document's content can't be read: it isn't UTF-8"),
    ] {
        let why = refused(&parts);
        assert!(why.contains(problem), "{problem}: {why}");
    }
    for signature in [Vec::new(), vec![0; 255], vec![0; 256], vec![0xff; 512]] {
        let why = refused(&with(|parts| parts.signers[0].signature = signature));
        assert_eq!(why, "the identity document's signature isn't that of region us-east-2");
    }
}

#[test]
fn the_content_is_what_an_instance_has() {
    let of = |from: &str, to: &str| {
        let changed = content().replace(from, to);
        assert_ne!(changed, content());
        refused(&signed_content(&changed))
    };
    for (from, to, problem) in [
        ("\"123456789012\"", "\"12345678901\"", "its accountId isn't 12 digits"),
        ("\"123456789012\"", "123456789012", "its accountId isn't 12 digits"),
        ("\"accountId\"", "\"account\"", "its accountId isn't 12 digits"),
        ("i-1234567890abcdef0", "i-1234567890abcdeg0", "its instanceId isn't that of an EC2 instance"),
        ("i-1234567890abcdef0", "../x", "its instanceId isn't that of an EC2 instance"),
        ("us-east-2b", "us-east-1b", "its availabilityZone isn't one of its region"),
        ("us-east-2b", "us-east-2", "its availabilityZone isn't one of its region"),
        ("\"region\"", "\"regio\"", "it names no region"),
        ("\"region\" : \"us-east-2\"", "\"region\" : [\"us-east-2\"]", "it names no region"),
        ("\"version\"", "\"region\" : \"us-east-2\", \"version\"", "a name occurs twice"),
        ("\"version\"", "\"\\u0061ccountId\" : \"999999999999\", \"version\"", "a name occurs twice"),
        ("{", "[", "it isn't JSON"),
        ("}", "} {}", "it isn't JSON"),
    ] {
        let why = of(from, to);
        assert!(why.contains(problem), "{from} -> {to}: {why}");
    }
    // What AWS adds one day.
    let more = content().replace("\"version\"", "\"new\" : {\"a\": [1]}, \"version\"");
    outcome(&signed_content(&more)).unwrap();
}

#[test]
fn what_is_not_a_document_is_refused() {
    let document = lines(&good().encode());
    let pem = format!("-----BEGIN PKCS7-----\n{document}\n-----END PKCS7-----");
    for (text, problem) in [
        ("", "the identity document is empty"),
        (" \n", "the identity document is empty"),
        ("hello, world", "isn't base64"),
        (&pem, "isn't base64"),
        (&"A".repeat(20_000), "has 20000 characters, more than the 16384"),
        ("AAAA", "isn't CMS SignedData"),
    ] {
        let why = verify(text, &CERTIFICATES).unwrap_err().to_string();
        assert!(why.contains(problem), "{problem}: {why}");
    }
}

#[test]
fn a_truncated_document_is_refused_wherever_it_ends() {
    let whole = good().encode();
    for end in 0..whole.len() {
        assert!(verify(&lines(&whole[..end]), &CERTIFICATES).is_err(), "{end}");
    }
}

#[test]
fn nesting_without_end_is_refused_and_harmless() {
    for (tag, ended) in [(0x24, true), (0x24, false), (0x30, true), (0xa0, false)] {
        let deep = [tag, 0x80].repeat(5000);
        let bytes = if ended { [deep, vec![0; 2000]].concat() } else { deep };
        let document = lines(&bytes[..11_000.min(bytes.len())]);
        assert!(matches!(verify(&document, &CERTIFICATES), Err(DocumentError::Malformed(_))));
        let content = bytes[..4000].to_vec();
        assert!(matches!(outcome(&with(|parts| parts.content = Some(content))), Err(DocumentError::Malformed(_))));
    }
}

/// Numbers that are the same in each run (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % limit as u64).unwrap()
    }
}

/// One change of the structure: some harmless, some not.
fn change_parts(numbers: &mut Numbers, parts: &mut Parts) {
    let text = content();
    let cut = numbers.below(text.len());
    let (left, right) = text.as_bytes().split_at(cut);
    match numbers.below(18) {
        0 => parts.indefinite = !parts.indefinite,
        1 => parts.content = Some(octet_string(text.as_bytes())),
        2 => parts.content = Some(tlv(0x24, &[octet_string(left), octet_string(right)].concat())),
        3 => parts.content = Some(indefinite(0x24, &[octet_string(left), tlv(0x24, &octet_string(right))].concat())),
        4 => parts.certificates.push(FORGER.certificate().to_vec()),
        5 => parts.certificates.push(KEY.certificate().to_vec()),
        6 => parts.content = Some(octet_string(left)),
        7 => parts.content = None,
        8 => parts.signers.push(parts.signers[0].clone()),
        9 => parts.signers.push(Signer::aws(&FORGER, text.as_bytes()).unwrap()),
        10 => parts.signers[0].attributes = None,
        11 => parts.signers[0].attributes.iter_mut().for_each(|attributes| attributes.reverse()),
        12 => {
            parts.signers[0].attributes.iter_mut().for_each(|attributes| attributes.reverse());
            parts.signers[0].sign(&KEY).unwrap();
        }
        13 => {
            if let Some(attributes) = &mut parts.signers[0].attributes {
                attributes.remove(numbers.below(attributes.len()));
            }
            parts.signers[0].sign(&KEY).unwrap();
        }
        14 => parts.signers[0].unsigned_attributes.push(attribute(SIGNING_TIME, &oid(DATA))),
        15 => parts.signers[0].signature = FORGER.sign(text.as_bytes()).unwrap(),
        16 => parts.trailing = vec![0; numbers.below(3)],
        _ => parts.digest_algorithms.push(algorithm(SHA1_OID)),
    }
}

/// One change of the bytes.
fn change_bytes(numbers: &mut Numbers, bytes: &mut Vec<u8>) {
    let at = numbers.below(bytes.len());
    match numbers.below(5) {
        0 => bytes[at] ^= 1 << numbers.below(8),
        1 => bytes.insert(at, u8::try_from(numbers.below(256)).unwrap()),
        2 => drop(bytes.remove(at)),
        3 => bytes.truncate(at.max(1)),
        _ => {
            let end = (at + 1 + numbers.below(40)).min(bytes.len());
            let piece = bytes[at..end].to_vec();
            bytes.splice(at..at, piece);
        }
    }
}

/// What OpenSSL takes for the content, when it accepts a document.
fn openssl(directory: &Path, document: &[u8]) -> Option<Vec<u8>> {
    let (input, content) = (directory.join("document"), directory.join("content"));
    std::fs::write(&input, document).unwrap();
    let output = Command::new("openssl")
        .args(["cms", "-verify", "-binary", "-inform", "DER", "-nointern", "-noverify", "-certfile"])
        .arg(directory.join("certificate"))
        .arg("-in")
        .arg(&input)
        .arg("-out")
        .arg(&content)
        .output()
        .expect("openssl, of Debian's package of that name");
    output.status.success().then(|| std::fs::read(&content).unwrap())
}

#[test]
fn what_is_accepted_openssl_accepts_and_understands_alike() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("certificate"), KEY.pinned()).unwrap();
    let mut numbers = Numbers(20_261_124);
    let (mut both, mut neither, mut stricter) = (0, 0, 0);
    for round in 0..240 {
        let mut parts = good();
        for _ in 0..numbers.below(3) {
            change_parts(&mut numbers, &mut parts);
        }
        let mut bytes = parts.encode();
        if round % 2 == 0 {
            change_bytes(&mut numbers, &mut bytes);
        }
        let theirs = openssl(directory.path(), &bytes);
        match (verify(&lines(&bytes), &CERTIFICATES), theirs) {
            (Ok(ours), Some(content)) => {
                both += 1;
                let content: Value = serde_json::from_slice(&content).unwrap();
                let time = ours.pending_time.map(|time| time.to_string());
                for (name, value) in [
                    ("accountId", Some(ours.account)),
                    ("region", Some(ours.region)),
                    ("availabilityZone", Some(ours.zone)),
                    ("instanceId", Some(ours.instance_id)),
                    ("imageId", ours.image_id),
                    ("instanceType", ours.instance_type),
                    ("architecture", ours.architecture),
                    ("privateIp", ours.private_ip),
                    ("pendingTime", time),
                ] {
                    assert_eq!(content[name].as_str(), value.as_deref(), "round {round}: {name}");
                }
            }
            (Ok(ours), None) => panic!("round {round}: accepted here only: {ours:?}\n{}", lines(&bytes)),
            // We are stricter about the shape, on purpose; never about a signature or a digest.
            (Err(DocumentError::Malformed(_) | DocumentError::Content(_)), Some(_)) => stricter += 1,
            (Err(error), Some(_)) => panic!("round {round}: accepted by OpenSSL only: {error}\n{}", lines(&bytes)),
            (Err(_), None) => neither += 1,
        }
    }
    // Each way was gone often enough to mean something.
    assert!(both >= 40 && neither >= 60 && stricter >= 5, "{both} {neither} {stricter}");
}
