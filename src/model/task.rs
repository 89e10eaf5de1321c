//! Operations: what runs on an object, and how far it is.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Class;
use super::change::ImageChange;
use super::instance::State;
use super::reconfiguration::Reconfiguration;
use super::record::{DiskRecord, Draft};
use super::volume::{VolumeCreation, VolumeOperation};

/// What an operation does; with its parameters, so that recovery needs nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Operation {
    /// Draft to active: make the root disk, define, start.
    Boot,
    /// Draft to stopped: make the root disk, define.
    Define,
    /// Start a stopped or crashed domain.
    Start,
    /// ACPI shutdown, repeated, then power off.
    Stop,
    /// Freeze.
    Pause,
    /// Let run again, also after an I/O error.
    Unpause,
    /// Memory to disk.
    Suspend,
    /// Start from saved memory.
    Resume,
    /// Restart the guest by asking it.
    RebootSoft,
    /// The reset button.
    RebootHard,
    /// Change the libvirt name of a stopped domain.
    Rename {
        /// Present name, for the undo.
        from: String,
        /// Wanted name.
        to: String,
    },
    /// Change hardware and other settings of an instance that is not a draft any more, all or none.
    Reconfigure {
        /// The values.
        change: Reconfiguration,
        /// What the same change set asked for beside: it follows when they are set.
        then: Option<Box<Operation>>,
    },
    /// Verify and publish an image draft.
    CommitImage,
    /// Fetch an image draft's data from its `import_from`, verify and publish it.
    ImportImage,
    /// Remove a draft and what was written into it.
    DiscardDraft,
    /// What a move into the bin leaves to do: stop the guest as [`Operation::Stop`] does, autostart off. The instance is in
    /// the bin already, whatever becomes of this.
    SoftDelete,
    /// What a move out of the bin leaves to do: autostart as it was, and this state. The instance is out of the bin
    /// already, whatever becomes of this.
    Restore {
        /// The state to reach.
        state: State,
    },
    /// Remove an object in the bin for good, with the disks that we made for it.
    Delete,
    /// Copy an instance's own disks to the shelf; stop it before.
    Shelve {
        /// Remove the disks when the copies are proven.
        offload: bool,
    },
    /// Remove the disks of a shelved instance when its copies are proven.
    Offload,
    /// Take an instance from the shelf, with its disks.
    Unshelve {
        /// Start it, else leave it off.
        start: bool,
    },
    /// Define a domain again that was undefined outside.
    DefineAgain,
    /// Something of a volume.
    Volume(VolumeOperation),
}

impl Operation {
    /// The word in `task` while it runs, also its directory in `by-state`.
    pub fn task_word(&self) -> TaskWord {
        match self {
            Operation::Boot => TaskWord::Building,
            Operation::Define => TaskWord::Defining,
            Operation::Start => TaskWord::Starting,
            Operation::Stop => TaskWord::Stopping,
            Operation::Pause => TaskWord::Pausing,
            Operation::Unpause => TaskWord::Unpausing,
            Operation::Suspend => TaskWord::Suspending,
            Operation::Resume => TaskWord::Resuming,
            Operation::RebootSoft | Operation::RebootHard => TaskWord::Rebooting,
            Operation::Rename { .. } => TaskWord::Renaming,
            Operation::Reconfigure { .. } => TaskWord::Reconfiguring,
            Operation::CommitImage => TaskWord::Saving,
            Operation::ImportImage => TaskWord::Importing,
            Operation::DiscardDraft | Operation::Delete => TaskWord::Deleting,
            Operation::SoftDelete => TaskWord::SoftDeleting,
            Operation::Restore { .. } => TaskWord::Restoring,
            Operation::Shelve { .. } => TaskWord::Shelving,
            Operation::Offload => TaskWord::ShelvingOffloading,
            Operation::Unshelve { .. } => TaskWord::Unshelving,
            Operation::DefineAgain => TaskWord::Defining,
            Operation::Volume(operation) => operation.task_word(),
        }
    }

    /// The instance that it owns beside its object.
    pub fn instance(&self) -> Option<Uuid> {
        if let Operation::Volume(operation) = self { operation.instance() } else { None }
    }

