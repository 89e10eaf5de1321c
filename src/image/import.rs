//! Image data from elsewhere: an http or https server, or a directory of this host. It arrives through the same
//! [`Draft`] as what users write, and is judged by the same inspection afterwards.
//!
//! The daemon may be root and inside of a protected network, its users are neither: what it fetches for them is limited
//! by [`Policy`].

mod address;
mod path;
mod url;

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ingest::Draft;

/// The largest image that is imported where nobody says otherwise, in bytes.
pub const DEFAULT_MOST_BYTES: u64 = 64 << 30;
/// How long an import may take where nobody says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(6 * 3600);
/// How long a server may say nothing where nobody says otherwise.
pub const DEFAULT_STALL: Duration = Duration::from_secs(60);

const READ_BYTES: usize = 1 << 20;

/// What may be imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Where importable files lie.
    pub directory: PathBuf,
    /// Hosts whose addresses are not looked at: names, `*.name` for all below a name, or addresses.
    pub hosts: Vec<String>,
    /// Whether other hosts may be asked, if all their addresses are public.
    pub public_hosts: bool,
    /// The largest image, in bytes.
    pub most_bytes: u64,
    /// How long an import may take.
    pub timeout: Duration,
    /// How long a server may say nothing.
    pub stall: Duration,
}

impl Policy {
    /// Files of `directory`, and public hosts, within the default limits.
    pub fn new(directory: PathBuf) -> Policy {
        Policy {
            directory,
            hosts: Vec::new(),
            public_hosts: true,
            most_bytes: DEFAULT_MOST_BYTES,
            timeout: DEFAULT_TIMEOUT,
            stall: DEFAULT_STALL,
        }
    }
}

/// Why nothing was imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The source cannot be understood.
    #[error("{0:?} cannot be imported: {1}")]
    Source(String, &'static str),
    /// The rules do not allow the host.
    #[error("the host {host} is not allowed: {why}; an administrator can list it in import_hosts")]
    Host {
        /// The host, as the URL or a redirect names it.
        host: String,
        /// Which rule.
        why: String,
    },
    /// The file cannot be used.
    #[error("the file {name} cannot be imported: {why}")]
    File {
        /// As the user names it.
        name: String,
        /// Why not.
        why: String,
    },
    /// The server does not give it.
    #[error("the server answered with status {0}; check the URL")]
    Status(u16),
    /// An https server redirects to http.
    #[error("the server redirects from https to http, which is refused; use another URL")]
    Downgrade,
    /// Redirects without end.
    #[error("the server redirects more than {0} times; use the URL that it leads to")]
    Redirects(u32),
    /// Longer than allowed.
    #[error("the image is larger than the {0} bytes that may be imported; an administrator can raise import_max_bytes")]
    TooLarge(u64),
    /// The data ended early.
    #[error("the data ended after {got} of {expected} bytes; try again")]
    Incomplete {
        /// How much there was, in bytes.
        got: u64,
        /// How much was announced, in bytes.
        expected: u64,
    },
    /// No byte for too long.
    #[error("the server was silent for {} s; try again", .0.as_secs_f64())]
    Stalled(Duration),
    /// Too slow.
    #[error("the import took longer than {} s; an administrator can raise import_timeout", .0.as_secs_f64())]
    TimedOut(Duration),
    /// The certificate is not to be trusted, the name is unknown, the connection broke.
    #[error("the import failed: {0}")]
    Connection(String),
    /// Asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The draft could not be written.
    #[error("the image's data cannot be written: {0}")]
    Write(#[source] io::Error),
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An http or https server.
    Url(String),
    /// A file, by its path below the import directory.
    File(PathBuf),
}

impl Source {
    /// Understands `text`: a URL, or a path below `policy`'s directory, absolute or relative to it.
    pub fn parse(text: &str, policy: &Policy) -> Result<Source, ImportError> {
        let refuse = |why| ImportError::Source(text.to_owned(), why);
        if text.contains("://") {
            return url::check(text).map(|()| Source::Url(text.to_owned())).map_err(refuse);
        }
        let path = Path::new(text);
        let below = if path.is_absolute() {
            path.strip_prefix(&policy.directory)
                .map_err(|_| refuse("it is neither an http or https URL nor below the import directory"))?
        } else {
            path
        };
        if below.as_os_str().is_empty() {
            return Err(refuse("it names no file"));
        }
        Ok(Source::File(below.to_owned()))
    }
}

/// Whether to give up; asked from several threads.
pub type Cancelled = Arc<dyn Fn() -> bool + Send + Sync>;

/// Fills the empty `draft` from `source`. `progress` is called with 0 to 100 if the length is known beforehand. After an
/// error some data may have arrived.
pub fn import(
    source: &Source,
    policy: &Policy,
    draft: &Draft,
    progress: &dyn Fn(u8),
    cancelled: &Cancelled,
) -> Result<(), ImportError> {
    match source {
        Source::Url(text) => url::fetch(text, policy, cancelled, |length, body| {
            Copy { policy, draft, progress, cancelled }.run(length, body)
        }),
        Source::File(name) => {
            let (file, length) = path::open(&policy.directory, name)?;
            Copy { policy, draft, progress, cancelled }
                .run(Some(length), &mut { file })
                .map_err(|failure| failure.or(|error| path::failed(name, error)))
        }
    }
}

/// Why a copy ended early.
enum Failure {
    /// The source failed.
    Read(io::Error),
    /// Anything else.
    Other(ImportError),
}

impl Failure {
    fn or(self, of_read: impl FnOnce(io::Error) -> ImportError) -> ImportError {
        match self {
            Failure::Read(error) => of_read(error),
            Failure::Other(error) => error,
        }
    }
}

impl From<ImportError> for Failure {
    fn from(error: ImportError) -> Failure {
        Failure::Other(error)
    }
}

/// From any source into a draft.
struct Copy<'a> {
    policy: &'a Policy,
    draft: &'a Draft,
    progress: &'a dyn Fn(u8),
    cancelled: &'a Cancelled,
}

impl Copy<'_> {
    fn run(&self, length: Option<u64>, from: &mut dyn Read) -> Result<(), Failure> {
        let most = self.policy.most_bytes;
        if length.is_some_and(|length| length > most) {
            return Err(ImportError::TooLarge(most).into());
        }
        let began = Instant::now();
        let mut buffer = vec![0u8; READ_BYTES];
        let mut at = 0u64;
        loop {
            if (self.cancelled)() {
                return Err(ImportError::Cancelled.into());
            }
            if began.elapsed() > self.policy.timeout {
                return Err(ImportError::TimedOut(self.policy.timeout).into());
            }
            let count = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    let expected = length.unwrap_or(at);
                    return Err(ImportError::Incomplete { got: at, expected }.into());
                }
                Err(error) => return Err(Failure::Read(error)),
            };
            if count as u64 > most - at {
                return Err(ImportError::TooLarge(most).into());
            }
            let bytes = buffer.get(..count).unwrap_or_default();
            self.draft.write_at(at, bytes).map_err(ImportError::Write)?;
            at += count as u64;
            if let Some(length) = length.filter(|length| *length > 0) {
                (self.progress)((u128::from(at) * 100 / u128::from(length)).min(100) as u8);
            }
        }
        match length {
            Some(expected) if expected != at => Err(ImportError::Incomplete { got: at, expected }.into()),
            Some(_) | None => Ok(()),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Url(text) => formatter.write_str(text),
            Source::File(path) => path.display().fmt(formatter),
        }
    }
}
