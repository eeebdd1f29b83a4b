//! Why the endpoint's TLS isn't good enough, in words that say what to do about it. What rustls says is for those who know rustls.

use jiff::Timestamp;
use rustls::{AlertDescription, CertificateError as Bad, Error};
use std::io;
use std::net::SocketAddr;

/// What is wrong with the endpoint's certificate, or with what answers in its place. `Display` says so, and the way out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsProblem {
    #[error(
        "the endpoint's certificate is not for {name}; it is for: {presented}. Put the right name into onboardingEndpoint.host, or into onboardingEndpoint.transportSecurity.tls.sni"
    )]
    WrongName { name: String, presented: String },
    #[error(
        "the endpoint's certificate is signed by a CA that this host does not know; put the CA's certificate into /etc/onboarding-agent/root-certs.pem (or into /usr/local/share/ca-certificates/NAME.crt, then run update-ca-certificates). If this host knows the CA, the endpoint's Secret lacks the CAs in between: tls.crt holds the whole chain, the endpoint's own certificate first"
    )]
    UnknownCa,
    #[error("the endpoint's certificate has expired{}, or this host's clock is wrong; renew it in the Secret that the ControlPlane names", at(.0))]
    Expired(Option<Timestamp>),
    #[error("the endpoint's certificate is not valid yet{}, or this host's clock is wrong; run a time service (chrony, systemd-timesyncd)", at(.0))]
    NotYetValid(Option<Timestamp>),
    #[error(
        "the endpoint's certificate is one of a CA (basicConstraints CA:TRUE, as `openssl req -x509` makes them), which no server may have; sign a certificate for the endpoint with it and put that into the Secret, or make one with `-addext basicConstraints=critical,CA:FALSE`; the CA's own certificate belongs into /etc/onboarding-agent/root-certs.pem"
    )]
    OfACa,
    #[error(
        "the endpoint's certificate is not meant for servers (its extendedKeyUsage lacks serverAuth); have one issued that is, and put it into the Secret that the ControlPlane names"
    )]
    NotForServers,
    #[error(
        "the endpoint's certificate is signed in a way that is not safe any more (SHA-1, for instance); have it issued anew with SHA-256 and a key of P-256, or RSA of 2048 bits or more"
    )]
    OldSignature,
    #[error(
        "the endpoint's certificate was signed by one that is no CA's (basicConstraints lacks CA:TRUE); in tls.crt of the Secret each certificate must be signed by the CA after it"
    )]
    SignedByNoCa,
    #[error(
        "a CA in the chain of the endpoint's certificate was not allowed to sign it (nameConstraints or pathLenConstraint); have it issued by one that may sign for {name}"
    )]
    BeyondTheCa { name: String },
    #[error(
        "the endpoint's certificate can't be read ({why}); it must be X.509 version 3, as `openssl x509 -req` makes with `-extfile` that names subjectAltName"
    )]
    Unreadable { why: String },
    #[error(
        "the endpoint's certificate can't be verified ({why}); have it issued anew without what is unusual about it"
    )]
    Other { why: String },
    #[error(
        "{address} does not speak TLS; check onboardingEndpoint.port, and that nothing in between takes TLS off: the agents' connections are to be passed through"
    )]
    NotTls { address: SocketAddr },
    #[error("{address} speaks no version of TLS from 1.2 on; is it the endpoint?")]
    OldTls { address: SocketAddr },
    #[error(
        "nobody at {address} answers for the name {name}; put a name of the ControlPlane's endpoint.hosts into onboardingEndpoint.host, or into onboardingEndpoint.transportSecurity.tls.sni"
    )]
    NobodyOfThatName { address: SocketAddr, name: String },
    #[error(
        "{address} closed the connection instead of showing a certificate; a gateway does that which knows nobody of the name {name}, or whose onboarding-plane isn't up: `kubectl get deployment onboarding-plane -n istio-system`"
    )]
    Closed { address: SocketAddr, name: String },
}

fn at(time: &Option<Timestamp>) -> String {
    time.map(|time| format!(" ({time})")).unwrap_or_default()
}

impl TlsProblem {
    /// `None`: one that needs no words of ours. `name`: that is sent and verified.
    pub fn of(source: &io::Error, name: &str, address: SocketAddr) -> Option<Self> {
        let name = || name.to_owned();
        match source.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            Some(Error::InvalidCertificate(bad)) => Some(Self::certificate(bad, name())),
            Some(Error::InvalidMessage(_)) => Some(Self::NotTls { address }),
            Some(Error::PeerIncompatible(_) | Error::AlertReceived(AlertDescription::ProtocolVersion)) => {
                Some(Self::OldTls { address })
            }
            Some(Error::AlertReceived(AlertDescription::UnrecognisedName)) => {
                Some(Self::NobodyOfThatName { address, name: name() })
            }
            Some(_) => None,
            None => {
                let closed = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
                closed.contains(&source.kind()).then(|| Self::Closed { address, name: name() })
            }
        }
    }

    fn certificate(bad: &Bad, name: String) -> Self {
        match bad {
            Bad::NotValidForName => Self::WrongName { name, presented: "(unknown)".to_owned() },
            Bad::NotValidForNameContext { presented, .. } => Self::WrongName {
                name,
                presented: if presented.is_empty() { "no name at all".to_owned() } else { presented.join(", ") },
            },
            // The latter: a CA of that name is known, with another key, as after it was made anew.
            Bad::UnknownIssuer | Bad::BadSignature => Self::UnknownCa,
            Bad::Expired => Self::Expired(None),
            Bad::ExpiredContext { not_after, .. } => Self::Expired(moment(not_after.as_secs())),
            Bad::NotValidYet => Self::NotYetValid(None),
            Bad::NotValidYetContext { not_before, .. } => Self::NotYetValid(moment(not_before.as_secs())),
            Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => Self::NotForServers,
            Bad::UnsupportedSignatureAlgorithmContext { .. }
            | Bad::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => Self::OldSignature,
            Bad::BadEncoding => Self::Unreadable { why: "it is no certificate in DER".to_owned() },
            Bad::Other(other) => match other.0.downcast_ref::<webpki::Error>() {
                Some(webpki::Error::CaUsedAsEndEntity) => Self::OfACa,
                Some(webpki::Error::EndEntityUsedAsCa) => Self::SignedByNoCa,
                Some(webpki::Error::NameConstraintViolation | webpki::Error::PathLenConstraintViolated) => {
                    Self::BeyondTheCa { name }
                }
                Some(webpki::Error::UnsupportedCertVersion) => {
                    Self::Unreadable { why: "it is of X.509 version 1".to_owned() }
                }
                Some(webpki::Error::MalformedExtensions | webpki::Error::ExtensionValueInvalid) => {
                    Self::Unreadable { why: "an extension of it is malformed".to_owned() }
                }
                Some(error) => Self::Other { why: error.to_string() },
                None => Self::Other { why: other.to_string() },
            },
            other => Self::Other { why: other.to_string() },
        }
    }
}

fn moment(seconds: u64) -> Option<Timestamp> {
    Timestamp::from_second(i64::try_from(seconds).ok()?).ok()
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
