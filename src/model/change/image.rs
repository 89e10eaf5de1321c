//! The judge of an image's changes.

use super::{Effect, ImageChange, expiry_already, may_give_away};
use crate::model::reason::Reason;
use crate::model::record::ImageRecord;
use crate::model::task::Operation;
use crate::model::{image, instance, sharing};

/// Judges one change of an image.
pub fn judge_image(
    situation: &image::Situation<'_>,
    record: &ImageRecord,
    change: &ImageChange,
) -> Result<Effect, Reason> {
    // A member has no business in the other files.
    if !matches!(change, ImageChange::Member { .. }) {
        image::access(situation)?;
    }
    let (already, root_only) = match change {
        ImageChange::Member { project, status } => {
            return sharing::judge_status(situation, record, *project, *status);
        }
        ImageChange::Visibility(wanted) => return sharing::judge_visibility(situation, record, *wanted),
        ImageChange::Share(project) => return sharing::judge_share(record, *project),
        ImageChange::Unshare(project) => return Ok(sharing::judge_unshare(record, *project)),
        ImageChange::State(word) => {
            return image::decide(situation, *word).map(|effect| match effect {
                Effect::Start(Operation::CommitImage) if record.import_from.is_some() => {
                    Effect::Start(Operation::ImportImage)
                }
                effect => effect,
            });
        }
        ImageChange::Restore => {
            instance::idle(situation.task)?;
            return match &record.bin {
                Some(_) => Ok(Effect::Record),
                None => Err(instance::not_in_bin()),
            };
        }
        ImageChange::ExpiresAt(at) => return Ok(effect(expiry_already(record.bin.as_ref(), *at)?)),
        ImageChange::DeleteProtection(value) => return Ok(effect(*value == record.delete_protection)),
        ImageChange::DiskFormat(format) => return in_draft(situation, record.disk_format == Some(*format)),
        ImageChange::ImportFrom(source) => return in_draft(situation, record.import_from == *source),
        ImageChange::Name(name) => (*name == record.name, false),
        ImageChange::Metadata(key, text) => return Ok(effect(record.metadata.get(key) == text.as_ref())),
        ImageChange::Description(text) => return Ok(effect(*text == record.description)),
        ImageChange::MinDiskBytes(bytes) => (*bytes == record.min_disk_bytes, false),
        ImageChange::MinMemoryBytes(bytes) => (*bytes == record.min_memory_bytes, false),
        ImageChange::Owner(uid) => (*uid == record.ownership.owner, true),
        ImageChange::Project(gid) => (*gid == record.ownership.project, true),
    };
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    if root_only {
        may_give_away(situation.role)?;
    }
    instance::idle(situation.task)?;
    Ok(Effect::Record)
}

fn in_draft(situation: &image::Situation<'_>, already: bool) -> Result<Effect, Reason> {
    if already {
        return Ok(Effect::AlreadyTrue);
    }
    instance::idle(situation.task)?;
    if situation.state == image::State::Draft { Ok(Effect::Record) } else { Err(Reason::DraftOnly) }
}

fn effect(already: bool) -> Effect {
    if already { Effect::AlreadyTrue } else { Effect::Record }
}
