use super::*;
use rcgen::{DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use rustls_pki_types::UnixTime;
use std::collections::BTreeMap;
use x509_parser::extensions::GeneralName;

const LIFE: Duration = Duration::from_secs(24 * 3600);
const ID: &str = "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm";

fn now() -> Timestamp {
    "2026-11-24T11:00:00Z".parse().unwrap()
}

fn ca(dir: &std::path::Path) -> (Arc<DataDir>, MeshCa) {
    let data = Arc::new(DataDir::open(dir).unwrap());
    let ca = MeshCa::open(&data, "cluster.local", LIFE, now()).unwrap();
    (data, ca)
}

fn csr(key: &KeyPair) -> Vec<u8> {
    let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "root of all");
    params.is_ca = IsCa::NoCa;
    params.serialize_request(key).unwrap().der().to_vec()
}

#[test]
fn a_certificate_has_the_groups_identity_the_requests_key_and_nothing_else_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_data, ca) = ca(dir.path());
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let issued = ca.issue(&csr(&key), ID, now()).unwrap();
    let leaf = pem::parse(&issued.chain).unwrap();
    let root = pem::parse(ca.roots(now())).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf.contents()).unwrap();
    let (_, root) = x509_parser::parse_x509_certificate(root.contents()).unwrap();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, root.public_key().subject_public_key.data.as_ref())
        .verify(leaf.tbs_certificate.as_ref(), leaf.signature_value.data.as_ref())
        .unwrap();
    assert_eq!(leaf.public_key().subject_public_key.data.as_ref(), key.der_bytes());
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert!(matches!(names.value.general_names.as_slice(), [GeneralName::URI(ID)]));
    assert!(!leaf.is_ca());
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any);
    assert_eq!(leaf.validity().not_after.timestamp(), now().as_second() + 24 * 3600);
    assert_eq!(issued.expires_at.as_second(), leaf.validity().not_after.timestamp());
    assert_eq!(leaf.validity().not_before.timestamp(), now().as_second() - 300);
}

#[test]
fn a_request_that_is_not_exactly_right_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_data, ca) = ca(dir.path());
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let good = csr(&key);
    ca.issue(&good, ID, now()).unwrap();

    let mut resigned = good.clone();
    *resigned.last_mut().unwrap() ^= 1;
    let mut other_name = good.clone();
    let at = other_name.windows(4).position(|window| window == b"root").unwrap();
    other_name[at] = b'R';
    let mut longer = good.clone();
    longer.push(0);
    let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    for (request, wanted) in [
        (resigned, "isn't signed by the key"),
        (other_name, "isn't signed by the key"),
        (longer, "has bytes after its end"),
        (good[..good.len() - 1].to_vec(), "isn't PKCS #10"),
        (Vec::new(), "isn't PKCS #10"),
        (vec![0x30; MAX_CSR + 1], "is larger"),
        (csr(&p384), "isn't for a P-256 key"),
        (csr(&ed25519), "isn't for a P-256 key"),
    ] {
        let error = ca.issue(&request, ID, now()).unwrap_err();
        assert!(matches!(error, CaError::BadRequest(_)), "{error}");
        assert!(error.to_string().contains(wanted), "{error}, wanted {wanted}");
    }
}

#[test]
fn the_root_is_made_once_and_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (data, first) = ca(dir.path());
    let again = MeshCa::open(&data, "cluster.local", LIFE, now()).unwrap();
    assert_eq!(first.roots(now()), again.roots(now()));
    let text = String::from_utf8(data.read(FILE).unwrap().unwrap()).unwrap();
    assert!(text.contains("PRIVATE KEY") && !first.roots(now()).contains("PRIVATE KEY"));

    let error = MeshCa::open(&data, "other.example", LIFE, now()).err().unwrap();
    assert!(format!("{error:#}").contains("another trust domain"), "{error:#}");
    data.replace(FILE, b"rubbish").unwrap();
    let error = MeshCa::open(&data, "cluster.local", LIFE, now()).err().unwrap();
    assert!(format!("{error:#}").contains("move it away"), "{error:#}");
    assert_eq!(data.read(FILE).unwrap().unwrap(), b"rubbish", "never silently made anew");
}

