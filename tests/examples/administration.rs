//! Shells and other tools that write when they are told to.

use std::fs;

use uuid::Uuid;

use crate::stage::{Stage, twice};
use crate::support::wait_until;

#[test]
fn maintenance_locks_what_runs_and_opens_exactly_that_again() {
    twice(|stage| {
        let [one, other, theirs] = ["one", "other", "theirs"].map(|name| stage.running(name));
        let off = stage.domain("off");
        stage.set(theirs, "locked", "1");
        let maintenance = |arguments: &[&str]| {
            let mut command = stage.example("maintenance");
            command.args(arguments).env("MAINTENANCE", stage.daemon.scratch().join("list"));
            command
        };
        stage.succeeds(&mut maintenance(&["begin", "new kernel"]));
        for id in [one, other] {
            assert_eq!((stage.read(id, "locked"), stage.read(id, "locked_reason")), ("1".into(), "new kernel".into()));
            assert!(stage.daemon.write(stage.file(id, "state"), "stopped").is_err(), "root stops a locked one");
        }
        assert_eq!(stage.read(off, "locked"), "0");
        let said = stage.fails(&mut maintenance(&["begin", "twice"]));
        assert!(said.contains("cannot overwrite existing file"), "{said}");
        stage.succeeds(&mut maintenance(&["end"]));
        assert_eq!([one, other, theirs, off].map(|id| stage.read(id, "locked")), ["0", "0", "1", "0"]);
        assert_eq!(stage.read(one, "locked_reason"), "");
    });
}

#[test]
fn an_instance_is_made_once_however_often_it_is_asked_for() {
    twice(|stage| {
        let image = stage.daemon.image().to_string();
        let ensure = || stage.succeeds(stage.example("ensure-instance").args(["web1", &image, "512M"]));
        let id: Uuid = ensure().trim().parse().expect("it says the uuid");
        assert_eq!((stage.read(id, "state"), stage.read(id, "memory_bytes")), ("active".into(), "536870912".into()));
        let quiet = stage.events();
        assert_eq!(ensure().trim(), id.to_string());
        assert_eq!(stage.events(), quiet, "the second time changes nothing");
        stage.host_does("stop", id);
        stage.daemon.wait_state(id, "stopped");
        ensure();
        assert_eq!(stage.read(id, "state"), "active");
    });
}

#[test]
fn what_has_been_off_for_long_is_shelved_and_nothing_else() {
    twice(|stage| {
        let [off, locked] = ["off", "locked"].map(|name| stage.domain(name));
        let runs = stage.running("runs");
        stage.set(locked, "locked", "1");
        let shelve = |days: &str| {
            let mut command = stage.command("dash");
            command.arg(crate::stage::examples().join("shelve-idle")).arg(days);
            command
        };
        assert_eq!(stage.succeeds(&mut shelve("1")), "", "none has been off for a day");
        assert_eq!(stage.succeeds(&mut shelve("0")), "shelved off\n");
        assert_eq!([off, locked, runs].map(|id| stage.read(id, "state")), ["shelved", "stopped", "active"]);
    });
}

#[test]
fn a_machine_of_tmpfiles_is_as_its_lines_say() {
    twice(|stage| {
        let id = stage.domain("mail");
        let edits = [("/vm", stage.root()), ("00000000-0000-4000-8000-000000000001", id.to_string())];
        let edits = edits.each_ref().map(|(from, to)| (*from, to.as_str()));
        let file = stage.edited("instancefs-tmpfiles.conf", &edits);
        let apply = || stage.succeeds(stage.command("systemd-tmpfiles").arg("--create").arg(&file));
        assert_eq!(apply(), "");
        let read = || {
            ["autostart", "stop_timeout_seconds", "disable_terminate", "description"].map(|name| stage.read(id, name))
        };
        let wanted = ["1", "180", "1", "mail server, see wiki"];
        wait_until("all is set", || read() == wanted);
        assert_eq!(apply(), "");
        assert_eq!(read(), wanted);
        assert!(fs::read_to_string(&file).expect("readable").contains("autostart"));
    });
}

#[test]
fn the_machines_of_a_project_are_off_at_night_but_for_those_that_were_off() {
    twice(office_hours);
}

fn office_hours(stage: &Stage) {
    let [one, other, locked, foreign] = ["one", "other", "locked", "foreign"].map(|name| stage.running(name));
    let off = stage.domain("off");
    for id in [one, other, locked, off] {
        stage.set(id, "project", "games");
    }
    stage.set(locked, "locked", "1");
    let hours = |word: &str| {
        let mut command = stage.example("office-hours");
        command.args([word, "games"]).env("OFFICE_HOURS", stage.directory("hours"));
        command
    };
    let states = || [one, other, locked, foreign, off].map(|id| stage.read(id, "state"));
    let said = stage.fails(&mut hours("close"));
    assert!(said.contains("locked: ") && said.contains("write 0 to locked first"), "{said}");
    assert_eq!(states(), ["stopped", "stopped", "active", "active", "stopped"]);
    // Somebody worked late; what he started is not what the morning starts, and running it twice forgets nothing.
    stage.set(locked, "locked", "0");
    assert_eq!(stage.succeeds(&mut hours("close")), "");
    assert_eq!(states(), ["stopped", "stopped", "stopped", "active", "stopped"]);
    assert_eq!(stage.succeeds(&mut hours("open")), "");
    assert_eq!(states(), ["active", "active", "active", "active", "stopped"]);
}
