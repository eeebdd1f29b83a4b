//! The grammars of single values. Each gives the value, or a sentence that says what is wrong with it.

use crate::fault::shown;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

pub(crate) fn any(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

pub(crate) fn ascii(text: &str) -> Result<String, String> {
    match text.is_ascii() {
        true => Ok(text.to_owned()),
        false => Err(format!("must be ASCII, and is {}", shown(text))),
    }
}

/// Lower-case letters, digits and `-`, beginning and ending with a letter or digit.
fn is_lower(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

fn is_label(text: &str) -> bool {
    text.len() <= 63 && is_lower(text)
}

/// As Kubernetes checks it: of the parts between the dots none may be empty, and any may be long.
fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_lower)
}

/// A Kubernetes namespace (RFC 1123 label).
pub(crate) fn namespace(text: &str) -> Result<String, String> {
    match is_label(text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be the name of a namespace (at most 63 lower-case letters, digits and '-', beginning and ending with a letter or digit), and is {}",
            shown(text)
        )),
    }
}

/// The name of a Kubernetes resource (RFC 1123 subdomain).
pub(crate) fn resource_name(text: &str) -> Result<String, String> {
    match is_subdomain(text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be a valid name (at most 253 lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit), and is {}",
            shown(text)
        )),
    }
}

/// The name of a port of a pod or workload.
pub(crate) fn port_name(text: &str) -> Result<String, String> {
    match is_label(text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be a port's number or its name (lower-case letters, digits and '-'), and is {}",
            shown(text)
        )),
    }
}

/// A label's value, or what is wrong with it.
pub fn label_value(text: &str) -> Result<String, String> {
    match is_qualified(text) || text.is_empty() {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be a label value (at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit), and is {}",
            shown(text)
        )),
    }
}

/// A label's key, or what is wrong with it.
pub fn label_key(text: &str) -> Result<String, String> {
    let valid = match text.split_once('/') {
        Some((prefix, name)) => is_subdomain(prefix) && is_qualified(name),
        None => is_qualified(text),
    };
    match valid {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "is not a label key ([PREFIX/]NAME, where NAME is at most 63 letters, digits, '-', '_' and '.', and PREFIX a DNS name): {}",
            shown(text)
        )),
    }
}

fn is_qualified(text: &str) -> bool {
    text.len() <= 63
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// A host name or an IP address: no scheme, no port, no placeholder.
pub(crate) fn host(text: &str) -> Result<String, String> {
    let host = shown(text);
    if text.contains(['<', '>']) {
        return Err(format!("{host} is a placeholder; replace it with a host name or an IP address"));
    }
    if let Some((_, rest)) = text.split_once("://") {
        return Err(format!(
            "must be a host name or an IP address without a scheme: {} instead of {host}",
            shown(rest)
        ));
    }
    if text.parse::<IpAddr>().is_ok() {
        return Ok(text.to_owned());
    }
    if text.starts_with('[') {
        return Err(format!("must be a host name or an IP address, without brackets and port, and is {host}"));
    }
    if let Some((name, _)) = text.split_once(':') {
        return Err(format!("must be a host name or an IP address without a port: {} instead of {host}", shown(name)));
    }
    match is_host_name(text) {
        true => Ok(text.to_owned()),
        false => Err(format!("must be a host name or an IP address, and is {host}")),
    }
}

/// Host names are compared without regard to case; a last label of digits would be an IPv4 address that isn't one.
pub(crate) fn is_host_name(text: &str) -> bool {
    text.len() <= 253
        && text.to_ascii_lowercase().split('.').all(is_label)
        && !text.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()))
}

/// `https`, optional port and path, no query (also no empty one), no fragment, no user.
pub(crate) fn issuer(text: &str) -> Result<String, String> {
    if text.contains('?') {
        return Err(format!("must be a URL without a query, and is {}", shown(text)));
    }
    https_url(text)
}

