//! Whether the endpoint's Secret has a certificate that agents will accept. Pure.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;

/// What stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// For programs.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

const TLS: &str = "kubernetes.io/tls";

/// When the certificate ends, or what stands in the way. `name`: `NAMESPACE/NAME`. `hosts`: those of the endpoint.
///
/// # Errors
/// The first thing that is wrong, with the way out.
pub fn judge(name: &str, secret: Option<&Secret>, hosts: &[String], now: Timestamp) -> Result<Timestamp, Fault> {
    let fault = |reason, message| Err(Fault { reason, message });
    let Some(secret) = secret else {
        return fault(
            "SecretAbsent",
            format!(
                "there is no Secret {name}; make it with `kubectl create secret tls`, or a cert-manager Certificate with that secretName"
            ),
        );
    };
    let kind = secret.type_.as_deref().unwrap_or("Opaque");
    if kind != TLS {
        return fault(
            "SecretUnusable",
            format!("the Secret {name} is of type {kind}, and must be of type {TLS}; delete it and create it anew"),
        );
    }
    let (key, not_before, not_after) = match certified(secret) {
        Ok(read) => read,
        Err(why) => return fault("SecretUnusable", format!("the Secret {name} can't be used: {why}")),
    };
    if not_after <= now {
        return fault(
            "CertificateExpired",
            format!(
                "the certificate in the Secret {name} expired at {not_after}; agents refuse it until it is renewed"
            ),
        );
    }
    if not_before > now {
        return fault(
            "CertificateNotYetValid",
            format!("the certificate in the Secret {name} is valid from {not_before} on; agents refuse it until then"),
        );
    }
    let lacking: Vec<&str> = hosts.iter().filter(|host| !is_for(&key, host)).map(String::as_str).collect();
    if !lacking.is_empty() {
        return fault(
            "CertificateForOtherNames",
            format!(
                "the certificate in the Secret {name} isn't for {}, named by spec.meshExpansion.onboarding.endpoint.hosts; agents that use that name refuse it",
                lacking.join(", ")
            ),
        );
    }
    Ok(not_after)
}

fn certified(secret: &Secret) -> Result<(CertifiedKey, Timestamp, Timestamp), String> {
    let data = |key: &str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(key)).map(|bytes| bytes.0.as_slice());
        bytes.filter(|bytes| !bytes.is_empty()).ok_or_else(|| format!("it has no {key}"))
    };
    let chain: Vec<_> = CertificateDer::pem_slice_iter(data("tls.crt")?)
        .collect::<Result<_, _>>()
        .map_err(|_| "tls.crt is no chain of PEM certificates")?;
    let leaf = chain.first().ok_or("tls.crt has no certificate")?.clone();
    let key = PrivateKeyDer::from_pem_slice(data("tls.key")?).map_err(|_| "tls.key is no PEM private key")?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&leaf).map_err(|_| "tls.crt is no X.509 certificate")?;
    let time =
        |time: x509_parser::time::ASN1Time, otherwise| Timestamp::from_second(time.timestamp()).unwrap_or(otherwise);
    let not_before = time(parsed.validity().not_before, Timestamp::MIN);
    let not_after = time(parsed.validity().not_after, Timestamp::MAX);
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let key = CertifiedKey::from_der(chain, key, &provider)
        .map_err(|_| "tls.key doesn't belong to tls.crt, or is of an unknown kind")?;
    Ok((key, not_before, not_after))
}

fn is_for(key: &CertifiedKey, host: &str) -> bool {
    let Ok(leaf) = key.end_entity_cert() else { return false };
    let (Ok(parsed), Ok(name)) = (ParsedCertificate::try_from(leaf), ServerName::try_from(host)) else { return false };
    verify_server_name(&parsed, &name).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::ByteString;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    const HOSTS: [&str; 2] = ["onboarding.our.corp", "10.0.0.4"];

    struct Made {
        names: &'static [&'static str],
        from: i32,
        until: i32,
        mutate: fn(&mut Secret),
    }

    const GOOD: Made = Made { names: &["*.our.corp", "10.0.0.4"], from: 2020, until: 2030, mutate: |_| {} };

    fn judged(made: &Made) -> Result<Timestamp, Fault> {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = made.names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(made.from, 1, 1);
        params.not_after = date_time_ymd(made.until, 1, 1);
        let certificate = params.self_signed(&key).unwrap();
        let mut secret = Secret { type_: Some(TLS.to_owned()), ..Secret::default() };
        let data = [("tls.crt", certificate.pem()), ("tls.key", key.serialize_pem())];
        secret.data = Some(data.map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes()))).into());
        (made.mutate)(&mut secret);
        let hosts = HOSTS.map(str::to_owned);
        judge("istio-system/tls", Some(&secret), &hosts, "2026-11-24T00:00:00Z".parse().unwrap())
    }

    fn set(secret: &mut Secret, key: &str, value: &[u8]) {
        secret.data.get_or_insert_default().insert(key.to_owned(), ByteString(value.to_vec()));
    }

    #[test]
    fn a_good_one_says_when_it_ends() {
        assert_eq!(judged(&GOOD), Ok("2030-01-01T00:00:00Z".parse().unwrap()));
    }

    #[test]
    fn each_fault_is_named() {
        let absent = judge("istio-system/tls", None, &[], Timestamp::UNIX_EPOCH).unwrap_err();
        assert_eq!(absent.reason, "SecretAbsent");
        assert!(absent.message.starts_with("there is no Secret istio-system/tls; make it with"), "{absent:?}");
        let other_key =
            |secret: &mut Secret| set(secret, "tls.key", KeyPair::generate().unwrap().serialize_pem().as_bytes());
        let unusable = |mutate| (Made { mutate, ..GOOD }, "SecretUnusable");
        for ((made, reason), words) in [
            ((Made { until: 2026, ..GOOD }, "CertificateExpired"), "expired at 2026-01-01T00:00:00Z"),
            ((Made { from: 2027, ..GOOD }, "CertificateNotYetValid"), "is valid from 2027-01-01T00:00:00Z on"),
            (
                (Made { names: &["onboarding.our.corp"], ..GOOD }, "CertificateForOtherNames"),
                "isn't for 10.0.0.4, named",
            ),
            (
                (Made { names: &["b.corp"], ..GOOD }, "CertificateForOtherNames"),
                "isn't for onboarding.our.corp, 10.0.0.4",
            ),
            (unusable(|secret| secret.type_ = None), "is of type Opaque, and must be"),
            (unusable(|secret| secret.data = None), "it has no tls.crt"),
            (unusable(|secret| set(secret, "tls.crt", b"")), "it has no tls.crt"),
            (unusable(|secret| set(secret, "tls.crt", b"x")), "tls.crt has no certificate"),
            (unusable(|secret| set(secret, "tls.key", b"x")), "tls.key is no PEM private key"),
            (unusable(other_key), "tls.key doesn't belong to tls.crt"),
        ] {
            let fault = judged(&made).unwrap_err();
            assert_eq!(fault.reason, reason, "{fault:?}");
            assert!(fault.message.contains(words), "{fault:?}");
        }
    }
}
