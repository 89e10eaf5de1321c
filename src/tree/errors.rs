//! `last_error` and `errors`.

use std::time::{Duration, UNIX_EPOCH};

use crate::model::record::{ErrorHistory, ErrorLine};

/// The content of `last_error`: `ok`, or one line.
pub fn last(history: &ErrorHistory) -> String {
    history.last().map_or_else(|| "ok\n".to_owned(), line)
}

/// The content of `errors`: one line each, the newest last.
pub fn all(history: &ErrorHistory) -> String {
    history.lines.iter().map(line).collect()
}

/// `<time> <login> <file>: <errno name>: <reason>`
fn line(line: &ErrorLine) -> String {
    let time = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(line.time));
    let ErrorLine { login, file, errno, reason, .. } = line;
    let text = format!("{time} {login} {file}: {errno}: {reason}");
    text.replace(|character: char| character.is_control(), " ") + "\n"
}
