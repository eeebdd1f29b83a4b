//! The Workload Onboarding Token: its claims, and the rules by which one is accepted. Signing and parsing are the endpoint's.

use crate::identity::{Attested, Thumbprint};
use crate::name::{GroupName, RegistrationName};
use crate::registration::{Ended, LONGEST_TOKEN_LIFE, State};
use jiff::Timestamp;
use std::time::Duration;

/// Reference, section 7, plus `cnf` (RFC 7800), which binds the token to the agent's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// `iss`, `azp` and `aud`: the plane's UID.
    pub plane_uid: String,
    /// `sub`: `<namespace>/<war name>`.
    pub subject: RegistrationName,
    /// `iat`, in whole seconds.
    pub issued_at: Timestamp,
    /// `exp`, in whole seconds.
    pub expires_at: Timestamp,
    /// `jti`.
    pub id: String,
    /// What was attested when it was issued. `claims.workload` is what was proven of its identity; what is only claimed travels apart from it.
    pub attested: Attested,
    /// `claims.workload_group`.
    pub group: GroupName,
    /// `cnf: {"jkt": ...}`: the thumbprint of the agent's key, in hex.
    pub key: Thumbprint,
}

/// Clocks of replicas may differ by this much.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// When a token of a registration in this state is issued, and when it ends: whole seconds, and later than the end of an
/// earlier registration, so that the tokens of before that end stay worthless. At most [`LONGEST_TOKEN_LIFE`].
pub fn lifetime(state: &State, now: Timestamp, life: Duration) -> (Timestamp, Timestamp) {
    let mut issued = now.as_second();
    if let State::Ended(Ended { at, .. }) = state {
        issued = issued.max(at.as_second() + 1);
    }
    let issued = Timestamp::from_second(issued).unwrap_or(now);
    let life = Duration::from_secs(life.min(LONGEST_TOKEN_LIFE).as_secs().max(1));
    (issued, issued.checked_add(life).unwrap_or(Timestamp::MAX))
}

/// Why a token, whose signature is ours, is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefusal {
    #[error("the token is for the plane {token:?}, this is {plane:?}; onboard again")]
    AnotherPlane { token: String, plane: String },
    #[error("the token expired at {0}; onboard again")]
    Expired(Timestamp),
    #[error("the token is valid from {0} on, which is in the future; check the clocks")]
    NotYetValid(Timestamp),
    #[error("the token belongs to another key than the one that this connection proved")]
    AnotherKey,
}

/// Whether the holder of `key` may use this token now. Whether its registration lives and is still admitted is asked elsewhere.
pub fn accept(claims: &Claims, plane_uid: &str, key: Thumbprint, now: Timestamp) -> Result<(), TokenRefusal> {
    if claims.plane_uid != plane_uid {
        return Err(TokenRefusal::AnotherPlane { token: claims.plane_uid.clone(), plane: plane_uid.to_owned() });
    }
    if claims.expires_at <= now {
        return Err(TokenRefusal::Expired(claims.expires_at));
    }
    if now.checked_add(LEEWAY).is_ok_and(|latest| claims.issued_at > latest) {
        return Err(TokenRefusal::NotYetValid(claims.issued_at));
    }
    if claims.key != key {
        return Err(TokenRefusal::AnotherKey);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Fact, Identity, JwtIdentity, Proven, Replay};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    const KEY: Thumbprint = Thumbprint([1; 32]);

    fn claims() -> Claims {
        Claims {
            plane_uid: "plane".to_owned(),
            subject: RegistrationName { namespace: "bookinfo".to_owned(), name: "a".to_owned() },
            issued_at: at(1000),
            expires_at: at(4600),
            id: "1".to_owned(),
            attested: Attested {
                identity: Identity::Jwt(JwtIdentity {
                    issuer: Fact::Proven(Proven::by_attestor("https://i".to_owned())),
                    subject: Fact::Proven(Proven::by_attestor("s".to_owned())),
                    attributes: Default::default(),
                }),
                issuer_short_name: Some("i".to_owned()),
                replay: Replay::BoundToKey,
            },
            group: GroupName { namespace: "bookinfo".to_owned(), name: "a".to_owned() },
            key: KEY,
        }
    }

    #[test]
    fn each_rule_refuses_by_itself() {
        assert_eq!(accept(&claims(), "plane", KEY, at(1000)), Ok(()));
        assert_eq!(accept(&claims(), "plane", KEY, at(4599)), Ok(()));
        assert_eq!(accept(&claims(), "plane", KEY, at(4600)), Err(TokenRefusal::Expired(at(4600))));
        assert_eq!(accept(&claims(), "plane", KEY, at(940)), Ok(()));
        assert_eq!(accept(&claims(), "plane", KEY, at(939)), Err(TokenRefusal::NotYetValid(at(1000))));
        assert_eq!(accept(&claims(), "plane", Thumbprint([2; 32]), at(1000)), Err(TokenRefusal::AnotherKey));
        assert_eq!(
            accept(&claims(), "other", KEY, at(1000)).unwrap_err().to_string(),
            "the token is for the plane \"plane\", this is \"other\"; onboard again"
        );
    }

    #[test]
    fn a_new_token_is_later_than_the_end_of_the_registration() {
        let ended = State::Ended(Ended { key: None, at: at(1000) });
        assert_eq!(lifetime(&ended, at(1000), Duration::from_secs(60)), (at(1001), at(1061)));
        assert_eq!(lifetime(&ended, at(2000), Duration::from_secs(60)), (at(2000), at(2060)));
        assert_eq!(lifetime(&State::Absent, at(7), Duration::from_millis(500)), (at(7), at(8)));
        // Its end is forgotten no sooner than the token's.
        assert_eq!(lifetime(&State::Absent, at(0), Duration::MAX), (at(0), at(30 * 86_400)));
    }
}
