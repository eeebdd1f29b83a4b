//! Who a host is, and how sure we are of each part of it.
//!
//! What an attestor verified and what a host merely says of itself are different types: a policy can only see the former.

use std::collections::BTreeMap;
use std::fmt;

/// A value that an attestor verified.
///
/// Only attestors make these (`onboarding-attest`, and `onboardctl explain` for an identity file);
/// `dev/walls` refuses a call of [`Proven::by_attestor`] elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Proven<T>(T);

impl<T> Proven<T> {
    /// To be called where the verification succeeded, and nowhere else.
    pub fn by_attestor(value: T) -> Self {
        Self(value)
    }
    pub fn get(&self) -> &T {
        &self.0
    }
    pub fn into_inner(self) -> T {
        self.0
    }
}

/// A value that a host or a credential's holder chose.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Claimed<T>(pub T);

/// One part of an identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fact<T> {
    Proven(Proven<T>),
    Claimed(Claimed<T>),
}

impl<T> Fact<T> {
    pub fn claimed(value: T) -> Self {
        Self::Claimed(Claimed(value))
    }
    /// The value, if it was proven: all that a decision may use.
    pub fn proven(&self) -> Option<&T> {
        match self {
            Self::Proven(value) => Some(value.get()),
            Self::Claimed(_) => None,
        }
    }
    /// The value whether proven or not: for people to read and for names, never to decide by.
    pub fn stated(&self) -> &T {
        match self {
            Self::Proven(value) => value.get(),
            Self::Claimed(Claimed(value)) => value,
        }
    }
    pub fn is_proven(&self) -> bool {
        matches!(self, Self::Proven(_))
    }
}

impl<T> From<Proven<T>> for Fact<T> {
    fn from(value: Proven<T>) -> Self {
        Self::Proven(value)
    }
}

/// The identity of a host, which is the identity of its workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    Aws(AwsIdentity),
    Gcp(GcpIdentity),
    Azure(AzureIdentity),
    Jwt(JwtIdentity),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsIdentity {
    /// `aws`, `aws-cn`, `aws-us-gov`, ...
    pub partition: Fact<String>,
    /// 12 digits.
    pub account: Fact<String>,
    pub region: Fact<String>,
    pub zone: Fact<String>,
    pub compute: AwsCompute,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AwsCompute {
    Ec2 { instance_id: Fact<String>, iam_role: Option<Fact<String>> },
    Ecs { task_id: Fact<String>, cluster: Fact<String>, iam_role: Option<Fact<String>> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcpIdentity {
    pub project_number: Fact<String>,
    pub project_id: Fact<String>,
    pub region: Fact<String>,
    pub zone: Fact<String>,
    pub instance_id: Fact<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AzureIdentity {
    pub subscription: Fact<String>,
    pub resource_group: Fact<String>,
    pub instance_id: Fact<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtIdentity {
    pub issuer: Fact<String>,
    pub subject: Fact<String>,
    /// Each attribute with the values that it may be matched by: one for a scalar, one for each element of an array.
    /// Strings stand for themselves, numbers and booleans by their JSON text; other shapes never get here.
    pub attributes: BTreeMap<String, Fact<AttributeValue>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttributeValue {
    One(String),
    Any(Vec<String>),
}

impl AttributeValue {
    /// An array, of its elements as text. `None`, as for any other shape that never matches, if one of them isn't a scalar.
    pub fn array(elements: impl IntoIterator<Item = Option<String>>) -> Option<Self> {
        elements.into_iter().collect::<Option<_>>().map(Self::Any)
    }

    pub fn values(&self) -> &[String] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Any(values) => values,
        }
    }
}

/// SHA-256 of the agent's public key (its SubjectPublicKeyInfo in DER): the key's name.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Thumbprint(pub [u8; 32]);

impl fmt::Display for Thumbprint {
    /// Lower-case hex, 64 characters.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Thumbprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for Thumbprint {
    type Err = ThumbprintError;
    fn from_str(text: &str) -> Result<Self, ThumbprintError> {
        if text.len() != 64 || !text.is_ascii() {
            return Err(ThumbprintError);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| ThumbprintError)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| ThumbprintError)?;
        }
        Ok(Self(bytes))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a key's thumbprint is 64 hexadecimal digits")]
pub struct ThumbprintError;

/// How long the same evidence could be presented again by somebody who copied it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replay {
    /// The evidence itself names the agent's key (an STS request signed over its thumbprint): worth nothing to another key.
    BoundToKey,
    /// A bearer credential, until it expires.
    Until(jiff::Timestamp),
    /// A document without an end (the EC2 identity document).
    Forever,
}

/// What an attestor makes of evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attested {
    pub identity: Identity,
    /// The name that the ControlPlane gives the token's issuer; only and always with [`Identity::Jwt`].
    pub issuer_short_name: Option<String>,
    pub replay: Replay,
}
