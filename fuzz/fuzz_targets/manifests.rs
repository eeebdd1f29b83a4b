//! Whatever a manifest, an agent's file or an identity file holds: reading ends, doesn't panic, and says what is wrong in
//! lines that a terminal can be shown.
#![no_main]

use libfuzzer_sys::fuzz_target;
use onboarding_kinds::fault::Fault;
use onboarding_kinds::{agent, identity, manifest};

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let manifests = manifest::read("f.yaml", text);
    check(&manifests.faults);
    check(&manifests.warnings);
    check(&manifest::cross_check(&manifests.items));
    check(&agent::read_onboarding_configuration("f.yaml", text).err().unwrap_or_default());
    check(&agent::read_agent_configuration("f.yaml", text).err().unwrap_or_default());
    match identity::read_identity_file("f.yaml", text) {
        Err(faults) => check(&faults),
        // What was read is written, and read back as it was.
        Ok(identity) => {
            let (value, claimed) = identity::stated_to_json(&identity, identity::Case::Snake);
            assert_eq!(identity::from_json(&value, &claimed), Ok(identity));
        }
    }
});

fn check(faults: &[Fault]) {
    for fault in faults {
        assert!(fault.line > 0);
        assert!(!fault.to_string().contains(char::is_control));
    }
}
