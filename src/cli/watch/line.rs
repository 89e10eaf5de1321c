//! A change as a line: for people, or as JSON with the keys of `events`.

use std::fmt::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One change. Strings that do not apply are empty; what a comparison of values cannot know is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Line {
    /// Its number in `events`.
    pub seq: Option<u64>,
    /// Unix seconds.
    pub time: u64,
    /// The object's class, a word.
    pub class: Option<String>,
    /// The object.
    pub uuid: Option<Uuid>,
    /// Its name.
    pub name: String,
    /// Who did it.
    pub uid: Option<u32>,
    /// The person, or the program, behind it.
    pub login: String,
    /// What happened, mostly a file's name.
    pub what: String,
    /// The former value.
    pub from: String,
    /// The new value.
    pub to: String,
    /// The errno's name of what failed.
    pub errno: String,
    /// Why.
    pub reason: String,
    /// The line in `events`, which may have keys that this program does not know.
    #[serde(skip)]
    pub original: Option<String>,
}

impl Line {
    /// Reads a line of `events`.
    pub fn parse(text: &str) -> Option<Line> {
        let line: Line = serde_json::from_str(text).ok()?;
        Some(Line { original: Some(text.to_owned()), ..line })
    }

    /// A change seen just now.
    pub fn now(what: &str, from: &str, to: &str) -> Line {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Line { time, what: what.to_owned(), from: from.to_owned(), to: to.to_owned(), ..Line::default() }
    }

    /// `<time> <class> <name or uuid> <what>: <from> -> <to>, by <login>`
    pub fn readable(&self) -> String {
        // Beyond the year 9999 there is no such text.
        let time = UNIX_EPOCH + Duration::from_secs(self.time.min(253_402_300_799));
        let mut text = humantime::format_rfc3339_seconds(time).to_string();
        for word in [self.class.as_deref().unwrap_or_default(), &self.subject(), &self.what] {
            if !word.is_empty() {
                text.push(' ');
                text.push_str(word);
            }
        }
        match (self.from.as_str(), self.to.as_str()) {
            ("", "") => {}
            ("", to) => text.push_str(&format!(": {to}")),
            (from, "") => text.push_str(&format!(": {from} -> (empty)")),
            (from, to) => text.push_str(&format!(": {from} -> {to}")),
        }
        match (self.errno.as_str(), self.reason.as_str()) {
            ("", "") => {}
            ("", reason) => text.push_str(&format!(" ({reason})")),
            (errno, reason) => text.push_str(&format!(" refused or failed with {errno}: {reason}")),
        }
        match self.uid {
            Some(uid) if self.login.is_empty() => text.push_str(&format!(", by uid {uid}")),
            Some(_) => text.push_str(&format!(", by {}", self.login)),
            None => {}
        }
        escape(&text)
    }

    /// One JSON object.
    pub fn json(&self) -> String {
        let text = match &self.original {
            Some(original) => original.clone(),
            // Strings and numbers alone: there is nothing in it that JSON cannot say.
            None => serde_json::to_string(self).unwrap_or_default(),
        };
        escape(&text)
    }

    fn subject(&self) -> String {
        match self.uuid {
            Some(id) if self.name.is_empty() => id.to_string(),
            Some(_) | None => self.name.clone(),
        }
    }
}

/// No text of a guest or a user reaches the terminal as a command: control characters become `\u` and four digits, which
/// is also what JSON calls them.
fn escape(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut escaped, character| {
        if character.is_control() {
            let _ = write!(escaped, "\\u{:04x}", u32::from(character));
        } else {
            escaped.push(character);
        }
        escaped
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line() -> Line {
        Line {
            time: 1_700_000_000,
            class: Some("instance".to_owned()),
            uuid: Some(Uuid::nil()),
            name: "web1".to_owned(),
            uid: Some(0),
            login: "ann".to_owned(),
            what: "state".to_owned(),
            from: "active".to_owned(),
            to: "stopped".to_owned(),
            ..Line::default()
        }
    }

    #[test]
    fn a_line_says_when_what_and_who() {
        assert_eq!(line().readable(), "2023-11-14T22:13:20Z instance web1 state: active -> stopped, by ann");
        let nameless = Line { name: String::new(), login: String::new(), uid: Some(7), ..line() };
        assert_eq!(
            nameless.readable(),
            format!("2023-11-14T22:13:20Z instance {} state: active -> stopped, by uid 7", Uuid::nil())
        );
    }

    #[test]
    fn absent_parts_leave_no_trace() {
        let appeared = Line { from: String::new(), what: "appeared".to_owned(), uid: None, ..line() };
        assert_eq!(appeared.readable(), "2023-11-14T22:13:20Z instance web1 appeared: stopped");
        let cleared = Line { to: String::new(), uid: None, ..line() };
        assert_eq!(cleared.readable(), "2023-11-14T22:13:20Z instance web1 state: active -> (empty)");
        let refused = Line { to: String::new(), from: String::new(), errno: "EPERM".to_owned(), ..line() };
        assert!(refused.readable().contains("web1 state refused or failed with EPERM"));
    }

    #[test]
    fn control_characters_are_escaped_in_both_forms() {
        let bad = Line { to: "\u{1b}[2J\u{9b}\n\u{7f}".to_owned(), ..line() };
        assert!(bad.readable().contains(r"\u001b[2J\u009b\u000a\u007f"), "{}", bad.readable());
        let json = bad.json();
        assert!(!json.chars().any(char::is_control), "{json}");
        assert_eq!(serde_json::from_str::<Line>(&json).unwrap().to, bad.to);
    }

    #[test]
    fn a_line_of_events_is_passed_on_with_keys_of_later_versions() {
        let text = r#"{"seq":3,"time":1,"class":"instance","what":"state","later":[1]}"#;
        let line = Line::parse(text).unwrap();
        assert_eq!((line.seq, line.json().as_str()), (Some(3), text));
        assert_eq!(Line::parse("{\"seq\":"), None);
    }
}
