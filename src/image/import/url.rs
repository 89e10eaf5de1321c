//! http and https, by ureq. Each redirect is judged as the first URL was, and the connection goes to the very addresses
//! that were judged: a name that answers differently the next time is not asked a next time.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{env, fmt, fs, thread};

use parking_lot::Mutex;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Error, Timeout};

use super::address::{is_listed, is_public};
use super::{Cancelled, Failure, ImportError, Policy};

const MOST_REDIRECTS: u32 = 5;

const OTHER_SCHEME: &str = "only http and https URLs are imported";

/// The authorities that this host trusts. Without it those that browsers trust are taken.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// Another file to take them from, as for OpenSSL and curl.
const NAMES_AUTHORITIES: &str = "SSL_CERT_FILE";

/// How often it is asked whether to give up.
const CANCEL_EVERY: Duration = Duration::from_millis(100);

/// What is wrong with a URL, if anything.
pub(super) fn check(text: &str) -> Result<(), &'static str> {
    let scheme = text.split("://").next().unwrap_or_default();
    if !["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) {
        return Err(OTHER_SCHEME);
    }
    let uri: Uri = text.parse().map_err(|_| "it is no URL")?;
    check_uri(&uri)
}

fn check_uri(uri: &Uri) -> Result<(), &'static str> {
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(OTHER_SCHEME);
    }
    let authority = uri.authority().ok_or("it names no host")?;
    if authority.as_str().contains('@') {
        return Err("a URL with a user name or password is refused, since everybody who sees the image reads it");
    }
    if authority.host().is_empty() { Err("it names no host") } else { Ok(()) }
}

/// Asks for `text` and gives `copy` the announced length and the body.
pub(super) fn fetch(
    text: &str,
    policy: &Policy,
    cancelled: &Cancelled,
    copy: impl FnOnce(Option<u64>, &mut dyn Read) -> Result<(), Failure>,
) -> Result<(), ImportError> {
    let refusal = Arc::new(Mutex::new(None));
    let resolver = Judge { policy: policy.clone(), inner: DefaultResolver::default(), refusal: refusal.clone() };
    let agent = Agent::with_parts(config(text, policy), DefaultConnector::new(), resolver);
    let ended = AtomicBool::new(false);
    let result = thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Acquire) {
                if cancelled() {
                    return agent.clone().shutdown();
                }
                thread::park_timeout(CANCEL_EVERY);
            }
        });
        let result = request(&agent, text, policy, copy);
        ended.store(true, Ordering::Release);
        result
    });
    if cancelled() {
        return Err(ImportError::Cancelled);
    }
    // What ureq reports then is a consequence.
    match refusal.lock().take() {
        Some(refusal) => Err(refusal),
        None => result,
    }
}

fn request(
    agent: &Agent,
    text: &str,
    policy: &Policy,
    copy: impl FnOnce(Option<u64>, &mut dyn Read) -> Result<(), Failure>,
) -> Result<(), ImportError> {
    let mut response = agent.get(text).call().map_err(|error| of_ureq(error, policy))?;
    let length = response.body().content_length();
    let mut body = response.body_mut().as_reader();
    copy(length, &mut body).map_err(|failure| failure.or(|error| of_io(error, policy)))
}

fn config(text: &str, policy: &Policy) -> Config {
    let tls = TlsConfig::builder().root_certs(authorities()).build();
    Agent::config_builder()
        .proxy(None)
        .https_only(text.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:")))
        .max_redirects(MOST_REDIRECTS)
        .max_idle_connections(0)
        .user_agent(concat!("instancefs/", env!("CARGO_PKG_VERSION")))
        .timeout_global(Some(policy.timeout))
        .timeout_resolve(Some(policy.stall))
        .timeout_connect(Some(policy.stall))
        .timeout_per_read(Some(policy.stall))
        .timeout_per_write(Some(policy.stall))
        .tls_config(tls)
        .build()
}

/// A file that is named but cannot be read means that nobody is trusted.
fn authorities() -> RootCerts {
    let named = env::var_os(NAMES_AUTHORITIES).map(PathBuf::from);
    let pem = match (fs::read(named.as_deref().unwrap_or(Path::new(AUTHORITIES))), named) {
        (Ok(pem), _) => pem,
        (Err(_), None) => return RootCerts::WebPki,
        (Err(error), Some(path)) => {
            log::warn!("no server is trusted: {NAMES_AUTHORITIES} names {}: {error}", path.display());
            Vec::new()
        }
    };
    let certificates = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        Ok(_) | Err(_) => None,
    });
    RootCerts::Specific(Arc::new(certificates.collect()))
}

/// Looks up the host of every request and judges its addresses. Only those are connected to.
struct Judge {
    policy: Policy,
    inner: DefaultResolver,
    refusal: Arc<Mutex<Option<ImportError>>>,
}

impl fmt::Debug for Judge {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Judge").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Judge {
    fn refuse(&self, refusal: ImportError) -> Error {
        let text = refusal.to_string();
        *self.refusal.lock() = Some(refusal);
        Error::Io(io::Error::other(text))
    }

    fn forbid(&self, host: &str, why: String) -> Error {
        self.refuse(ImportError::Host { host: host.to_owned(), why })
    }
}

impl Resolver for Judge {
    fn resolve(&self, uri: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, Error> {
        check_uri(uri).map_err(|why| self.refuse(ImportError::Source(uri.to_string(), why)))?;
        let host = uri.host().unwrap_or_default();
        let is_listed = is_listed(&self.policy.hosts, host);
        if !is_listed && !self.policy.public_hosts {
            return Err(self.forbid(host, "only listed hosts are".to_owned()));
        }
        let addresses = self.inner.resolve(uri, config, timeout)?;
        match addresses.iter().map(|address| address.ip()).find(|address| !is_public(*address)) {
            Some(address) if !is_listed => Err(self.forbid(host, format!("its address {address} is not public"))),
            Some(_) | None => Ok(addresses),
        }
    }
}

fn of_ureq(error: Error, policy: &Policy) -> ImportError {
    match error {
        Error::StatusCode(status) => ImportError::Status(status),
        Error::TooManyRedirects => ImportError::Redirects(MOST_REDIRECTS),
        Error::RequireHttpsOnly(_) => ImportError::Downgrade,
        Error::Timeout(Timeout::Global) => ImportError::TimedOut(policy.timeout),
        Error::Timeout(_) => ImportError::Stalled(policy.stall),
        Error::HostNotFound => ImportError::Connection("the host is not known; check the URL".to_owned()),
        Error::Io(error) => of_io(error, policy),
        other => ImportError::Connection(other.to_string()),
    }
}

/// What ureq means while a body is read: it wraps its own errors.
fn of_io(error: io::Error, policy: &Policy) -> ImportError {
    match error.downcast::<Error>() {
        Ok(Error::Io(error)) => ImportError::Connection(error.to_string()),
        Ok(error) => of_ureq(error, policy),
        Err(error) => ImportError::Connection(error.to_string()),
    }
}