/// Whether a certificate is good for somebody who has these roots, at that moment: as Envoy decides it.
fn verifies(chain: &str, roots: &str, at: Timestamp) -> bool {
    let mut store = rustls::RootCertStore::empty();
    for root in pem::parse_many(roots).unwrap() {
        store.add(root.contents().to_vec().into()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider).build().unwrap();
    let leaf = pem::parse(chain).unwrap().contents().to_vec().into();
    let at = UnixTime::since_unix_epoch(Duration::from_secs(at.as_second().unsigned_abs()));
    rustls::server::danger::ClientCertVerifier::verify_client_cert(verifier.as_ref(), &leaf, &[], at).is_ok()
}

/// Agents that renew at half of a certificate's life, some of them late and some away for a while; at each moment whoever has a
/// certificate that has not ended reaches everybody else who has one, through the whole of a replacement and across restarts.
#[test]
fn no_request_fails_while_a_root_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (data, mut ca) = ca(dir.path());
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let request = csr(&key);
    let hour = Duration::from_secs(3600);
    let mut held: BTreeMap<u64, Issued> = BTreeMap::new();
    let first = ca.roots(now());
    let (mut stages, mut at) = (Vec::new(), now());
    for step in 0..24 * 5 {
        if step == 24 {
            let status = ca.rotate(at).unwrap();
            assert_eq!((status.stage, status.next_step_at.is_some()), ("introducing", true));
            assert!(matches!(ca.rotate(at), Err(RotateError::UnderWay { .. })));
        }
        // The plane is started anew all the time: nothing of this is in its memory alone.
        if step % 7 == 0 {
            ca = MeshCa::open(&data, "cluster.local", LIFE, at).unwrap();
        }
        let stage = ca.root_status(at).stage;
        if stages.last() != Some(&stage) {
            stages.push(stage);
        }
        for agent in 0..12_u64 {
            // Agent 11 is away for a day and a half, beginning with the replacement's second stage.
            let away = agent == 11 && (49..85).contains(&step);
            let late = Duration::from_secs(agent * 3900);
            let due = held.get(&agent).is_none_or(|issued| issued.expires_at - (LIFE / 2) + late <= at);
            if due && !away {
                held.insert(agent, ca.issue(&request, ID, at).unwrap());
            }
        }
        for mine in held.values().filter(|issued| issued.expires_at > at) {
            for theirs in held.values().filter(|issued| issued.expires_at > at) {
                assert!(verifies(&mine.chain, &theirs.roots, at), "hour {step}, {stage}");
            }
        }
        at = at.checked_add(hour).unwrap();
    }
    assert_eq!(stages, ["steady", "introducing", "retiring", "steady"]);
    let last = ca.roots(at);
    assert_ne!(first, last);
    assert!(!last.contains(&first), "the old root is trusted no more");
    assert!(held.values().all(|issued| verifies(&issued.chain, &last, at) || issued.expires_at <= at));
}

#[test]
fn a_step_that_cannot_be_written_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let (data, ca) = ca(dir.path());
    let file = data.file(FILE);
    let before = std::fs::read(&file).unwrap();
    // What can't be replaced: a directory in its place.
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    let error = ca.rotate(now()).unwrap_err();
    assert!(matches!(error, RotateError::Failed(_)) && error.to_string().contains("mesh-ca.pem"), "{error}");
    assert_eq!(ca.root_status(now()).stage, "steady");
    std::fs::remove_dir(&file).unwrap();
    std::fs::write(&file, &before).unwrap();
    ca.rotate(now()).unwrap();
    let introducing = std::fs::read(&file).unwrap();
    let due = ca.root_status(now()).next_step_at.unwrap();
    // The next step waits for the disk, and what there is goes on.
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    assert_eq!(ca.root_status(due).stage, "introducing");
    std::fs::remove_dir(&file).unwrap();
    std::fs::write(&file, &introducing).unwrap();
    assert_eq!(ca.root_status(due).stage, "retiring");
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text.matches("BEGIN PRIVATE KEY").count(), 1, "the old root's key is gone");
}

