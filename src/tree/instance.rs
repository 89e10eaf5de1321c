//! The files of an instance.

use super::account::{group, group_name, user, user_name};
use super::attribute::{KeyFile, Read, Row, Type, Write};
use super::directory::metadata;
use super::rows::{document, free_directory, read_only, row, verb, with_read, writable};
use super::value::{
    boolean, filled, instance_name, malformed, memory_bytes, metadata_key, number, one, root_disk_bytes, vcpus,
};
use super::{bin, errors, spec};
use crate::inventory::Instance;
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::change::InstanceChange;
use crate::model::domain::ConsoleDevice;
use crate::model::instance::{Word, available};
use crate::model::reason::Reason;
use crate::model::task::Operation;
use crate::model::volume::VolumeOperation;
use crate::workflow::request::DOCUMENT;

/// The rows; ids are fixed for ever.
pub type InstanceRow = Row<Instance, InstanceChange>;

/// `console.log`, and all pieces of the log.
pub const CONSOLE_LOG: u8 = 27;
/// `console.log.1`
pub const FORMER_CONSOLE_LOG: u8 = 59;

/// `volumes`
pub const VOLUMES: u8 = 63;
/// The serial of the link that a volume has while it is being attached.
pub const COMING: u32 = 0;

/// The table.
pub static ROWS: &[InstanceRow] = &[
    writable(
        row(
            1,
            "name",
            0o660,
            Type::Text,
            "The libvirt name, unique on the host. Changes in a draft and while stopped.",
        ),
        |instance| instance.name().to_owned(),
        |value, _| instance_name(value).map(InstanceChange::Name),
    ),
    writable(
        row(2, "description", 0o660, Type::Text, "Free text of one line; empty clears it. Mirrored into the domain."),
        |instance| instance.record.description.clone(),
        |value, _| Ok(InstanceChange::Description(value.to_owned())),
    ),
    writable(
        row(
            3,
            "state",
            0o660,
            Type::Word,
            "What the instance is; write the word that it should become. The write waits up to the settle window for \
             the end of the work, and a failure is its errno; longer work goes on as a task.",
        ),
        |instance| instance.observed().state.word().to_owned(),
        |value, _| Word::parse(filled(value)?).map(InstanceChange::State),
    ),
    read_only(
        row(4, "state_available", 0o440, Type::Word, "The words that a write to state would be allowed now."),
        |instance| available(&instance.situation(&Caller::daemon(), None)).join(" "),
    ),
    read_only(
        row(
            5,
            "state_reason",
            0o440,
            Type::Word,
            "Why it is so, as libvirt says: booted, ioerror, crashed, watchdog, ...",
        ),
        |instance| instance.observed().reason,
    ),
    read_only(
        row(
            6,
            "task",
            0o440,
            Type::Word,
            "The operation under way: building, starting, stopping, ...; empty when idle.",
        ),
        |instance| instance.task.as_ref().map_or("", |task| task.operation.task_word().word()).to_owned(),
    ),
    read_only(
        row(7, "progress", 0o440, Type::Number("percent"), "How far the operation is; empty when idle."),
        |instance| instance.task.as_ref().map_or_else(String::new, |task| task.progress.to_string()),
    ),
    with_read(
        row(8, "last_task", 0o777, Type::Link, "The latest operation. Absent until there was one."),
        Read::Link(|instance| instance.record.last_task.map(|id| format!("../../tasks/{id}"))),
    ),
    writable(
        row(
            9,
            "locked",
            0o660,
            Type::Boolean,
            "1 refuses every change through this tree, for everybody, root too. A lock by root is opened by root only; \
             root's 1 on an owner's lock raises it.",
        ),
        |instance| u8::from(instance.record.protection.lock.is_some()).to_string(),
        |value, _| boolean(value).map(InstanceChange::Locked),
    ),
    read_only(
        row(10, "locked_by", 0o440, Type::User, "Login name of who locked it; empty when unlocked."),
        |instance| instance.record.protection.lock.as_ref().map_or_else(String::new, |lock| lock.by.clone()),
    ),
    read_only(row(11, "locked_at", 0o440, Type::Time, "When it was locked; empty when unlocked."), |instance| {
        instance.record.protection.lock.as_ref().map_or_else(String::new, |lock| lock.at.to_string())
    }),
    read_only(row(12, "locked_level", 0o440, Type::Word, "owner or admin; empty when unlocked."), |instance| {
        instance.record.protection.lock.as_ref().map_or("", |lock| lock.level.word()).to_owned()
    }),
    writable(
        row(
            13,
            "locked_reason",
            0o660,
            Type::Text,
            "Why it is locked; written by whoever may lock. Unlocking clears it.",
        ),
        |instance| instance.record.protection.lock.as_ref().map_or_else(String::new, |lock| lock.reason.clone()),
        |value, _| Ok(InstanceChange::LockedReason(value.to_owned())),
    ),
    writable(
        row(14, "disable_terminate", 0o660, Type::Boolean, "1 refuses every kind of deletion, for everybody."),
        |instance| u8::from(instance.record.protection.disable_terminate).to_string(),
        |value, _| boolean(value).map(InstanceChange::DisableTerminate),
    ),
    read_only(
        row(
            15,
            "power_state",
            0o440,
            Type::Word,
            "running, paused, pmsuspended, shutoff or crashed; empty in a draft.",
        ),
        |instance| instance.domain.as_ref().map_or("", |domain| domain.power.word()).to_owned(),
    ),
    read_only(row(16, "host", 0o440, Type::Text, "The host that it lives on."), |_| {
        nix::unistd::gethostname().map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned())
    }),
    read_only(row(17, "created_at", 0o440, Type::Time, "When instancefs made it or first saw it."), |instance| {
        instance.record.created_at.to_string()
    }),
    read_only(row(18, "updated_at", 0o440, Type::Time, "When it last changed."), |instance| {
        instance.record.updated_at.to_string()
    }),
    read_only(
        row(19, "launched_at", 0o440, Type::Time, "When it last started, as far as was seen; else empty."),
        |instance| instance.record.launched_at.map_or_else(String::new, |time| time.to_string()),
    ),
    writable(
        row(20, "owner", 0o640, Type::User, "Whose it is; root may change it."),
        |instance| user_name(instance.record.ownership.owner),
        |value, _| user(value).map(InstanceChange::Owner),
    ),
    writable(
        row(21, "project", 0o640, Type::Group, "The group that shares it; nogroup for none. Root may change it."),
        |instance| group_name(instance.record.ownership.project),
        |value, _| group(value).map(InstanceChange::Project),
    ),
    writable(
        row(22, "image", 0o660, Type::Object, "The image of its root disk; written in a draft."),
        |instance| instance.record.image.map_or_else(String::new, |id| id.to_string()),
        |value, resolver| resolver.image(filled(value)?).map(InstanceChange::Image),
    ),
    writable(
        row(23, "vcpus", 0o660, Type::Number(""), "Virtual CPUs; written in a draft and while stopped."),
        |instance| instance.record.vcpus.to_string(),
        |value, _| vcpus(filled(value)?).map(InstanceChange::Vcpus),
    ),
    writable(
        row(
            24,
            "memory_bytes",
            0o660,
            Type::Number("bytes"),
            "Memory, a multiple of 1024; written in a draft and while stopped.",
        ),
        |instance| instance.record.memory_bytes.to_string(),
        |value, _| memory_bytes(filled(value)?).map(InstanceChange::MemoryBytes),
    ),
    writable(
        row(
            25,
            "root_disk_bytes",
            0o660,
            Type::Number("bytes"),
            "Size of the root disk; written in a draft, where empty means the image's size, and while stopped, when it \
             only grows. Empty if instancefs did not make the disk.",
        ),
        |instance| instance.record.root_disk_bytes.map_or_else(String::new, |bytes| bytes.to_string()),
        |value, _| root_disk_bytes(filled(value)?).map(InstanceChange::RootDiskBytes),
    ),
    writable(
        row(
            26,
            "stop_timeout_seconds",
            0o660,
            Type::Number("seconds"),
            "How long stopping waits for the guest before it powers off.",
        ),
        |instance| instance.record.stop_timeout_seconds.to_string(),
        |value, _| {
            let seconds = number(filled(value)?, 0, 86_400, "seconds")?;
            Ok(InstanceChange::StopTimeoutSeconds(u32::try_from(seconds).map_err(|_| malformed("too long"))?))
        },
    ),
    with_read(
        row(
            CONSOLE_LOG,
            "console.log",
            0o440,
            Type::Document("text"),
            "What the guest printed on its serial console. A stream of 4 MiB: after so many it goes on in a new file, \
             and the full one is console.log.1. EOPNOTSUPP if the definition names no serial log.",
        ),
        Read::Stream,
    ),
    document(
        row(
            28,
            DOCUMENT,
            0o660,
            Type::Document("JSON"),
            "What can be written, as one document; see instances.schema.json. Written, it is taken or refused as a \
             whole; keys that are absent stay.",
        ),
        spec::render,
        Write::Spec,
    ),
    with_read(
        row(
            29,
            "domain.xml",
            0o440,
            Type::Document("XML"),
            "The definition last seen from libvirt; absent until first fetched.",
        ),
        Read::Definition,
    ),
    with_read(
        row(
            30,
            "last_error",
            0o440,
            Type::Text,
            "ok, or the last refusal or failure: time, login, file, errno, reason.",
        ),
        Read::Document(|instance| errors::last(&instance.record.errors)),
    ),
    with_read(
        row(31, "errors", 0o440, Type::Document("lines"), "The last 16 refusals and failures, the newest last."),
        Read::Document(|instance| errors::all(&instance.record.errors)),
    ),
    verb(
        row(32, "reboot", 0o220, Type::Word, "Write soft to ask the guest to restart, hard to press its reset button."),
        |value, _| match filled(value)? {
            "soft" => Ok(InstanceChange::RebootSoft),
            "hard" => Ok(InstanceChange::RebootHard),
            _ => Err(malformed("write soft or hard")),
        },
    ),
    verb(
        row(33, "reset_state", 0o220, Type::Boolean, "1, by root: give up a stuck task and look at libvirt again."),
        |value, _| one(value).map(|()| InstanceChange::ResetState),
    ),
    free_directory(
        row(
            34,
            "metadata",
            0o770,
            Type::Directory,
            "Free text under keys of your own, one file each; mirrored into the domain. Keys are made and removed \
             through spec.json.",
        ),
        |instance| metadata(&instance.record.metadata),
        |key, value, _| metadata_key(key).map(|key| InstanceChange::Metadata(key, Some(value.to_owned()))),
        |key| metadata_key(key).map(|key| InstanceChange::Metadata(key, None)),
    ),
    writable(
        row(
            40,
            "network",
            0o660,
            Type::Text,
            "What its network card is connected to: none, user (connections out only), bridge:NAME of this host, \
             network:NAME of libvirt; written in a draft. Empty if its definition says something else.",
        ),
        |instance| instance.record.network.as_ref().map_or_else(String::new, |network| network.to_string()),
        |value, _| filled(value)?.parse().map(InstanceChange::Network).map_err(Reason::Malformed),
    ),
    with_read(
        row(
            41,
            "addresses",
            0o440,
            Type::Document("lines"),
            "Where the guest can be reached, one address a line, as its agent says, else the host's DHCP leases or its \
             neighbour table. Looked up in the background while it runs; empty while it does not.",
        ),
        Read::Document(|instance| instance.addresses.shown().iter().map(|address| format!("{address}\n")).collect()),
    ),
    writable(
        row(42, "autostart", 0o660, Type::Boolean, "1 has it started with the host. Written at any time."),
        |instance| u8::from(instance.autostart()).to_string(),
        |value, _| boolean(value).map(InstanceChange::Autostart),
    ),
    writable(
        row(
            50,
            "flavor",
            0o660,
            Type::Text,
            "The flavor whose vcpus, memory_bytes and root_disk_bytes were copied last; written in a draft and while stopped, as a name or \
             a path in this tree. What is written afterwards deviates from it.",
        ),
        |instance| instance.record.flavor.clone().unwrap_or_default(),
        |value, resolver| resolver.flavor(filled(value)?).map(InstanceChange::Flavor),
    ),
    document(
        row(
            51,
            "user_data",
            0o660,
            Type::Document("text"),
            "What cloud-init in the guest is to read, at most 1 MiB; written in a draft, empty clears it.",
        ),
        |instance| instance.record.user_data.as_deref().unwrap_or_default().to_owned(),
        Write::Document(|text| {
            Ok(InstanceChange::UserData(if text.trim().is_empty() { None } else { Some(text.into()) }))
        }),
    ),
    with_read(
        row(
            FORMER_CONSOLE_LOG,
            "console.log.1",
            0o440,
            Type::Document("text"),
            "The 4 MiB of the console log before those; absent until there were so many.",
        ),
        Read::Stream,
    ),
    with_read(row(60, "console", 0o550, Type::Directory, "Ways to the guest's consoles."), Read::Directory),
    with_read(
        row(
            61,
            "console/serial",
            0o440,
            Type::Text,
            "Each read makes a socket for its reader, and gives its path: socat -,raw,echo=0,escape=0x1d \
             UNIX-CONNECT:$(cat console/serial). It takes one connection, is nobody else's to open, and ends after 10 \
             minutes, when the guest stops and when the instance changes hands. One client at a time. EINVAL while \
             the guest does not run, EOPNOTSUPP without a serial console in the definition.",
        ),
        Read::Console(ConsoleDevice::Serial),
    ),
    with_read(
        row(
            62,
            "console/vnc",
            0o440,
            Type::Text,
            "The same for the guest's screen, which speaks RFB: socat TCP-LISTEN:5900,bind=127.0.0.1 \
             UNIX-CONNECT:$(cat console/vnc) lets one VNC viewer in. EOPNOTSUPP without VNC graphics in the \
             definition.",
        ),
        Read::Console(ConsoleDevice::Vnc),
    ),
    with_read(
        row(
            VOLUMES,
            "volumes",
            0o770,
            Type::Directory,
            "The volumes that it has: symlinks, named by their devices in the guest. ln -s ../../../volumes/UUID DEVICE \
             attaches one; writing to the volume's detach takes it away.",
        ),
        Read::Links(volumes),
    ),
    with_read(
        row(70, "class", 0o440, Type::Word, bin::CLASS),
        Read::Sometimes(|instance| bin::class(Class::Instance, instance.bin())),
    ),
    with_read(
        row(71, "deleted_at", 0o440, Type::Time, bin::DELETED_AT),
        Read::Sometimes(|instance| bin::deleted_at(instance.bin())),
    ),
    with_read(
        row(72, "deleted_by", 0o440, Type::User, bin::DELETED_BY),
        Read::Sometimes(|instance| bin::deleted_by(instance.bin())),
    ),
    InstanceRow {
        write: Write::Change(|value, _| bin::expiry(value).map(InstanceChange::ExpiresAt)),
        ..with_read(
            row(73, "expires_at", 0o660, Type::Time, bin::EXPIRES_AT),
            Read::Sometimes(|instance| bin::expires_at(instance.bin())),
        )
    },
];

/// The links in `volumes/`: to what it has, and to what it is about to have.
fn volumes(instance: &Instance) -> Vec<KeyFile> {
    let link = |serial, device: &str, value| KeyFile { serial, name: device.to_owned(), value, writer: None };
    let held = instance.record.volumes.iter();
    let mut links: Vec<_> = held.map(|(device, entry)| link(entry.serial, device, entry.value.to_string())).collect();
    if let Some(Operation::Volume(VolumeOperation::Attach { device: Some(device), .. })) =
        instance.task.as_ref().map(|task| &task.operation)
        && instance.record.volumes.get(device).is_none()
    {
        links.push(link(COMING, device, String::new()));
    }
    links
}
