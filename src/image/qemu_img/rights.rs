//! What a caged program may open.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
    path_beneath_rules,
};
use nix::errno::Errno;

/// Where programs, libraries and what these read at their start lie; those that a distribution lacks do not count.
const SYSTEM: [&str; 10] =
    ["/bin", "/dev/null", "/dev/urandom", "/etc", "/gnu/store", "/lib", "/lib32", "/lib64", "/nix/store", "/usr"];
/// The newest interface of the kernel that we know; an older kernel restricts what it can.
const INTERFACE: ABI = ABI::V6;

/// Whose rights a caged program has.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rights<'a> {
    /// Ours.
    Ours,
    /// Those of this user, who owns nothing. Only root can give his own away.
    Of(u32),
    /// Ours, but only to read what belongs to the system, where the kernel has landlock(7): no file of ours, no network.
    SystemOnly,
    /// The same, and these files, whatever their names lead to by now.
    Files {
        /// May be read.
        read: Option<BorrowedFd<'a>>,
        /// May be read and written.
        write: Option<BorrowedFd<'a>>,
    },
}

impl Rights<'_> {
    /// What [`restrict`] takes, for those rights that need it; `None` also if the kernel knows nothing of the kind.
    pub(super) fn ruleset(self) -> Result<Option<OwnedFd>, RulesetError> {
        let (read, write) = match self {
            Rights::Ours | Rights::Of(_) => return Ok(None),
            Rights::SystemOnly => (None, None),
            Rights::Files { read, write } => (read, write),
        };
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(INTERFACE))?
            .handle_access(AccessNet::from_all(INTERFACE))?
            .scope(Scope::from_all(INTERFACE))?
            .create()?
            .add_rules(path_beneath_rules(SYSTEM, AccessFs::from_read(INTERFACE)))?;
        if let Some(file) = read {
            ruleset = ruleset.add_rule(PathBeneath::new(file, AccessFs::ReadFile))?;
        }
        if let Some(file) = write {
            ruleset = ruleset.add_rule(PathBeneath::new(file, AccessFs::from_file(INTERFACE)))?;
        }
        Ok(ruleset.into())
    }
}

/// From here on this thread, and what it starts, has no other rights. Needs `no_new_privs`. One system call.
pub(super) fn restrict(ruleset: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: takes two integers and changes nothing but the calling thread's rights.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) };
    Errno::result(result).map(drop)
}
