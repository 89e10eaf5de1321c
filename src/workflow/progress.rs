//! How far an operation is, as its task and its object show it. Never stored: after a restart it begins anew.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::operation::Run;
use crate::inventory::Object;

const EVERY: Duration = Duration::from_millis(200);

/// The most that is shown: 100 is for what is done.
const MOST: u8 = 99;

/// Shows percentages of one operation, a few times in a second at most, and only ever larger ones.
pub(super) struct Progress<'a> {
    run: &'a Run,
    shown: Mutex<(u8, Instant)>,
}

impl<'a> Progress<'a> {
    pub(super) fn new(run: &'a Run) -> Progress<'a> {
        Progress { run, shown: Mutex::new((0, Instant::now())) }
    }

    /// So much is done, in percent.
    pub(super) fn show(&self, percent: u8) {
        let mut shown = self.shown.lock();
        let percent = percent.min(MOST);
        if percent > shown.0 && shown.1.elapsed() >= EVERY && show(self.run, percent) {
            *shown = (percent, Instant::now());
        }
    }
}

/// Not while a batch is being stored: the work would wait for it, and on a busy disk that takes a while.
fn show(run: &Run, percent: u8) -> bool {
    let (id, object) = (run.id, run.object);
    let shown = run.shared.parts.ledger.try_transact(|batch| {
        if let Some(task) = batch.task(id) {
            let mut task = (*task).clone();
            task.record.progress = percent;
            batch.show(Object::Task(Arc::new(task)));
        }
        if let Some(image) = batch.image(object) {
            let mut image = (*image).clone();
            if let Some(task) = &mut image.task {
                task.progress = percent;
            }
            batch.show(Object::Image(Arc::new(image)));
        } else if let Some(instance) = batch.instance(object) {
            let mut instance = (*instance).clone();
            if let Some(task) = &mut instance.task {
                task.progress = percent;
            }
            batch.show(Object::Instance(Arc::new(instance)));
        } else if let Some(volume) = batch.volume(object) {
            let mut volume = (*volume).clone();
            if let Some(task) = &mut volume.task {
                task.progress = percent;
            }
            batch.show(Object::Volume(Arc::new(volume)));
        }
    });
    match shown {
        None => false,
        Some(Ok(())) => true,
        Some(Err(error)) => {
            log::debug!("progress of {} is not shown: {error}", run.id);
            true
        }
    }
}
