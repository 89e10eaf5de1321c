//! Data of a volume is made, in a lane if much is to be copied, with progress, and given up when the operation is.

use crate::block::{BlockError, Examined, NewData, Source, VolumeBackend};
use crate::workflow::copies::halt;
use crate::workflow::lanes::{self, Lane};
use crate::workflow::operation::{Halt, Run};
use crate::workflow::progress::Progress;

/// The right to make data that is journaled.
pub(super) struct Copying<'a> {
    run: &'a Run,
    _lane: Option<Lane<'a>>,
}

/// Waits for its turn if there is something to copy, then begins the step that makes it.
pub(super) fn begin<'a>(
    run: &'a Run,
    source: &Source<'_>,
    step: impl FnOnce() -> Result<(), Halt>,
) -> Result<Copying<'a>, Halt> {
    let lane = match source {
        Source::Empty => None,
        Source::Image(..) | Source::Volume(_) | Source::Snapshot(_) | Source::Elsewhere(..) => Some(lanes::enter(run)?),
    };
    step()?;
    Ok(Copying { run, _lane: lane })
}

impl Copying<'_> {
    /// Makes it.
    pub(super) fn create(self, backend: &dyn VolumeBackend, new: &NewData<'_>) -> Result<Examined, Halt> {
        let progress = Progress::new(self.run);
        let watch = |percent: u8| {
            progress.show(percent);
            self.run.proceed().map_err(|_| BlockError::Cancelled)
        };
        let made = backend.create_data(new, &watch).map_err(|error| halt(self.run, error))?;
        self.run.proceed()?;
        Ok(made)
    }
}
