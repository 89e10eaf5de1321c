//! Domains that come, change and go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use instancefs::hypervisor::simulated::SimulatedHypervisor;
use instancefs::hypervisor::{Domain, PowerState};
use instancefs::inventory::Change;
use instancefs::model::instance::State;
use instancefs::model::record::{DiskRecord, DiskRole, Draft};
use instancefs::store::Store;
use instancefs::workflow::ledger::now;
use serde_json::json;
use uuid::Uuid;

use crate::world::{PATIENCE, World};

#[test]
fn domains_come_change_and_go() {
    let world = World::new();
    let id = world.define_with("web", "<description>front</description>");
    let instance = world.instance(id).unwrap();
    assert_eq!((instance.name(), instance.record.description.as_str()), ("web", "front"));
    assert_eq!((instance.record.vcpus, instance.record.memory_bytes), (2, 512 << 20));
    assert_eq!((instance.record.ownership.owner, instance.record.ownership.project), (0, 65534));
    assert_eq!(instance.record.launched_at, None);
    world.is(id, State::Stopped);

    world.on_domain("start", id);
    world.is(id, State::Active);
    assert!(world.instance(id).unwrap().record.launched_at.is_some_and(|at| now() - at < 20));
    world.on_domain("pause", id);
    world.is(id, State::Paused);
    world.on_domain("stop", id);
    world.is(id, State::Stopped);
    world.control(json!({ "do": "rename", "uuid": id, "name": "shop" }));
    world.until("its new name shows", || world.inventory().instance_named("shop") == Some(id));
    assert_eq!(world.inventory().instance_named("web"), None);
    world.until("the new name is in the record", || world.instance(id).unwrap().record.name == "shop");

    world.until("the definition is stored", || world.store.get(&format!("definitions/{id}")).unwrap().is_some());
    world.on_domain("undefine", id);
    world.until("it is gone", || world.instance(id).is_none());
    assert_eq!(world.store.list("instances/").unwrap(), []);
    assert_eq!(world.store.get(&format!("definitions/{id}")).unwrap(), None);
    assert_eq!(
        world.logged(id),
        [
            "appeared  stopped",
            "state stopped active",
            "state active paused",
            "state paused stopped",
            "name web shop",
            "disappeared stopped "
        ]
    );
}

#[test]
fn ten_thousand_domains_are_one_transaction_and_one_batch() {
    let directory = Arc::new(tempfile::tempdir().unwrap());
    let hypervisor = Arc::new(SimulatedHypervisor::open(&directory.path().join("host")).unwrap());
    hypervisor.control(json!({ "do": "fault", "call": "domains", "mode": "hang" }));
    // They are there before the first look.
    let made = hypervisor.control(json!({ "do": "bulk", "count": 10_000 }));
    assert_eq!(made["ok"], true);
    let world = World::on(directory, hypervisor, Duration::from_secs(3600), false);
    world.until("the first pass waits", || world.calls("domains") == 1);
    let batches = world.inventory().subscribe();
    let commits = world.store.watch("instances/");
    let began = Instant::now();
    world.control(json!({ "do": "release", "call": "domains" }));
    world.until("they are all here", || world.inventory().instances().len() == 10_000);
    println!("10000 domains appeared in {:?}", began.elapsed());
    assert_eq!(commits.recv_timeout(PATIENCE).unwrap().changes.len(), 10_000);
    let objects = |batch: &Arc<Vec<Change>>| {
        batch.iter().filter(|change| matches!(change, Change::Object { old: None, .. })).count()
    };
    let first = batches.iter().map(|batch| objects(&batch)).find(|count| *count > 0);
    assert_eq!(first, Some(10_000));
    assert_eq!(world.calls("domain"), 0);

    // A burst of events is one more pass, not ten thousand questions.
    let ids: Vec<Uuid> = world.inventory().instances().iter().map(|instance| instance.id).collect();
    for id in &ids[..2000] {
        world.on_domain("start", *id);
    }
    world.until("they run", || {
        world.inventory().instances().iter().filter(|it| it.observed().state == State::Active).count() == 2000
    });
    assert!(world.calls("domain") < 2000, "{} single questions", world.calls("domain"));
}

