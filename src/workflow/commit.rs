//! An image draft becomes an image: wait for the writers, inspect and hash, publish.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::drafts_data::{DraftData, of_io};
use super::lanes;
use super::operation::{Ending, Halt, Run, WhenFull};
use super::progress::Progress;
use crate::image::ingest::{CommitError, Committed, Draft, publish, unpublish};
use crate::inventory::{Image, Object};
use crate::model::reason::Reason;

/// How long writers may still be there: the kernel reports a close late.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// Verifies and publishes the draft.
pub(super) fn commit(run: &Run) -> Result<Ending, Halt> {
    let data = run.shared.drafts.get(&run.shared, run.object);
    data.close(PATIENCE).map_err(Halt::Failed)?;
    let result = verify_and_publish(run, &data);
    if result.is_err() {
        data.reopen();
    }
    result
}

/// Once nobody writes any more.
pub(super) fn verify_and_publish(run: &Run, data: &DraftData) -> Result<Ending, Halt> {
    let image = run.image()?;
    let (from, to) = (run.shared.draft_path(run.object), run.shared.image_path(run.object));
    let failed = |error: io::Error| Halt::Failed(of_io(&error));
    if !exists(&from).map_err(failed)? {
        if is_published(run, &image)? {
            publish(&from, &to, run.shared.settings.guest_group).map_err(failed)?;
            return Ok(active());
        }
        return Err(Halt::Failed(Reason::Image("the image is empty; write its data first".to_owned())));
    }
    let _lane = lanes::enter(run)?;
    run.begin("verify")?;
    let draft = data.existing().map_err(failed)?;
    let progress = Progress::new(run);
    let progress = |percent: u8| progress.show(percent);
    // A claimed format is the user's; one that an earlier attempt stored was proven.
    let committed = match draft.commit(image.record.disk_format, &progress, &|| run.proceed().is_err()) {
        Ok(committed) => committed,
        Err(CommitError::Cancelled) => {
            run.proceed()?;
            return Err(Halt::Cancelled);
        }
        Err(CommitError::Io(error)) => return Err(failed(error)),
        Err(error @ (CommitError::Refused(_) | CommitError::Disagrees(_) | CommitError::Changed)) => {
            return Err(Halt::Failed(Reason::Image(error.to_string())));
        }
        Err(CommitError::Busy) => return Err(Halt::Failed(Reason::Busy { task: "saving" })),
    };
    let published = remember(run, committed)
        .and_then(|()| publish(&from, &to, run.shared.settings.guest_group).map_err(failed))
        .and_then(|()| as_checked(&draft, &from, &to));
    if let Err(halt) = published {
        draft.thaw();
        forget_findings(run, image.record.disk_format)?;
        return Err(halt);
    }
    Ok(active())
}

/// Whether an earlier life of the program published the data: it stored what it had found before.
pub(super) fn is_published(run: &Run, image: &Image) -> Result<bool, Halt> {
    let failed = |error: io::Error| Halt::Failed(of_io(&error));
    let (from, to) = (run.shared.draft_path(run.object), run.shared.image_path(run.object));
    Ok(image.record.sha512.is_some() && !exists(&from).map_err(failed)? && exists(&to).map_err(failed)?)
}

/// Stores what was found, with the step that publishes: afterwards the draft's file is gone.
fn remember(run: &Run, committed: Committed) -> Result<(), Halt> {
    let object = run.object;
    run.step("publish", None, move |batch| {
        let Some(image) = batch.image(object) else { return };
        let mut image = (*image).clone();
        image.record.disk_format = Some(committed.inspected.format);
        image.record.virtual_size_bytes = committed.inspected.virtual_size_bytes;
        image.record.size_bytes = committed.size_bytes;
        image.record.sha512 = Some(committed.sha512.clone());
        batch.put(Object::Image(Arc::new(image)));
    })
}

/// Root can write the file past us until the last moment: what was published is what was checked, or a draft again.
fn as_checked(draft: &Draft, from: &Path, to: &Path) -> Result<(), Halt> {
    let failed = |error: io::Error| Halt::Failed(of_io(&error));
    if draft.is_as_checked().map_err(failed)? {
        return Ok(());
    }
    unpublish(from, to).map_err(failed)?;
    Err(Halt::Failed(Reason::Image(CommitError::Changed.to_string())))
}

fn active() -> Ending {
    Ending::Image(Box::new(|image: &mut Image| {
        image.record.draft = None;
        image.data_bytes = image.record.size_bytes;
    }))
}

/// A missing file is no error.
fn exists(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Leaves nothing of a verification that did not lead to an image.
fn forget_findings(run: &Run, claimed: Option<crate::image::Format>) -> Result<(), Halt> {
    let object = run.object;
    run.store(
        Arc::new(move |batch| {
            let Some(image) = batch.image(object) else { return };
            let mut image = (*image).clone();
            image.record.disk_format = claimed;
            image.record.sha512 = None;
            image.record.size_bytes = 0;
            image.record.virtual_size_bytes = 0;
            batch.put(Object::Image(Arc::new(image)));
        }),
        WhenFull::Wait,
    )
}
