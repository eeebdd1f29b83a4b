//! The grammars of `crate::syntax`, as an API server can be asked to check them. A corpus runs through both (`tests/tests/crds.rs`).

use super::schema::{Grammar, Refusal};

/// Longer than any region, role, cluster or project is.
const LONGEST_NAME: u32 = 256;

/// What a terminal can't be shown.
const PRINTABLE: &str = r"^[^\p{Cc}\x{61c}\x{200b}-\x{200f}\x{2028}-\x{202e}\x{2060}-\x{206f}\x{feff}]*$";
const EMPTY: Refusal = Refusal { holds: "self.trim() != ''", says: "must not be empty" };
const PLACEHOLDER: Refusal = Refusal {
    holds: "!(self.startsWith('<') && self.endsWith('>'))",
    says: "is a placeholder; replace it with your own value",
};

pub(super) const NAME: Grammar =
    Grammar { longest: LONGEST_NAME, patterns: &[PRINTABLE], refusals: &[EMPTY, PLACEHOLDER] };

/// The same where a list in a list in a list would have too many of them for a rule that reads the whole text.
pub(super) const ONE_OF_MANY: Grammar =
    Grammar { longest: LONGEST_NAME, patterns: &[PRINTABLE, r"\S"], refusals: &[PLACEHOLDER] };

pub(super) const ASCII: Grammar = Grammar { longest: 2048, patterns: &["^[ -~]*$", r"\S"], refusals: &[PLACEHOLDER] };

pub(super) const AWS_ACCOUNT: Grammar = Grammar {
    longest: 20,
    patterns: &[],
    refusals: &[
        EMPTY,
        PLACEHOLDER,
        Refusal { holds: "self.matches('^[0-9]{12}$')", says: "must be an AWS account, which has 12 digits" },
    ],
};

pub(super) const DIGITS: Grammar = Grammar {
    longest: 64,
    patterns: &[],
    refusals: &[EMPTY, PLACEHOLDER, Refusal { holds: "self.matches('^[0-9]+$')", says: "must be digits" }],
};

pub(super) const MANY_DIGITS: Grammar = Grammar { longest: 64, patterns: &["^[0-9]+$"], refusals: &[PLACEHOLDER] };

/// Facts of a war: whatever was attested, as long as it is something.
pub(super) const FACT: Grammar =
    Grammar { longest: 16384, patterns: &[], refusals: &[Refusal { holds: "self != ''", says: "must not be empty" }] };

pub(super) const RESOURCE_NAME: Grammar = Grammar {
    longest: 253,
    patterns: &[],
    refusals: &[
        EMPTY,
        PLACEHOLDER,
        Refusal {
            holds: "self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",
            says: "must be a valid name (at most 253 lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit)",
        },
    ],
};

macro_rules! label_value {
    () => {
        "^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"
    };
}

macro_rules! label_key {
    () => {
        concat!(
            "^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?",
            "([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]$"
        )
    };
}

pub(super) const LABEL_VALUE: Grammar = Grammar {
    longest: 63,
    patterns: &[],
    refusals: &[Refusal {
        holds: concat!("self.matches('", label_value!(), "')"),
        says: "must be a label value (at most 63 letters, digits, '-', '_' and '.', beginning and ending with a letter or digit)",
    }],
};
/// One of many, as [`ONE_OF_MANY`].
pub(super) const LABEL_VALUES: Grammar = Grammar { longest: 63, patterns: &[label_value!()], refusals: &[] };

pub(super) const LABEL_KEY: Grammar = Grammar { longest: 317, patterns: &[label_key!()], refusals: &[PLACEHOLDER] };
macro_rules! not_a_label_key {
    () => {
        "is not a label key ([PREFIX/]NAME, where NAME is at most 63 letters, digits, '-', '_' and '.', and PREFIX a DNS name)"
    };
}

/// Of a mapping's keys.
pub(super) const LABEL_KEYS: Refusal = Refusal {
    holds: concat!("self.all(key, key.matches('", label_key!(), "'))"),
    says: concat!("has a key that ", not_a_label_key!()),
};
/// Which of them, in CEL.
pub(super) const FIRST_WRONG_KEY: &str = concat!(
    "'has a key that ' + \"",
    not_a_label_key!(),
    ": \" + self.filter(key, !key.matches('",
    label_key!(),
    "'))[0]"
);