#[test]
fn a_file_of_before_and_one_that_is_not_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (data, ca) = ca(dir.path());
    let text = std::fs::read_to_string(data.file(FILE)).unwrap();
    // As it was written before there were notes in it.
    let old = text.split("-----BEGIN ONBOARDING MESH ROOTS").next().unwrap();
    data.replace(FILE, old.as_bytes()).unwrap();
    let opened = MeshCa::open(&data, "cluster.local", LIFE, now()).unwrap();
    assert_eq!(opened.roots(now()), ca.roots(now()));
    assert_eq!(std::fs::read_to_string(data.file(FILE)).unwrap(), text, "with its notes again");

    ca.rotate(now()).unwrap();
    let rotating = std::fs::read_to_string(data.file(FILE)).unwrap();
    let without = |what: &str, from: usize| {
        let begin = rotating.match_indices(&format!("-----BEGIN {what}")).nth(from).unwrap().0;
        let end = begin + rotating[begin..].find(&format!("-----END {what}-----\n")).unwrap();
        let end = end + format!("-----END {what}-----\n").len();
        format!("{}{}", &rotating[..begin], &rotating[end..])
    };
    for (broken, words) in [
        (without("PRIVATE KEY", 1), "there is no PRIVATE KEY in it"),
        (without("PRIVATE KEY", 0), "there is no PRIVATE KEY in it"),
        (without("CERTIFICATE", 0), "out of place"),
        (without("ONBOARDING MESH ROOTS", 0), "2 certificates"),
        (format!("{rotating}{old}"), "more than two"),
    ] {
        data.replace(FILE, broken.as_bytes()).unwrap();
        let error = format!("{:#}", MeshCa::open(&data, "cluster.local", LIFE, now()).err().unwrap());
        assert!(error.contains(words) && error.contains("restore it from a backup"), "{error}, wanted {words}");
    }
}

/// Certificates that live longer than those of now were issued before: the overlap is theirs.
#[test]
fn an_overlap_is_as_long_as_the_longest_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let (data, _) = ca(dir.path());
    let short = MeshCa::open(&data, "cluster.local", Duration::from_secs(60), now()).unwrap();
    let status = short.rotate(now()).unwrap();
    assert!(status.next_step_at.unwrap() >= now() + LIFE, "{status:?}");
}

#[test]
fn a_root_that_ends_is_replaced_by_itself_and_bounds_its_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let (data, ca) = ca(dir.path());
    assert_eq!(ca.fault(now()), None);
    let ends_at = ca.root_status(now()).ends_at;
    let before = ends_at.checked_sub(Duration::from_secs(179 * 24 * 3600)).unwrap();
    assert_eq!(ca.root_status(before).stage, "introducing");
    assert_eq!(ca.fault(before), None);

    // Where it couldn't be: said ahead.
    let dir = tempfile::tempdir().unwrap();
    let (late_data, stuck) = self::ca(dir.path());
    std::fs::remove_file(late_data.file(FILE)).unwrap();
    std::fs::create_dir(late_data.file(FILE)).unwrap();
    let late = ends_at.checked_sub(Duration::from_secs(3600)).unwrap();
    assert!(stuck.fault(late).unwrap().contains("replace it"));
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    assert_eq!(stuck.issue(&csr(&key), ID, late).unwrap().expires_at, ends_at);
    assert!(matches!(stuck.issue(&csr(&key), ID, ends_at), Err(CaError::RootEnded(_))));
    drop(data);
}

#[test]
fn a_trust_domain_is_what_spiffe_says_it_is() {
    for bad in ["", "Cluster.local", "a/b", "a b", &"a".repeat(256)] {
        assert!(check_trust_domain(bad).is_err(), "{bad:?}");
    }
    check_trust_domain("cluster.local").unwrap();
}
