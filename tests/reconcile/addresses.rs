//! Where running guests can be reached.

use std::net::IpAddr;

use instancefs::model::instance::State;
use serde_json::json;

use crate::world::World;

fn shown(world: &World, id: uuid::Uuid) -> Vec<String> {
    world.instance(id).map(|i| i.addresses.shown().iter().map(IpAddr::to_string).collect()).unwrap_or_default()
}

#[test]
fn addresses_come_after_a_start_and_go_with_the_guest() {
    let world = World::new();
    let id = world.define("web");
    world.control(json!({ "do": "addresses", "uuid": id, "agent": ["127.0.0.1", "10.0.0.7", "fe80::1"], "host": [] }));
    world.on_domain("start", id);
    world.until("the agent's address is shown", || shown(&world, id) == ["10.0.0.7"]);
    world.on_domain("stop", id);
    world.until("it is gone", || world.state(id).0 == State::Stopped);
    assert!(shown(&world, id).is_empty());
}

#[test]
fn the_agent_knows_best_and_the_host_knows_without_it() {
    let world = World::new();
    let id = world.define("web");
    world.control(json!({ "do": "addresses", "uuid": id, "host": ["10.0.0.8"] }));
    world.on_domain("start", id);
    world.until("the host's address is shown", || shown(&world, id) == ["10.0.0.8"]);
    world.control(json!({ "do": "addresses", "uuid": id, "agent": ["10.0.0.7"] }));
    world.until("the agent's is", || shown(&world, id) == ["10.0.0.7"]);
}

#[test]
fn agents_that_never_answer_keep_nobody_from_the_other_guests() {
    let world = World::new();
    let hung: Vec<_> = (0..8).map(|number| world.define(&format!("hung-{number}"))).collect();
    let well = world.define("well");
    for id in &hung {
        world.control(json!({ "do": "fault", "call": "agent_addresses", "uuid": id, "mode": "hang" }));
        world.on_domain("start", *id);
    }
    let is_full = || {
        let pending = world.control(json!({ "do": "calls" }))["pending"].clone();
        pending.as_array().unwrap().iter().filter(|pending| pending["call"] == "agent_addresses").count() >= 4
    };
    world.until("as many as may be asked at once hang", is_full);
    world.control(json!({ "do": "addresses", "uuid": well, "agent": ["10.0.0.9"], "host": ["10.0.0.8"] }));
    world.on_domain("start", well);
    world.until("it is shown as running", || world.state(well).0 == State::Active);
    world.until("the host is asked", || shown(&world, well) == ["10.0.0.8"]);
    world.control(json!({ "do": "release" }));
    world.until("its agent is asked too", || shown(&world, well) == ["10.0.0.9"]);
}
