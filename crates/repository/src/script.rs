//! `/install/onboard.sh`: the installation as one script, with the name by which the repository was asked in it.

use http::uri::Authority;
use http::{Request, header};

/// Below the root.
pub(crate) const NAME: &str = "onboard.sh";
const TEMPLATE: &str = include_str!("onboard.sh");
/// Of a DNS name.
const MOST_NAME: usize = 253;

/// `None`: the request doesn't say to whom it is, in characters that a script can hold.
pub(crate) fn script<B>(request: &Request<B>) -> Option<String> {
    let asked = match request.uri().authority() {
        Some(authority) => authority.clone(),
        None => request.headers().get(header::HOST)?.to_str().ok()?.parse::<Authority>().ok()?,
    };
    let host = asked.host();
    let name = match host.strip_prefix('[') {
        // The address only decides which bytes may be in it.
        Some(address) => address.strip_suffix(']').filter(|address| address.parse::<std::net::Ipv6Addr>().is_ok())?,
        None => host,
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':');
    if name.is_empty() || name.len() > MOST_NAME || !name.bytes().all(plain) {
        return None;
    }
    let whole = match asked.port_u16() {
        Some(443) | None => host.to_owned(),
        Some(port) => format!("{host}:{port}"),
    };
    Some(TEMPLATE.replace("@HOST@", &whole).replace("@NAME@", name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(host: &str) -> Option<String> {
        script(&Request::builder().uri("/install/onboard.sh").header(header::HOST, host).body(()).unwrap())
    }

    #[test]
    fn the_name_by_which_it_was_asked_is_in_it() {
        for (host, repository, endpoint) in [
            ("onboarding.corp", "'https://onboarding.corp'", "'onboarding.corp'"),
            ("onboarding.corp:443", "'https://onboarding.corp'", "'onboarding.corp'"),
            ("onboarding.corp:8443", "'https://onboarding.corp:8443'", "'onboarding.corp'"),
            ("[2001:db8::1]:8443", "'https://[2001:db8::1]:8443'", "'2001:db8::1'"),
        ] {
            let script = asked(host).unwrap();
            assert!(script.contains(&format!("REPOSITORY={repository}\nENDPOINT={endpoint}\n")), "{script}");
            assert!(!script.contains("@HOST@") && !script.contains("@NAME@"));
        }
    }

    #[test]
    fn nothing_else_gets_into_it() {
        let long = "a".repeat(254);
        for host in ["", "a'b", "a$(id)", "a b", "a;id", "a`id`", "[x]", "[2001:db8::1", "a\\b", "a/b", "a\"b", &long] {
            assert_eq!(asked(host), None, "{host}");
        }
        // Who asks is no part of whom they ask.
        assert!(!asked("mallory'@onboarding.corp").unwrap_or_default().contains("mallory"));
        assert_eq!(script(&Request::new(())), None);
    }
}
