//! Follows `events` through its rotation, without losing or doubling a line.
//!
//! Each line bears a number that grows by one. So the file is only read on from where the last look ended if its first
//! new line bears the next number; else it was rotated meanwhile, and both files are searched for what is newer than
//! the last line seen. A gap that remains are lines that the daemon lost on a full disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::sys::inotify::Inotify;

use super::line::Line;
use super::scope::Part;
use super::{WatchError, wake_on};

/// How much of the end of a file is searched for its last line; longer than any line.
const TAIL_BYTES: u64 = 256 << 10;

/// A reader of `events`.
pub struct Events {
    current: PathBuf,
    former: PathBuf,
    parts: Vec<Part>,
    /// Where the next look begins: behind the last whole line that was read.
    offset: u64,
    /// The number of the last line seen.
    last: u64,
}

impl Events {
    /// Begins behind what is there now. `None` if this user may not read it.
    pub fn begin(root: &Path, part: Part, inotify: &Inotify) -> Result<Option<Events>, WatchError> {
        let (current, former) = (root.join("events"), root.join("events.1"));
        let mut file = match File::open(&current) {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound) => {
                return Ok(None);
            }
            Err(source) => return Err(WatchError::Unreadable { file: current, source }),
        };
        wake_on(inotify, &current)?;
        let end = whole_lines(&mut file).map_err(unreadable(&current))?;
        let last = match end.last {
            Some(last) => last,
            // Rotated, and nothing written since then.
            None => match File::open(&former) {
                Ok(mut file) => whole_lines(&mut file).map_err(unreadable(&former))?.last.unwrap_or(0),
                Err(_) => 0,
            },
        };
        Ok(Some(Events { current, former, parts: vec![part], offset: end.offset, last }))
    }

    /// Another part of the same tree.
    pub fn add(&mut self, part: Part) {
        self.parts.push(part);
    }

    /// Prints what came since the last look.
    pub fn look(
        &mut self,
        inotify: &Inotify,
        print: &mut impl FnMut(&Line) -> Result<(), WatchError>,
    ) -> Result<(), WatchError> {
        wake_on(inotify, &self.current)?;
        let lines = match self.read_on().map_err(unreadable(&self.current))? {
            Some(lines) => lines,
            None => self.search()?,
        };
        for line in lines {
            let number = line.seq.unwrap_or(self.last);
            let missing = number.saturating_sub(self.last + 1);
            if missing > 0 && self.last > 0 {
                eprintln!("instancefs: {missing} lines of events are missing; the daemon could not write them");
            }
            self.last = number;
            if self.parts.iter().any(|part| part.has(&line)) {
                print(&line)?;
            }
        }
        Ok(())
    }

    /// The lines behind the last look's, `None` if they do not continue it.
    fn read_on(&mut self) -> io::Result<Option<Vec<Line>>> {
        let file = File::open(&self.current)?;
        if file.metadata()?.len() < self.offset {
            return Ok(None);
        }
        let (text, length) = read_from(&file, self.offset)?;
        let mut lines = Vec::new();
        for (next, line) in (self.last + 1..).zip(text.lines()) {
            match Line::parse(line).filter(|line| line.seq == Some(next)) {
                Some(line) => lines.push(line),
                None => return Ok(None),
            }
        }
        self.offset += length;
        Ok(Some(lines))
    }

    /// Everything that is newer than the last line seen. The newer file is read first: if it becomes the older one in
    /// between, it is read twice rather than not at all.
    fn search(&mut self) -> Result<Vec<Line>, WatchError> {
        let mut found = BTreeMap::new();
        for path in [&self.current, &self.former] {
            let (text, length) = match File::open(path).and_then(|file| read_from(&file, 0)) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(unreadable(path)(error)),
            };
            let newer = text.lines().filter_map(Line::parse).filter_map(|line| Some((line.seq?, line)));
            found.extend(newer.filter(|(number, _)| *number > self.last));
            if path == &self.current {
                self.offset = length;
            }
        }
        Ok(found.into_values().collect())
    }
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> WatchError {
    let file = path.to_owned();
    |source| WatchError::Unreadable { file, source }
}

/// Whole lines from `offset` on, and their length in bytes.
fn read_from(file: &File, mut offset: u64) -> io::Result<(String, u64)> {
    let mut bytes = Vec::new();
    let mut piece = vec![0; 128 << 10];
    loop {
        match file.read_at(&mut piece, offset)? {
            0 => break,
            count => {
                bytes.extend_from_slice(&piece[..count]);
                offset += count as u64;
            }
        }
    }
    bytes.truncate(bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1));
    let length = bytes.len() as u64;
    Ok((String::from_utf8_lossy(&bytes).into_owned(), length))
}

/// Where a file ends.
struct End {
    /// Behind its last whole line.
    offset: u64,
    /// That line's number.
    last: Option<u64>,
}

fn whole_lines(file: &mut File) -> io::Result<End> {
    let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
    let (text, length) = read_from(file, start)?;
    let last = text.lines().rev().find_map(|line| Line::parse(line)?.seq);
    Ok(End { offset: start + length, last })
}
