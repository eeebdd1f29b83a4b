//! A schema as Kubernetes wants it (structural), put together from a few words.
//!
//! Each method is one thing that a manifest's reader says too, and says it in the reader's words.

use serde_json::{Map, Value, json};

/// The grammar of one text: what is refused, in the order in which lint asks. The first refusal that applies is the message.
pub(super) struct Grammar {
    /// In characters; a rule's cost is estimated from it.
    pub longest: u32,
    /// All of them match. They cost nothing, and are their own message.
    pub patterns: &'static [&'static str],
    pub refusals: &'static [Refusal],
}

#[derive(Clone, Copy)]
pub(super) struct Refusal {
    /// CEL that must be true, with the text as `self`; something that can stand beside `&&`.
    pub holds: &'static str,
    /// What is wrong otherwise.
    pub says: &'static str,
}

/// What a rule says where it doesn't hold.
pub(super) enum Says<'a> {
    Words(&'a str),
    /// CEL, and the words for where it can't be evaluated.
    Expression {
        first: &'a str,
        otherwise: &'a str,
    },
}

#[derive(Clone)]
pub(super) struct Schema(Map<String, Value>);

impl Schema {
    fn of(kind: &str, says: &str) -> Self {
        let Value::Object(mut map) = json!({ "type": kind }) else { return Self(Map::new()) };
        if !says.is_empty() {
            map.insert("description".into(), says.into());
        }
        Self(map)
    }

    /// Text of a grammar.
    pub fn text(says: &str, grammar: &Grammar) -> Self {
        let mut schema = Self::of("string", says).with("maxLength", grammar.longest);
        if let [first, others @ ..] = grammar.patterns {
            schema = schema.with("pattern", *first);
            let others: Vec<_> = others.iter().map(|pattern| json!({ "pattern": pattern })).collect();
            if !others.is_empty() {
                schema = schema.with("allOf", others);
            }
        }
        match grammar.refusals {
            [] => schema,
            [only] => schema.refuses(only.holds, Says::Words(only.says), None, "FieldValueInvalid"),
            [others @ .., last] => {
                let rule: Vec<_> = grammar.refusals.iter().map(|refusal| refusal.holds).collect();
                let others = others.iter().map(|other| format!("!({}) ? {} :\n", other.holds, quoted(other.says)));
                let first = others.collect::<String>() + &quoted(last.says);
                let says = Says::Expression { first: &first, otherwise: last.says };
                schema.refuses(&rule.join(" &&\n"), says, None, "FieldValueInvalid")
            }
        }
    }

    /// Any text.
    pub fn any_text(says: &str) -> Self {
        Self::of("string", says)
    }

    pub fn word(says: &str, words: &[&str]) -> Self {
        Self::of("string", says).with("enum", json!(words))
    }

    pub fn time(says: &str) -> Self {
        Self::of("string", says).with("format", "date-time")
    }

    pub fn integer(says: &str, least: i64, most: Option<i64>) -> Self {
        let schema = Self::of("integer", says).with("format", "int64").with("minimum", least);
        match most {
            Some(most) => schema.with("maximum", most),
            None => schema,
        }
    }

    pub fn object<'a>(says: &str, fields: impl IntoIterator<Item = (&'a str, Self)>) -> Self {
        let fields: Map<_, _> = fields.into_iter().map(|(key, schema)| (key.to_owned(), schema.into())).collect();
        let schema = Self::of("object", says);
        if fields.is_empty() { schema } else { schema.with("properties", fields) }
    }

    /// A mapping with whatever keys.
    pub fn map(says: &str, values: Self, most: u32) -> Self {
        Self::of("object", says).with("maxProperties", most).with("additionalProperties", values)
    }

    /// A list that one field manager owns whole: its order, or that an item occurs twice, may be meant.
    pub fn list(says: &str, items: Self, most: u32) -> Self {
        Self::of("array", says).with("maxItems", most).with("x-kubernetes-list-type", "atomic").with("items", items)
    }

    /// A list whose items are known by one of their fields, so that several managers may each own some.
    pub fn list_by(says: &str, key: &str, items: Self, most: u32) -> Self {
        Self::of("array", says)
            .with("maxItems", most)
            .with("x-kubernetes-list-type", "map")
            .with("x-kubernetes-list-map-keys", json!([key]))
            .with("items", items)
    }

    /// Whatever there is.
    pub fn anything(says: &str) -> Self {
        let mut map = Map::new();
        map.insert("description".into(), says.into());
        Self(map).open()
    }

    pub fn at_least_one(self) -> Self {
        self.with("minItems", 1)
    }

    pub fn requires(self, keys: &[&str]) -> Self {
        self.with("required", json!(keys))
    }

    /// Fields that aren't named here are kept, and nobody asks what is in them.
    pub fn open(self) -> Self {
        self.with("x-kubernetes-preserve-unknown-fields", true)
    }

    /// Exactly one of these fields.
    pub fn one_of(self, keys: &[&str]) -> Self {
        let any: Vec<_> = keys.iter().map(|key| format!("has(self.{key})")).collect();
        let message = format!("must have one of {}", keys.join(", "));
        self.refuses(&any.join(" || "), Says::Words(&message), None, "FieldValueRequired").at_most_one_of(keys)
    }

    pub fn at_most_one_of(mut self, keys: &[&str]) -> Self {
        let all = keys.join(", ");
        for (index, key) in keys.iter().enumerate().skip(1) {
            let before: Vec<_> = keys[..index].iter().map(|key| format!("has(self.{key})")).collect();
            let rule = format!("!has(self.{key}) || !({})", before.join(" || "));
            let last = keys[index - 1];
            let first: String = keys[..index - 1].iter().map(|key| format!("has(self.{key}) ? '{key}' : ")).collect();
            let message =
                format!("\"can't be there together with \" + ({first}'{last}') + \": only one of {all} may\"");
            let otherwise = format!("only one of {all} may be there");
            let says = Says::Expression { first: &message, otherwise: &otherwise };
            self = self.refuses(&rule, says, Some(key), "FieldValueForbidden");
        }
        self
    }

    /// `holds` is CEL that must be true; `field` is the one that the fault is shown at.
    pub fn refuses(self, holds: &str, says: Says<'_>, field: Option<&str>, reason: &str) -> Self {
        let mut rule = json!({ "rule": holds });
        match says {
            Says::Words(words) => rule["message"] = words.into(),
            Says::Expression { first, otherwise } => {
                rule["message"] = otherwise.into();
                rule["messageExpression"] = first.into();
            }
        }
        if let Some(field) = field {
            rule["fieldPath"] = format!(".{field}").into();
        }
        rule["reason"] = reason.into();
        let mut schema = self;
        match schema.0.get_mut("x-kubernetes-validations") {
            Some(Value::Array(rules)) => rules.push(rule),
            _ => schema = schema.with("x-kubernetes-validations", json!([rule])),
        }
        schema
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.0.insert(key.to_owned(), value.into());
        self
    }
}

impl From<Schema> for Value {
    fn from(schema: Schema) -> Self {
        Self::Object(schema.0)
    }
}

/// A sentence as a literal of CEL.
fn quoted(sentence: &str) -> String {
    format!("\"{}\"", sentence.replace('\\', "\\\\"))
}
