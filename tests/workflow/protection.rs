//! A locked instance survives root, and one with `disable_terminate` survives everybody: all verbs from all states, and
//! all timers. The tables are exhaustive, so that a new verb, state or protection has to be entered here.
//!
//! A rename asks for one of these verbs, and the daemon's own requests are among them. The rig locks in the middle of each
//! operation, also before its recovery.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use instancefs::model::caller::Caller;
use instancefs::model::change::{FlavorChoice, InstanceChange, Sizes};
use instancefs::model::instance::{State, Word};
use instancefs::model::network::Network;
use instancefs::workflow::request::{Request, Wait};
use serde_json::json;
use uuid::Uuid;

use crate::keeper::looked;
use crate::lab::{DEADLINE, Life, TestClock, World, alice, root, until};

/// What protects it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protected {
    Locked,
    Undeletable,
}

macro_rules! verbs {
    ($($pattern:pat => $changes:expr;)*) => {
        /// Whether the table knows a verb: a new one does not compile without a row.
        fn is_known(change: &InstanceChange) -> bool {
            match change {
                $($pattern => true,)*
            }
        }

        /// All verbs.
        fn verbs() -> Vec<InstanceChange> {
            let mut all = Vec::new();
            $(all.extend($changes);)*
            assert!(all.iter().all(is_known));
            all
        }
    };
}

fn none() -> Vec<InstanceChange> {
    Vec::new()
}

verbs! {
    InstanceChange::State(_) => Word::REQUESTS.map(InstanceChange::State);
    InstanceChange::Restore => [InstanceChange::Restore];
    InstanceChange::SettleBin => [InstanceChange::SettleBin];
    InstanceChange::ExpiresAt(_) => [InstanceChange::ExpiresAt(Some(1)), InstanceChange::ExpiresAt(None)];
    InstanceChange::RebootSoft => [InstanceChange::RebootSoft];
    InstanceChange::RebootHard => [InstanceChange::RebootHard];
    InstanceChange::ResetState => [InstanceChange::ResetState];
    InstanceChange::Name(_) => [InstanceChange::Name("other".to_owned())];
    InstanceChange::Description(_) => [InstanceChange::Description("other".to_owned())];
    InstanceChange::Owner(_) => [InstanceChange::Owner(1001)];
    InstanceChange::Project(_) => [InstanceChange::Project(2000)];
    InstanceChange::Image(_) => [InstanceChange::Image(Uuid::new_v4())];
    InstanceChange::Flavor(_) => [InstanceChange::Flavor(FlavorChoice {
        name: "small".to_owned(),
        sizes: Ok(Sizes { vcpus: 2, memory_bytes: 1 << 29, root_disk_bytes: None }),
    })];
    InstanceChange::UserData(_) => [InstanceChange::UserData(None)];
    InstanceChange::Vcpus(_) => [InstanceChange::Vcpus(2)];
    InstanceChange::MemoryBytes(_) => [InstanceChange::MemoryBytes(1 << 29)];
    InstanceChange::RootDiskBytes(_) => [InstanceChange::RootDiskBytes(2 << 30)];
    InstanceChange::Network(_) => [InstanceChange::Network(Network::Libvirt("default".to_owned()))];
    InstanceChange::Autostart(_) => [InstanceChange::Autostart(true)];
    InstanceChange::StopTimeoutSeconds(_) => [InstanceChange::StopTimeoutSeconds(0)];
    InstanceChange::Metadata(..) => [InstanceChange::Metadata("key".to_owned(), Some("text".to_owned()))];
    InstanceChange::LockedReason(_) => [InstanceChange::LockedReason("other".to_owned())];
    // Whoever may take the protection away takes it away; after that it is another instance.
    InstanceChange::Locked(_) => none();
    InstanceChange::DisableTerminate(_) => none();
}

/// An instance in this state; `None` where nothing leads there.
fn in_state(life: &Life<'_>, state: State) -> Option<Uuid> {
    let id = match state {
        // No disk and no domain: there is only the record.
        State::Draft => life.draft_with_image(),
        State::Active => life.active(),
        State::Stopped => life.stopped(),
        State::Paused | State::Suspended | State::Shelved | State::ShelvedOffloaded | State::SoftDeleted => {
            let id = life.active();
            life.state(id, state).unwrap();
            id
        }
        State::Error => {
            let id = life.active();
            life.world.control(json!({ "do": "crash", "uuid": id }));
            until("the crash is seen", || life.observed(id) == State::Error);
            id
        }
        State::Building | State::Rescued | State::Resized => return None,
    };
    life.wait_idle(id);
    assert_eq!(life.observed(id), state);
    Some(id)
}

fn protect(life: &Life<'_>, id: Uuid, protected: Protected) {
    let change = match protected {
        Protected::Locked => InstanceChange::Locked(true),
        Protected::Undeletable => InstanceChange::DisableTerminate(true),
    };
    life.change(&alice(), id, change).unwrap();
}

