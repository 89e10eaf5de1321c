//! The libvirt backend against real hypervisors: libvirt's test driver, its embedded QEMU driver with a guest that
//! boots, and a daemon of our own that is stopped, killed and restarted.

#[path = "libvirt_backend/daemon.rs"]
mod daemon;
#[path = "libvirt_backend/disks.rs"]
mod disks;
#[path = "libvirt_backend/guest.rs"]
mod guest;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use instancefs::hypervisor::definition::{Definition, METADATA_NAMESPACE};
use instancefs::hypervisor::libvirt::{Target, open};
use instancefs::hypervisor::{Accelerator, Domain, Event, Hypervisor, HypervisorError, PowerState, Reboot};
use uuid::Uuid;

use daemon::Daemon;
use guest::Guest;

const PATIENCE: Duration = Duration::from_secs(20);

/// A name that is hard on everybody: 127 bytes of quotes, markup, spaces and characters of two to four bytes, one of
/// them across the 20th byte, where libvirt would cut it in the C locale.
fn nasty_name() -> String {
    let mut name = "ä日本語🦀日本語<&>'\"  %20 $(x) \\ ".to_owned();
    while name.len() < 127 {
        name.push('n');
    }
    assert_eq!(name.len(), 127);
    name
}

fn connect(target: &Target, state: &Path) -> (Arc<dyn Hypervisor>, Receiver<Event>) {
    let hypervisor = open(target.clone(), state, None).unwrap();
    let events = hypervisor.events();
    hypervisor.connect().unwrap();
    assert_eq!(events.recv_timeout(PATIENCE), Ok(Event::Connected));
    (hypervisor, events)
}

