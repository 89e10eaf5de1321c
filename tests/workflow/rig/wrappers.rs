//! What an operation works with, on a [`Wire`].

use std::fs::File;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use instancefs::block::{BlockBackend, BlockError, DiskRecord, FillFile, NewDisk, NewSeed, VolumeBackend};
use instancefs::block::{DataRecord, DiskSource, Examined, ExistingData, NewData, VolumeData, Watch};
use instancefs::hypervisor::definition::{AttachedDisk, Profile};
use instancefs::hypervisor::simulated::SimulatedHypervisor;
use instancefs::hypervisor::{
    Accelerator, AddressSource, ConsoleDevice, Domain, Event, Hypervisor, HypervisorError, Identity, Networks, Places,
    Reboot,
};
use instancefs::model::image::Format;
use instancefs::store::power_loss::Moment;
use instancefs::store::{Change, Committed, Compare, Record, Revision, Store, StoreError};
use serde_json::json;
use uuid::Uuid;

use super::wire::{Act, Failure, Kind, Verdict, Wire, die};

/// A simulated hypervisor on a wire.
pub struct WiredHypervisor {
    pub inner: Arc<SimulatedHypervisor>,
    pub wire: Arc<Wire>,
}

impl WiredHypervisor {
    fn call<T>(&self, name: &'static str, act: impl Fn() -> Result<T, HypervisorError>) -> Result<T, HypervisorError> {
        match self.wire.step(Kind::Hypervisor, name) {
            Verdict::Pass => act(),
            Verdict::Dead => Err(gone()),
            Verdict::Act(Act::Die(moment)) => {
                if moment == Moment::After {
                    let _nobody_hears = act();
                    self.wire.kill();
                }
                die()
            }
            Verdict::Act(Act::Meanwhile(somebody)) => {
                let result = act();
                somebody();
                result
            }
            Verdict::Act(Act::Fail(failure)) => match failure {
                Failure::WrongState => Err(HypervisorError::InvalidState("a test says: not in this state".to_owned())),
                Failure::Refused | Failure::NoSpace | Failure::Quota | Failure::Io { .. } => {
                    Err(HypervisorError::Failed("a test says no".to_owned()))
                }
                Failure::Lost { applied } => {
                    if applied {
                        let _nobody_hears = act();
                    }
                    self.inner.control(json!({ "do": "disconnect", "reason": "a test cut it" }));
                    self.inner.control(json!({ "do": "reconnect" }));
                    Err(HypervisorError::Unreachable("a test cut it".to_owned()))
                }
            },
        }
    }
}

fn gone() -> HypervisorError {
    HypervisorError::Unreachable("the program is dead (a test killed it)".to_owned())
}

