//! JSON documents as they are written: one object, no name twice.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::value::malformed;
use crate::model::reason::Reason;

/// Characters of a name that a refusal shows.
const LONGEST_SHOWN: usize = 200;

/// Reads a document. A name that stands there twice is refused: nobody can tell which of the two was meant.
pub fn object(bytes: &[u8]) -> Result<Map<String, Value>, Reason> {
    let text = std::str::from_utf8(bytes).map_err(|_| malformed("a document is UTF-8 text"))?;
    match serde_json::from_str::<Unambiguous>(text) {
        Ok(Unambiguous(Value::Object(members))) => Ok(members),
        Ok(Unambiguous(_)) => Err(malformed("a document is one JSON object: {\"key\": value, ...}")),
        Err(error) => Err(Reason::Malformed(format!("this is no JSON document that can be read: {error}"))),
    }
}

struct Unambiguous(Value);

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unambiguous, D::Error> {
        deserializer.deserialize_any(Any).map(Unambiguous)
    }
}

struct Any;

impl<'de> Visitor<'de> for Any {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(Unambiguous(element)) = elements.next_element()? {
            array.push(element);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((name, Unambiguous(value))) = members.next_entry::<String, Unambiguous>()? {
            if object.contains_key(&name) {
                let name: String = name.chars().take(LONGEST_SHOWN).collect();
                return Err(A::Error::custom(format!("the key {name:?} stands there twice")));
            }
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_is_one_object_that_says_nothing_twice() {
        let members = object(br#" {"a": [1, -2, 1.5, null, true], "b": {"c": "\u00fc"}} "#).expect("a document");
        assert_eq!(Value::Object(members), serde_json::json!({"a": [1, -2, 1.5, null, true], "b": {"c": "ü"}}));
        let deep = format!("{}1{}", r#"{"a":"#.repeat(5000), "}".repeat(5000));
        for bad in [
            &b""[..],
            b"1",
            b"[{}]",
            b"{} {}",
            br#"{"a": 1, "a": 1}"#,
            br#"{"m": {"a": 1, "a": 2}}"#,
            br#"{"a": 1e999}"#,
            b"{\"a\": \"\xff\"}",
            b"{\"a\": \"\n\"}",
            br#"{"a": 1,}"#,
            deep.as_bytes(),
        ] {
            let reason = object(bad).expect_err("refused");
            assert_eq!(reason.errno(), libc::EINVAL, "{}", String::from_utf8_lossy(bad));
        }
    }
}
