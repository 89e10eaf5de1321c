//! What a domain does, as in libvirt.

use std::time::{Duration, Instant};

use instancefs::hypervisor::{Event, Hypervisor, HypervisorError, PowerState, Reboot};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::lab::{Lab, invalid, off, paused, running, xml};

#[test]
fn a_domain_lives_as_in_libvirt() {
    let (lab, uuid) = Lab::with_domain("a");
    let hypervisor = &lab.hypervisor;
    assert_eq!(lab.power(uuid), off("unknown"));
    hypervisor.start(uuid).unwrap();
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    assert_eq!(lab.power(uuid), running("booted"));
    invalid(hypervisor.start(uuid));
    invalid(hypervisor.unpause(uuid));
    invalid(hypervisor.rename(uuid, "b"));
    lab.no_event();
    hypervisor.pause(uuid).unwrap();
    assert_eq!(lab.power(uuid), paused("user"));
    hypervisor.unpause(uuid).unwrap();
    assert_eq!(lab.power(uuid), running("unpaused"));
    hypervisor.save(uuid).unwrap();
    assert_eq!(lab.power(uuid), off("saved"));
    assert!(lab.domain(uuid).has_managed_save);
    invalid(hypervisor.rename(uuid, "b"));
    hypervisor.start(uuid).unwrap();
    assert_eq!(lab.power(uuid), running("restored"));
    assert!(!lab.domain(uuid).has_managed_save);
    hypervisor.reboot(uuid, Reboot::Hard).unwrap();
    assert_eq!(lab.guest(uuid)["boots"], 2);
    hypervisor.power_off(uuid).unwrap();
    assert_eq!(lab.power(uuid), off("destroyed"));
    for refused in [
        hypervisor.power_off(uuid),
        hypervisor.pause(uuid),
        hypervisor.unpause(uuid),
        hypervisor.save(uuid),
        hypervisor.shutdown(uuid),
        hypervisor.reboot(uuid, Reboot::Soft),
    ] {
        invalid(refused);
    }
}

#[test]
fn a_name_belongs_to_one_uuid() {
    let (lab, uuid) = Lab::with_domain("a");
    let exists = |answer| matches!(answer, Err(HypervisorError::Exists(_)));
    assert!(exists(lab.hypervisor.define(&xml("a", Uuid::new_v4()))));
    assert!(exists(lab.hypervisor.define(&xml("b", uuid))));
    let other = lab.define("b");
    assert!(exists(lab.hypervisor.rename(other, "a")));
    lab.hypervisor.rename(uuid, "c & d").unwrap();
    assert_eq!(lab.next_event(), Event::Undefined { uuid, kept: true });
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    assert!(lab.hypervisor.definition(uuid).unwrap().contains("<name>c &amp; d</name>"));
    lab.hypervisor.rename(other, "a").unwrap();
    assert_eq!(lab.domain(other).name, "a");
    assert_eq!(lab.hypervisor.start(Uuid::new_v4()), Err(HypervisorError::NoDomain));
    assert_eq!(lab.hypervisor.domain(Uuid::new_v4()), Ok(None));
}

#[test]
fn a_running_domain_that_is_undefined_becomes_transient_and_vanishes_with_its_run() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.hypervisor.start(uuid).unwrap();
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    lab.hypervisor.undefine(uuid).unwrap();
    assert_eq!(lab.next_event(), Event::Undefined { uuid, kept: false });
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    assert!(!lab.domain(uuid).persistent);
    invalid(lab.hypervisor.undefine(uuid));
    invalid(lab.hypervisor.save(uuid));
    let definition = lab.hypervisor.definition(uuid).unwrap();
    lab.hypervisor.define(&definition).unwrap();
    assert!(lab.domain(uuid).persistent);
    lab.hypervisor.undefine(uuid).unwrap();
    lab.hypervisor.power_off(uuid).unwrap();
    assert_eq!(lab.hypervisor.domain(uuid), Ok(None));
    assert_eq!(lab.hypervisor.domains().unwrap(), []);
}

#[test]
fn metadata_and_description_are_in_the_definition() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.hypervisor.set_metadata(uuid, Some("<instance locked='all'/>")).unwrap();
    lab.hypervisor.set_description(uuid, Some("web & mail")).unwrap();
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    let xml = lab.hypervisor.definition(uuid).unwrap();
    assert!(xml.contains("locked='all'") && xml.contains("<description>web &amp; mail</description>"));
    lab.hypervisor.set_metadata(uuid, None).unwrap();
    lab.hypervisor.set_description(uuid, None).unwrap();
    let xml = lab.hypervisor.definition(uuid).unwrap();
    assert!(!xml.contains("locked") && !xml.contains("description"));
}