impl Hypervisor for WiredHypervisor {
    fn identity(&self) -> Result<Identity, HypervisorError> {
        self.call("identity", || self.inner.identity())
    }
    fn events(&self) -> Receiver<Event> {
        self.inner.events()
    }
    fn connect(&self) -> Result<(), HypervisorError> {
        self.call("connect", || self.inner.connect())
    }
    fn ping(&self) -> Result<(), HypervisorError> {
        self.call("ping", || self.inner.ping())
    }
    fn domains(&self) -> Result<Vec<Domain>, HypervisorError> {
        self.call("domains", || self.inner.domains())
    }
    fn domain(&self, uuid: Uuid) -> Result<Option<Domain>, HypervisorError> {
        self.call("domain", || self.inner.domain(uuid))
    }
    fn definition(&self, uuid: Uuid) -> Result<String, HypervisorError> {
        self.call("definition", || self.inner.definition(uuid))
    }
    fn live_definition(&self, uuid: Uuid) -> Result<Option<String>, HypervisorError> {
        self.call("live_definition", || self.inner.live_definition(uuid))
    }
    fn define(&self, xml: &str) -> Result<(), HypervisorError> {
        self.call("define", || self.inner.define(xml))
    }
    fn undefine(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.call("undefine", || self.inner.undefine(uuid))
    }
    fn start(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.call("start", || self.inner.start(uuid))
    }
    fn shutdown(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.call("shutdown", || self.inner.shutdown(uuid))
    }
    fn power_off(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.call("power_off", || self.inner.power_off(uuid))
    }
    fn pause(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.call("pause", || self.inner.pause(uuid))
    }
    fn unpause(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.call("unpause", || self.inner.unpause(uuid))
    }
    fn save(&self, uuid: Uuid) -> Result<(), HypervisorError> {
        self.call("save", || self.inner.save(uuid))
    }
    fn reboot(&self, uuid: Uuid, kind: Reboot) -> Result<(), HypervisorError> {
        self.call("reboot", || self.inner.reboot(uuid, kind))
    }
    fn open_console(&self, uuid: Uuid, device: ConsoleDevice) -> Result<UnixStream, HypervisorError> {
        self.call("open_console", || self.inner.open_console(uuid, device))
    }
    fn rename(&self, uuid: Uuid, name: &str) -> Result<(), HypervisorError> {
        self.call("rename", || self.inner.rename(uuid, name))
    }
    fn set_metadata(&self, uuid: Uuid, xml: Option<&str>) -> Result<(), HypervisorError> {
        self.call("set_metadata", || self.inner.set_metadata(uuid, xml))
    }
    fn set_description(&self, uuid: Uuid, text: Option<&str>) -> Result<(), HypervisorError> {
        self.call("set_description", || self.inner.set_description(uuid, text))
    }
    fn set_autostart(&self, uuid: Uuid, on: bool) -> Result<(), HypervisorError> {
        self.call("set_autostart", || self.inner.set_autostart(uuid, on))
    }
    fn set_hardware(&self, uuid: Uuid, vcpus: Option<u32>, memory_bytes: Option<u64>) -> Result<(), HypervisorError> {
        self.call("set_hardware", || self.inner.set_hardware(uuid, vcpus, memory_bytes))
    }
    fn attach_disk(&self, uuid: Uuid, disk: &AttachedDisk, places: Places) -> Result<(), HypervisorError> {
        self.call("attach_disk", || self.inner.attach_disk(uuid, disk, places))
    }
    fn detach_disk(&self, uuid: Uuid, device: &str, places: Places) -> Result<(), HypervisorError> {
        self.call("detach_disk", || self.inner.detach_disk(uuid, device, places))
    }
    fn resize_disk(&self, uuid: Uuid, device: &str, size_bytes: u64) -> Result<(), HypervisorError> {
        self.call("resize_disk", || self.inner.resize_disk(uuid, device, size_bytes))
    }
    fn addresses(&self, uuid: Uuid, source: AddressSource) -> Result<Vec<IpAddr>, HypervisorError> {
        self.call("addresses", || self.inner.addresses(uuid, source))
    }
    fn networks(&self) -> Networks {
        self.inner.networks()
    }
    fn accelerator(&self) -> Result<Accelerator, HypervisorError> {
        self.call("accelerator", || self.inner.accelerator())
    }
    fn definition_profile(&self) -> Profile {
        self.inner.definition_profile()
    }
}

/// Any block backend on a wire.
pub struct WiredBlock {
    pub inner: Arc<dyn BlockBackend>,
    pub wire: Arc<Wire>,
}

impl WiredBlock {
    fn call<T>(&self, name: &'static str, act: impl Fn() -> Result<T, BlockError>) -> Result<T, BlockError> {
        match self.wire.step(Kind::Block, name) {
            Verdict::Pass => act(),
            Verdict::Dead => Err(BlockError::Failed("the program is dead (a test killed it)".to_owned())),
            Verdict::Act(Act::Die(moment)) => {
                if moment == Moment::After {
                    let _nobody_hears = act();
                    self.wire.kill();
                }
                die()
            }
            Verdict::Act(Act::Meanwhile(somebody)) => {
                let result = act();
                somebody();
                result
            }
            Verdict::Act(Act::Fail(failure)) => match failure {
                Failure::NoSpace => Err(BlockError::NoSpace("the disks' place (a test)".to_owned())),
                Failure::Quota => Err(BlockError::Quota("the owner (a test)".to_owned())),
                Failure::Io { applied: true } | Failure::Lost { applied: true } => {
                    let _nobody_hears = act();
                    Err(BlockError::Failed("Input/output error (a test)".to_owned()))
                }
                Failure::Refused | Failure::WrongState | Failure::Io { .. } | Failure::Lost { .. } => {
                    Err(BlockError::Failed("Input/output error (a test)".to_owned()))
                }
            },
        }
    }
}

