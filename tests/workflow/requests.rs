use std::sync::Arc;
use std::sync::mpsc::Receiver;

use instancefs::model::Class;
use instancefs::model::caller::NO_PROJECT;
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::{State, Word};
use instancefs::model::protection::Level;
use instancefs::model::reason::Reason;
use instancefs::store::power_loss::{Moment, PowerLoss};
use instancefs::store::{Change, Committed, Compare, Record, Revision, Store, StoreError};
use instancefs::workflow::request::{Request, Wait};
use parking_lot::Mutex;
use uuid::Uuid;

use crate::lab::{World, alice, bob, root, until};

/// A store whose disk is full while a test says so.
pub struct Full<S> {
    pub inner: S,
    pub full: Mutex<bool>,
}

impl<S: Store> Store for Full<S> {
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        self.inner.get(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        self.inner.list(prefix)
    }

    fn transact(&self, compares: &[Compare], changes: &[Change]) -> Result<Revision, StoreError> {
        if *self.full.lock() { Err(StoreError::Full) } else { self.inner.transact(compares, changes) }
    }

    fn watch(&self, prefix: &str) -> Receiver<Committed> {
        self.inner.watch(prefix)
    }
}

#[test]
fn a_new_draft_has_the_defaults_and_belongs_to_its_maker() {
    let world = World::new();
    let life = world.live();
    let id = life.draft();
    let record = life.instance(id).record.clone();
    assert_eq!(record.name, id.to_string());
    assert_eq!((record.vcpus, record.memory_bytes, record.stop_timeout_seconds), (1, 512 << 20, 60));
    assert_eq!(record.root_disk_bytes, None);
    assert_eq!((record.ownership.owner, record.ownership.project), (1000, NO_PROJECT));
    let mut member = alice();
    member.gid = 2000;
    let other = Uuid::new_v4();
    life.ask(&member, Request::MakeDraft { class: Class::Image, id: other }).unwrap();
    assert_eq!(life.inventory.image(other).unwrap().record.ownership.project, 2000);
}

#[test]
fn a_uuid_is_given_once_over_all_classes() {
    let world = World::new();
    let life = world.live();
    let id = life.draft();
    assert_eq!(life.ask(&bob(), Request::MakeDraft { class: Class::Image, id }), Err(Reason::Exists));
    let image = Request::MakeDraft { class: Class::Instance, id: world.image };
    assert_eq!(life.ask(&alice(), image), Err(Reason::Exists));
    assert_eq!(life.inventory.refusals(alice().uid).last().unwrap().errno, "EEXIST");
}

#[test]
fn drafts_are_limited_by_user_also_within_one_batch() {
    let world = World::new();
    let life = world.live_on(world.store.clone(), |settings| settings.drafts_per_user = 3);
    let answers: Vec<_> = (0..5)
        .map(|number| {
            let class = if number % 2 == 0 { Class::Image } else { Class::Instance };
            life.submit(&alice(), Request::MakeDraft { class, id: Uuid::new_v4() }, Wait::Accepted)
        })
        .collect();
    let refused = answers.iter().filter(|answer| answer.recv().unwrap() == Err(Reason::DraftQuota { limit: 3 }));
    assert_eq!(refused.count(), 2);
    life.ask(&bob(), Request::MakeDraft { class: Class::Image, id: Uuid::new_v4() }).unwrap();
}

#[test]
fn only_a_draft_that_was_never_written_to_goes_by_rmdir() {
    let world = World::new();
    let life = world.live();
    let (untouched, written, real) = (life.draft(), life.draft_with_image(), life.active());
    let rmdir = |id| life.ask(&alice(), Request::DiscardUnwritten { class: Class::Instance, id });
    assert_eq!(rmdir(written), Err(Reason::NotEmpty));
    assert_eq!(rmdir(real), Err(Reason::NotEmpty));
    assert!(matches!(
        life.ask(&bob(), Request::DiscardUnwritten { class: Class::Instance, id: untouched }),
        Err(Reason::NotYours { .. })
    ));
    rmdir(untouched).unwrap();
    assert_eq!(life.inventory.instance(untouched), None);
    assert!(matches!(rmdir(untouched), Err(Reason::NotFound(_))));
}