/// What may not go: record, domain, and the data of each disk, on the disk itself or proven on the shelf.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Possessions {
    has_domain: bool,
    disks: BTreeSet<String>,
    power: Option<String>,
}

fn possessions(life: &Life<'_>, id: Uuid) -> Possessions {
    let record = &life.inventory.instance(id).expect("the instance is gone").record;
    let mut disks: BTreeSet<String> = life.world.disks.disks.lock().keys().cloned().collect();
    disks.retain(|disk| disk.starts_with(&id.to_string()));
    let names: Vec<_> = life.world.shelf().iter().filter_map(|path| Some(path.file_name()?.to_owned())).collect();
    for copy in record.shelf.iter().flat_map(|shelf| &shelf.copies) {
        let name = format!("{}-{}", copy.of.operation, copy.of.disk.reference);
        if names.contains(&name.into()) {
            disks.insert(copy.of.disk.reference.clone());
        }
    }
    let domain = life.world.domain(id);
    Possessions { has_domain: domain.is_some(), disks, power: domain.map(|domain| format!("{:?}", domain.power)) }
}

fn survives(life: &Life<'_>, id: Uuid, protected: Protected, before: &Possessions, what: &str) {
    let now = possessions(life, id);
    match protected {
        Protected::Locked => assert_eq!(now, *before, "{what}"),
        // It may be stopped and started, and a draft may become real.
        Protected::Undeletable => {
            assert!(now.has_domain || !before.has_domain, "{what}: its domain is gone");
            assert!(now.disks.is_superset(&before.disks), "{what}: {before:?}, then {now:?}");
        }
    }
}

fn life_with<'a>(world: &'a World, clock: &Arc<TestClock>) -> Life<'a> {
    let clock = clock.clone();
    world.live_on(world.store.clone(), |settings| {
        settings.clock = clock;
        settings.shelf_grace = Duration::ZERO;
    })
}

fn all_verbs(protected: Protected) {
    let mut attempts = 0;
    for state in State::ALL {
        let world = World::new();
        let life = life_with(&world, &TestClock::new());
        let mut object: Option<(Uuid, Possessions)> = None;
        for verb in verbs() {
            for caller in [alice(), root(), Caller::daemon()] {
                let (id, before) = match object.take() {
                    Some(object) => object,
                    None => {
                        let Some(id) = in_state(&life, state) else { continue };
                        protect(&life, id, protected);
                        (id, possessions(&life, id))
                    }
                };
                let what = format!("{verb:?} by {} on one that is {protected:?} and {state:?}", caller.login);
                let request = Request::Instance { id, changes: vec![verb.clone()] };
                let answer = life.submit(&caller, request, Wait::Settle).recv_timeout(DEADLINE).expect("answered");
                life.wait_idle(id);
                survives(&life, id, protected, &before, &what);
                attempts += 1;
                // What was refused has changed nothing, so that the next verb meets the same.
                if answer.is_err() {
                    object = Some((id, before));
                } else {
                    // Names are unique, and this one may have taken one.
                    let _free_again = life.change(&root(), id, InstanceChange::Name(id.to_string()));
                }
            }
        }
    }
    println!("{protected:?}: {attempts} attempts");
}

#[test]
fn a_locked_instance_survives_every_verb_of_everybody_in_every_state() {
    all_verbs(Protected::Locked);
}

#[test]
fn an_instance_with_disable_terminate_survives_every_verb_of_everybody_in_every_state() {
    all_verbs(Protected::Undeletable);
}

#[test]
fn a_protected_instance_survives_all_timers_and_clocks_that_are_set() {
    for protected in [Protected::Locked, Protected::Undeletable] {
        let world = World::new();
        let clock = TestClock::new();
        let id_of = |life: &Life<'_>, state| {
            let id = in_state(life, state)?;
            protect(life, id, protected);
            Some((id, possessions(life, id), state))
        };
        let objects: Vec<_> = {
            let life = life_with(&world, &clock);
            State::ALL.into_iter().filter_map(|state| id_of(&life, state)).collect()
        };
        let year = Duration::from_secs(365 * 24 * 3600);
        let changes: [(&str, &dyn Fn()); 4] = [
            ("a year is set forward", &|| clock.set(|now| now + year.as_secs())),
            ("two years are set back", &|| clock.set(|now| now - 2 * year.as_secs())),
            ("ten years pass", &|| clock.pass(10 * year)),
            ("the host boots", &|| clock.reboot(year)),
        ];
        for (what, change) in changes {
            change();
            let clock = clock.clone();
            let life = world.live_on(world.store.clone(), |settings| {
                settings.clock = clock;
                settings.shelf_grace = Duration::ZERO;
                settings.shelved_offload_time = Some(Duration::from_secs(1));
            });
            looked(&life);
            for (id, before, state) in &objects {
                life.wait_idle(*id);
                survives(&life, *id, protected, before, &format!("{what}, {protected:?}, {state:?}"));
            }
        }
    }
}
