//! The host's block devices on a wire.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use instancefs::block::local::{LocalData, LocalDevice, LocalDevices, LocalError};
use instancefs::image::Format;
use instancefs::model::volume::record::{Exporter, LocalAttachment};
use instancefs::store::power_loss::Moment;
use uuid::Uuid;

use super::wire::{Act, Failure, Kind, Verdict, Wire, die};
use crate::devices::TestDevices;

/// See the module.
pub struct WiredDevices {
    pub inner: Arc<TestDevices>,
    pub wire: Arc<Wire>,
}

impl WiredDevices {
    fn call<T>(&self, name: &'static str, act: impl Fn() -> Result<T, LocalError>) -> Result<T, LocalError> {
        match self.wire.step(Kind::Block, name) {
            Verdict::Pass => act(),
            Verdict::Dead => Err(LocalError::Failed("the program is dead (a test killed it)".to_owned())),
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
                Failure::NoSpace => Err(LocalError::Unsupported("a test says that this host cannot".to_owned())),
                Failure::Quota => Err(LocalError::InUse("a test uses it".to_owned())),
                Failure::Io { applied: true } | Failure::Lost { applied: true } => {
                    let _nobody_hears = act();
                    Err(LocalError::Failed("Input/output error (a test)".to_owned()))
                }
                Failure::Refused | Failure::WrongState | Failure::Io { .. } | Failure::Lost { .. } => {
                    Err(LocalError::Failed("Input/output error (a test)".to_owned()))
                }
            },
        }
    }
}

impl LocalDevices for WiredDevices {
    fn can_attach(&self, format: Format) -> Result<(), LocalError> {
        self.call("can_attach", || self.inner.can_attach(format))
    }
    fn exporter(&self, volume: Uuid) -> Result<Option<Exporter>, LocalError> {
        self.call("exporter", || self.inner.exporter(volume))
    }
    fn export(&self, data: &LocalData<'_>) -> Result<Exporter, LocalError> {
        self.call("export", || self.inner.export(data))
    }
    fn end_export(&self, volume: Uuid) -> Result<(), LocalError> {
        self.call("end_export", || self.inner.end_export(volume))
    }
    fn find(&self, data: &LocalData<'_>, exporter: Option<&Exporter>) -> Result<Option<LocalDevice>, LocalError> {
        self.call("find", || self.inner.find(data, exporter))
    }
    fn attach(&self, data: &LocalData<'_>, exporter: Option<&Exporter>) -> Result<LocalDevice, LocalError> {
        self.call("attach", || self.inner.attach(data, exporter))
    }
    fn is_there(&self, volume: Uuid, local: &LocalAttachment) -> Result<bool, LocalError> {
        self.call("is_there", || self.inner.is_there(volume, local))
    }
    fn user(&self, volume: Uuid, local: &LocalAttachment) -> Result<Option<String>, LocalError> {
        self.call("user", || self.inner.user(volume, local))
    }
    fn detach(&self, volume: Uuid, local: &LocalAttachment) -> Result<(), LocalError> {
        self.call("detach", || self.inner.detach(volume, local))
    }
    fn grow(&self, volume: Uuid, local: &LocalAttachment, size_bytes: u64) -> Result<(), LocalError> {
        self.call("grow", || self.inner.grow(volume, local, size_bytes))
    }
    fn watch(&self, exporter: &Exporter) -> io::Result<Option<OwnedFd>> {
        self.inner.watch(exporter)
    }
}
