//! How a draft is removed, with what was written into it.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::boot::clear_leftovers;
use super::drafts_data::of_io;
use super::operation::{Ending, Halt, Run};
use crate::model::Class;
use crate::model::protection::{Action, check_deletion};

/// Writers of a draft that is to be discarded may go on for this long.
const PATIENCE: Duration = Duration::from_secs(1);

/// Removes a draft.
pub(super) fn discard(run: &Run) -> Result<Ending, Halt> {
    match run.class {
        Class::Instance => {
            clear_leftovers(run)?;
            let instance = run.instance()?;
            let role = crate::model::caller::Role::Root;
            instance.record.protection.check(Action::Delete, role).map_err(Halt::Failed)?;
            Ok(Ending::Removed)
        }
        Class::Image => {
            check_deletion(run.image()?.record.delete_protection).map_err(Halt::Failed)?;
            let data = run.shared.drafts.get(&run.shared, run.object);
            data.close(PATIENCE).map_err(Halt::Failed)?;
            let removed = remove_data(run);
            match &removed {
                // Now, and not whenever the last thread lets go of the file: whoever sees that the draft is gone counts on
                // its space.
                Ok(()) => data.free_removed(),
                Err(_) => data.reopen(),
            }
            removed.map(|()| Ending::Removed)
        }
        Class::Volume => super::volume::discard(run),
        // A flavor draft is a record, which no operation removes.
        Class::Task | Class::Flavor | Class::Transfer | Class::Backend => Ok(Ending::Removed),
    }
}

/// Removes exactly the file that this draft's writers made, and its directory if nothing else is in it.
fn remove_data(run: &Run) -> Result<(), Halt> {
    let path = run.shared.draft_path(run.object);
    run.begin("remove_data")?;
    absent_is_fine(fs::remove_file(&path)).map_err(|error| Halt::Failed(of_io(&error)))?;
    let directory = path.parent().unwrap_or_else(|| Path::new("."));
    match absent_is_fine(fs::remove_dir(directory)) {
        Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
            log::warn!("the directory {} stays: {error}", directory.display());
        }
        Ok(()) | Err(_) => {}
    }
    Ok(())
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
