//! Documents on their way: what is written through one handle, until it is complete.
//!
//! Tools write documents in pieces, and report the errno of write(2) only: so a JSON document is committed in the very
//! write that completes it, and of other text each write commits what there is so far.

use super::value::malformed;
use crate::model::reason::Reason;

/// Bytes of one document.
pub const LARGEST: usize = 1 << 20;

/// When a document is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// At the end of its object.
    Json,
    /// After every write: more may follow.
    Text,
}

/// What a write leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is nothing to commit yet, or any more.
    Wait,
    /// This is to be committed.
    Commit(Vec<u8>),
}

/// What was written through one handle.
#[derive(Debug)]
pub struct Buffer {
    kind: Kind,
    bytes: Vec<u8>,
    scan: Scan,
    /// Nothing is taken any more: the rest of what was refused could look like a document of its own.
    refused: Option<Reason>,
}

/// Where in a JSON document the last byte was.
#[derive(Clone, Copy, Debug, Default)]
struct Scan {
    /// Open braces and brackets; 0 before the document.
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Buffer {
    /// Empty.
    pub fn new(kind: Kind) -> Buffer {
        Buffer { kind, bytes: Vec::new(), scan: Scan::default(), refused: None }
    }

    /// One write; `rewinds` if it is at offset 0, where a writer begins anew. Other offsets mean nothing.
    pub fn write(&mut self, rewinds: bool, bytes: &[u8]) -> Result<Step, Reason> {
        if let Some(reason) = &self.refused {
            return Err(reason.clone());
        }
        if rewinds {
            self.bytes.clear();
            self.scan = Scan::default();
        }
        let step = match self.kind {
            Kind::Json => self.write_json(bytes),
            Kind::Text => self.write_text(bytes),
        };
        step.inspect_err(|reason| {
            self.bytes = Vec::new();
            self.refused = Some(reason.clone());
        })
    }

    /// Whether something was written that was never committed.
    pub fn is_unfinished(&self) -> bool {
        match self.kind {
            Kind::Json => self.scan.depth > 0,
            Kind::Text => std::str::from_utf8(&self.bytes).is_err(),
        }
    }

    fn write_json(&mut self, bytes: &[u8]) -> Result<Step, Reason> {
        let begin = match self.scan.depth {
            0 => bytes.iter().position(|byte| !byte.is_ascii_whitespace()),
            _ => Some(0),
        };
        let Some(rest) = begin.and_then(|begin| bytes.get(begin..)) else { return Ok(Step::Wait) };
        if self.scan.depth == 0 && !rest.starts_with(b"{") {
            return Err(malformed("a document is one JSON object: it begins with {"));
        }
        let end = rest.iter().position(|byte| self.scan.ends_at(*byte)).map(|last| last + 1);
        let (document, behind) = rest.split_at(end.unwrap_or(rest.len()));
        if !behind.iter().all(u8::is_ascii_whitespace) {
            return Err(malformed("something stands behind the document; write one document at a time"));
        }
        if self.bytes.len() + document.len() > LARGEST {
            return Err(Reason::TooLarge);
        }
        self.bytes.extend_from_slice(document);
        Ok(if end.is_some() { Step::Commit(std::mem::take(&mut self.bytes)) } else { Step::Wait })
    }

    fn write_text(&mut self, bytes: &[u8]) -> Result<Step, Reason> {
        if self.bytes.len() + bytes.len() > LARGEST {
            return Err(Reason::TooLarge);
        }
        self.bytes.extend_from_slice(bytes);
        let complete = match std::str::from_utf8(&self.bytes) {
            Ok(text) => text.len(),
            // The rest of the last character comes with the next write.
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => return Err(malformed("this is no UTF-8 text")),
        };
        Ok(if complete == 0 { Step::Wait } else { Step::Commit(self.bytes[..complete].to_vec()) })
    }
}

impl Scan {
    /// Takes a byte; true if it ends the document.
    fn ends_at(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth -= 1;
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn commit(bytes: &[u8]) -> Result<Step, Reason> {
        Ok(Step::Commit(bytes.to_vec()))
    }

    #[test]
    fn a_json_document_is_committed_by_the_write_that_completes_it() {
        let mut buffer = Buffer::new(Kind::Json);
        for piece in [&b" \n"[..], b"{\"a\": \"}\\\"", b"}\", \"b\": [{}"] {
            assert_eq!(buffer.write(false, piece), Ok(Step::Wait));
        }
        assert!(buffer.is_unfinished());
        assert_eq!(buffer.write(false, b"]}\n\n"), commit(b"{\"a\": \"}\\\"}\", \"b\": [{}]}"));
        assert!(!buffer.is_unfinished());
        assert_eq!(buffer.write(false, b"\n"), Ok(Step::Wait));
        assert_eq!(buffer.write(false, b"{}"), commit(b"{}"));
        assert_eq!(buffer.write(false, b"{\"half\""), Ok(Step::Wait));
        assert_eq!(buffer.write(true, b"{}"), commit(b"{}"));
    }

    #[test]
    fn the_rest_of_what_was_refused_is_no_document() {
        for bad in [&b"["[..], b"{} {}", b"1", b"\xef\xbb\xbf{}"] {
            let mut buffer = Buffer::new(Kind::Json);
            let reason = buffer.write(true, bad).expect_err("refused");
            assert_eq!(reason.errno(), libc::EINVAL);
            assert_eq!(buffer.write(true, b"{\"state\": \"deleted\"}"), Err(reason));
            assert!(!buffer.is_unfinished());
        }
    }

    #[test]
    fn of_text_each_write_commits_all_whole_characters_so_far() {
        let mut buffer = Buffer::new(Kind::Text);
        assert_eq!(buffer.write(true, b"a\xc3"), commit(b"a"));
        assert!(buffer.is_unfinished());
        assert_eq!(buffer.write(false, b"\xbc\n"), commit("aü\n".as_bytes()));
        assert!(!buffer.is_unfinished());
        assert_eq!(buffer.write(true, b"b"), commit(b"b"));
        assert_eq!(buffer.write(false, b"\xff").map_err(|reason| reason.errno()), Err(libc::EINVAL));
    }

    #[test]
    fn one_mebibyte_passes_and_one_byte_more_does_not() {
        let half = vec![b' '; LARGEST / 2];
        for kind in [Kind::Json, Kind::Text] {
            let mut buffer = Buffer::new(kind);
            buffer.write(true, b"{").expect("taken");
            buffer.write(false, &half).expect("taken");
            buffer.write(false, &half[..half.len() - 2]).expect("taken");
            assert!(matches!(buffer.write(false, b"}"), Ok(Step::Commit(bytes)) if bytes.len() == LARGEST));
            let mut buffer = Buffer::new(kind);
            buffer.write(true, b"{").expect("taken");
            buffer.write(false, &half).expect("taken");
            assert_eq!(buffer.write(false, &half), Err(Reason::TooLarge));
        }
    }

    proptest! {
        #[test]
        fn however_a_document_is_cut_it_is_committed_once_and_whole(
            text in r#"\PC{0,20}["\\{}\[\]]{0,8}"#,
            cuts in proptest::collection::vec(1_usize..9, 1..40),
        ) {
            let document = serde_json::json!({"text": text, "list": [{"more": text}]}).to_string();
            let mut buffer = Buffer::new(Kind::Json);
            let mut rest = document.as_bytes();
            let mut committed = Vec::new();
            for cut in cuts.iter().cycle() {
                let (piece, behind) = rest.split_at((*cut).min(rest.len()));
                rest = behind;
                if let Step::Commit(bytes) = buffer.write(false, piece).expect("taken") {
                    committed.push(bytes);
                }
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(committed, vec![document.into_bytes()]);
        }
    }
}
