//! The background that makes, checks and removes kept links: when something of an instance changes that matters, and again and
//! again, since nobody tells what becomes of files.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Edit, editing, forgetting, is_plain, last_name, moves_disks};
use crate::block::kept::{self as file, Found, KeptError, Removal};
use crate::inventory::{Change, Instance, Object};
use crate::model::Class;
use crate::model::domain::DefinedDisk;
use crate::model::reason::Reason;
use crate::model::record::{Departure, DiskRole, ErrorLine, KeptLink};
use crate::workflow::engine::Shared;
use crate::workflow::events::Entry;
use crate::workflow::ledger::now;

/// Time between two looks at all links.
const ROUND: Duration = Duration::from_secs(30);

/// How often the thread looks whether it is to end, and at disks that may still be on their way out.
const PAUSE: Duration = Duration::from_secs(1);

/// For so many seconds after an undefine its disks may still be removed: virsh does that afterwards.
const AFTERMATH_SECONDS: u64 = 60;

const LOGIN: &str = "instancefs";
const WHAT: &str = "kept";

/// Starts the thread, which ends with the engine.
pub(in crate::workflow) fn start(shared: &Arc<Shared>) {
    let changes = shared.parts.ledger.inventory().subscribe();
    let shared = shared.clone();
    let spawned = thread::Builder::new().name("kept-links".to_owned()).spawn(move || {
        let (due, watched) = (BTreeSet::new(), BTreeSet::new());
        let (suspects, told, unsuitable) = (HashMap::new(), HashMap::new(), HashSet::new());
        Keeper { shared, due, watched, suspects, told, unsuitable, mount_points: Vec::new() }.run(&changes);
    });
    if let Err(error) = spawned {
        log::error!("no thread keeps links of protected disks: {error}");
    }
}

struct Keeper {
    shared: Arc<Shared>,
    /// To be looked at now.
    due: BTreeSet<Uuid>,
    /// To be looked at every now and then, see [`AFTERMATH_SECONDS`].
    watched: BTreeSet<Uuid>,
    /// By instance the links whose disk is gone, or another file, and since when that is seen.
    suspects: HashMap<Uuid, HashMap<PathBuf, Instant>>,
    /// The troubles that were told, so that each is told once while it lasts.
    told: HashMap<Uuid, BTreeSet<String>>,
    /// File systems without such links, which the log was told of.
    unsuitable: HashSet<u64>,
    /// Of our own tree.
    mount_points: Vec<PathBuf>,
}

