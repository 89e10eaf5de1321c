//! Whom an image is shared with: who may read it besides its owner and project, and who may change that.

use serde::{Deserialize, Serialize};

use super::Class;
use super::caller::{Caller, NO_PROJECT, Role};
use super::change::Effect;
use super::image::Situation;
use super::keys::Keys;
use super::reason::Reason;
use super::record::ImageRecord;

/// The content of `visibility`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// Owner and project.
    #[default]
    Private,
    /// The members too.
    Shared,
    /// Everybody whom the tree admits.
    Public,
}

impl Visibility {
    /// All of them.
    pub const ALL: [Visibility; 3] = [Visibility::Private, Visibility::Shared, Visibility::Public];

    /// The word in the file.
    pub fn word(self) -> &'static str {
        match self {
            Visibility::Private => "private",
            Visibility::Shared => "shared",
            Visibility::Public => "public",
        }
    }

    /// Reads a word.
    pub fn parse(text: &str) -> Result<Visibility, Reason> {
        let all = Visibility::ALL.into_iter();
        let found = all.into_iter().find(|visibility| visibility.word() == text);
        found.ok_or_else(|| Reason::Malformed("write private, shared or public".to_owned()))
    }
}

/// What a member says of an image that was shared with it. It tells others and gives or takes no right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Nothing yet.
    #[default]
    Pending,
    /// It wants it.
    Accepted,
    /// It does not want to see it.
    Rejected,
}

impl Status {
    /// All of them.
    pub const ALL: [Status; 3] = [Status::Pending, Status::Accepted, Status::Rejected];

    /// The word in the file.
    pub fn word(self) -> &'static str {
        match self {
            Status::Pending => "pending",
            Status::Accepted => "accepted",
            Status::Rejected => "rejected",
        }
    }

    /// Reads a word.
    pub fn parse(text: &str) -> Result<Status, Reason> {
        let found = Status::ALL.into_iter().find(|status| status.word() == text);
        found.ok_or_else(|| Reason::Malformed("write pending, accepted or rejected".to_owned()))
    }
}

/// With whom an image is shared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sharing {
    /// Whether the members count, and whether everybody does.
    pub visibility: Visibility,
    /// They are kept while the image is private or public, and give no right then.
    pub members: Members,
}

/// The members, by group id. At most [`super::keys::MOST`]: their entries have to fit into an access control list of
/// one page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Members {
    keys: Keys<Status>,
}

impl Members {
    /// What a member says; `None` if it is none.
    pub fn get(&self, project: u32) -> Option<Status> {
        self.keys.get(&project.to_string()).copied()
    }

    /// All of them: group id, the number of the file, and what it says.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32, Status)> {
        self.keys.iter().filter_map(|(key, entry)| Some((key.parse().ok()?, entry.serial, entry.value)))
    }

    /// Makes a project a member, or changes what it says.
    ///
    /// # Errors
    ///
    /// [`Reason::KeyQuota`] where there would be too many.
    pub fn set(&mut self, project: u32, status: Status) -> Result<(), Reason> {
        self.keys.set(&project.to_string(), status)
    }

    /// One that is none is no error.
    pub fn remove(&mut self, project: u32) {
        self.keys.remove(&project.to_string());
    }
}

/// Who may read an image besides root, its owner and its project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Nobody else. A draft is always so: nobody has inspected what is in it.
    Nobody,
    /// Its members.
    Members,
    /// Everybody whom the tree admits.
    Everybody,
}

/// The audience of an image.
pub fn audience(record: &ImageRecord) -> Audience {
    match (&record.draft, record.sharing.visibility) {
        (Some(_), _) | (None, Visibility::Private) => Audience::Nobody,
        (None, Visibility::Shared) => Audience::Members,
        (None, Visibility::Public) => Audience::Everybody,
    }
}

/// Whether a caller may read an image, and name it inside a value: the one judge of that. What the kernel is told to
/// decide by is made from the same [`audience`].
pub fn may_read(record: &ImageRecord, caller: &Caller) -> bool {
    match caller.role(&record.ownership) {
        Role::Root | Role::Mounter | Role::Owner | Role::Member => true,
        Role::Stranger => match audience(record) {
            Audience::Nobody => false,
            Audience::Members => record.sharing.members.iter().any(|(project, ..)| caller.in_group(project)),
            Audience::Everybody => true,
        },
    }
}

/// Judges `visibility`. Going on or off the public list never waits for an operation: so it is for all of these, since
/// whoever takes a right back wants it back now.
pub fn judge_visibility(situation: &Situation<'_>, record: &ImageRecord, wanted: Visibility) -> Result<Effect, Reason> {
    if record.sharing.visibility == wanted {
        return Ok(Effect::AlreadyTrue);
    }
    match (wanted, situation.role) {
        (Visibility::Public, Role::Owner | Role::Member | Role::Stranger) => Err(Reason::RootOnly),
        (Visibility::Public, Role::Root | Role::Mounter) | (Visibility::Private | Visibility::Shared, _) => {
            Ok(Effect::Record)
        }
    }
}

/// Judges `share`.
pub fn judge_share(record: &ImageRecord, project: u32) -> Result<Effect, Reason> {
    if project == NO_PROJECT {
        return Err(Reason::Malformed("nogroup is no project; name another group".to_owned()));
    }
    let sharing = &record.sharing;
    // Before "already true": a member of an image that is not shared has no rights.
    if sharing.visibility != Visibility::Shared {
        return Err(Reason::NotShared { visibility: sharing.visibility.word() });
    }
    if sharing.members.get(project).is_some() { Ok(Effect::AlreadyTrue) } else { Ok(Effect::Record) }
}

/// Judges `unshare`, which is allowed whatever the visibility is.
pub fn judge_unshare(record: &ImageRecord, project: u32) -> Effect {
    if record.sharing.members.get(project).is_some() { Effect::Record } else { Effect::AlreadyTrue }
}

/// Judges `members/<project>`: a member's word is its own. Root may, as root may become the member anyway; `events` names him.
pub fn judge_status(
    situation: &Situation<'_>,
    record: &ImageRecord,
    project: u32,
    wanted: Status,
) -> Result<Effect, Reason> {
    if !may_read(record, situation.caller) {
        return Err(Reason::NotYours { class: Class::Image });
    }
    let present = record.sharing.members.get(project);
    let present = present.ok_or_else(|| Reason::NotFound("such member any more".to_owned()))?;
    let is_member = situation.caller.in_group(project) && audience(record) == Audience::Members;
    match situation.role {
        Role::Stranger if !is_member => Err(Reason::NotYours { class: Class::Image }),
        Role::Root | Role::Mounter | Role::Owner | Role::Member | Role::Stranger if present == wanted => {
            Ok(Effect::AlreadyTrue)
        }
        Role::Owner | Role::Member if !is_member => Err(Reason::MemberOnly),
        Role::Root | Role::Mounter | Role::Owner | Role::Member | Role::Stranger => Ok(Effect::Record),
    }
}