pub(crate) fn https_url(text: &str) -> Result<String, String> {
    let url = shown(text);
    let Some(rest) = text.strip_prefix("https://") else {
        return Err(format!("must be a URL that begins with https://, and is {url}"));
    };
    if text.contains('#') {
        return Err(format!("must be a URL without a fragment, and is {url}"));
    }
    if let Some(c) = rest.chars().find(|c| !c.is_ascii_graphic() || "\"<>\\^`{|}".contains(*c)) {
        return Err(format!("must be a URL, and {url} has {} in it", shown(&c.to_string())));
    }
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err(format!("must be a URL without a user name, and is {url}"));
    }
    let (name, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            (address.parse::<Ipv6Addr>().is_ok(), port.strip_prefix(':').or((!port.is_empty()).then_some(port)))
        }
        None => match authority.split_once(':') {
            Some((name, port)) => (is_host(name), Some(port)),
            None => (is_host(authority), None),
        },
    };
    if !name {
        return Err(format!("must be a URL with a host name or an IP address, and is {url}"));
    }
    let digits = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    if port.is_some_and(|port| !digits(port) || !port.parse::<u16>().is_ok_and(|port| port > 0)) {
        return Err(format!("must be a URL whose port is from 1 to 65535, and is {url}"));
    }
    Ok(text.to_owned())
}

fn is_host(text: &str) -> bool {
    text.parse::<std::net::Ipv4Addr>().is_ok() || is_host_name(text)
}

/// `^[0-9a-z]+(-[0-9a-z]+)*$`
pub(crate) fn short_name(text: &str) -> Result<String, String> {
    let part =
        |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    match text.len() <= 63 && text.split('-').all(part) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be lower-case letters and digits, with single '-' between them, at most 63 characters, and is {}",
            shown(text)
        )),
    }
}

/// `^[a-z0-9](?:[-a-z0-9]*[a-z0-9])?$`, at most 56 characters.
pub(crate) fn revision(text: &str) -> Result<String, String> {
    match is_label(text) && text.len() <= 56 {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be at most 56 lower-case letters, digits and '-', beginning and ending with a letter or digit, and is {}",
            shown(text)
        )),
    }
}

pub(crate) fn aws_account(text: &str) -> Result<String, String> {
    match text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => Ok(text.to_owned()),
        false => Err(format!("must be an AWS account, which has 12 digits, and is {}", shown(text))),
    }
}

pub(crate) fn digits(text: &str) -> Result<String, String> {
    match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => Ok(text.to_owned()),
        false => Err(format!("must be digits, and is {}", shown(text))),
    }
}

/// A regular expression in RE2's syntax, which the `regex-lite` crate reads: without classes of Unicode (`\\pL`), whose tables would be
/// a tenth of the agent.
pub(crate) fn regular_expression(text: &str) -> Result<String, String> {
    match regex_lite::RegexBuilder::new(text).size_limit(1 << 20).build() {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => {
            // The last line says what is wrong; those before it draw a picture.
            let error = error.to_string();
            let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
            Err(format!("must be a regular expression, and {} is none: {reason}", shown(text)))
        }
    }
}

/// The name of a plugin, which becomes a part of a file name.
pub(crate) fn plugin_name(text: &str) -> Result<String, String> {
    match is_qualified(text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit, and is {}",
            shown(text)
        )),
    }
}

/// Go's `time.ParseDuration`, without negative ones: `1h`, `1h30m`, `1.5s`, `500ms`, `0`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("must be a duration such as 1h, 1h30m or 500ms, and is {}", shown(text));
    if text.starts_with('-') {
        return Err(format!("must not be negative, and is {}", shown(text)));
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let whole = take_digits(&mut rest);
        let fraction = match rest.strip_prefix('.') {
            Some(after) => {
                rest = after;
                take_digits(&mut rest)
            }
            None => "",
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(invalid());
        }
        let unit_length = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let (unit, after) = rest.split_at(unit_length);
        rest = after;
        let unit: u128 = match unit {
            "ns" => 1,
            "us" | "\u{b5}s" | "\u{3bc}s" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return Err(invalid()),
        };
        // Go counts in 64 bits of nanoseconds (292 years); digits of a fraction beyond a nanosecond's don't count.
        let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
        let fraction = &fraction[..fraction.len().min(18)];
        let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| invalid())?);
        let part: u64 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| invalid())? };
        nanos += u128::from(whole) * unit + u128::from(part) * unit / scale;
        if nanos > i64::MAX.unsigned_abs().into() {
            return Err(format!("must be a duration of at most 292 years, and is {}", shown(text)));
        }
    }
    u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| invalid())
}

fn take_digits<'a>(rest: &mut &'a str) -> &'a str {
    let length = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (digits, after) = rest.split_at(length);
    *rest = after;
    digits
}