impl Keeper {
    fn run(mut self, changes: &Receiver<Arc<Vec<Change>>>) {
        let mut next_round = Instant::now();
        let mut next_pause = Instant::now();
        loop {
            let wait = next_pause.saturating_duration_since(Instant::now());
            match changes.recv_timeout(wait) {
                Ok(batch) => self.due.extend(batch.iter().filter_map(matters)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if next_round <= Instant::now() {
                next_round = Instant::now() + ROUND;
                let instances = self.shared.parts.ledger.inventory().instances();
                self.due.extend(instances.iter().filter(|instance| concerns(instance)).map(|instance| instance.id));
            }
            if next_pause <= Instant::now() {
                next_pause = Instant::now() + PAUSE;
                self.due.append(&mut self.watched);
            }
            if !self.due.is_empty() {
                self.mount_points = self.shared.parts.reconciler.mount_points();
            }
            while let Some(id) = self.due.pop_first() {
                if self.shared.gate.stopping() {
                    return;
                }
                self.tend(id);
            }
            if self.shared.gate.stopping() {
                return;
            }
        }
    }

    /// Brings the links of one instance to where they are to be, as far as that is safe.
    fn tend(&mut self, id: Uuid) {
        let shared = self.shared.clone();
        let _hold = shared.holds.hold(id);
        let Some(instance) = self.instance(id).filter(|instance| concerns(instance)) else {
            self.told.remove(&id);
            self.suspects.remove(&id);
            return;
        };
        if moves_disks(&instance) {
            return;
        }
        let protects = instance.record.protection.protects();
        // What was undefined is restored as a whole, and not judged before.
        if instance.domain.is_none() && protects {
            return;
        }
        if is_aftermath(&instance) {
            self.watched.insert(id);
        }
        let wanted = if protects { self.wanted(&instance) } else { BTreeSet::new() };
        let mut troubles = BTreeSet::new();
        for link in &instance.record.kept {
            if let Err(trouble) = self.judge(&instance, link, wanted.contains(&link.path)) {
                troubles.insert(trouble);
            }
        }
        let kept = self.instance(id).map(|instance| instance.record.kept.clone()).unwrap_or_default();
        for path in wanted {
            let is_linked = kept.iter().any(|link| link.path == path && !link.is_told);
            if !is_linked && let Err(trouble) = self.add(id, &path) {
                troubles.insert(trouble);
            }
        }
        let told = self.told.remove(&id).unwrap_or_default();
        for trouble in troubles.difference(&told) {
            self.tell(id, trouble);
        }
        if !troubles.is_empty() {
            self.told.insert(id, troubles);
        }
    }

    fn instance(&self, id: Uuid) -> Option<Arc<Instance>> {
        self.shared.parts.ledger.inventory().instance(id)
    }

    /// The paths of the files that it may write, and of all that we made for it.
    fn wanted(&self, instance: &Instance) -> BTreeSet<PathBuf> {
        let record = &instance.record;
        let defined = record.definition.iter().flat_map(|definition| &definition.disks);
        let written = defined.filter(|disk| !disk.read_only).filter_map(|disk| disk.path.clone());
        let ours = record.disks.iter().map(|disk| match disk.role {
            DiskRole::Root | DiskRole::Seed => self.shared.parts.block.path(disk),
        });
        written.chain(ours).filter(|path| self.may_touch(path)).collect()
    }

    fn may_touch(&self, path: &Path) -> bool {
        is_plain(path) && !self.mount_points.iter().any(|mount_point| path.starts_with(mount_point))
    }

    /// Looks at a recorded link. An error is a trouble to be told.
    fn judge(&mut self, instance: &Instance, link: &KeptLink, is_wanted: bool) -> Result<(), String> {
        let id = instance.id;
        let kept = file::look(&link.link).map_err(|error| error.to_string())?;
        if !matches!(kept, Found::File { inode, .. } if inode == link.inode) {
            log::info!("the link {} of {id} is gone", link.link.display());
            return self.edit(forgetting(id, link));
        }
        let disk = file::look(&link.path).map_err(|error| error.to_string())?;
        if disk == kept {
            if let Some(suspects) = self.suspects.get_mut(&id) {
                suspects.remove(&link.link);
            }
            if !is_wanted {
                return match file::remove(&link.path, &link.link, link.inode).map_err(|error| error.to_string())? {
                    Removal::Gone => self.edit(forgetting(id, link)),
                    Removal::OnlyName => Ok(()),
                };
            }
            return if link.is_told { self.mark(id, link, false) } else { Ok(()) };
        }
        if disk == Found::Nothing && is_wanted && is_aftermath(instance) {
            log::warn!("the disk {} of {id} was removed after its definition and is linked back", link.path.display());
            return file::restore(&link.path, &link.link, link.inode).map(drop).map_err(|error| error.to_string());
        }
        if !link.is_told {
            // That its domain was undefined before may be on its way to us still, and then this is no matter of ours.
            let since = *self.suspects.entry(id).or_default().entry(link.link.clone()).or_insert_with(Instant::now);
            if is_wanted && since.elapsed() < PAUSE {
                self.watched.insert(id);
                return Ok(());
            }
            self.mark(id, link, true)?;
            self.tell(id, &last_name(id, link));
        }
        Ok(())
    }

    /// Records a link to what lies at the path now, and makes it.
    fn add(&mut self, id: Uuid, path: &Path) -> Result<(), String> {
        let found = file::look(path).map_err(|error| error.to_string())?;
        let Found::File { device, inode } = found else { return Ok(()) };
        if self.unsuitable.contains(&device) {
            return Ok(());
        }
        let Some(link) = self.free_name(id, path, inode)? else { return Ok(()) };
        let kept = KeptLink { path: path.to_owned(), link, inode, is_told: false };
        let recorded = kept.clone();
        self.edit(editing(id, move |instance| {
            let record = &mut instance.record;
            if record.protection.protects() && !record.kept.contains(&recorded) {
                record.kept.push(recorded.clone());
            }
        }))?;
        // Unprotected meanwhile: whoever did it has us look again.
        if !self.instance(id).is_some_and(|instance| instance.record.kept.contains(&kept)) {
            return Ok(());
        }
        let made = file::make(path, &kept.link, inode);
        if made.is_err() && file::look(&kept.link).is_ok_and(|found| found == Found::Nothing) {
            self.edit(forgetting(id, &kept))?;
        }
        match made {
            Ok(()) => Ok(()),
            Err(error @ KeptError::Unsuitable { .. }) => {
                log::warn!("{error}; the disk is lost if somebody removes it outside");
                self.unsuitable.insert(device);
                Ok(())
            }
            // The next look sees what it is now.
            Err(KeptError::Changed(_)) => Ok(()),
            Err(error @ (KeptError::Exists(_) | KeptError::Foreign(_) | KeptError::Failed { .. })) => {
                Err(format!("the disk {} is lost if somebody removes it outside: {error}", path.display()))
            }
        }
    }

    /// A name that nothing has, or this very file.
    fn free_name(&self, id: Uuid, path: &Path, inode: u64) -> Result<Option<PathBuf>, String> {
        let recorded = self.instance(id).map(|instance| instance.record.kept.clone()).unwrap_or_default();
        for number in 0..=u32::MAX {
            let Some(link) = file::link_path(path, id, number) else { return Ok(None) };
            if recorded.iter().any(|kept| kept.link == link) {
                continue;
            }
            match file::look(&link).map_err(|error| error.to_string())? {
                Found::Nothing => return Ok(Some(link)),
                Found::File { inode: present, .. } if present == inode => return Ok(Some(link)),
                Found::File { .. } | Found::Other => {}
            }
        }
        Ok(None)
    }

    fn mark(&self, id: Uuid, link: &KeptLink, is_told: bool) -> Result<(), String> {
        let link = link.link.clone();
        self.edit(editing(id, move |instance| {
            for kept in instance.record.kept.iter_mut().filter(|kept| kept.link == link) {
                kept.is_told = is_told;
            }
        }))
    }

    fn edit(&self, edit: Edit) -> Result<(), String> {
        self.shared.edit(edit).map_err(|fault| fault.reason().to_string())
    }

    /// Says it in the log, in `events` and in `last_error`.
    fn tell(&self, id: Uuid, trouble: &str) {
        log::warn!("{trouble}");
        let reason = Reason::Failed(trouble.to_owned());
        let line = ErrorLine {
            time: now(),
            login: LOGIN.to_owned(),
            file: WHAT.to_owned(),
            errno: reason.errno_name().to_owned(),
            reason: reason.to_string(),
        };
        self.shared.parts.events.record(Entry {
            class: Some(Class::Instance),
            id: Some(id),
            name: self.instance(id).map(|instance| instance.name().to_owned()).unwrap_or_default(),
            uid: 0,
            login: LOGIN.to_owned(),
            what: WHAT.to_owned(),
            from: String::new(),
            to: String::new(),
            errno: reason.errno_name().to_owned(),
            reason: reason.to_string(),
        });
        // Without the store the log has to do.
        let _logged = self.edit(editing(id, move |instance| instance.record.errors.push(line.clone())));
    }
}

/// Whether there are links, or are to be some.
fn concerns(instance: &Instance) -> bool {
    let record = &instance.record;
    record.draft.is_none() && (record.protection.protects() || !record.kept.is_empty())
}

/// Whether it was defined again so recently that its disks may still be being removed.
fn is_aftermath(instance: &Instance) -> bool {
    let is_recent = instance.record.undefined.is_some_and(|undefined| {
        undefined.departure == Departure::Told && now() < undefined.at.saturating_add(AFTERMATH_SECONDS)
    });
    is_recent && instance.domain.as_ref().is_some_and(|domain| !domain.power.is_on())
}

fn disks(instance: &Instance) -> &[DefinedDisk] {
    instance.record.definition.as_ref().map_or(&[], |definition| &definition.disks)
}

/// The instance of a change after which its links may have to be others.
fn matters(change: &Change) -> Option<Uuid> {
    match change {
        Change::Object { old, new: Some(Object::Instance(new)) } if concerns(new) => {
            let Some(Object::Instance(old)) = old else { return Some(new.id) };
            let is_same = concerns(old)
                && old.record.protection.protects() == new.record.protection.protects()
                && old.domain.is_some() == new.domain.is_some()
                && old.record.undefined == new.record.undefined
                && moves_disks(old) == moves_disks(new)
                && old.record.disks == new.record.disks
                && disks(old) == disks(new);
            (!is_same).then_some(new.id)
        }
        Change::Object { .. } | Change::Health | Change::Events(_) | Change::Console(..) | Change::Moved(..) => None,
    }
}
