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

fn is_label(text: &str) -> bool {
    text.len() <= 63
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
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

pub(crate) fn label_value(text: &str) -> Result<String, String> {
    match is_qualified(text) || text.is_empty() {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be a label value (at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit), and is {}",
            shown(text)
        )),
    }
}

pub(crate) fn label_key(text: &str) -> Result<String, String> {
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
    is_subdomain(&text.to_ascii_lowercase())
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

/// A regular expression in RE2's syntax, which the `regex` crate reads.
pub(crate) fn regular_expression(text: &str) -> Result<String, String> {
    match regex::RegexBuilder::new(text).size_limit(1 << 20).build() {
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
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
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
