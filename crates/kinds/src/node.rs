//! YAML text to documents of nodes that know their lines; nothing is dropped and nothing guessed.
//!
//! Bounded in every direction: a file of [`LARGEST_FILE`] with documents of [`LARGEST_DOCUMENT`], [`DEEPEST`] levels, and
//! [`LARGEST_EXPANSION`] of what aliases repeat.

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};
use serde_json::Value as Json;
use std::borrow::Cow;
use std::collections::HashMap;

const LARGEST_FILE: usize = 16 * 1024 * 1024;
const LARGEST_DOCUMENT: usize = 1024 * 1024;
const DEEPEST: usize = 64;
/// In bytes of memory, roughly.
const LARGEST_EXPANSION: usize = 4 * 1024 * 1024;
const NODE_WEIGHT: usize = 64;
const TOO_DEEP: &str = "the document is nested more than 64 levels deep";

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    /// From 1.
    pub line: usize,
    pub value: Value,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// Also nothing at all: a key without a value.
    Null,
    Text(String),
    /// As written.
    Number(String),
    Bool(bool),
    /// `yes`, `off` and the like without quotes: text to YAML 1.2, a boolean to kubectl.
    YesNo(String),
    List(Vec<Node>),
    /// In the order of the file, with all that a key that occurs twice stands for.
    Map(Vec<Entry>),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub key: String,
    pub line: usize,
    pub value: Node,
}

/// Why a document can't be read as YAML.
#[derive(Debug, PartialEq)]
pub(crate) struct SyntaxError {
    pub line: usize,
    pub message: String,
}

/// The documents of a file, one after the other; empty ones are left out. What is wrong with one doesn't touch the others.
pub(crate) fn documents(text: &str) -> impl Iterator<Item = Result<Node, SyntaxError>> {
    let too_large = (text.len() > LARGEST_FILE).then(|| {
        let message = format!("the file has {} bytes; {LARGEST_FILE} are the most", text.len());
        Err(SyntaxError { line: 1, message })
    });
    let text = if too_large.is_some() { "" } else { text.strip_prefix('\u{feff}').unwrap_or(text) };
    too_large.into_iter().chain(parts(text).into_iter().flat_map(|(line, part)| documents_of_part(line, part)))
}

fn documents_of_part(line: usize, part: &str) -> Vec<Result<Node, SyntaxError>> {
    if part.len() > LARGEST_DOCUMENT {
        let message = format!("the document has {} bytes; {LARGEST_DOCUMENT} are the most", part.len());
        return vec![Err(SyntaxError { line, message })];
    }
    let mut documents = Vec::new();
    if let Err(mut error) = read_part(part, line - 1, &mut documents) {
        let last = line + part.lines().count().saturating_sub(1);
        error.line = error.line.clamp(line, last.max(line));
        documents.push(Err(error));
    }
    documents
}

/// The file cut before each `---`, with the line that each part starts at. YAML allows such a line nowhere else, so a
/// part that can't be read says nothing about the others. A directive (`%YAML 1.2`) belongs to what follows it.
fn parts(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut start_line) = (0, 1);
    let (mut offset, mut directives) = (0, None);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        if is_document_start(line) {
            let (cut, cut_line) = directives.unwrap_or((offset, index + 1));
            parts.push((start_line, &text[start..cut]));
            (start, start_line) = (cut, cut_line);
        }
        directives = match line.starts_with('%') {
            true => directives.or(Some((offset, index + 1))),
            false => None,
        };
        offset += line.len();
    }
    parts.push((start_line, &text[start..]));
    parts
}

