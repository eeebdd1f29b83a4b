//! An answer of STS: reading it ends and doesn't panic, and a caller that is understood has an account and a name.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onboarding_attest::aws::sts::{Principal, Said, understand};

fuzz_target!(|data: &[u8]| {
    for status in [200, 403, 503] {
        let said = Said { status, body: data.to_vec() };
        let Ok(caller) = understand(&said, "sts.us-east-2.amazonaws.com") else { continue };
        assert_eq!(status, 200);
        assert!(caller.account.len() == 12 && caller.account.bytes().all(|byte| byte.is_ascii_digit()));
        match caller.principal {
            Principal::Instance { id } => assert!(id.starts_with("i-")),
            Principal::Role { name, session } => assert!(!format!("{name}{session}").contains([':', '/', ' '])),
        }
    }
});