#[test]
fn a_change_set_is_taken_as_a_whole_or_not_at_all() {
    let world = World::new();
    let life = world.live();
    let id = life.draft();
    let missing = Uuid::new_v4();
    let changes = vec![InstanceChange::Vcpus(4), InstanceChange::Image(missing)];
    let refused = life.ask(&alice(), Request::Instance { id, changes });
    assert!(matches!(refused, Err(Reason::NotFound(_))));
    assert_eq!(life.instance(id).record.vcpus, 1);
    assert!(life.last_error(id).unwrap().contains(&missing.to_string()));
    // The order in the set does not matter: the state sees the attributes, the lock comes last.
    let changes = vec![
        InstanceChange::Locked(true),
        InstanceChange::State(Word::State(State::Active)),
        InstanceChange::LockedReason("mine".to_owned()),
        InstanceChange::Image(world.image),
        InstanceChange::Vcpus(4),
    ];
    life.ask(&alice(), Request::Instance { id, changes }).unwrap();
    let instance = life.instance(id);
    assert_eq!((instance.observed().state, instance.record.vcpus), (State::Active, 4));
    assert_eq!(instance.record.protection.lock.as_ref().unwrap().reason, "mine");
    assert_eq!(instance.record.errors.last(), None);
}

#[test]
fn a_locked_instance_refuses_root_and_says_who_locked_it() {
    let world = World::new();
    let life = world.live();
    let id = life.active();
    life.change(&alice(), id, InstanceChange::Locked(true)).unwrap();
    let lock = life.instance(id).record.protection.lock.clone().unwrap();
    assert_eq!((lock.by.as_str(), lock.level), ("alice", Level::Owner));
    let refused = life.change(&root(), id, InstanceChange::State(Word::State(State::Stopped)));
    assert_eq!(refused, Err(Reason::Locked(lock)));
    assert!(life.last_error(id).unwrap().contains("alice"));
    life.change(&root(), id, InstanceChange::Locked(true)).unwrap();
    assert!(matches!(life.change(&alice(), id, InstanceChange::Locked(false)), Err(Reason::AdminLock(_))));
    life.change(&root(), id, InstanceChange::Locked(false)).unwrap();
    assert_eq!(life.last_error(id), None);
    life.state(id, State::Stopped).unwrap();
}

#[test]
fn writing_what_is_true_stores_nothing_and_makes_last_error_ok() {
    let world = World::new();
    let store = Arc::new(PowerLoss::new(world.store.clone(), 0, Moment::Before));
    let life = world.live_on(store.clone(), |_| {});
    let id = life.active();
    let updated_at = life.instance(id).record.updated_at;
    // What the hypervisor said of the start may be stored meanwhile, once.
    until("nothing is stored", || {
        life.change(&bob(), id, InstanceChange::Vcpus(3)).unwrap_err();
        assert!(life.last_error(id).is_some());
        let before = store.transactions();
        life.state(id, State::Active).unwrap();
        assert_eq!(life.last_error(id), None);
        store.transactions() == before
    });
    assert_eq!(life.instance(id).record.updated_at, updated_at);
}

#[test]
fn what_is_queued_together_is_stored_together() {
    let world = World::new();
    let store = Arc::new(PowerLoss::new(world.store.clone(), 0, Moment::Before));
    let life = world.live_on(store.clone(), |_| {});
    let ids: Vec<_> = (0..50).map(|_| Uuid::new_v4()).collect();
    let before = store.transactions();
    let answers: Vec<_> = ids
        .iter()
        .map(|id| life.submit(&alice(), Request::MakeDraft { class: Class::Instance, id: *id }, Wait::Accepted))
        .collect();
    answers.iter().for_each(|answer| answer.recv().unwrap().unwrap());
    assert!(store.transactions() - before < 40, "{} transactions", store.transactions() - before);
}

#[test]
fn a_full_disk_refuses_and_changes_nothing() {
    let world = World::new();
    let store = Arc::new(Full { inner: world.store.clone(), full: Mutex::new(false) });
    let life = world.live_on(store.clone(), |_| {});
    let id = life.draft_with_image();
    *store.full.lock() = true;
    assert!(matches!(life.change(&alice(), id, InstanceChange::Vcpus(8)), Err(Reason::NoSpace(_))));
    assert!(matches!(life.state(id, State::Active), Err(Reason::NoSpace(_))));
    assert_eq!(life.instance(id).record.vcpus, 1);
    assert_eq!(life.instance(id).task, None);
    assert!(life.last_error(id).unwrap().contains("no space"));
    *store.full.lock() = false;
    life.state(id, State::Active).unwrap();
    assert_eq!(life.last_error(id), None);
}

