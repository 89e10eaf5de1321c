//! What the tree asks of the engine.

use uuid::Uuid;

use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::change::{ImageChange, InstanceChange};
use crate::model::flavor::FlavorChange;
use crate::model::reason::Reason;
use crate::model::task::Import;
use crate::model::transfer::TransferChange;
use crate::model::volume::change::VolumeChange;

/// The file whose change sets are whole documents: what is wrong with one is said key by key.
pub const DOCUMENT: &str = "spec.json";

/// What moves are called, whose refusals are [`Reason::of_move`].
pub const MOVE: &str = "mv";

/// Called exactly once with the outcome; from any thread, never while a lock is held.
pub type Completion = Box<dyn FnOnce(Result<(), Reason>) + Send>;

/// When a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// When its operation ends, with its outcome, or the settle window after the operation began, whichever is first.
    Settle,
    /// When it is accepted and durable: for renames, mkdir and rmdir, during which the kernel holds locks.
    Accepted,
}

/// What is asked.
#[derive(Clone, Debug)]
pub enum Request {
    /// Change an instance: all of these or none, in one validation and one transaction.
    Instance {
        /// Which.
        id: Uuid,
        /// The change set.
        changes: Vec<InstanceChange>,
    },
    /// Change an image likewise.
    Image {
        /// Which.
        id: Uuid,
        /// The change set.
        changes: Vec<ImageChange>,
    },
    /// Change a flavor likewise.
    Flavor {
        /// Which.
        id: Uuid,
        /// The change set.
        changes: Vec<FlavorChange>,
    },
    /// Change a volume likewise.
    Volume {
        /// Which.
        id: Uuid,
        /// The change set.
        changes: Vec<VolumeChange>,
    },
    /// Take an offer, or take it back.
    Transfer {
        /// Which.
        id: Uuid,
        /// What.
        change: TransferChange,
    },
    /// Tell a user's own task to import an image.
    Import {
        /// The task.
        id: Uuid,
        /// What, and from where.
        import: Box<Import>,
    },
    /// Ask an operation to give up.
    Cancel {
        /// Its task.
        id: Uuid,
        /// The class of the object that it works on.
        class: Class,
        /// That object.
        object: Uuid,
    },
    /// mkdir: a new flavor draft, by root.
    MakeFlavor {
        /// Its key in the store.
        id: Uuid,
        /// Its name.
        name: String,
    },
    /// mkdir: a new draft of this uuid, owned by the caller.
    MakeDraft {
        /// Instance, image, volume or task.
        class: Class,
        /// The uuid that the client chose.
        id: Uuid,
    },
    /// The daemon's own: define a protected domain again that somebody undefined outside. Refused if that is not so (any
    /// more).
    DefineAgain {
        /// Which instance.
        id: Uuid,
    },
    /// rmdir: discard a draft into which no write ever succeeded; anything else is `ENOTEMPTY`.
    DiscardUnwritten {
        /// Instance, image, volume, flavor or task.
        class: Class,
        /// Which.
        id: Uuid,
    },
}

impl Request {
    /// The object that refusals belong to.
    pub fn object(&self) -> Option<(Class, Uuid)> {
        match self {
            Request::Instance { id, .. } | Request::DefineAgain { id } => Some((Class::Instance, *id)),
            Request::Image { id, .. } => Some((Class::Image, *id)),
            Request::Flavor { id, .. } => Some((Class::Flavor, *id)),
            Request::Volume { id, .. } => Some((Class::Volume, *id)),
            Request::Transfer { id, .. } => Some((Class::Transfer, *id)),
            Request::Import { id, .. } => Some((Class::Task, *id)),
            Request::Cancel { class, object, .. } => Some((*class, *object)),
            Request::DiscardUnwritten { class, id } => Some((*class, *id)),
            Request::MakeDraft { .. } | Request::MakeFlavor { .. } => None,
        }
    }
}

/// A request on its way.
pub struct Submission {
    /// Who asks.
    pub caller: Caller,
    /// The file that he wrote, or the verb, for `last_error`.
    pub file: String,
    /// What he asks.
    pub request: Request,
    /// When to answer.
    pub wait: Wait,
    /// Whom to answer.
    pub done: Completion,
}
