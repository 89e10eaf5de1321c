//! Durations as people write them.

use std::time::Duration;

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
    fn everything_else_is_refused() {
        for text in ["", "soon", "-1", "inf", "nan", "3 parsecs"] {
            assert!(parse(text).unwrap_err().contains("is no duration"), "{text}");
        }
    }
}