/// Waits for an event that `wanted` accepts, skipping others.
fn wait_for_event(events: &Receiver<Event>, wanted: impl Fn(&Event) -> bool) -> Event {
    let deadline = Instant::now() + PATIENCE;
    let mut skipped = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match events.recv_timeout(left) {
            Ok(event) if wanted(&event) => return event,
            Ok(event) => skipped.push(event),
            Err(error) => panic!("{error}; other events: {skipped:?}"),
        }
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn power(hypervisor: &dyn Hypervisor, uuid: Uuid) -> (PowerState, String) {
    let domain = hypervisor.domain(uuid).unwrap().unwrap();
    (domain.power, domain.reason)
}

/// `domains` and `domain` have to agree.
fn described(hypervisor: &dyn Hypervisor, uuid: Uuid) -> Domain {
    let one = hypervisor.domain(uuid).unwrap().unwrap();
    let all = hypervisor.domains().unwrap();
    let listed: Vec<_> = all.iter().filter(|domain| domain.uuid == uuid).collect();
    assert_eq!(listed, [&one]);
    one
}

fn test_domain(uuid: Uuid, name: &str) -> String {
    format!(
        "<domain type='test'><name>{}</name><uuid>{uuid}</uuid><memory>8192</memory><vcpu>1</vcpu>\
         <os><type>hvm</type></os></domain>",
        instancefs::hypervisor::definition::escape(name)
    )
}

#[test]
fn the_test_driver_goes_through_a_whole_life() {
    let state = tempfile::tempdir().unwrap();
    let target = Target::parse("test:///default", state.path()).unwrap();
    let (hypervisor, events) = connect(&target, state.path());
    let uuid = Uuid::new_v4();
    let changed = |event: &Event| *event == Event::Changed(uuid);

    assert_eq!(hypervisor.identity().unwrap().uri, "test:///default");
    hypervisor.ping().unwrap();
    assert_eq!(hypervisor.domain(uuid), Ok(None));
    assert_eq!(hypervisor.start(uuid), Err(HypervisorError::NoDomain));

    hypervisor.define(&test_domain(uuid, &nasty_name())).unwrap();
    wait_for_event(&events, changed);
    let domain = described(&*hypervisor, uuid);
    assert_eq!(domain.name, nasty_name());
    assert_eq!(domain.power, PowerState::ShutOff);
    assert!(domain.persistent && !domain.autostart && !domain.has_managed_save);

    hypervisor.start(uuid).unwrap();
    wait_for_event(&events, changed);
    assert_eq!(described(&*hypervisor, uuid).power, PowerState::Running);
    hypervisor.pause(uuid).unwrap();
    assert_eq!(power(&*hypervisor, uuid), (PowerState::Paused, "user".to_owned()));
    hypervisor.unpause(uuid).unwrap();
    assert_eq!(power(&*hypervisor, uuid).0, PowerState::Running);

    hypervisor.save(uuid).unwrap();
    let saved = described(&*hypervisor, uuid);
    assert_eq!(saved.power, PowerState::ShutOff);
    assert!(saved.has_managed_save);
    hypervisor.start(uuid).unwrap();
    assert!(!described(&*hypervisor, uuid).has_managed_save);

    hypervisor.shutdown(uuid).unwrap();
    assert_eq!(power(&*hypervisor, uuid), (PowerState::ShutOff, "shutdown".to_owned()));
    hypervisor.undefine(uuid).unwrap();
    wait_for_event(&events, |event| *event == Event::Undefined { uuid, kept: false });
    assert_eq!(hypervisor.domain(uuid), Ok(None));
}

#[test]
fn new_hardware_and_autostart_keep_what_else_the_definition_says_with_its_secrets() {
    let state = tempfile::tempdir().unwrap();
    let target = Target::parse("test:///default", state.path()).unwrap();
    let (hypervisor, _events) = connect(&target, state.path());
    let uuid = Uuid::new_v4();
    let graphics = "<devices><graphics type='vnc' port='5999' passwd='secret'/></devices><vcpu current='1'>2</vcpu>";
    let xml = test_domain(uuid, "hardware").replace("<vcpu>1</vcpu>", graphics);
    hypervisor.define(&xml).unwrap();
    hypervisor.set_hardware(uuid, Some(4), Some(32 << 20)).unwrap();
    hypervisor.set_autostart(uuid, true).unwrap();
    assert!(described(&*hypervisor, uuid).autostart);
    let definition = Definition::parse(&hypervisor.definition(uuid).unwrap()).unwrap();
    assert_eq!((definition.vcpus, definition.memory_bytes), (Some(4), Some(32 << 20)));
    // The driver's state is the process's, so that another connection sees the same domain.
    let other = virt::connect::Connect::open(Some(target.uri())).unwrap();
    let secure = virt::sys::VIR_DOMAIN_XML_INACTIVE | virt::sys::VIR_DOMAIN_XML_SECURE;
    let xml = other.lookup_domain_by_uuid(uuid).unwrap().xml_desc(secure).unwrap();
    assert!(xml.contains("passwd='secret'") && !xml.contains("current="), "{xml}");
    assert!(matches!(hypervisor.set_hardware(uuid, Some(0), None), Err(HypervisorError::Failed(_))));
    hypervisor.undefine(uuid).unwrap();
}

#[test]
fn a_rename_keeps_the_definition_and_a_taken_name_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let target = Target::parse("test:///default", state.path()).unwrap();
    let (hypervisor, events) = connect(&target, state.path());
    let (one, other) = (Uuid::new_v4(), Uuid::new_v4());
    hypervisor.define(&test_domain(one, "rename-one")).unwrap();
    hypervisor.define(&test_domain(other, "rename-other")).unwrap();

    assert!(matches!(hypervisor.define(&test_domain(Uuid::new_v4(), "rename-one")), Err(HypervisorError::Exists(_))));
    assert!(matches!(hypervisor.rename(one, "rename-other"), Err(HypervisorError::Exists(_))));
    hypervisor.rename(one, "rename-new").unwrap();
    assert_eq!(described(&*hypervisor, one).name, "rename-new");
    wait_for_event(&events, |event| *event == Event::Undefined { uuid: one, kept: true });
    for uuid in [one, other] {
        hypervisor.undefine(uuid).unwrap();
    }
}

#[test]
fn metadata_and_description_are_set_and_removed_stopped_and_running() {
    let state = tempfile::tempdir().unwrap();
    let target = Target::parse("test:///default", state.path()).unwrap();
    let (hypervisor, _events) = connect(&target, state.path());
    let uuid = Uuid::new_v4();
    hypervisor.define(&test_domain(uuid, "metadata")).unwrap();
    prove_metadata(&*hypervisor, uuid);
    hypervisor.start(uuid).unwrap();
    prove_metadata(&*hypervisor, uuid);
    hypervisor.power_off(uuid).unwrap();
    hypervisor.undefine(uuid).unwrap();
}

