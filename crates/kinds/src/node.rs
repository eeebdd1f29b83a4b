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

/// The documents of a file; empty ones are left out. What is wrong with one doesn't touch the others.
pub(crate) fn documents(text: &str) -> Vec<Result<Node, SyntaxError>> {
    if text.len() > LARGEST_FILE {
        let message = format!("the file has {} bytes; {LARGEST_FILE} are the most", text.len());
        return vec![Err(SyntaxError { line: 1, message })];
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    for (line, part) in parts(text) {
        if part.len() > LARGEST_DOCUMENT {
            let message = format!("the document has {} bytes; {LARGEST_DOCUMENT} are the most", part.len());
            documents.push(Err(SyntaxError { line, message }));
            continue;
        }
        if let Err(mut error) = read_part(part, line - 1, &mut documents) {
            let last = line + part.lines().count().saturating_sub(1);
            error.line = error.line.clamp(line, last.max(line));
            documents.push(Err(error));
        }
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
    serde_json::from_str(text).ok()
}
