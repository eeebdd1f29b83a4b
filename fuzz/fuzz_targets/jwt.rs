//! A token, or an issuer's keys: reading ends and doesn't panic, and a token that is accepted is one of those that were signed.
//!
//! The seeds are tokens that `onboarding-testkit` signed with the keys of `jwt-keys.json`, which were then forgotten.
#![no_main]

use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;
use onboarding_attest::jwt::verify::{Keys, Token, issuer_of, verify};
use onboarding_attest::jwt::{Issuer, KeySource, attested};
use std::sync::LazyLock;

static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys::read(include_bytes!("jwt-keys.json")).unwrap());
static ISSUERS: LazyLock<[Issuer; 1]> = LazyLock::new(|| {
    [Issuer {
        issuer: "https://issuer.example".to_owned(),
        short_name: "issuer".to_owned(),
        keys: KeySource::Discovery,
        attributes: Some("$.custom_attributes".to_owned()),
    }]
});

fuzz_target!(|data: &[u8]| {
    let now = Timestamp::from_second(1_790_000_000).unwrap();
    let others = Keys::read(data).unwrap_or_default();
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(token) = Token::read(text) else { return };
    let Ok(issuer) = issuer_of(&token, &*ISSUERS) else { return };
    let _ = verify(&token, issuer, &others, "plane", now);
    if let Ok(verified) = verify(&token, issuer, &KEYS, "plane", now) {
        assert_eq!((verified.issuer.as_str(), verified.subject.as_str()), ("https://issuer.example", "vm007"));
        assert_eq!(verified.attributes.len(), 3);
        assert!(attested(verified).issuer_short_name.is_some());
    }
});