fn prove_metadata(hypervisor: &dyn Hypervisor, uuid: Uuid) {
    let element = format!("<instance xmlns='{METADATA_NAMESPACE}' locked='1'>&lt;text&gt;</instance>");
    let prefixed = format!("<instancefs:instance xmlns:instancefs='{METADATA_NAMESPACE}' locked='1'/>");
    let xml = || hypervisor.definition(uuid).unwrap();
    for element in [&prefixed, &element, &element] {
        hypervisor.set_metadata(uuid, Some(element)).unwrap();
        assert_eq!(xml().matches("locked=").count(), 1, "{}", xml());
    }
    assert!(xml().contains("&lt;text&gt;"));
    hypervisor.set_description(uuid, Some("<b> & \"c\"")).unwrap();
    let description = || Definition::parse(&xml()).unwrap().description;
    assert_eq!(description().as_deref(), Some("<b> & \"c\""));

    for _ in 0..2 {
        hypervisor.set_metadata(uuid, None).unwrap();
        hypervisor.set_description(uuid, None).unwrap();
    }
    assert!(!xml().contains(METADATA_NAMESPACE));
    assert_eq!(description(), None);
}

#[test]
fn the_test_driver_has_no_accelerator() {
    let state = tempfile::tempdir().unwrap();
    let target = Target::parse("test:///default", state.path()).unwrap();
    let (hypervisor, _events) = connect(&target, state.path());
    assert!(matches!(hypervisor.accelerator(), Err(HypervisorError::Unsupported(_))));
}

