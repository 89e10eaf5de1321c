//! Block devices of a host for tests: a file for each exporter and each device, which say whose they are, so that they
//! outlive the program as those of a real host do.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use instancefs::block::local::{LocalData, LocalDevice, LocalDevices, LocalError};
use instancefs::image::Format;
use instancefs::model::volume::record::{Backing, Exporter, LocalAttachment};
use nix::sys::eventfd::EventFd;
use parking_lot::Mutex;
use uuid::Uuid;

/// See the module.
pub struct TestDevices {
    directory: PathBuf,
    /// Who uses all devices.
    pub user: Mutex<Option<String>>,
    /// Why there can be no devices.
    pub unsupported: Mutex<Option<String>>,
}

impl TestDevices {
    pub fn new(directory: PathBuf) -> TestDevices {
        TestDevices { directory, user: Mutex::default(), unsupported: Mutex::default() }
    }

    fn exporter_file(&self, volume: Uuid) -> PathBuf {
        self.directory.join(format!("exporter-{volume}"))
    }

    fn device_file(&self, volume: Uuid) -> PathBuf {
        self.directory.join(format!("device-{volume}"))
    }

    /// The host restarts, or somebody takes everything away.
    pub fn lose_all(&self) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }

    pub fn has_device(&self, volume: Uuid) -> bool {
        self.device_file(volume).exists()
    }

    pub fn has_exporter(&self, volume: Uuid) -> bool {
        self.exporter_file(volume).exists()
    }

    /// As a process that was killed: what it exported is still there, and answers nobody.
    pub fn kill_exporter(&self, volume: Uuid) {
        fs::remove_file(self.exporter_file(volume)).unwrap();
    }

    fn found(&self, volume: Uuid) -> Option<LocalDevice> {
        let device = self.device_file(volume);
        device.exists().then_some(LocalDevice { device, backing: Backing { device: 1, inode: 2 } })
    }
}

impl LocalDevices for TestDevices {
    fn can_attach(&self, _format: Format) -> Result<(), LocalError> {
        self.unsupported.lock().clone().map_or(Ok(()), |words| Err(LocalError::Unsupported(words)))
    }

    fn exporter(&self, volume: Uuid) -> Result<Option<Exporter>, LocalError> {
        let mountpoint = self.exporter_file(volume);
        Ok(mountpoint.exists().then_some(Exporter { pid: 1, started_at: 1, mountpoint }))
    }

    fn export(&self, data: &LocalData<'_>) -> Result<Exporter, LocalError> {
        fs::create_dir_all(&self.directory).unwrap();
        fs::write(self.exporter_file(data.volume), "exports it\n").unwrap();
        Ok(self.exporter(data.volume)?.expect("it was just made"))
    }

    fn end_export(&self, volume: Uuid) -> Result<(), LocalError> {
        assert!(!self.has_device(volume), "an exporter was ended under its device");
        let _there_may_be_none = fs::remove_file(self.exporter_file(volume));
        Ok(())
    }

    fn find(&self, data: &LocalData<'_>, _exporter: Option<&Exporter>) -> Result<Option<LocalDevice>, LocalError> {
        Ok(self.found(data.volume))
    }

    fn attach(&self, data: &LocalData<'_>, exporter: Option<&Exporter>) -> Result<LocalDevice, LocalError> {
        assert_eq!(exporter.is_some(), self.has_exporter(data.volume), "a device of what nobody exports");
        fs::create_dir_all(&self.directory).unwrap();
        fs::write(self.device_file(data.volume), "a device\n").unwrap();
        Ok(self.found(data.volume).expect("it was just made"))
    }

    fn is_there(&self, volume: Uuid, local: &LocalAttachment) -> Result<bool, LocalError> {
        Ok(local.device.is_some() && self.has_device(volume))
    }

    fn user(&self, _volume: Uuid, _local: &LocalAttachment) -> Result<Option<String>, LocalError> {
        Ok(self.user.lock().clone())
    }

    fn detach(&self, volume: Uuid, local: &LocalAttachment) -> Result<(), LocalError> {
        if let Some(user) = self.user(volume, local)? {
            return Err(LocalError::InUse(user));
        }
        let _there_may_be_none = fs::remove_file(self.device_file(volume));
        Ok(())
    }

    fn grow(&self, volume: Uuid, _local: &LocalAttachment, size_bytes: u64) -> Result<(), LocalError> {
        fs::write(self.device_file(volume), format!("a device of {size_bytes} bytes\n")).unwrap();
        Ok(())
    }

    fn watch(&self, exporter: &Exporter) -> io::Result<Option<OwnedFd>> {
        // It never becomes readable: who wants an exporter dead begins another life.
        let lives = exporter.mountpoint.exists();
        Ok(if lives { Some(OwnedFd::from(EventFd::new()?)) } else { None })
    }
}