fn is_document_start(line: &str) -> bool {
    line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// A list or mapping that isn't complete.
struct Open {
    line: usize,
    anchor: usize,
    content: Content,
}

enum Content {
    List(Vec<Node>),
    Map { entries: Vec<Entry>, key: Option<(String, usize)> },
}

fn read_part(
    part: &str,
    lines_before: usize,
    documents: &mut Vec<Result<Node, SyntaxError>>,
) -> Result<(), SyntaxError> {
    let mut open: Vec<Open> = Vec::new();
    let mut anchors: HashMap<usize, Node> = HashMap::new();
    let mut expansion = 0;
    for event in Parser::new_from_str(part) {
        let (event, span) = event.map_err(|error| SyntaxError {
            line: error.marker().line() + lines_before,
            message: format!("this is not YAML: {} (column {})", error.info(), error.marker().col() + 1),
        })?;
        let line = span.start.line() + lines_before;
        let error = |message: &str| SyntaxError { line, message: message.to_owned() };
        let (node, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let value = scalar(text, style, tag).map_err(|message| SyntaxError { line, message })?;
                (Node { line, value }, anchor)
            }
            Event::Alias(anchor) => {
                let node = anchors.get(&anchor).ok_or_else(|| {
                    error("an alias (*name) must come after the anchor (&name) that it repeats, and not inside it")
                })?;
                expansion += weight(node);
                if expansion > LARGEST_EXPANSION {
                    return Err(error("the aliases (*name) repeat too much; write the document without them"));
                }
                if open.len() + depth(node) > DEEPEST {
                    return Err(error(TOO_DEEP));
                }
                (node.clone(), 0)
            }
            Event::SequenceStart(anchor, tag) => {
                collection_tag(tag, "seq").map_err(|message| SyntaxError { line, message })?;
                open.push(Open { line, anchor, content: Content::List(Vec::new()) });
                if open.len() > DEEPEST {
                    return Err(error(TOO_DEEP));
                }
                continue;
            }
            Event::MappingStart(anchor, tag) => {
                collection_tag(tag, "map").map_err(|message| SyntaxError { line, message })?;
                open.push(Open { line, anchor, content: Content::Map { entries: Vec::new(), key: None } });
                if open.len() > DEEPEST {
                    return Err(error(TOO_DEEP));
                }
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(closed) = open.pop() else { continue };
                let value = match closed.content {
                    Content::List(items) => Value::List(items),
                    Content::Map { entries, .. } => Value::Map(entries),
                };
                (Node { line: closed.line, value }, closed.anchor)
            }
            Event::DocumentStart(_) => {
                anchors.clear();
                continue;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => continue,
        };
        if anchor != 0 {
            expansion += weight(&node);
            if expansion > LARGEST_EXPANSION {
                return Err(error("the anchors (&name) hold too much; write the document without them"));
            }
            anchors.insert(anchor, node.clone());
        }
        match open.last_mut().map(|open| &mut open.content) {
            None if node.value == Value::Null => {}
            None => documents.push(Ok(node)),
            Some(Content::List(items)) => items.push(node),
            Some(Content::Map { entries, key }) => match key.take() {
                Some((key, line)) => entries.push(Entry { key, line, value: node }),
                None => *key = Some((key_text(node.value).ok_or_else(|| error("a key must be text"))?, line)),
            },
        }
    }
    Ok(())
}

/// About how much memory a node takes.
fn weight(node: &Node) -> usize {
    NODE_WEIGHT
        + match &node.value {
            Value::Text(text) | Value::Number(text) | Value::YesNo(text) => text.len(),
            Value::List(items) => items.iter().map(weight).sum(),
            Value::Map(entries) => entries.iter().map(|entry| entry.key.len() + weight(&entry.value)).sum(),
            Value::Null | Value::Bool(_) => 0,
        }
}

/// The levels of lists and mappings in a node.
fn depth(node: &Node) -> usize {
    match &node.value {
        Value::List(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Map(entries) => 1 + entries.iter().map(|entry| depth(&entry.value)).max().unwrap_or(0),
        _ => 0,
    }
}

fn key_text(value: Value) -> Option<String> {
    match value {
        Value::Text(text) | Value::Number(text) | Value::YesNo(text) => Some(text),
        Value::Bool(value) => Some(value.to_string()),
        Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

fn collection_tag(tag: Option<Cow<'_, Tag>>, wanted: &str) -> Result<(), String> {
    match tag {
        Some(tag) if !(tag.is_yaml_core_schema() && tag.suffix == wanted) => {
            Err(format!("the tag {tag} isn't known here"))
        }
        _ => Ok(()),
    }
}

fn scalar(text: Cow<'_, str>, style: ScalarStyle, tag: Option<Cow<'_, Tag>>) -> Result<Value, String> {
    match tag.as_deref() {
        Some(tag) if tag.is_yaml_core_schema() && tag.suffix == "str" => return Ok(Value::Text(text.into_owned())),
        Some(tag) if tag.is_yaml_core_schema() && ["null", "bool", "int", "float"].contains(&tag.suffix.as_str()) => {
            return Ok(plain(&text));
        }
        Some(tag) => return Err(format!("the tag {tag} isn't known here")),
        None => {}
    }
    Ok(match style {
        ScalarStyle::Plain => plain(&text),
        _ => Value::Text(text.into_owned()),
    })
}

/// What kubectl (YAML 1.1) or YAML 1.2 would take for something else than text, isn't text.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "n" | "N" | "no" | "No" | "NO" | "off" | "Off"
        | "OFF" => Value::YesNo(text.to_owned()),
        _ if is_number(text) => Value::Number(text.to_owned()),
        _ => Value::Text(text.to_owned()),
    }
}

fn is_number(text: &str) -> bool {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return true;
    }
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return false;
    }
    let digits = unsigned.replace('_', "");
    let radix = |prefix: &str, radix: u32| {
        digits.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.chars().all(|c| c.is_digit(radix)))
    };
    if radix("0x", 16) || radix("0o", 8) || radix("0b", 2) {
        return true;
    }
    // Rust's grammar of floats is YAML's, but for its words for infinity, which don't start with a digit or dot.
    digits.bytes().any(|byte| byte.is_ascii_digit()) && digits.parse::<f64>().is_ok()
}