    /// The state word that it works towards; `None` where it leaves the state alone.
    pub fn target(&self) -> Option<&'static str> {
        match self {
            Operation::Boot
            | Operation::Start
            | Operation::Unpause
            | Operation::Resume
            | Operation::RebootSoft
            | Operation::RebootHard
            | Operation::CommitImage
            | Operation::ImportImage => Some("active"),
            Operation::Define | Operation::Stop => Some("stopped"),
            Operation::Pause => Some("paused"),
            Operation::Suspend => Some("suspended"),
            Operation::Rename { .. } => None,
            Operation::Reconfigure { then, .. } => then.as_ref().and_then(|then| then.target()),
            Operation::DiscardDraft | Operation::Delete => Some("deleted"),
            Operation::SoftDelete => Some("soft_deleted"),
            Operation::Restore { state } => Some(state.word()),
            Operation::Shelve { offload: false } => Some("shelved"),
            Operation::Shelve { offload: true } | Operation::Offload => Some("shelved_offloaded"),
            Operation::Unshelve { start: true } => Some("active"),
            Operation::Unshelve { start: false } | Operation::DefineAgain => Some("stopped"),
            Operation::Volume(operation) => operation.target(),
        }
    }
}

/// The words of `task`. The order is that of their directories' inodes; only ever appended to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskWord {
    /// A draft boots.
    Building,
    /// A draft is defined without a start.
    Defining,
    /// A stopped instance starts.
    Starting,
    /// It is asked to shut down.
    Stopping,
    /// It is being frozen.
    Pausing,
    /// It is being let run.
    Unpausing,
    /// Its memory is written to disk.
    Suspending,
    /// It starts from saved memory.
    Resuming,
    /// It restarts.
    Rebooting,
    /// Its libvirt name changes.
    Renaming,
    /// An image draft is verified and published.
    Saving,
    /// A draft is removed.
    Deleting,
    /// An image draft's data is fetched from elsewhere, verified and published.
    Importing,
    /// Hardware or settings change.
    Reconfiguring,
    /// A guest in the bin is being stopped.
    SoftDeleting,
    /// It comes back from the bin.
    Restoring,
    /// Its disks are copied to the shelf.
    Shelving,
    /// Its disks are removed, the copies stay.
    ShelvingOffloading,
    /// It comes back from the shelf.
    Unshelving,
    /// A volume draft is made.
    Creating,
    /// A volume is made larger.
    Extending,
    /// A volume is given to an instance or to the host.
    Attaching,
    /// It is taken from there.
    Detaching,
    /// A volume's content is kept.
    Snapshotting,
    /// A snapshot is removed.
    DeletingSnapshot,
    /// What was wrong with a volume is looked at.
    Examining,
}

impl TaskWord {
    /// All of them.
    pub const ALL: [TaskWord; 26] = [
        TaskWord::Building,
        TaskWord::Defining,
        TaskWord::Starting,
        TaskWord::Stopping,
        TaskWord::Pausing,
        TaskWord::Unpausing,
        TaskWord::Suspending,
        TaskWord::Resuming,
        TaskWord::Rebooting,
        TaskWord::Renaming,
        TaskWord::Saving,
        TaskWord::Deleting,
        TaskWord::Importing,
        TaskWord::Reconfiguring,
        TaskWord::SoftDeleting,
        TaskWord::Restoring,
        TaskWord::Shelving,
        TaskWord::ShelvingOffloading,
        TaskWord::Unshelving,
        TaskWord::Creating,
        TaskWord::Extending,
        TaskWord::Attaching,
        TaskWord::Detaching,
        TaskWord::Snapshotting,
        TaskWord::DeletingSnapshot,
        TaskWord::Examining,
    ];

    /// The content of `task`.
    pub fn word(self) -> &'static str {
        match self {
            TaskWord::Building => "building",
            TaskWord::Defining => "defining",
            TaskWord::Starting => "starting",
            TaskWord::Stopping => "stopping",
            TaskWord::Pausing => "pausing",
            TaskWord::Unpausing => "unpausing",
            TaskWord::Suspending => "suspending",
            TaskWord::Resuming => "resuming",
            TaskWord::Rebooting => "rebooting",
            TaskWord::Renaming => "renaming",
            TaskWord::Saving => "saving",
            TaskWord::Deleting => "deleting",
            TaskWord::Importing => "importing",
            TaskWord::Reconfiguring => "reconfiguring",
            TaskWord::SoftDeleting => "soft_deleting",
            TaskWord::Restoring => "restoring",
            TaskWord::Shelving => "shelving",
            TaskWord::ShelvingOffloading => "shelving_offloading",
            TaskWord::Unshelving => "unshelving",
            TaskWord::Creating => "creating",
            TaskWord::Extending => "extending",
            TaskWord::Attaching => "attaching",
            TaskWord::Detaching => "detaching",
            TaskWord::Snapshotting => "snapshotting",
            TaskWord::DeletingSnapshot => "deleting_snapshot",
            TaskWord::Examining => "examining",
        }
    }
}

/// How an operation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// Claimed, nothing done yet.
    Pending,
    /// A step runs, or its outcome is still unknown.
    Processing,
    /// Done.
    Success,
    /// Failed, and rolled back as far as its steps say.
    Failure,
    /// Given up on request.
    Cancelled,
}

