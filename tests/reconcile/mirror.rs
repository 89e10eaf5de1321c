//! What is mirrored into domains, and what is not.

use std::sync::Arc;
use std::time::Duration;

use instancefs::hypervisor::simulated::SimulatedHypervisor;
use instancefs::model::instance::State;
use serde_json::json;

use crate::world::World;

#[test]
fn a_lock_reaches_the_domain_and_waits_while_it_is_suspended() {
    let world = World::new();
    let id = world.define("web");
    world.lock(id, "do <not> \"touch\"");
    world.until("the lock is mirrored", || world.xml(id).contains("locked_by=\"alice\""));
    let xml = world.xml(id);
    assert!(xml.contains("locked=\"1\"") && xml.contains("locked_level=\"admin\"") && xml.contains("locked_at=\"7\""));
    assert!(xml.contains("do &lt;not&gt; &quot;touch&quot;") && xml.contains("owner=\"root\""), "{xml}");

    world.on_domain("start", id);
    world.on_domain("save", id);
    world.is(id, State::Suspended);
    world.edit(id, |record| record.protection.lock = None);
    // Something else that is mirrored shows that the queue has gone past it.
    let other = world.define("other");
    world.lock(other, "");
    world.until("the other is mirrored", || world.xml(other).contains("alice"));
    assert!(world.xml(id).contains("locked=\"1\""), "a suspended guest's definition is not touched");
    world.on_domain("start", id);
    world.until("the mirror follows", || world.xml(id).contains("locked=\"0\""));
    assert!(!world.xml(id).contains("alice"));

    world.control(json!({ "do": "calls", "reset": true }));
    let world = world.again();
    world.lock(other, "again");
    world.until("the other is mirrored", || world.xml(other).contains("again"));
    assert_eq!(world.calls("set_metadata"), 1, "what was mirrored in a former life is not mirrored again");
}

#[test]
fn a_lock_is_mirrored_after_the_connection_is_back_and_never_when_read_only() {
    let world = World::new();
    let id = world.define("web");
    world.control(json!({ "do": "disconnect" }));
    world.lock(id, "");
    world.until("it was tried", || world.calls("set_metadata") > 0);
    world.control(json!({ "do": "reconnect" }));
    world.until("the lock is mirrored", || world.xml(id).contains("alice"));

    let directory = Arc::new(tempfile::tempdir().unwrap());
    let hypervisor = Arc::new(SimulatedHypervisor::open(&directory.path().join("host")).unwrap());
    let world = World::on(directory, hypervisor, Duration::from_secs(3600), true);
    let id = world.define("web");
    world.lock(id, "");
    world.edit(id, |record| record.description = "mine".to_owned());
    // The next definition is fetched by the thread that would have mirrored before.
    world.define("next");
    assert_eq!(world.calls("set_metadata") + world.calls("set_description"), 0);
}

#[test]
fn foreign_domains_are_not_touched() {
    let world = World::new();
    let id = world.define_with("web", "<description>theirs</description>");
    world.on_domain("start", id);
    world.is(id, State::Active);
    world.reconciler.mirror(id);
    let other = world.define("other");
    world.lock(other, "");
    world.until("the other is mirrored", || world.xml(other).contains("alice"));
    assert_eq!(world.calls("set_description"), 0);
    assert_eq!(world.calls("set_metadata"), 1);
}

#[test]
fn descriptions_go_both_ways_and_the_last_writer_wins() {
    let world = World::new();
    let id = world.define_with("web", "<description>theirs</description>");
    for text in ["ours & <yours>", "second", ""] {
        world.edit(id, |record| record.description = text.to_owned());
    }
    world.until("the last one is mirrored", || !world.xml(id).contains("<description>"));
    world.edit(id, |record| record.description = "third".to_owned());
    world.until("it is mirrored", || world.xml(id).contains("<description>third</description>"));
    let said = |text: &str| {
        world.until("the definition is read", || {
            let instance = world.instance(id).unwrap();
            let definition = instance.record.definition.as_ref().unwrap();
            definition.description.as_deref() == Some(text)
        });
    };
    said("third");
    assert_eq!(world.instance(id).unwrap().record.description, "third");
    // Somebody else's words are adopted, also when they are the ones that were mirrored once.
    for text in ["fourth", "third"] {
        world.control(json!({ "do": "set_description", "uuid": id, "text": text }));
        world.until("it is adopted", || world.instance(id).unwrap().record.description == text);
        said(text);
        assert!(world.xml(id).contains(text));
    }
}

#[test]
fn an_echo_of_the_mirror_does_not_overwrite_what_was_written_since() {
    let world = World::new();
    let id = world.define("web");
    world.edit(id, |record| record.description = "first".to_owned());
    world.until("it is mirrored", || world.xml(id).contains("first"));
    // The definition is fetched while the next description is being written.
    world.control(json!({ "do": "fault", "call": "set_description", "mode": "late", "ms": 200 }));
    for round in 0..5 {
        let text = format!("round {round}");
        world.edit(id, |record| record.description = text.clone());
        world.on_domain(if round % 2 == 0 { "start" } else { "stop" }, id);
        world.until("it is mirrored", || world.xml(id).contains(&text));
        assert_eq!(world.instance(id).unwrap().record.description, text);
    }
}