#[test]
fn what_was_shown_survives_the_daemon_and_is_compared_with_what_is() {
    let world = World::new();
    let (id, gone) = (world.define("web"), world.define("gone"));
    let number = world.instance(id).unwrap().record.number;
    world.on_domain("start", id);
    world.is(id, State::Active);
    world.reconciler.stop();
    world.on_domain("stop", id);
    world.on_domain("undefine", gone);
    let world = world.again();
    world.is(id, State::Stopped);
    world.until("the other is gone", || world.instance(gone).is_none());
    assert_eq!(world.instance(id).unwrap().record.number, number);
    assert_eq!(world.logged(id), ["appeared  stopped", "state stopped active", "state active stopped"]);
}

#[test]
fn a_crash_is_remembered_until_it_runs_again() {
    let world = World::new();
    let id = world.define("web");
    for preserve in [false, true] {
        world.on_domain("start", id);
        world.is(id, State::Active);
        assert_eq!(world.instance(id).unwrap().record.crashed, None);
        world.control(json!({ "do": "crash", "uuid": id, "preserve": preserve }));
        world.is(id, State::Error);
        if preserve {
            // Off by now, but nobody has started it.
            world.on_domain("stop", id);
            world.until("it is off", || {
                world.instance(id).unwrap().domain.as_ref().unwrap().power == PowerState::ShutOff
            });
        }
        assert_eq!(world.state(id), (State::Error, "crashed".to_owned()));
        assert_eq!(world.instance(id).unwrap().record.crashed.as_deref(), Some("crashed"));
    }
    // Whoever clears it is not contradicted by looking again.
    world.edit(id, |record| record.crashed = None);
    world.reconciler.refresh(id).unwrap();
    assert_eq!(world.instance(id).unwrap().record.crashed, None);
}

#[test]
fn an_undefined_instance_with_our_disks_or_a_lock_stays_as_error() {
    let world = World::new();
    let (ours, locked, plain) = (world.define("ours"), world.define("locked"), world.define("plain"));
    let disk = DiskRecord {
        backend: "directory".to_owned(),
        reference: "disk".to_owned(),
        operation: Uuid::new_v4(),
        role: DiskRole::Root,
    };
    world.edit(ours, |record| record.disks.push(disk));
    world.lock(locked, "keep");
    for id in [ours, locked, plain] {
        world.on_domain("undefine", id);
    }
    world.until("the plain one leaves", || world.instance(plain).is_none());
    for id in [ours, locked] {
        world.is(id, State::Error);
        assert_eq!(world.state(id).1, "undefined_outside");
        assert_eq!(world.logged(id), ["appeared  stopped", "disappeared stopped error"]);
    }
    let world = world.again();
    world.reconciler.pass().unwrap();
    for id in [ours, locked] {
        assert_eq!(world.state(id), (State::Error, "undefined_outside".to_owned()));
        assert!(world.reconciler.definition(id).is_some());
    }
    let xml = world.reconciler.definition(ours).unwrap();
    world.control(json!({ "do": "define", "xml": &*xml }));
    world.is(ours, State::Stopped);
}

#[test]
fn drafts_and_what_an_operation_owns_are_left_to_the_engine() {
    let world = World::new();
    let (draft, busy) = (world.define("draft"), world.define("busy"));
    world.edit(draft, |record| {
        record.draft = Some(Draft { written: true });
        record.name = "wanted".to_owned();
    });
    world.edit(busy, |record| record.operation = Some(Uuid::new_v4()));
    world.on_domain("start", draft);
    world.on_domain("start", busy);
    let runs = |domain: Option<&Domain>| domain.is_some_and(|it| it.power == PowerState::Running);
    assert!(world.reconciler.wait_for(draft, PATIENCE, &runs));
    assert!(world.reconciler.wait_for(busy, PATIENCE, &runs));
    let shown = world.instance(draft).unwrap();
    assert_eq!((shown.observed().state, shown.record.name.as_str()), (State::Draft, "wanted"));
    assert!(shown.record.launched_at.is_some());

    for id in [draft, busy] {
        world.on_domain("stop", id);
        world.on_domain("undefine", id);
        assert!(world.reconciler.wait_for(id, PATIENCE, &|domain| domain.is_none()));
        world.reconciler.pass().unwrap();
        assert!(world.instance(id).is_some(), "its record is the operation's");
        assert_eq!(world.logged(id), ["appeared  stopped"], "the engine logs its own");
    }
    world.edit(busy, |record| record.operation = None);
    world.reconciler.pass().unwrap();
    assert!(world.instance(busy).is_none(), "once nobody owns it, it leaves as any other");
    assert!(world.instance(draft).is_some());
}
