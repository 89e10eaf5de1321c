//! Calls that fail, hang, come late, and connections that break.

use std::time::{Duration, Instant};

use instancefs::hypervisor::{Event, Hypervisor, HypervisorError};
use serde_json::json;

use crate::lab::{Lab, joined, off, running};

#[test]
fn a_fault_fails_as_many_calls_as_it_says() {
    let (lab, uuid) = Lab::with_domain("a");
    let other = lab.define("b");
    lab.ok(json!({ "do": "fault", "call": "start", "mode": "fail", "message": "no KVM", "times": 1, "uuid": uuid }));
    lab.hypervisor.start(other).unwrap();
    assert_eq!(lab.hypervisor.start(uuid), Err(HypervisorError::Failed("no KVM".to_owned())));
    assert_eq!(lab.power(uuid), off("unknown"));
    lab.hypervisor.start(uuid).unwrap();

    lab.ok(json!({ "do": "fault", "call": "pause", "mode": "fail", "kind": "unsupported" }));
    for _ in 0..3 {
        assert!(matches!(lab.hypervisor.pause(uuid), Err(HypervisorError::Unsupported(_))));
    }
    lab.ok(json!({ "do": "release", "call": "pause" }));
    lab.hypervisor.pause(uuid).unwrap();
    let calls = lab.ok(json!({ "do": "calls", "reset": true }));
    assert_eq!((&calls["calls"]["start"], &calls["calls"]["pause"]), (&json!(3), &json!(4)));
    assert_eq!(lab.ok(json!({ "do": "calls" }))["calls"], json!({}));
}

#[test]
fn a_call_that_hangs_takes_effect_when_it_is_released() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.ok(json!({ "do": "fault", "call": "start", "mode": "hang", "times": 1 }));
    let start = lab.taken(move |hypervisor| hypervisor.start(uuid));
    assert_eq!(lab.power(uuid), off("unknown"));
    lab.no_event();
    assert_eq!(lab.ok(json!({ "do": "release", "call": "start" }))["released"], 1);
    assert_eq!(joined(start), Ok(()));
    assert_eq!(lab.power(uuid), running("booted"));
    assert_eq!(lab.next_event(), Event::Changed(uuid));
}

#[test]
fn a_late_call_takes_effect_late() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.ok(json!({ "do": "fault", "call": "start", "mode": "late", "ms": 300, "times": 1 }));
    let asked = Instant::now();
    let start = lab.taken(move |hypervisor| hypervisor.start(uuid));
    assert_eq!(lab.power(uuid), off("unknown"));
    assert_eq!(joined(start), Ok(()));
    assert!(asked.elapsed() >= Duration::from_millis(299));
    assert_eq!(lab.power(uuid), running("booted"));
}

#[test]
fn a_call_whose_connection_breaks_may_have_taken_effect_or_not() {
    let (lab, uuid) = Lab::with_domain("a");
    for (applied, expected) in [(false, off("unknown")), (true, running("booted"))] {
        lab.ok(json!({
            "do": "fault", "call": "start", "mode": "disconnect", "message": "broken pipe",
            "applied": applied, "ms": 20, "times": 1
        }));
        let broken = HypervisorError::Unreachable("broken pipe".to_owned());
        assert_eq!(lab.hypervisor.start(uuid), Err(broken));
        assert_eq!(lab.next_event(), Event::Disconnected("broken pipe".to_owned()));
        assert_eq!(lab.next_event(), Event::Connected);
        lab.no_event();
        assert_eq!(lab.power(uuid), expected);
    }
}

#[test]
fn a_stopped_daemon_answers_and_tells_nothing_until_it_runs_again() {
    let (lab, uuid) = Lab::with_domain("a");
    let other = lab.define("b");
    lab.hypervisor.start(other).unwrap();
    assert_eq!(lab.next_event(), Event::Changed(other));
    lab.ok(json!({ "do": "hang_all" }));
    let ping = lab.taken(|hypervisor| hypervisor.ping());
    let identity = lab.taken(|hypervisor| hypervisor.identity());
    let start = lab.taken(move |hypervisor| hypervisor.start(uuid));
    lab.ok(json!({ "do": "crash", "uuid": other }));
    assert_eq!(lab.guest(uuid)["domain"]["power"], "shut_off");
    lab.no_event();
    assert!(!ping.is_finished() && !identity.is_finished() && !start.is_finished());
    lab.ok(json!({ "do": "release_all" }));
    assert_eq!(joined(ping), Ok(()));
    assert!(joined(identity).is_ok());
    assert_eq!(joined(start), Ok(()));
    assert_eq!(lab.next_event(), Event::Changed(other));
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    assert_eq!(lab.power(uuid), running("booted"));
    assert_eq!(lab.power(other), off("crashed"));
}

#[test]
fn a_lost_connection_answers_the_waiting_and_the_call_happens_nevertheless() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.ok(json!({ "do": "hang_all" }));
    let start = lab.taken(move |hypervisor| hypervisor.start(uuid));
    lab.ok(json!({ "do": "disconnect", "reason": "keepalive" }));
    let lost = HypervisorError::Unreachable("keepalive".to_owned());
    assert_eq!(joined(start), Err(lost.clone()));
    assert_eq!(lab.hypervisor.ping(), Err(lost));
    lab.ok(json!({ "do": "release_all" }));
    assert_eq!(lab.next_event(), Event::Disconnected("keepalive".to_owned()));
    lab.no_event();
    lab.ok(json!({ "do": "reconnect" }));
    assert_eq!(lab.next_event(), Event::Connected);
    assert_eq!(lab.power(uuid), running("booted"));
}
