//! Every rule broken once: `NAME.yaml` is good, and each block of `NAME.refusals` changes it (`-` lines are replaced by `+`
//! lines, `#` says which rule that breaks) and lists the faults that come of it: `!` what lint says, without the file's name, all
//! of it and in this order; `@` what an API server says (`FIELD: MESSAGE`, or `accepts: WHY NOT`), for the kinds that have a CRD.

//!
//! `values` has single values, each for one place of a good document (`@` says which; `$` is where it comes, in quotes): `=` those that
//! are taken and `!` those that are refused, by lint and by an API server alike. A space at an end of a value is written `␣`.

use std::path::PathBuf;

pub fn corpus(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(super::CORPUS).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[derive(Default)]
pub struct Block {
    pub rule: String,
    pub from: String,
    pub to: String,
    pub faults: Vec<String>,
    #[allow(dead_code, reason = "only the test with an API server reads it")]
    pub answers: Vec<String>,
}

pub fn blocks(text: &str) -> Vec<Block> {
    let parse = |block: &str| {
        let mut parsed = Block::default();
        for line in block.lines() {
            let (mark, rest) = line.split_at(1);
            match mark {
                "#" => parsed.rule = rest.trim().to_owned(),
                "-" => parsed.from += &format!("{rest}\n"),
                "+" => parsed.to += &format!("{rest}\n"),
                "!" => parsed.faults.push(rest.trim().to_owned()),
                "@" => parsed.answers.push(rest.trim().to_owned()),
                _ => panic!("a line that is none of #, -, +, !, @: {line}"),
            }
        }
        parsed
    };
    text.split("\n\n").filter(|block| !block.trim().is_empty()).map(parse).collect()
}

/// One value in its place.
pub struct Case {
    pub rule: String,
    pub value: String,
    pub document: String,
    pub good: bool,
}

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for block in corpus("values").split("\n\n") {
        let (mut rule, mut kind, mut from, mut to) = (String::new(), String::new(), String::new(), String::new());
        for line in block.lines() {
            let (mark, rest) = line.split_at(1);
            let rest = rest.strip_prefix(' ').filter(|_| !matches!(mark, "-" | "+")).unwrap_or(rest);
            match mark {
                "#" => rule = rest.to_owned(),
                "@" => kind = rest.to_owned(),
                "-" => from = format!("{rest}\n"),
                "+" => to = format!("{rest}\n"),
                "=" | "!" => {
                    let good = corpus(&format!("{kind}.yaml"));
                    assert!(good.contains(&from), "{rule}: {from:?} isn't in {kind}.yaml");
                    let value = rest.replace('␣', " ");
                    let quoted = format!("'{}'", value.replace('\'', "''"));
                    cases.push(Case {
                        rule: format!("{kind}, {rule}"),
                        value,
                        document: good.replacen(&from, &to.replacen('$', &quoted, 1), 1),
                        good: mark == "=",
                    });
                }
                _ => panic!("a line that is none of #, @, -, +, =, !: {line}"),
            }
        }
    }
    cases
}
