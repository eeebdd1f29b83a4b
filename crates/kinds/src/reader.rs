//! Reading the fields of a document: what is wrong is noted with its path and line, and reading goes on.
//!
//! A [`Map`] remembers which fields were asked for; [`Map::close`] reports the others. So the reading of a kind is a flat
//! list of its fields, and the value is made at the end, out of what was read, if all of it could be.

use crate::fault::{Fault, is_unprintable, shown};
use crate::node::{Entry, Node, Value};
use crate::syntax;
use onboarding_core::label::Labels;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// More faults of one document than anybody reads.
const MOST_FAULTS: usize = 100;

/// Where faults of one document are collected.
pub(crate) struct Document {
    file: String,
    object: String,
    faults: RefCell<Vec<Fault>>,
    warnings: RefCell<Vec<Fault>>,
}

impl Document {
    pub fn new(file: &str, object: String) -> Self {
        Self { file: file.to_owned(), object, faults: RefCell::default(), warnings: RefCell::default() }
    }

    /// The document's root, as something to be read; notes keys that occur twice anywhere in it.
    pub fn root<'a>(&'a self, node: &'a Node) -> Item<'a> {
        self.find_duplicates(node, &mut String::new());
        Item { document: self, node, path: String::new(), line: node.line }
    }

    /// Beyond [`MOST_FAULTS`] they only count, as one more.
    pub fn fault(&self, line: usize, path: &str, message: impl Into<String>) {
        let mut faults = self.faults.borrow_mut();
        match faults.len() {
            ..MOST_FAULTS => faults.push(self.note(line, path, message.into())),
            MOST_FAULTS => faults.push(self.note(line, "", "there are more faults, which aren't shown".to_owned())),
            _ => {}
        }
    }

    fn is_full(&self) -> bool {
        self.faults.borrow().len() > MOST_FAULTS
    }

    pub fn warn(&self, line: usize, path: &str, message: impl Into<String>) {
        self.warnings.borrow_mut().push(self.note(line, path, message.into()));
    }

    fn note(&self, line: usize, path: &str, message: String) -> Fault {
        Fault { file: self.file.clone(), line, object: self.object.clone(), path: path.to_owned(), message }
    }

    /// Faults in the order of their lines, then the warnings.
    pub fn finish(self) -> (Vec<Fault>, Vec<Fault>) {
        let mut faults = self.faults.into_inner();
        let shown = faults.len().min(MOST_FAULTS);
        faults[..shown].sort_by_key(|fault| fault.line);
        (faults, self.warnings.into_inner())
    }

    fn find_duplicates(&self, node: &Node, path: &mut String) {
        let length = path.len();
        match &node.value {
            Value::Map(entries) => {
                let mut seen: HashMap<&str, usize> = HashMap::with_capacity(entries.len());
                for entry in entries {
                    path.push_str(&segment(path, &entry.key));
                    if let Some(first) = seen.insert(&entry.key, entry.line) {
                        self.fault(entry.line, path, format!("is there twice, first on line {first}"));
                    }
                    if entry.key == "<<" {
                        self.fault(entry.line, path, "merge keys aren't supported; write the fields out");
                    }
                    self.find_duplicates(&entry.value, path);
                    path.truncate(length);
                }
            }
            Value::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    path.push_str(&format!("[{index}]"));
                    self.find_duplicates(item, path);
                    path.truncate(length);
                }
            }
            _ => {}
        }
    }
}

/// A key as a part of a path.
pub(crate) fn segment(path: &str, key: &str) -> String {
    let simple = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    match simple {
        true if path.is_empty() => key.to_owned(),
        true => format!(".{key}"),
        false => format!("[{}]", shown(key)),
    }
}

/// A value that is there.
#[derive(Clone)]
pub(crate) struct Item<'a> {
    document: &'a Document,
    node: &'a Node,
    path: String,
    /// Of the key, where there is one; else of the value.
    line: usize,
}

impl<'a> Item<'a> {
    pub fn fault(&self, message: impl Into<String>) {
        self.document.fault(self.line, &self.path, message);
    }

    pub fn warn(&self, message: impl Into<String>) {
        self.document.warn(self.line, &self.path, message);
    }

    /// A fault of a field of this mapping.
    pub fn fault_at(&self, key: &str, message: impl Into<String>) {
        let line = self.node.get(key).map_or(self.line, |entry| entry.line);
        self.document.fault(line, &format!("{}{}", self.path, segment(&self.path, key)), message);
    }

