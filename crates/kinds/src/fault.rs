//! One thing that is wrong with a document.

use std::fmt::{self, Write};

/// `Display` is `FILE:LINE: KIND NAMESPACE/NAME: FIELD.PATH: what is wrong`, in one line, with control characters escaped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    pub file: String,
    /// From 1.
    pub line: usize,
    /// `OnboardingPolicy bookinfo/narrow`; of an agent's file only the kind; empty where no kind could be read.
    pub object: String,
    /// `spec.allow[0].workloads[0].aws.accounts`; empty for a document as a whole.
    pub path: String,
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = Escaped(f);
        write!(out, "{}:{}", self.file, self.line)?;
        for part in [&self.object, &self.path] {
            if !part.is_empty() {
                write!(out, ": {part}")?;
            }
        }
        write!(out, ": {}", self.message)
    }
}

impl Fault {
    /// `KIND NAMESPACE/NAME: FIELD.PATH: what is wrong`, for what isn't from a file; in one line, as [`fmt::Display`] has it.
    pub fn of_object(&self) -> String {
        join(&[&self.object, &self.path, &self.message])
    }
    /// `FIELD.PATH: what is wrong`, where the object is known.
    pub fn of_field(&self) -> String {
        join(&[&self.path, &self.message])
    }
}

/// The parts that there are, with colons between them.
fn join(parts: &[&str]) -> String {
    let parts: Vec<_> = parts.iter().copied().filter(|part| !part.is_empty()).collect();
    let mut out = String::new();
    for c in parts.join(": ").chars() {
        if is_unprintable(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// Writes text so that a terminal shows it and doesn't obey it: control characters, line and paragraph separators and
/// the characters that turn the direction of writing become `\u{..}`.
struct Escaped<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| {
            if is_unprintable(c) { write!(self.0, "{}", c.escape_default()) } else { self.0.write_char(c) }
        })
    }
}

pub(crate) fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// A value of the input in a message: in quotes, and not longer than people read.
pub(crate) fn shown(value: &str) -> String {
    const LONGEST: usize = 120;
    let mut text = format!("{value:?}");
    if text.chars().count() > LONGEST {
        text = format!("{}...\"", text.chars().take(LONGEST).collect::<String>());
    }
    text
}