#[test]
fn ten_thousand_domains_are_listed_completely() {
    let state = tempfile::tempdir().unwrap();
    let driver = state.path().join("driver.xml");
    let domains: String =
        (0..10_000).map(|number| test_domain(Uuid::from_u128(number), &format!("d{number}"))).collect();
    std::fs::write(&driver, format!("<node>{domains}</node>")).unwrap();
    let uri = format!("test://{}", driver.display());
    let target = Target::parse(&uri, state.path()).unwrap();
    let (hypervisor, _events) = connect(&target, state.path());
    let start = Instant::now();
    assert_eq!(hypervisor.domains().unwrap().len(), 10_000);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_guest_of_the_embedded_driver_boots_pauses_sleeps_and_resumes() {
    if !guest::in_a_process_of_its_own("a_guest_of_the_embedded_driver_boots_pauses_sleeps_and_resumes") {
        return;
    }
    let guest = Guest::new();
    let target = Target::parse("embed", guest.state()).unwrap();
    let (hypervisor, events) = connect(&target, guest.state());
    let uuid = guest.uuid();
    let changed = |event: &Event| *event == Event::Changed(uuid);

    let identity = hypervisor.identity().unwrap();
    assert_eq!(identity.uri, target.uri());
    assert_eq!(Target::from_recorded(&identity.uri), Ok(target));
    assert!(Uuid::parse_str(&identity.host_uuid).is_ok());

    let xml = guest.definition(&nasty_name(), &hypervisor.definition_profile());
    hypervisor.define(&xml).unwrap();
    wait_for_event(&events, changed);
    prove_metadata(&*hypervisor, uuid);

    hypervisor.start(uuid).unwrap();
    let running = described(&*hypervisor, uuid);
    assert_eq!(running.name, nasty_name());
    assert_eq!((running.power, running.reason.as_str()), (PowerState::Running, "booted"));
    wait_until("the guest boots", || guest.boots() == 1);
    guest.prove_it_is_confined(uuid);
    prove_metadata(&*hypervisor, uuid);

    hypervisor.pause(uuid).unwrap();
    assert_eq!(power(&*hypervisor, uuid), (PowerState::Paused, "user".to_owned()));
    let before = guest.ticks();
    hypervisor.unpause(uuid).unwrap();
    wait_until("the guest ticks again", || guest.ticks() > before);

    hypervisor.save(uuid).unwrap();
    let saved = described(&*hypervisor, uuid);
    assert_eq!((saved.power, saved.reason.as_str(), saved.has_managed_save), (PowerState::ShutOff, "saved", true));
    let before = guest.ticks();
    hypervisor.start(uuid).unwrap();
    wait_until("the guest ticks again", || guest.ticks() > before);
    assert_eq!(guest.boots(), 1, "it went on where it was");

    hypervisor.reboot(uuid, Reboot::Hard).unwrap();
    wait_until("the guest boots again", || guest.boots() == 2);

    hypervisor.power_off(uuid).unwrap();
    assert_eq!(power(&*hypervisor, uuid), (PowerState::ShutOff, "destroyed".to_owned()));
    assert!(matches!(hypervisor.power_off(uuid), Err(HypervisorError::InvalidState(_))));
    hypervisor.undefine(uuid).unwrap();
    wait_for_event(&events, |event| *event == Event::Undefined { uuid, kept: false });
    assert_eq!(hypervisor.domains(), Ok(Vec::new()));
    assert!(guest.disk().exists(), "undefining removes no storage");

    let found = hypervisor.accelerator().unwrap();
    if Path::new("/sys/module/kvm_pvm").exists() {
        assert_eq!(found, Accelerator::Tcg, "this KVM starts a guest and then gets nowhere");
    }
    let memory = guest.state().join("accelerator.json");
    assert!(memory.exists(), "it is remembered");
    let again = open(Target::parse("embed", guest.state()).unwrap(), guest.state(), None);
    assert_eq!(again.unwrap().accelerator(), Ok(found));
}

#[test]
fn a_daemon_that_dies_and_comes_back_is_connected_again() {
    let daemon = Daemon::start();
    let target = Target::parse(&daemon.socket(), daemon.directory()).unwrap();
    let (hypervisor, events) = connect(&target, daemon.directory());
    assert_eq!(hypervisor.identity().unwrap().host_uuid, daemon.host_uuid().to_string());

    daemon.kill();
    wait_for_event(&events, |event| matches!(event, Event::Disconnected(_)));
    assert!(matches!(hypervisor.ping(), Err(HypervisorError::Unreachable(_))));
    assert!(matches!(hypervisor.domains(), Err(HypervisorError::Unreachable(_))));

    daemon.restart();
    wait_for_event(&events, |event| *event == Event::Connected);
    hypervisor.ping().unwrap();
    let uuid = Uuid::new_v4();
    hypervisor.define(&daemon.definition(uuid)).unwrap();
    wait_for_event(&events, |event| *event == Event::Changed(uuid));
    hypervisor.undefine(uuid).unwrap();
}

#[test]
fn a_daemon_that_hangs_hangs_only_the_thread_that_asked() {
    let daemon = Daemon::start();
    let target = Target::parse(&daemon.socket(), daemon.directory()).unwrap();
    let (hypervisor, events) = connect(&target, daemon.directory());

    daemon.stop();
    let (sender, answer) = channel();
    let asker = Arc::clone(&hypervisor);
    std::thread::spawn(move || sender.send(asker.ping()));
    assert!(answer.recv_timeout(Duration::from_millis(500)).is_err());

    // Neither the event loop nor another connection is held up by it.
    let state = tempfile::tempdir().unwrap();
    let other = Target::parse("test:///default", state.path()).unwrap();
    let (other, other_events) = connect(&other, state.path());
    let uuid = Uuid::new_v4();
    other.define(&test_domain(uuid, "beside")).unwrap();
    wait_for_event(&other_events, |event| *event == Event::Changed(uuid));
    other.undefine(uuid).unwrap();

    daemon.go_on();
    assert_eq!(answer.recv_timeout(PATIENCE), Ok(Ok(())));
    assert!(events.try_recv().is_err(), "the connection was never lost");
}

#[test]
fn an_absent_daemon_is_reported_and_found_when_it_comes() {
    let state = tempfile::tempdir().unwrap();
    let daemon = Daemon::prepare();
    let target = Target::parse(&daemon.socket(), state.path()).unwrap();
    let hypervisor = open(target, state.path(), None).unwrap();
    let events = hypervisor.events();
    assert!(matches!(hypervisor.connect(), Err(HypervisorError::Unreachable(_))));
    daemon.restart();
    assert_eq!(events.recv_timeout(PATIENCE), Ok(Event::Connected));
    hypervisor.ping().unwrap();
}