    pub fn node(&self) -> &'a Node {
        self.node
    }

    fn wrong_type(&self, wanted: &str) {
        let found = match &self.node.value {
            Value::Null => "nothing",
            Value::Text(_) => "text",
            Value::Number(_) => "a number",
            Value::Bool(_) | Value::YesNo(_) => "a boolean",
            Value::List(_) => "a list",
            Value::Map(_) => "a mapping",
        };
        self.fault(format!("must be {wanted}, and is {found}"));
    }

    /// Any text, also an empty one.
    pub fn text(&self) -> Option<&'a str> {
        let quoted = |text: &str, what: &str| {
            self.fault(format!("must be text, and {text} without quotes is {what}; quote it: '{text}'"));
        };
        match &self.node.value {
            Value::Text(text) => return Some(text),
            Value::Number(text) => quoted(text, "a number"),
            Value::YesNo(text) => quoted(text, "a boolean to kubectl"),
            Value::Bool(value) => quoted(&value.to_string(), "a boolean"),
            _ => self.wrong_type("text"),
        }
        None
    }

    /// Text that no message may show.
    pub fn secret_text(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::Text(text) => Some(text),
            _ => {
                self.wrong_type("text");
                None
            }
        }
    }

    pub fn is_zero(&self) -> bool {
        matches!(&self.node.value, Value::Number(text) if text == "0")
    }

    /// Text that `syntax` accepts; never empty, a placeholder or with control characters.
    pub fn parse<T>(&self, syntax: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = self.text()?;
        if text.trim().is_empty() {
            self.fault("must not be empty");
        } else if text.starts_with('<') && text.ends_with('>') {
            self.fault(format!("{} is a placeholder; replace it with your own value", shown(text)));
        } else if text.chars().any(is_unprintable) {
            self.fault(format!("{} has a control character in it", shown(text)));
        } else {
            return syntax(text).map_err(|message| self.fault(message)).ok();
        }
        None
    }

    pub fn integer(&self, least: i64, most: i64) -> Option<i64> {
        match &self.node.value {
            Value::Number(text) => match text.parse::<i64>() {
                Ok(number) if (least..=most).contains(&number) => return Some(number),
                _ => self.fault(format!("must be a whole number from {least} to {most}, and is {text}")),
            },
            Value::Text(text) if text.starts_with('<') && text.ends_with('>') => {
                self.fault(format!("{} is a placeholder; replace it with a number", shown(text)));
            }
            Value::Text(text) if text.parse::<i64>().is_ok() => {
                self.fault(format!("must be a number, and is text; write {text} without quotes"));
            }
            _ => self.wrong_type("a number"),
        }
        None
    }

    pub fn port(&self) -> Option<u16> {
        self.integer(1, 65535).and_then(|port| u16::try_from(port).ok())
    }

    pub fn boolean(&self) -> Option<bool> {
        match &self.node.value {
            Value::Bool(value) => return Some(*value),
            Value::YesNo(text) => self.fault(format!("must be true or false, and is {text}")),
            Value::Text(text) if text == "true" || text == "false" => {
                self.fault(format!("must be a boolean, and is text; write {text} without quotes"));
            }
            _ => self.wrong_type("true or false"),
        }
        None
    }

    /// A duration in Go's grammar, at least `least`.
    pub fn duration(&self, least: Duration) -> Option<Duration> {
        let duration = match &self.node.value {
            // Zero needs no unit, also in Go.
            Value::Number(text) if text == "0" => Some(Duration::ZERO),
            Value::Number(text) => {
                self.fault(format!(
                    "must be a duration with its unit, as in 1h, 1h30m or 500ms, and is the number {text}"
                ));
                None
            }
            _ => self.parse(syntax::duration),
        }?;
        if duration < least {
            let least = match least {
                least if least == Duration::from_nanos(1) => "more than 0".to_owned(),
                least => format!("at least {least:?}"),
            };
            self.fault(format!("must be {least}"));
            return None;
        }
        Some(duration)
    }

    /// One of some words.
    pub fn word<T: Copy>(&self, words: &[(&str, T)]) -> Option<T> {
        let text = self.parse(|text| Ok(text.to_owned()))?;
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let all = words.iter().map(|(word, _)| *word).collect::<Vec<_>>();
        self.fault(format!("must be one of {}, and is {}{}", all.join(", "), shown(&text), did_you_mean(&text, &all)));
        None
    }

    pub fn map(&self) -> Option<Map<'a>> {
        match &self.node.value {
            Value::Map(entries) => Some(Map {
                document: self.document,
                entries,
                path: self.path.clone(),
                line: self.line,
                known: Vec::new(),
            }),
            _ => {
                self.wrong_type("a mapping");
                None
            }
        }
    }

    /// The items of a list; one that is null is a fault and left out.
    pub fn list(&self) -> Option<Vec<Item<'a>>> {
        let Value::List(items) = &self.node.value else {
            self.wrong_type("a list");
            return None;
        };
        let items = items.iter().enumerate().map(|(index, node)| Item {
            document: self.document,
            node,
            path: format!("{}[{index}]", self.path),
            line: node.line,
        });
        let (empty, items): (Vec<_>, Vec<_>) = items.partition(|item| item.node.value == Value::Null);
        empty.iter().for_each(|item| item.fault("must not be empty"));
        Some(items)
    }

    pub fn is_empty_list(&self) -> bool {
        matches!(&self.node.value, Value::List(items) if items.is_empty())
    }

    /// A list with at least one item.
    pub fn items(&self) -> Option<Vec<Item<'a>>> {
        let Value::List(nodes) = &self.node.value else {
            self.wrong_type("a list");
            return None;
        };
        if nodes.is_empty() {
            self.fault("must have at least one item");
            return None;
        }
        self.list()
    }

    /// `key: text` pairs with whatever keys.
    pub fn pairs(&self) -> Option<Vec<(&'a str, Item<'a>)>> {
        let Value::Map(entries) = &self.node.value else {
            self.wrong_type("a mapping");
            return None;
        };
        Some(
            entries
                .iter()
                .map(|entry| {
                    let path = format!("{}{}", self.path, segment(&self.path, &entry.key));
                    (entry.key.as_str(), Item { document: self.document, node: &entry.value, path, line: entry.line })
                })
                .collect(),
        )
    }

    /// Labels as Kubernetes allows them.
    pub fn labels(&self) -> Option<Labels> {
        let mut labels = BTreeMap::new();
        for (key, item) in self.pairs()? {
            if let Err(message) = syntax::label_key(key) {
                item.fault(message);
            }
            if let Some(value) = item.text() {
                match syntax::label_value(value) {
                    Ok(value) => drop(labels.insert(key.to_owned(), value)),
                    Err(message) => item.fault(message),
                }
            }
        }
        Some(labels)
    }

    /// Text to text, unchecked: annotations.
    pub fn texts(&self) -> Option<BTreeMap<String, String>> {
        let pairs = self.pairs()?;
        Some(pairs.into_iter().filter_map(|(key, item)| Some((key.to_owned(), item.text()?.to_owned()))).collect())
    }
}

