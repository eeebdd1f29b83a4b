//! JSON in which a name may occur once per object: two readers of one signed text must not understand it differently.

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;

/// The object that `text` is. Errors say where, and never quote the text.
pub(crate) fn object(text: &[u8]) -> Result<Map<String, Value>, String> {
    let text = std::str::from_utf8(text).map_err(|_| "it isn't UTF-8".to_owned())?;
    match serde_json::from_str(text) {
        Ok(Strict(Value::Object(object))) => Ok(object),
        Ok(_) => Err("it isn't a JSON object".to_owned()),
        Err(error) if error.is_data() => {
            Err(format!("a name occurs twice in one of its objects (line {}, column {})", error.line(), error.column()))
        }
        Err(error) => Err(format!("it isn't JSON (line {}, column {})", error.line(), error.column())),
    }
}

struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(Strict(element)) = elements.next_element()? {
            all.push(element);
        }
        Ok(Value::Array(all))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut all = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            let Strict(value) = members.next_value()?;
            if all.insert(name, value).is_some() {
                return Err(de::Error::custom("a name occurs twice"));
            }
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_occurs_once_however_it_is_written() {
        assert_eq!(object(br#"{"a": [1, {"b": null}], "c": -2.5}"#).unwrap()["c"], -2.5);
        for twice in [r#"{"a": 1, "a": 1}"#, r#"{"a": 1, "\u0061": 2}"#, r#"{"x": [{"a": 1, "a": 2}]}"#] {
            let error = object(twice.as_bytes()).unwrap_err();
            assert!(error.contains("occurs twice"), "{twice}: {error}");
        }
    }

    #[test]
    fn what_is_not_one_json_object_is_refused() {
        let deep = format!("{{\"a\": {}1{}}}", "[".repeat(200), "]".repeat(200));
        for (text, problem) in [
            ("[]", "isn't a JSON object"),
            ("{} {}", "isn't JSON"),
            ("{", "isn't JSON"),
            ("", "isn't JSON"),
            (&deep, "isn't JSON"),
        ] {
            let error = object(text.as_bytes()).unwrap_err();
            assert!(error.contains(problem), "{text}: {error}");
        }
        assert!(object(b"{\"a\": \"\xff\"}").unwrap_err().contains("UTF-8"));
    }
}
