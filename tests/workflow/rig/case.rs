//! What is asked for, and in which situation.

use instancefs::model::Class;
use instancefs::model::caller::Caller;
use instancefs::model::change::{ImageChange, InstanceChange};
use instancefs::model::volume::change::VolumeChange;
use instancefs::workflow::request::Request;
use uuid::Uuid;

use super::scene::Scene;
use crate::lab::{Life, alice, root};

/// What is asked for.
#[derive(Clone, Debug)]
pub enum Asked {
    Instance(Vec<InstanceChange>),
    Image(Vec<ImageChange>),
    Volume(Vec<VolumeChange>),
}

impl Asked {
    pub fn class(&self) -> Class {
        match self {
            Asked::Instance(_) => Class::Instance,
            Asked::Image(_) => Class::Image,
            Asked::Volume(_) => Class::Volume,
        }
    }

    /// Who asks.
    pub fn caller(&self) -> Caller {
        match self {
            Asked::Volume(changes) if changes.iter().any(|change| matches!(change, VolumeChange::LocalAttach(_))) => {
                root()
            }
            Asked::Instance(_) | Asked::Image(_) | Asked::Volume(_) => alice(),
        }
    }

    pub fn request(&self, id: Uuid) -> Request {
        match self {
            Asked::Instance(changes) => Request::Instance { id, changes: changes.clone() },
            Asked::Image(changes) => Request::Image { id, changes: changes.clone() },
            Asked::Volume(changes) => Request::Volume { id, changes: changes.clone() },
        }
    }

    /// Whether it is also disturbed by what others ask for meanwhile: of volumes, where an instance is owned too.
    pub fn meets_others(&self) -> bool {
        match self {
            Asked::Instance(_) => true,
            Asked::Image(_) => false,
            Asked::Volume(changes) => {
                changes.iter().any(|change| matches!(change, VolumeChange::Attach { .. } | VolumeChange::Detach(_)))
            }
        }
    }
}

/// One operation in one situation.
pub struct Case {
    /// Makes the object.
    pub setup: fn(&Life<'_>) -> Uuid,
    /// Begins the operation.
    pub asked: Asked,
    /// The state words before and after.
    pub states: (&'static str, &'static str),
    /// Root disks and seeds that the object has before and after.
    pub disks: (usize, usize),
    /// Parts of the request that are an end as well: what a failure of the rest leaves.
    pub parts: Vec<Asked>,
    /// Whether what a failure left, which is neither before nor after, is an end as well. The first scene is the one before.
    pub between: fn(&Scene, &Scene) -> bool,
    /// It matters how often the guest booted: it may not be started to be put back where it was.
    pub counts_boots: bool,
    /// The same request again changes nothing more.
    pub settles: bool,
}
