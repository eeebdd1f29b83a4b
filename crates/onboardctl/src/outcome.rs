//! What a verb comes to: its standard output, what goes to standard error, and the exit code.

use std::io::{self, Write};
use std::process::ExitCode;

/// Nothing was wrong with the question; what the answer is, `code` says. An error of a verb is exit code [`FAILED`].
#[derive(Debug, Default)]
pub struct Outcome {
    /// Standard output, as it is.
    pub out: String,
    /// Lines of standard error.
    pub notes: Vec<String>,
    pub code: u8,
}

/// An input that can't be used, a plane that doesn't answer, wrong usage. Also what the argument parser's errors become: its own 2
/// would read as an answer of `explain`.
pub const FAILED: u8 = 1;

impl Outcome {
    pub fn text(out: String) -> Self {
        Self { out, ..Self::default() }
    }

    /// Writes it all. Whoever closed the pipe has read enough.
    pub fn write(&self) -> ExitCode {
        for note in &self.notes {
            complain(note);
        }
        let mut stdout = io::stdout().lock();
        match stdout.write_all(self.out.as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                complain(&format!("onboardctl: writing to standard output: {error}"));
                ExitCode::from(FAILED)
            }
            _ => ExitCode::from(self.code),
        }
    }
}

/// A line of standard error; nobody is left to be told where that can't be written.
pub fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", printable(line));
}

/// What a terminal shows and doesn't obey: control characters and those that turn the direction of writing are spelt out.
pub fn printable(text: &str) -> String {
    let obeyed = |c: char| {
        c.is_control()
            || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if obeyed(c) {
            out.extend(c.escape_default())
        } else {
            out.push(c)
        }
        out
    })
}

/// `-o` of the verbs that have one way to say it to programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    #[default]
    Text,
    Json,
}

/// JSON for people and programs, with a line end.
pub fn json(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_obeys_nothing() {
        assert_eq!(printable("a\u{1b}[2J\u{202e}b\n é"), "a\\u{1b}[2J\\u{202e}b\\n é");
    }
}