/// An IP address as Rust reads it: `isIP` refuses IPv4 in IPv6, which begins with `::`; with a 1 before it, it is another address.
macro_rules! is_ip {
    ($text:literal) => {
        concat!("(isIP(", $text, ") || ", $text, ".startsWith('::') && isIP('1' + ", $text, "))")
    };
}

/// Labels of at most 63 letters, digits and hyphens, of which the last isn't a number.
macro_rules! self_is_host_name {
    () => {
        concat!(
            "self.matches('(?i)^([0-9a-z]([-0-9a-z]{0,61}[0-9a-z])?[.])*[0-9a-z]([-0-9a-z]{0,61}[0-9a-z])?$') && ",
            "!self.matches('(^|[.])[0-9]+$')"
        )
    };
}

pub(super) const HOST: Grammar = Grammar {
    longest: 253,
    patterns: &[],
    refusals: &[
        EMPTY,
        PLACEHOLDER,
        Refusal {
            holds: "!self.contains('<') && !self.contains('>')",
            says: "is a placeholder; replace it with a host name or an IP address",
        },
        Refusal { holds: "!self.contains('://')", says: "must be a host name or an IP address without a scheme" },
        Refusal {
            holds: "!self.startsWith('[')",
            says: "must be a host name or an IP address, without brackets and port",
        },
        Refusal {
            holds: concat!("(!self.contains(':') || ", is_ip!("self"), ")"),
            says: "must be a host name or an IP address without a port",
        },
        Refusal {
            holds: concat!("(", is_ip!("self"), " || ", self_is_host_name!(), ")"),
            says: "must be a host name or an IP address",
        },
    ],
};

pub(super) const IP: Grammar = Grammar {
    longest: 64,
    patterns: &[],
    refusals: &[EMPTY, PLACEHOLDER, Refusal { holds: is_ip!("self"), says: "must be an IP address" }],
};

const NO_QUERY: Refusal = Refusal { holds: "!self.contains('?')", says: "must be a URL without a query" };
const HTTPS: Refusal =
    Refusal { holds: "self.startsWith('https://')", says: "must be a URL that begins with https://" };
const NO_FRAGMENT: Refusal = Refusal { holds: "!self.contains('#')", says: "must be a URL without a fragment" };
/// Lint names the character.
const URL_CHARACTERS: Refusal =
    Refusal { holds: "self.matches('^[!#-;=?-Z_a-z~\\\\[\\\\]]*$')", says: "must be a URL" };
const NO_USER: Refusal =
    Refusal { holds: "!self.matches('^[^/]*//[^/?]*@')", says: "must be a URL without a user name" };
/// By regular expressions alone: what `url()` finds has no known length, so that no rule with it would be cheap enough.
const URL_HOST: Refusal = Refusal {
    holds: concat!(
        // A host name (or four numbers), or an IPv6 address in brackets.
        "self.matches('(?i)^https://([0-9a-z]+((-+|[.])[0-9a-z]+)*|\\\\[[0-9a-f.]*:[0-9a-f:.]+\\\\])([:/?]|$)') && ",
        "(!self.startsWith('https://[') || ",
        is_ip!("self.substring(9, self.indexOf(']'))"),
        ") && ",
        // Where its last label is a number, it is an IPv4 address.
        "(!self.matches('^https://([^/:?]*[.])?[0-9]+([:/?]|$)') || ",
        "self.matches('^https://((25[0-5]|2[0-4]\\\\d|1\\\\d\\\\d|[1-9]?\\\\d)[.]){3}(25[0-5]|2[0-4]\\\\d|1\\\\d\\\\d|[1-9]?\\\\d)([:/?]|$)')) && ",
        // No label is too long.
        "!self.matches('^https://[^/:?]*[^/:?.]{64}')"
    ),
    says: "must be a URL with a host name or an IP address",
};
const URL_PORT: Refusal = Refusal {
    holds: concat!(
        "self.matches('^https://(\\\\[.*\\\\]|[^:/?]*)",
        "(:0*([1-9]\\\\d{0,3}|[1-5]\\\\d{4}|6[0-4]\\\\d{3}|65[0-4]\\\\d\\\\d|655[0-2]\\\\d|6553[0-5]))?([/?]|$)')"
    ),
    says: "must be a URL whose port is from 1 to 65535",
};

pub(super) const ISSUER: Grammar = Grammar {
    longest: 256,
    patterns: &[],
    refusals: &[EMPTY, PLACEHOLDER, NO_QUERY, HTTPS, NO_FRAGMENT, URL_CHARACTERS, NO_USER, URL_HOST, URL_PORT],
};