#[test]
fn a_refusal_is_shown_although_what_was_queued_with_it_is_not_stored() {
    let world = World::new();
    let store = Arc::new(Full { inner: world.store.clone(), full: Mutex::new(false) });
    let life = world.live_on(store.clone(), |_| {});
    let id = life.draft();
    // The engine waits for the store with what comes first, until the rest is queued.
    let mut full = store.full.lock();
    let change = |vcpus| {
        let changes = vec![InstanceChange::Vcpus(vcpus)];
        life.submit(&alice(), Request::Instance { id, changes }, Wait::Accepted)
    };
    let answers = [change(2), change(3)];
    life.engine.refused(&alice(), Some((Class::Instance, id)), "uuid", &Reason::ReadOnlyAttribute);
    *full = true;
    drop(full);
    for answer in answers {
        assert!(matches!(answer.recv().unwrap(), Err(Reason::NoSpace(_))));
    }
    until("the refusal is shown", || {
        life.instance(id).record.errors.last().is_some_and(|line| line.file == "uuid" && line.errno == "EACCES")
    });
}

#[test]
fn a_name_is_given_once_also_by_drafts_that_boot_together() {
    let world = World::new();
    let life = world.live();
    let (first, second) = (life.draft_with_image(), life.draft_with_image());
    for id in [first, second] {
        life.change(&alice(), id, InstanceChange::Name("web".to_owned())).unwrap();
    }
    let answers = [first, second].map(|id| life.begin(id, State::Active));
    let results = answers.map(|answer| answer.recv().unwrap());
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
    assert!(results.contains(&Err(Reason::NameTaken("web".to_owned()))));
    let third = life.draft();
    assert_eq!(
        life.change(&alice(), third, InstanceChange::Name("web".to_owned())),
        Err(Reason::NameTaken("web".to_owned()))
    );
}

#[test]
fn a_new_owner_makes_a_new_generation() {
    let world = World::new();
    let life = world.live();
    let id = life.draft();
    assert_eq!(life.change(&alice(), id, InstanceChange::Owner(1001)), Err(Reason::RootOnly));
    life.change(&root(), id, InstanceChange::Owner(1001)).unwrap();
    let ownership = life.instance(id).record.ownership;
    assert_eq!((ownership.owner, ownership.generation), (1001, 1));
    assert!(matches!(life.change(&alice(), id, InstanceChange::Vcpus(2)), Err(Reason::NotYours { .. })));
}

#[test]
fn a_read_only_mount_changes_nothing() {
    let world = World::new();
    let id = world.live().active();
    world.control(serde_json::json!({ "do": "calls", "reset": true }));
    let life = world.live_on(world.store.clone(), |settings| settings.read_only = true);
    assert_eq!(life.state(id, State::Stopped), Err(Reason::ReadOnlyMount));
    assert_eq!(
        life.ask(&alice(), Request::MakeDraft { class: Class::Instance, id: Uuid::new_v4() }),
        Err(Reason::ReadOnlyMount)
    );
    assert_eq!(world.calls("shutdown") + world.calls("domain"), 0);
}

#[test]
fn booting_needs_an_active_image_that_fits() {
    let world = World::new();
    let life = world.live();
    let id = life.draft();
    assert!(life.state(id, State::Active).unwrap_err().to_string().contains("write an image first"));
    life.change(&alice(), id, InstanceChange::Image(world.image)).unwrap();
    life.change(&alice(), id, InstanceChange::RootDiskBytes(1 << 20)).unwrap();
    assert!(matches!(life.state(id, State::Active), Err(Reason::OutOfRange { low, .. }) if low == 1 << 30));
    let image = Uuid::new_v4();
    life.ask(&alice(), Request::MakeDraft { class: Class::Image, id: image }).unwrap();
    life.change(&alice(), id, InstanceChange::Image(image)).unwrap();
    assert!(matches!(life.state(id, State::Active), Err(Reason::Malformed(_))));
    assert_eq!(life.instance(id).record.last_task, None);
}

#[test]
fn the_trees_own_refusals_are_remembered_with_the_object_or_the_caller() {
    let world = World::new();
    let life = world.live();
    let id = life.draft();
    life.engine.refused(&alice(), Some((Class::Instance, id)), "vcpus", &Reason::ReadOnlyAttribute);
    crate::lab::until("the refusal is shown", || life.last_error(id).is_some());
    life.engine.refused(&bob(), None, "README", &Reason::ReadOnlyAttribute);
    assert_eq!(life.inventory.refusals(bob().uid).last().unwrap().file, "README");
    life.events.flush();
    let lines = std::fs::read_to_string(life.events.path()).unwrap();
    assert!(lines.contains("\"what\":\"vcpus\"") && lines.contains("EACCES"), "{lines}");
}