impl Node {
    /// The tree of a JSON value; everything is on line 1.
    pub fn from_json(json: &Json) -> Self {
        let value = match json {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(*value),
            Json::Number(number) => Value::Number(number.to_string()),
            Json::String(text) => Value::Text(text.clone()),
            Json::Array(items) => Value::List(items.iter().map(Self::from_json).collect()),
            Json::Object(fields) => Value::Map(
                fields
                    .iter()
                    .map(|(key, value)| Entry { key: key.clone(), line: 1, value: Self::from_json(value) })
                    .collect(),
            ),
        };
        Self { line: 1, value }
    }

    /// As JSON; a number that JSON can't write becomes text.
    pub fn to_json(&self) -> Json {
        match &self.value {
            Value::Null => Json::Null,
            Value::Bool(value) => Json::Bool(*value),
            Value::Number(text) => json_number(text).map_or_else(|| Json::String(text.clone()), Json::Number),
            Value::Text(text) | Value::YesNo(text) => Json::String(text.clone()),
            Value::List(items) => Json::Array(items.iter().map(Self::to_json).collect()),
            Value::Map(entries) => {
                Json::Object(entries.iter().map(|entry| (entry.key.clone(), entry.value.to_json())).collect())
            }
        }
    }

    /// The first value under this key, unless it is null; `None` also where this is no mapping.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        match &self.value {
            Value::Map(entries) => {
                entries.iter().find(|entry| entry.key == key).filter(|entry| entry.value.value != Value::Null)
            }
            _ => None,
        }
    }

    pub fn as_text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// The number that this text is in JSON's grammar.
pub(crate) fn json_number(text: &str) -> Option<serde_json::Number> {
    let number: serde_json::Number = serde_json::from_str(text).ok()?;
    match number.is_f64() {
        // serde_json is content with a neighbour.
        true => serde_json::Number::from_f64(text.parse().ok()?),
        false => Some(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn json() -> impl Strategy<Value = Json> {
        let words =
            prop_oneof!["[ -~]{0,12}", any::<String>(), "(yes|no|~|null|true|0x1f|1e3|- a|a: b|[#&*!|>'\"%@`{}]x|---)"];
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            any::<i64>().prop_map(Json::from),
            proptest::num::f64::NORMAL.prop_map(Json::from),
            // YAML can't write every character; what its writers make of those is theirs.
            words.prop_filter_map("printable", |text| {
                (!text.chars().any(crate::fault::is_unprintable)).then(|| Json::from(text))
            }),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Json::from),
                proptest::collection::btree_map("[a-z:# -]{1,6}", inner, 0..5)
                    .prop_map(|fields| Json::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// What another implementation writes is understood as it was meant, and as that implementation understands it.
        #[test]
        fn another_writer_is_understood(value in json()) {
            let text = serde_yaml_ng::to_string(&value).unwrap();
            let wanted: Json = serde_yaml_ng::from_str(&text).unwrap();
            let read: Vec<_> = documents(&text).map(|node| node.unwrap().to_json()).collect();
            match value {
                Json::Null => prop_assert!(read.is_empty()),
                value => {
                    prop_assert_eq!(&read, &[value]);
                    prop_assert_eq!(read, [wanted]);
                }
            }
        }

        /// JSON is YAML.
        #[test]
        fn json_is_understood(value in json()) {
            let read: Vec<_> = documents(&value.to_string()).map(|node| node.unwrap().to_json()).collect();
            prop_assert_eq!(read, if value.is_null() { vec![] } else { vec![value] });
        }
    }

    #[test]
    fn lines() {
        let text = "# a\na: 1\n\nb:\n- x\n-\n  y: &y {z: 1}\n---\n- *y\n";
        let mut documents = documents(text);
        let Some(Ok(Node { line: 2, value: Value::Map(entries) })) = documents.next() else { panic!("no mapping") };
        assert_eq!(entries.iter().map(|entry| (entry.line, entry.value.line)).collect::<Vec<_>>(), [(2, 2), (4, 5)]);
        let Value::List(items) = &entries[1].value.value else { panic!("no list") };
        assert_eq!(items.iter().map(|item| item.line).collect::<Vec<_>>(), [5, 7]);
        // An anchor is known in its own document only.
        assert_eq!(documents.next().unwrap().unwrap_err().line, 9);
        assert!(documents.next().is_none());
    }

    #[test]
    fn what_is_not_text_without_quotes() {
        for text in [
            "1", "-1", "+1", "01", "1_000", "0x1F", "0o17", "0b1", "1.5", ".5", "1.", "1e3", "1E+3", ".inf", "-.Inf",
            ".nan",
        ] {
            assert_eq!(plain(text), Value::Number(text.to_owned()), "{text}");
        }
        for text in [
            "1.2.3", "1.2.3.4", "-", "+", ".", "..", "e3", "1e", "0x", "0xg", "inf", "nan", "_1", "1h", "1:20", "::1",
            "i-0", "=", "v1",
        ] {
            assert_eq!(plain(text), Value::Text(text.to_owned()), "{text}");
        }
        assert_eq!(plain("on"), Value::YesNo("on".to_owned()));
        assert_eq!(plain("True"), Value::Bool(true));
        assert_eq!(plain("~"), Value::Null);
    }
}