/// The short form of a JSONPath (`.a`, `.a\.b`) or the whole one (`$.a`, `$['a'].b`), as RFC 9535 writes it.
pub(crate) fn json_path(text: &str) -> Result<String, String> {
    const LONGEST: usize = 512;
    let invalid = |why: String| {
        format!("must be a JSONPath such as .attributes, .a\\.b or $['a'].b, and is {}{why}", shown(text))
    };
    if text.len() > LONGEST {
        return Err(invalid(format!(": it is longer than {LONGEST} bytes")));
    }
    if text.starts_with('[') {
        return Err(invalid(": a path that begins with brackets needs $ before them".to_owned()));
    }
    if !text.starts_with(['.', '$']) || text.len() < 2 {
        return Err(invalid(": it must begin with . or $ and go on".to_owned()));
    }
    if text.ends_with('\\') {
        return Err(invalid(": nothing comes after the last \\".to_owned()));
    }
    let path = rfc9535(text);
    match serde_json_path::JsonPath::parse(&path) {
        Ok(_) => Ok(path),
        Err(error) => Err(invalid(format!(" ({error})"))),
    }
}

fn rfc9535(text: &str) -> String {
    let mut path = String::from("$");
    let mut chars = text.strip_prefix('$').unwrap_or(text).chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            // Brackets stand as they are, to the bracket that closes them.
            '[' => {
                path.push('[');
                let (mut depth, mut quote) = (1, None);
                while let Some(c) = chars.next() {
                    path.push(c);
                    match (c, quote) {
                        ('\\', Some(_)) => path.extend(chars.next()),
                        ('\'' | '"', None) => quote = Some(c),
                        (c, Some(q)) if c == q => quote = None,
                        ('[', None) => depth += 1,
                        (']', None) => depth -= 1,
                        _ => {}
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            '.' => {
                let (mut name, mut escaped) = (String::new(), false);
                while let Some(c) = chars.next_if(|c| !matches!(c, '.' | '[')) {
                    match c {
                        '\\' => {
                            escaped = true;
                            name.extend(chars.next());
                        }
                        c => name.push(c),
                    }
                }
                // A name that the short form can't write, as one with a hyphen, goes into brackets.
                let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || !c.is_ascii())
                    && !name.starts_with(|c: char| c.is_ascii_digit());
                if !escaped && (plain || name == "*") {
                    path.push('.');
                    path.push_str(&name);
                } else {
                    path.push_str(&format!("['{}']", name.replace('\\', "\\\\").replace('\'', "\\'")));
                }
            }
            c => path.push(c),
        }
    }
    path
}

/// An inline JWKS: public, asymmetric keys only.
pub(crate) fn jwks(text: &str) -> Result<String, String> {
    let json: serde_json::Value =
        serde_json::from_str(text).map_err(|error| format!("must be a JSON Web Key Set, and is not JSON: {error}"))?;
    let keys = json.get("keys").and_then(|keys| keys.as_array()).filter(|keys| !keys.is_empty());
    let keys = keys.ok_or("must be a JSON Web Key Set: an object whose member keys is a list of at least one key")?;
    for (index, key) in keys.iter().enumerate() {
        match key.get("kty").and_then(|kty| kty.as_str()) {
            Some("RSA" | "EC" | "OKP") if key.get("d").is_some() => {
                return Err(format!("keys[{index}] is a private key; only public keys belong here"));
            }
            Some("RSA" | "EC" | "OKP") => {}
            Some("oct") => {
                return Err(format!("keys[{index}] is a symmetric key (kty oct); only public keys belong here"));
            }
            Some(kty) => return Err(format!("keys[{index}] has the key type {}, which isn't known", shown(kty))),
            None => return Err(format!("keys[{index}] has no key type (kty)")),
        }
    }
    Ok(text.to_owned())
}

