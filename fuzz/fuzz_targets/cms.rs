//! An identity document: reading it ends and doesn't panic, and what is accepted is what the region's key has signed.
//!
//! The seeds are forms of one document that `onboarding-testkit` signed with the key of `cms-certificate.pem`, which was then
//! forgotten: whatever of them is accepted after mutation must still say the same.
#![no_main]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use libfuzzer_sys::fuzz_target;
use onboarding_attest::aws::certificates::Certificates;
use onboarding_attest::aws::document::verify;
use std::sync::LazyLock;

static CERTIFICATES: LazyLock<Certificates> = LazyLock::new(|| {
    let mut certificates = Certificates::published().unwrap();
    certificates.add(include_str!("cms-certificate.pem")).unwrap();
    certificates
});

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = verify(text, &CERTIFICATES);
        let _ = Certificates::default().add(text);
    }
    if let Ok(identity) = verify(&STANDARD.encode(data), &CERTIFICATES) {
        assert_eq!(identity.account, "123456789012");
        assert_eq!((identity.region.as_str(), identity.zone.as_str()), ("us-east-2", "us-east-2b"));
        assert_eq!(identity.instance_id, "i-1234567890abcdef0");
    }
});
