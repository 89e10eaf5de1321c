//! Durations as people write them.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

/// Reads `90` (seconds), `1.5`, `500ms`, `2m 30s`.
///
/// # Errors
///
/// A sentence that says how to write it.
pub fn parse(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let refused = || format!("'{text}' is no duration: write seconds (90), or with units (500ms, 2m, 1h 30m)");
    if let Ok(seconds) = text.parse::<f64>() {
        // `inf`, `nan` and negative numbers parse as floating point too.
        return Duration::try_from_secs_f64(seconds).map_err(|_| refused());
    }
    humantime::parse_duration(text).map_err(|_| refused())
}

/// How long something is kept: a [`Duration`], or `never` removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retention {
    /// So long.
    For(Duration),
    /// For ever.
    Never,
}

impl Retention {
    /// Reads `7d`, or `never`.
    ///
    /// # Errors
    ///
    /// A sentence that says how to write it.
    pub fn parse(text: &str) -> Result<Retention, String> {
        match text.trim() {
            "never" => Ok(Retention::Never),
            text => parse(text).map(Retention::For).map_err(|refused| format!("{refused}, or never")),
        }
    }

    /// So long, or `None` for ever.
    pub fn limit(self) -> Option<Duration> {
        match self {
            Retention::For(time) => Some(time),
            Retention::Never => None,
        }
    }
}

/// A text, or a whole number of seconds.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a duration is a text such as \"3s\", or a number of seconds")]
enum Written {
    Text(String),
    Seconds(u64),
}

/// A string as on the command line, or a whole number of seconds.
pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    match Written::deserialize(deserializer)? {
        Written::Text(text) => parse(&text).map(Some).map_err(serde::de::Error::custom),
        Written::Seconds(seconds) => Ok(Some(Duration::from_secs(seconds))),
    }
}

/// The same, or `never`.
pub(super) fn retention<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Retention>, D::Error> {
    match Written::deserialize(deserializer)? {
        Written::Text(text) => Retention::parse(&text).map(Some).map_err(serde::de::Error::custom),
        Written::Seconds(seconds) => Ok(Some(Retention::For(Duration::from_secs(seconds)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_numbers_are_seconds() {
        assert_eq!(parse("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("0"), Ok(Duration::ZERO));
        assert_eq!(parse("1.5"), Ok(Duration::from_millis(1500)));
    }

    #[test]
    fn units_are_understood() {
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse("1h 30m"), Ok(Duration::from_secs(5400)));
    }

    #[test]
    fn what_is_kept_for_ever_is_said_in_a_word() {
        assert_eq!(Retention::parse("never").map(Retention::limit), Ok(None));
        assert_eq!(Retention::parse("7d").map(Retention::limit), Ok(Some(Duration::from_secs(7 * 86400))));
        assert!(Retention::parse("always").unwrap_err().ends_with("or never"));
    }

    #[test]
    fn everything_else_is_refused() {
        for text in ["", "soon", "-1", "inf", "nan", "3 parsecs"] {
            assert!(parse(text).unwrap_err().contains("is no duration"), "{text}");
        }
    }
}