/// Which keys of a JWKS no token can name.
pub(crate) fn nameless_keys(jwks: &str) -> Vec<usize> {
    let json: serde_json::Value = serde_json::from_str(jwks).unwrap_or_default();
    let keys = json["keys"].as_array().into_iter().flatten().enumerate();
    keys.filter(|(_, key)| !key["kid"].is_string()).map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_go_s() {
        let nanos = |text: &str| duration(text).map(|duration| duration.as_nanos());
        // From Go's own time_test.go.
        for (text, wanted) in [
            ("0", 0),
            ("5s", 5_000_000_000),
            ("+5s", 5_000_000_000),
            ("5.0s", 5_000_000_000),
            ("5.6s", 5_600_000_000),
            ("5.s", 5_000_000_000),
            (".5s", 500_000_000),
            ("1.004s", 1_004_000_000),
            ("100.00100s", 100_001_000_000),
            ("10ns", 10),
            ("11us", 11_000),
            ("12\u{b5}s", 12_000),
            ("12\u{3bc}s", 12_000),
            ("13ms", 13_000_000),
            ("14s", 14_000_000_000),
            ("15m", 900_000_000_000),
            ("16h", 57_600_000_000_000),
            ("3h30m", 12_600_000_000_000),
            ("10.5s4m", 250_500_000_000),
            ("1h2m3s4ms5us6ns", 3_723_004_005_006),
            ("52763797000ns", 52_763_797_000),
            ("0.3333333333333333333h", 1_199_999_999_999),
            ("9223372036854775807ns", 9_223_372_036_854_775_807),
        ] {
            assert_eq!(nanos(text), Ok(wanted), "{text}");
        }
        for text in ["", "3", "s", ".", ".s", "1d", "1h-1m", "-1s", "1 s", "9223372036854775808ns", "3000000h", "1e3s"]
        {
            assert!(nanos(text).is_err(), "{text}");
        }
    }

    #[test]
    fn json_paths_become_rfc_9535() {
        for (text, wanted) in [
            (".custom_attributes", "$.custom_attributes"),
            (".a.b", "$.a.b"),
            (r".custom\.attributes", "$['custom.attributes']"),
            (r".a.b\.c.d", "$.a['b.c'].d"),
            (".custom-attributes", "$['custom-attributes']"),
            (".a[0].b", "$.a[0].b"),
            ("$['custom_attributes']", "$['custom_attributes']"),
            ("$['google'].compute_engine", "$['google'].compute_engine"),
            ("$[\"a.b\"].c-d", "$[\"a.b\"]['c-d']"),
            ("$['a[.]b'].c", "$['a[.]b'].c"),
            (r".it\'s", r"$['it\'s']"),
            ("..x", "$..x"),
            ("$.*", "$.*"),
        ] {
            assert_eq!(json_path(text).as_deref(), Ok(wanted), "{text}");
        }
        for text in ["a", "['a']", ".", "$", "$$", ".a[", "$.a[?", ".['a']", ".a.", r".a\"] {
            assert!(json_path(text).is_err(), "{text} became {:?}", json_path(text));
        }
        assert!(json_path(&format!(".{}", "a".repeat(600))).is_err());
        assert!(json_path(&format!("$[?{}@.a{}]", "(".repeat(250), ")".repeat(250))).is_ok());
    }

    #[test]
    fn hosts() {
        for text in ["a", "A.example", "192.0.2.1", "2001:db8::1", "1password.com", "xn--bcher-kva.example"] {
            assert_eq!(host(text).as_deref(), Ok(text));
        }
        for text in [
            "a.",
            ".a",
            "a..b",
            "-a",
            "a-",
            "a_b",
            "1.2.3",
            "1.2.3.4.5",
            "::1%eth0",
            "a/b",
            "b\u{fc}cher.example",
            "*.a",
        ] {
            assert!(host(text).is_err(), "{text}");
        }
        assert!(host(&"a".repeat(64)).is_err());
    }

    #[test]
    fn issuers() {
        for text in [
            "https://a",
            "https://A.example/Realm",
            "https://a:1",
            "https://a:65535/x/y",
            "https://192.0.2.1:8443",
            "https://[2001:db8::1]:8443/x",
            "https://[::1]",
            "https://a/",
        ] {
            assert_eq!(issuer(text).as_deref(), Ok(text));
        }
        for text in [
            "https://",
            "https:///x",
            "HTTPS://a",
            "http://a",
            "https://a?",
            "https://a?x=1",
            "https://a#",
            "https://a:",
            "https://a:0",
            "https://a:x",
            "https://a:+1",
            "https://u@a",
            "https://u:p@a",
            "https://a b",
            "https://a/\u{fc}",
            "https://[::1",
            "https://::1",
            "https://[::1]x",
            "https://[a]",
            "https://a\\b",
            "https://1.2.3",
        ] {
            assert!(issuer(text).is_err(), "{text}");
        }
    }

    #[test]
    fn accounts() {
        assert!(aws_account("012345678901").is_ok());
        assert!(aws_account("\u{661}23456").is_err(), "digits of other scripts");
    }
}