#[test]
fn a_guest_shuts_down_by_itself_later_or_never() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.hypervisor.start(uuid).unwrap();
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    lab.hypervisor.shutdown(uuid).unwrap();
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    assert_eq!(lab.power(uuid), off("shutdown"));

    lab.ok(json!({ "do": "guest", "uuid": uuid, "acpi_delay_ms": 60 }));
    lab.hypervisor.start(uuid).unwrap();
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    let asked = Instant::now();
    lab.hypervisor.shutdown(uuid).unwrap();
    assert_eq!(lab.power(uuid).0, PowerState::Running);
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    assert!(asked.elapsed() >= Duration::from_millis(59));
    assert_eq!(lab.power(uuid), off("shutdown"));

    lab.ok(json!({ "do": "guest", "uuid": uuid, "ignores_acpi": true }));
    lab.hypervisor.start(uuid).unwrap();
    lab.hypervisor.shutdown(uuid).unwrap();
    assert_eq!(lab.guest(uuid)["button"], Value::Null);
}

#[test]
fn a_paused_guest_never_hears_its_power_button() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.hypervisor.start(uuid).unwrap();
    lab.hypervisor.pause(uuid).unwrap();
    lab.hypervisor.shutdown(uuid).unwrap();
    lab.hypervisor.unpause(uuid).unwrap();
    assert_eq!(lab.guest(uuid)["button"], Value::Null);
    assert_eq!(lab.power(uuid), running("unpaused"));
}

#[test]
fn a_soft_reboot_is_told_when_the_guest_has_done_it() {
    let (lab, uuid) = Lab::with_domain("a");
    lab.hypervisor.start(uuid).unwrap();
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    lab.hypervisor.reboot(uuid, Reboot::Soft).unwrap();
    assert_eq!(lab.next_event(), Event::Rebooted(uuid));
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    assert_eq!(lab.guest(uuid)["boots"], 2);
    assert_eq!(lab.power(uuid).0, PowerState::Running);
}

#[test]
fn what_is_done_elsewhere_is_seen_and_told() {
    let (lab, uuid) = Lab::with_domain("a");
    let sequence = [
        ("start", running("booted")),
        ("ioerror", paused("ioerror")),
        ("unpause", running("unpaused")),
        ("watchdog", paused("watchdog")),
        ("stop", off("destroyed")),
        ("start", running("booted")),
        ("sleep", (PowerState::PmSuspended, "unknown".to_owned())),
        ("wake", running("wakeup")),
        ("crash", off("crashed")),
        ("start", running("booted")),
        ("halt", off("shutdown")),
    ];
    for (verb, expected) in sequence {
        lab.ok(json!({ "do": verb, "uuid": uuid }));
        assert_eq!(lab.next_event(), Event::Changed(uuid), "{verb}");
        assert_eq!(lab.power(uuid), expected, "{verb}");
    }
    lab.ok(json!({ "do": "autostart", "uuid": uuid, "on": true }));
    assert!(lab.domain(uuid).autostart);
    lab.ok(json!({ "do": "migrate", "uuid": uuid }));
    assert_eq!(lab.next_event(), Event::Changed(uuid));
    assert_eq!(lab.next_event(), Event::Undefined { uuid, kept: true });
    assert_eq!(lab.hypervisor.domain(uuid), Ok(None));
    let refused = lab.hypervisor.control(json!({ "do": "start", "uuid": uuid }));
    assert_eq!((&refused["ok"], &refused["kind"]), (&json!(false), &json!("no_domain")));
}

#[test]
fn what_is_not_understood_is_refused_with_a_sentence() {
    let lab = Lab::new();
    for command in [
        json!({ "do": "explode" }),
        json!({ "do": "start" }),
        json!({ "do": "release", "cal": "start" }),
        json!({ "do": "fault", "call": "strat", "mode": "fail" }),
        json!([1]),
    ] {
        let answer = lab.hypervisor.control(command.clone());
        assert_eq!(answer["ok"], false, "{command}");
        assert!(!answer["error"].as_str().unwrap().is_empty());
    }
}

#[test]
fn ten_thousand_domains_are_defined_at_once_and_told() {
    let lab = Lab::new();
    let uuids = lab.ok(json!({ "do": "bulk", "count": 10_000, "prefix": "vm" }))["uuids"].clone();
    let uuids: Vec<Uuid> = serde_json::from_value(uuids).unwrap();
    assert_eq!(lab.hypervisor.domains().unwrap().len(), 10_000);
    for uuid in &uuids {
        assert_eq!(lab.next_event(), Event::Changed(*uuid));
    }
    assert_eq!(lab.domain(uuids[9_999]).name, "vm-10000");
}