/// The fields of a mapping.
pub(crate) struct Map<'a> {
    document: &'a Document,
    entries: &'a [Entry],
    path: String,
    line: usize,
    known: Vec<&'static str>,
}

impl<'a> Map<'a> {
    fn path_of(&self, key: &str) -> String {
        format!("{}{}", self.path, segment(&self.path, key))
    }

    /// A fault of the mapping as a whole.
    pub fn fault(&self, message: impl Into<String>) {
        self.document.fault(self.line, &self.path, message);
    }

    /// A fault of a field that isn't there.
    pub fn fault_at(&self, key: &str, message: impl Into<String>) {
        self.document.fault(self.line, &self.path_of(key), message);
    }

    /// The field, unless it is absent or null.
    pub fn optional(&mut self, key: &'static str) -> Option<Item<'a>> {
        self.known.push(key);
        let entry = self.entries.iter().find(|entry| entry.key == key)?;
        (entry.value.value != Value::Null).then(|| Item {
            document: self.document,
            node: &entry.value,
            path: self.path_of(key),
            line: entry.line,
        })
    }

    /// A field under one of two spellings.
    pub fn either(&mut self, key: &'static str, other: &'static str) -> Option<Item<'a>> {
        let found = self.optional(key);
        match (found, (key != other).then(|| self.optional(other)).flatten()) {
            (Some(found), Some(again)) => {
                again.fault(format!("is there as {key} too"));
                Some(found)
            }
            (found, again) => found.or(again),
        }
    }

    pub fn required(&mut self, key: &'static str) -> Option<Item<'a>> {
        let item = self.optional(key);
        if item.is_none() {
            self.fault_at(key, "is required");
        }
        item
    }

    pub fn optional_as<T>(&mut self, key: &'static str, syntax: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.optional(key)?.parse(syntax)
    }

    pub fn required_as<T>(&mut self, key: &'static str, syntax: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.required(key)?.parse(syntax)
    }

    /// A list of texts, none of them empty; an absent list is an empty one.
    pub fn texts<T>(&mut self, key: &'static str, syntax: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let items = self.optional(key).and_then(|item| item.list()).unwrap_or_default();
        items.iter().filter_map(|item| item.parse(&syntax)).collect()
    }

    /// A list of texts with at least one item.
    pub fn required_texts<T>(&mut self, key: &'static str, syntax: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let items = self.required(key).and_then(|item| item.items()).unwrap_or_default();
        items.iter().filter_map(|item| item.parse(&syntax)).collect()
    }

    /// A list with at least one item, each read by `read`.
    pub fn required_items<T>(&mut self, key: &'static str, read: impl Fn(&Item<'a>) -> Option<T>) -> Vec<T> {
        let items = self.required(key).and_then(|item| item.items()).unwrap_or_default();
        items.iter().filter_map(read).collect()
    }

