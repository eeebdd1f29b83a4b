//! Every rule broken once: `NAME.yaml` is good, and each block of `NAME.refusals` changes it (`-` lines are replaced by `+`
//! lines, `#` says which rule that breaks) and lists the faults that come of it: `!` what lint says, without the file's name, all
//! of it and in this order; `@` what an API server says (`FIELD: MESSAGE`, or `accepts: WHY NOT`), for the kinds that have a CRD.

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