impl BlockBackend for WiredBlock {
    fn name(&self) -> &str {
        self.inner.name()
    }
    fn plan(&self, disk: &NewDisk<'_>) -> DiskRecord {
        self.inner.plan(disk)
    }
    fn create(&self, disk: &NewDisk<'_>) -> Result<DiskRecord, BlockError> {
        self.call("create", || self.inner.create(disk))
    }
    fn plan_seed(&self, seed: &NewSeed<'_>) -> DiskRecord {
        self.inner.plan_seed(seed)
    }
    fn create_seed(&self, seed: &NewSeed<'_>) -> Result<DiskRecord, BlockError> {
        self.call("create_seed", || self.inner.create_seed(seed))
    }
    fn grow(&self, record: &DiskRecord, size_bytes: u64) -> Result<(), BlockError> {
        self.call("grow", || self.inner.grow(record, size_bytes))
    }
    fn open(&self, record: &DiskRecord) -> Result<File, BlockError> {
        self.call("open", || self.inner.open(record))
    }
    fn format(&self, record: &DiskRecord) -> Format {
        self.inner.format(record)
    }
    fn create_again(&self, record: &DiskRecord, fill: FillFile<'_>) -> Result<(), BlockError> {
        self.call("create_again", || self.inner.create_again(record, fill))
    }
    fn path(&self, record: &DiskRecord) -> PathBuf {
        self.inner.path(record)
    }
    fn remove(&self, record: &DiskRecord) -> Result<(), BlockError> {
        self.call("remove", || self.inner.remove(record))
    }
    fn volumes(&self) -> &dyn VolumeBackend {
        self
    }
}

impl VolumeBackend for WiredBlock {
    fn plan_data(&self, new: &NewData<'_>) -> DataRecord {
        self.inner.volumes().plan_data(new)
    }
    fn create_data(&self, new: &NewData<'_>, watch: Watch<'_>) -> Result<Examined, BlockError> {
        self.call("create_data", || self.inner.volumes().create_data(new, watch))
    }
    fn remove_data(&self, record: &DataRecord) -> Result<(), BlockError> {
        self.call("remove_data", || self.inner.volumes().remove_data(record))
    }
    fn grow_data(&self, data: &VolumeData, size_bytes: u64, in_use: bool) -> Result<u64, BlockError> {
        self.call("grow_data", || self.inner.volumes().grow_data(data, size_bytes, in_use))
    }
    fn examine(&self, data: &VolumeData) -> Result<Examined, BlockError> {
        self.call("examine", || self.inner.volumes().examine(data))
    }
    fn adopt(&self, reference: &str, claimed: Option<Format>) -> Result<(ExistingData, Examined), BlockError> {
        self.call("adopt", || self.inner.volumes().adopt(reference, claimed))
    }
    fn source(&self, data: &VolumeData) -> DiskSource {
        self.inner.volumes().source(data)
    }
    fn prepare(&self, data: &VolumeData) -> Result<(), BlockError> {
        self.call("prepare", || self.inner.volumes().prepare(data))
    }
    fn open_data(&self, data: &VolumeData) -> Result<File, BlockError> {
        self.call("open_data", || self.inner.volumes().open_data(data))
    }
    fn holder(&self, data: &VolumeData) -> Result<Option<String>, BlockError> {
        self.call("holder", || self.inner.volumes().holder(data))
    }
    fn capacity(&self) -> Result<(u64, u64), BlockError> {
        self.inner.volumes().capacity()
    }
}

/// A store on a wire.
pub struct WiredStore {
    pub inner: Arc<dyn Store>,
    pub wire: Arc<Wire>,
}

impl WiredStore {
    fn alive(&self) -> Result<(), StoreError> {
        if self.wire.is_dead() { Err(powerless()) } else { Ok(()) }
    }
}

fn powerless() -> StoreError {
    StoreError::Failed("the program is dead (a test killed it)".to_owned())
}

impl Store for WiredStore {
    fn get(&self, key: &str) -> Result<Option<Record>, StoreError> {
        self.alive()?;
        self.inner.get(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Record>, StoreError> {
        self.alive()?;
        self.inner.list(prefix)
    }

    fn transact(&self, compares: &[Compare], changes: &[Change]) -> Result<Revision, StoreError> {
        match self.wire.step(Kind::Commit, "commit") {
            Verdict::Pass => self.inner.transact(compares, changes),
            Verdict::Dead | Verdict::Act(Act::Die(Moment::Before)) => Err(powerless()),
            Verdict::Act(Act::Die(Moment::After)) => {
                self.inner.transact(compares, changes)?;
                self.wire.kill();
                Err(powerless())
            }
            Verdict::Act(Act::Meanwhile(somebody)) => {
                somebody();
                Err(StoreError::Failed("a test says: not now".to_owned()))
            }
            Verdict::Act(Act::Fail(Failure::NoSpace | Failure::Quota)) => Err(StoreError::Full),
            Verdict::Act(Act::Fail(
                Failure::Refused | Failure::WrongState | Failure::Lost { .. } | Failure::Io { .. },
            )) => Err(StoreError::Failed("Input/output error (a test)".to_owned())),
        }
    }

    fn watch(&self, prefix: &str) -> Receiver<Committed> {
        if self.wire.is_dead() { channel().1 } else { self.inner.watch(prefix) }
    }
}
