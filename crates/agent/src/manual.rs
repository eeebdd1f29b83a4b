//! The manual page: what the command line says of itself, and what `manual.8` adds to it. The packages are made with it.

use crate::args::Cli;
use clap::CommandFactory;
use std::io::{self, Write};

/// Without a date: the same input is the same page. `Aq` is the apostrophe of what clap_mangen writes.
const TITLE: &[u8] = br#".ie \n(.g .ds Aq \(aq
.el .ds Aq '
.TH ONBOARDING\-AGENT 8 "" "Workload Onboarding" "Workload Onboarding"
"#;

/// Writes onboarding-agent(8), in roff. One page with every command: who is on a machine at night looks in one place.
pub fn print(out: &mut impl Write) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let page = clap_mangen::Man::new(command.clone());
    out.write_all(TITLE)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    page.render_options_section(out)?;
    writeln!(out, ".SH COMMANDS")?;
    for verb in command.get_subcommands_mut().filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        let usage = verb.render_usage().to_string();
        writeln!(out, ".SS {}", roff(usage.trim_start_matches("Usage: ")))?;
        writeln!(out, "{}", roff(&verb.get_about().map(ToString::to_string).unwrap_or_default()))?;
        for option in verb.get_arguments().filter(|option| !option.is_global_set() && option.get_id() != "help") {
            writeln!(out, ".TP\n.B {}", roff(&option.to_string()))?;
            writeln!(out, "{}", roff(&option.get_help().map(ToString::to_string).unwrap_or_default()))?;
        }
        if let Some(more) = verb.get_after_help() {
            writeln!(out, ".P\n.EX\n{}\n.EE", roff(&more.to_string()))?;
        }
    }
    out.write_all(include_bytes!("manual.8"))
}

/// Text as roff reads it: no line of it is a request, and a `-` is what it is on a keyboard.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let lines = text.lines().map(|line| match line.starts_with(['.', '\'']) {
        true => format!("\\&{line}"),
        false => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_every_command_and_no_line_that_is_a_request_by_accident() {
        let mut page = Vec::new();
        print(&mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        for expected in [".SH COMMANDS", "check", "hosts", "completions", ".SH EXIT STATUS", "\\-\\-write"] {
            assert!(page.contains(expected), "{expected}");
        }
        assert_eq!(roff(".TP is text\nand \\ too"), "\\&.TP is text\nand \\e too");
    }
}