impl TaskState {
    /// The content of `tasks/U/state`.
    pub fn word(self) -> &'static str {
        match self {
            TaskState::Pending => "pending",
            TaskState::Processing => "processing",
            TaskState::Success => "success",
            TaskState::Failure => "failure",
            TaskState::Cancelled => "cancelled",
        }
    }

    /// Whether the operation is over.
    pub fn is_final(self) -> bool {
        match self {
            TaskState::Pending | TaskState::Processing => false,
            TaskState::Success | TaskState::Failure | TaskState::Cancelled => true,
        }
    }
}

/// What a step brings into the world, journaled before it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Creation {
    /// A disk; its undo removes exactly this one.
    Disk(DiskRecord),
    /// A disk that was there before, made again of its copy on the shelf, while the domain is defined; its undo removes
    /// exactly this one, unless something has written to it.
    DiskAgain(DiskRecord),
    /// This operation's copy of a disk on the shelf; its undo removes exactly that.
    ShelfCopy(DiskRecord),
    /// A guest that is off and stays off when the host starts; its undo brings both back.
    PutAway {
        /// It was started with the host.
        autostart: bool,
        /// It ran.
        was_running: bool,
    },
    /// The domain's definition; its undo undefines it.
    Definition,
    /// Something of a volume.
    Volume(VolumeCreation),
    /// Other settings of a domain that exists; its undo sets these former ones again.
    Settings {
        /// Virtual CPUs.
        vcpus: u32,
        /// Memory in bytes.
        memory_bytes: u64,
        /// Started with the host.
        autostart: bool,
    },
}

/// How a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// Journaled; it may have run or not.
    Started,
    /// It ran.
    Done,
    /// It was undone.
    Undone,
}

/// One step of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Its name, the content of `phase`.
    pub name: String,
    /// What it creates.
    pub creates: Option<Creation>,
    /// How it stands.
    pub state: StepState,
}

/// One operation as the store holds it, under `tasks/<id>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskRecord {
    /// The number behind its inodes.
    pub number: u64,
    /// The class of the object that it claims.
    pub class: Class,
    /// That object.
    pub object: Uuid,
    /// The instance that it claims beside it.
    #[serde(default)]
    pub instance: Option<Uuid>,
    /// What it does.
    pub operation: Operation,
    /// Who asked for it.
    pub uid: u32,
    /// His login name.
    pub login: String,
    /// The object's owner and project at the time, who may look at it.
    pub owner: u32,
    /// See [`TaskRecord::owner`].
    pub project: u32,
    /// How it stands.
    pub state: TaskState,
    /// The journal.
    pub steps: Vec<Step>,
    /// Percent.
    pub progress: u8,
    /// Unix seconds.
    pub started_at: u64,
    /// Unix seconds, once final.
    pub ended_at: Option<u64>,
    /// One line: what went wrong, or empty.
    pub message: String,
    /// The errno that a waiting writer got with [`TaskRecord::message`], 0 for none.
    pub errno: i32,
    /// Present in a user's own task until it is told what to do; it has no object until then.
    #[serde(default)]
    pub draft: Option<Draft>,
    /// What a user's own task was told, as he wrote it.
    #[serde(default)]
    pub spec: Option<String>,
    /// Somebody asked it to give up.
    #[serde(default)]
    pub is_cancelled: bool,
}

impl TaskRecord {
    /// The object that it made, once it has: others change what was there before.
    pub fn result(&self) -> Option<(Class, Uuid)> {
        let makes = match &self.operation {
            Operation::Boot
            | Operation::Define
            | Operation::CommitImage
            | Operation::ImportImage
            | Operation::Volume(VolumeOperation::Create) => true,
            Operation::Start
            | Operation::Stop
            | Operation::Pause
            | Operation::Unpause
            | Operation::Suspend
            | Operation::Resume
            | Operation::RebootSoft
            | Operation::RebootHard
            | Operation::Rename { .. }
            | Operation::Reconfigure { .. }
            | Operation::DiscardDraft
            | Operation::SoftDelete
            | Operation::Restore { .. }
            | Operation::Delete
            | Operation::Shelve { .. }
            | Operation::Offload
            | Operation::Unshelve { .. }
            | Operation::DefineAgain
            | Operation::Volume(_) => false,
        };
        (makes && self.state == TaskState::Success).then_some((self.class, self.object))
    }
}

/// What can be written to a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskChange {
    /// `cancel`.
    Cancel,
    /// `spec.json` of a user's own task.
    Import(Box<Import>),
}

/// An import that a user's own task is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// An http(s) URL, or a path below the import directory.
    pub source: String,
    /// What the new image is to be like.
    pub properties: Vec<ImageChange>,
    /// The document as it was written.
    pub document: String,
}