pub(super) const HTTPS_URL: Grammar = Grammar {
    longest: 1024,
    patterns: &[],
    refusals: &[EMPTY, PLACEHOLDER, HTTPS, NO_FRAGMENT, URL_CHARACTERS, NO_USER, URL_HOST, URL_PORT],
};

pub(super) const SHORT_NAME: Grammar = Grammar {
    longest: 63,
    patterns: &[],
    refusals: &[
        EMPTY,
        PLACEHOLDER,
        Refusal {
            holds: "self.matches('^[0-9a-z]+(-[0-9a-z]+)*$')",
            says: "must be lower-case letters and digits, with single '-' between them, at most 63 characters",
        },
    ],
};

pub(super) const UID: Grammar = Grammar {
    longest: 1024,
    patterns: &[PRINTABLE],
    refusals: &[
        EMPTY,
        PLACEHOLDER,
        Refusal { holds: "!self.matches('[\\\\s\\\\pZ]')", says: "must be at most 1024 characters without spaces" },
    ],
};

const NEGATIVE: Refusal = Refusal { holds: "!self.startsWith('-')", says: "must not be negative" };
/// Go's grammar; `duration` reads with Go, but what it says of anything else isn't for people.
const GO_DURATION: Refusal = Refusal {
    holds: "self.matches('^[+]?(0|(([0-9]+[.]?[0-9]*|[.][0-9]+)(ns|us|\u{b5}s|\u{3bc}s|ms|s|m|h))+)$')",
    says: "must be a duration such as 1h, 1h30m or 500ms",
};

pub(super) const DURATION: Grammar =
    Grammar { longest: 64, patterns: &[], refusals: &[EMPTY, PLACEHOLDER, NEGATIVE, GO_DURATION, TOO_LONG] };

pub(super) const POSITIVE_DURATION: Grammar = Grammar {
    longest: 64,
    patterns: &[],
    refusals: &[
        EMPTY,
        PLACEHOLDER,
        NEGATIVE,
        GO_DURATION,
        TOO_LONG,
        Refusal { holds: "duration(self) > duration('0s')", says: "must be more than 0" },
    ],
};

/// `duration` fails on more than 292 years, and a rule that fails refuses; the message is then the API server's own.
const TOO_LONG: Refusal =
    Refusal { holds: "duration(self) >= duration('0s')", says: "must be a duration of at most 292 years" };

/// CEL can't read JSON: what is plainly no set of public keys is refused, the rest is left to the plane.
pub(super) const JWKS: Grammar = Grammar {
    longest: 32768,
    patterns: &[],
    refusals: &[
        Refusal {
            holds: "self.matches('(?s)^\\\\s*[{].*[}]\\\\s*$')",
            says: "must be a JSON Web Key Set, and is not JSON",
        },
        Refusal {
            holds: "self.matches('\"keys\"\\\\s*:\\\\s*\\\\[\\\\s*[{]')",
            says: "must be a JSON Web Key Set: an object whose member keys is a list of at least one key",
        },
        Refusal { holds: "!self.matches('\"d\"\\\\s*:')", says: "is a private key; only public keys belong here" },
        Refusal {
            holds: "!self.matches('\"kty\"\\\\s*:\\\\s*\"oct\"')",
            says: "is a symmetric key (kty oct); only public keys belong here",
        },
    ],
};

/// RFC 9535 is more than a regular expression can read: what this lets pass is left to the plane.
pub(super) const JSON_PATH: Grammar = Grammar {
    longest: 512,
    patterns: &[PRINTABLE],
    refusals: &[
        EMPTY,
        PLACEHOLDER,
        Refusal {
            holds: "!self.startsWith('[')",
            says: "must be a JSONPath such as .attributes, .a\\.b or $['a'].b: a path that begins with brackets needs $ before them",
        },
        Refusal {
            holds: "self.matches('^[.$].')",
            says: "must be a JSONPath such as .attributes, .a\\.b or $['a'].b: it must begin with . or $ and go on",
        },
        Refusal {
            holds: "self.matches('^[$]?([.][.]?([^.\\\\[\\\\\\\\]|\\\\\\\\.)+|([.][.])?\\\\[.+\\\\])+$')",
            says: "must be a JSONPath such as .attributes, .a\\.b or $['a'].b",
        },
    ],
};
