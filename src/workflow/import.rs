//! An image draft becomes an image whose data comes from elsewhere: fetch, then what every commit does.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::drafts_data::{DraftData, of_io};
use super::operation::{Ending, Halt, Run};
use super::progress::Progress;
use super::{commit, lanes};
use crate::image::import::{Cancelled, ImportError, Policy, Source, import};
use crate::model::reason::Reason;

/// The step from whose beginning on the draft's data is this operation's.
const FETCH: &str = "fetch";

/// What the fetch is of the whole, in percent; the rest is the verification, which has hashed most of it already.
const FETCH_PERCENT: u16 = 95;

/// What the first step would find out, said at once.
pub(super) fn can_begin(source: &str, policy: &Policy, data_bytes: u64) -> Result<(), Reason> {
    if data_bytes > 0 {
        return Err(has_data());
    }
    Source::parse(source, policy).map(drop).map_err(reason)
}

/// Fetches, verifies and publishes the draft.
pub(super) fn import_image(run: &Run) -> Result<Ending, Halt> {
    let data = run.shared.drafts.get(&run.shared, run.object);
    data.close(commit::PATIENCE).map_err(Halt::Failed)?;
    let result = fetch(run, &data).and_then(|()| commit::verify_and_publish(run, &data));
    match &result {
        Err(Halt::Failed(_) | Halt::Cancelled) => {
            discard_fetched(run, &data)?;
            data.reopen();
        }
        // It goes on after the next start, and nobody writes until then.
        Err(Halt::Stopped | Halt::Lost) | Ok(_) => {}
    }
    result
}

fn fetch(run: &Run, data: &DraftData) -> Result<(), Halt> {
    let image = run.image()?;
    if commit::is_published(run, &image)? {
        return Ok(());
    }
    if !run.has_begun(FETCH)? && !data.is_empty() {
        return Err(Halt::Failed(has_data()));
    }
    let policy = &run.shared.settings.import;
    let source = image.record.import_from.clone().unwrap_or_default();
    let source = Source::parse(&source, policy).map_err(|error| Halt::Failed(reason(error)))?;
    // A server decides itself how fast it sends, and may be slow for hours.
    let _lane = match &source {
        Source::File(_) => Some(lanes::enter(run)?),
        Source::Url(_) => None,
    };
    run.begin(FETCH)?;
    let draft = data.existing_or_new().map_err(|error| Halt::Failed(of_io(&error)))?;
    // What an earlier life of the program fetched is incomplete.
    draft.truncate(0).map_err(|error| Halt::Failed(of_io(&error)))?;
    let progress = Progress::new(run);
    let progress = |percent: u8| progress.show((u16::from(percent) * FETCH_PERCENT / 100) as u8);
    let (shared, cancel) = (run.shared.clone(), run.cancel.clone());
    let cancelled: Cancelled = Arc::new(move || shared.gate.stopping() || cancel.load(Ordering::Acquire));
    import(&source, policy, &draft, &progress, &cancelled).map_err(|error| match error {
        ImportError::Cancelled => run.proceed().err().unwrap_or(Halt::Cancelled),
        other => Halt::Failed(reason(other)),
    })
}

/// Leaves an empty draft. The file had no byte before this operation, and everything in it is this operation's.
fn discard_fetched(run: &Run, data: &DraftData) -> Result<(), Halt> {
    if !run.has_begun(FETCH)? || data.is_empty() {
        return Ok(());
    }
    let emptied = data.existing_or_new().and_then(|draft| draft.truncate(0));
    emptied.map_err(|error| Halt::Failed(of_io(&error)))
}

fn has_data() -> Reason {
    Reason::Image(
        "the draft has data and import_from; clear one of them: truncate data, or write an empty line".to_owned(),
    )
}

fn reason(error: ImportError) -> Reason {
    let text = error.to_string();
    match error {
        ImportError::Host { .. } => Reason::Policy(text),
        ImportError::Stalled(_) | ImportError::TimedOut(_) => Reason::TimedOut(text),
        ImportError::Status(_)
        | ImportError::Incomplete { .. }
        | ImportError::Connection(_)
        | ImportError::Cancelled => Reason::Failed(text),
        ImportError::Write(error) => of_io(&error),
        ImportError::Source(..)
        | ImportError::File { .. }
        | ImportError::Downgrade
        | ImportError::Redirects(_)
        | ImportError::TooLarge(_) => Reason::Image(text),
    }
}
