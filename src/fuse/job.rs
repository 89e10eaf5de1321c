//! What daemon and announcer say to each other: one JSON document a line.

use serde::{Deserialize, Serialize};

/// One file operation through the mount, so that the kernel raises its inotify events. Paths are relative to the root
/// of the mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Open for writing, set the modification time, close: MODIFY and CLOSE_WRITE; of a directory ATTRIB alone.
    Touch {
        /// The file or directory.
        path: String,
    },
    /// CREATE of a directory.
    MakeDirectory {
        /// Its path.
        path: String,
    },
    /// DELETE of a directory.
    RemoveDirectory {
        /// Its path.
        path: String,
    },
    /// CREATE of a symlink.
    Symlink {
        /// Its path.
        path: String,
        /// Where it points.
        target: String,
    },
    /// DELETE of a symlink.
    Unlink {
        /// Its path.
        path: String,
    },
    /// MOVED_FROM and MOVED_TO.
    Rename {
        /// The old path.
        from: String,
        /// The new path.
        to: String,
    },
}

/// Daemon to announcer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Comes back in [`Report::Done`].
    pub id: u64,
    /// What to do.
    pub action: Action,
}

/// Announcer to daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// The announcer takes jobs.
    Ready,
    /// A job has ended.
    Done {
        /// Which.
        id: u64,
        /// 0, or why it failed.
        errno: i32,
    },
}

/// One line, newline included.
pub fn line<T: Serialize>(message: &T) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_a_newline_stays_in_its_line() {
        let job = Job { id: 7, action: Action::Rename { from: "a\nb".into(), to: "ü\"c".into() } };
        let line = line(&job).expect("a line");
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert_eq!(serde_json::from_slice::<Job>(&line).expect("a job"), job);
    }
}
