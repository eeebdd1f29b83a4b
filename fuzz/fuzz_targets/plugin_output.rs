//! What a plugin prints: reading ends and doesn't panic, and what is accepted fits where it goes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onboarding_agent::host::plugin::{parse_credential, parse_host_info, parse_status};

fuzz_target!(|data: &[u8]| {
    match parse_credential(data) {
        Ok(credential) => {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            assert!(credential.token.bytes().all(allowed), "it goes into a header and a log must not have it");
            assert_eq!(credential.token.split('.').count(), 3);
        }
        // What is wrong is said in one line of bounded length, whatever was printed.
        Err(problem) => {
            let text = problem.to_string();
            assert!(text.len() < 4096 && !text.chars().any(char::is_control), "{text:?}");
        }
    }
    if let Ok(addresses) = parse_host_info(data) {
        assert!((1..=64).contains(&addresses.len()));
        assert!(addresses.iter().all(|address| !address.ip.is_unspecified() && !address.ip.is_multicast()));
    }
    if let Some(problem) = parse_status(data) {
        assert!(!problem.to_string().chars().any(char::is_control));
    }
});