    /// A list that may be empty or absent.
    pub fn read_list<T>(&mut self, key: &'static str, read: impl Fn(&Item<'a>) -> Option<T>) -> Vec<T> {
        let items = self.optional(key).and_then(|item| item.list()).unwrap_or_default();
        items.iter().filter_map(read).collect()
    }

    pub fn labels(&mut self, key: &'static str) -> Labels {
        self.optional(key).and_then(|item| item.labels()).unwrap_or_default()
    }

    /// Exactly one of these fields. Where there are several each is returned, so that all of them are read, after a fault.
    pub fn one_of(&mut self, keys: &[&'static str]) -> Vec<(&'static str, Item<'a>)> {
        let found = self.at_most_one_of(keys);
        if found.is_empty() {
            self.fault(format!("must have one of {}", keys.join(", ")));
        }
        found
    }

    pub fn at_most_one_of(&mut self, keys: &[&'static str]) -> Vec<(&'static str, Item<'a>)> {
        let found: Vec<_> = keys.iter().filter_map(|key| Some((*key, self.optional(key)?))).collect();
        if let Some((first, others)) = found.split_first() {
            for (_, other) in others {
                other.fault(format!("can't be there together with {}: only one of {} may", first.0, keys.join(", ")));
            }
        }
        found
    }

    /// The fields of a mapping some levels down, all of which may be absent; each level is closed.
    pub fn inner<T>(&mut self, keys: &[&'static str], read: impl FnOnce(&mut Map<'a>) -> Option<T>) -> Option<T> {
        let Some((first, rest)) = keys.split_first() else { return read(self) };
        let mut map = self.optional(first)?.map()?;
        let value = map.inner(rest, read);
        map.close();
        value
    }

    /// In a mapping that is open to others, a field that looks like a slip of ours.
    pub fn warn_of_misspelt(&self, key: &str) {
        if self.has(key) {
            return;
        }
        for entry in self.entries.iter().filter(|entry| closest(&entry.key, &[key]).is_some()) {
            self.document.warn(entry.line, &self.path_of(&entry.key), format!("isn't known here; did you mean {key}?"));
        }
    }

    /// Whether the key is there without a value.
    pub fn is_null(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.key == key && entry.value.value == Value::Null)
    }

    /// Marks a field as known without reading it.
    pub fn skip(&mut self, key: &'static str) {
        self.known.push(key);
    }

    /// Of the fields that nobody asked for, reports those that look like a slip of one that is missing.
    pub fn close_misspelt(self) {
        let missing: Vec<_> = self.known.iter().copied().filter(|key| !self.has(key)).collect();
        for entry in self.entries.iter().filter(|entry| closest(&entry.key, &missing).is_some()) {
            let message = format!("is unknown here{}", did_you_mean(&entry.key, &missing));
            self.document.fault(entry.line, &self.path_of(&entry.key), message);
        }
    }

    fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|entry| entry.key == key)
    }

    /// Reports the fields that nobody asked for.
    pub fn close(self) {
        for entry in self.entries {
            if self.document.is_full() {
                break;
            }
            if !self.known.contains(&entry.key.as_str()) && entry.key != "<<" {
                let message = match self.known.is_empty() {
                    true => "is unknown: nothing is expected here".to_owned(),
                    false => format!("is unknown here{}", did_you_mean(&entry.key, &self.known)),
                };
                self.document.fault(entry.line, &self.path_of(&entry.key), message);
            }
        }
    }
}

/// `; did you mean X?`, or nothing.
pub(crate) fn did_you_mean(word: &str, known: &[&str]) -> String {
    closest(word, known).map(|known| format!("; did you mean {known}?")).unwrap_or_default()
}

/// The known word that this one is a slip of.
pub(crate) fn closest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    if word.len() > 128 {
        return None;
    }
    let plain = |word: &str| word.replace(['_', '-'], "").to_lowercase();
    let word = plain(word);
    known
        .iter()
        .map(|known| (strsim::damerau_levenshtein(&word, &plain(known)), *known))
        .filter(|(distance, known)| *distance <= (known.len() / 3).clamp(1, 4) && *distance < known.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}
