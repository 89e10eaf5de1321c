//! Volumes as block devices of this host: a loop device, of another format than raw on what an exporter shows of it.

mod exporter;
mod loop_device;
mod process;
mod usage;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use loop_device::Access;

use crate::image::Format;
use crate::image::inspect;
use crate::image::qemu_img::{self, CheckFailure};
use crate::model::volume::record::{Backing, Exporter, LocalAttachment};
use crate::privilege::Privilege;

/// How long a device may take to go when nobody is seen to use it.
const GOING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);

/// Why there is no device, or why it stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// This host, or who we are on it, cannot; the sentence says what would help.
    #[error("{0}")]
    Unsupported(String),
    /// Somebody uses it; the sentence says who.
    #[error("{0}")]
    InUse(String),
    /// The data is not what it was, or damaged.
    #[error("{0}")]
    Damaged(String),
    /// The system or a tool failed, in its own words.
    #[error("{0}")]
    Failed(String),
}

impl LocalError {
    fn at(path: &Path) -> impl Fn(io::Error) -> LocalError + '_ {
        move |error| LocalError::Failed(format!("{}: {error}", path.display()))
    }
}

/// The data of a volume, which nobody else uses.
#[derive(Clone, Copy, Debug)]
pub struct LocalData<'a> {
    /// The volume.
    pub volume: Uuid,
    /// The file, opened for reading and writing; never opened again by its path.
    pub file: &'a File,
    /// The format of its bytes.
    pub format: Format,
}

/// A device that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalDevice {
    /// Its path.
    pub device: PathBuf,
    /// The file behind it.
    pub backing: Backing,
}

/// What makes block devices of this host. Every call can be repeated: it looks first.
pub trait LocalDevices: Send + Sync {
    /// Whether data of this format can become a device here.
    ///
    /// # Errors
    ///
    /// [`LocalError::Unsupported`] says what would be needed.
    fn can_attach(&self, format: Format) -> Result<(), LocalError>;
    /// The exporter of this volume that runs.
    ///
    /// # Errors
    ///
    /// It cannot be looked for.
    fn exporter(&self, volume: Uuid) -> Result<Option<Exporter>, LocalError>;
    /// Checks the data, and starts an exporter that outlives us; one that runs already is as good.
    ///
    /// # Errors
    ///
    /// [`LocalError::Damaged`] of data that does not pass, else why none runs.
    fn export(&self, data: &LocalData<'_>) -> Result<Exporter, LocalError>;
    /// Ends the volume's exporter and waits until it has written everything; removes what is left of one that has died.
    ///
    /// # Errors
    ///
    /// It goes on.
    fn end_export(&self, volume: Uuid) -> Result<(), LocalError>;
    /// The device that was made of this volume, on what its exporter shows if it has one.
    ///
    /// # Errors
    ///
    /// It cannot be looked for.
    fn find(&self, data: &LocalData<'_>, exporter: Option<&Exporter>) -> Result<Option<LocalDevice>, LocalError>;
    /// Makes the device; one that was made already is as good.
    ///
    /// # Errors
    ///
    /// Why there is none.
    fn attach(&self, data: &LocalData<'_>, exporter: Option<&Exporter>) -> Result<LocalDevice, LocalError>;
    /// Whether a recorded device is there and still the volume's.
    ///
    /// # Errors
    ///
    /// It cannot be looked for.
    fn is_there(&self, volume: Uuid, local: &LocalAttachment) -> Result<bool, LocalError>;
    /// Who uses the device, as a sentence.
    ///
    /// # Errors
    ///
    /// It cannot be looked for.
    fn user(&self, volume: Uuid, local: &LocalAttachment) -> Result<Option<String>, LocalError>;
    /// Takes exactly this device away; one that is gone, or somebody else's by now, is success.
    ///
    /// # Errors
    ///
    /// [`LocalError::InUse`] while somebody uses it.
    fn detach(&self, volume: Uuid, local: &LocalAttachment) -> Result<(), LocalError>;
    /// Lets the device have this size, in bytes. Of a file without an exporter the file has it already.
    ///
    /// # Errors
    ///
    /// Why it has not.
    fn grow(&self, volume: Uuid, local: &LocalAttachment, size_bytes: u64) -> Result<(), LocalError>;
    /// A descriptor that becomes readable when the exporter ends; `None` if it has ended.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    fn watch(&self, exporter: &Exporter) -> io::Result<Option<OwnedFd>>;
}

/// Those of this host.
pub struct HostDevices {
    /// Where exporters have a directory each.
    directory: PathBuf,
    privilege: Privilege,
}

impl HostDevices {
    /// Exporters are at home in directories below this one, which is made when it is needed.
    pub fn new(directory: PathBuf, privilege: Privilege) -> HostDevices {
        HostDevices { directory, privilege }
    }

    fn home(&self, volume: Uuid) -> PathBuf {
        self.directory.join(volume.to_string())
    }

    /// The file that a device is made of, or is to be.
    fn open_backing(&self, data: &LocalData<'_>, exporter: Option<&Exporter>) -> Result<File, LocalError> {
        match exporter {
            Some(exporter) => open_exported(&exporter.mountpoint),
            None => duplicate(data.file),
        }
    }

    /// The recorded device if it is there and still the volume's, opened.
    fn open_device(&self, volume: Uuid, local: &LocalAttachment) -> Result<Option<(PathBuf, File)>, LocalError> {
        let Some(path) = &local.device else { return Ok(None) };
        let file = match loop_device::open(path) {
            Ok(file) => file,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => return Ok(None),
            Err(error) => return Err(LocalError::at(path)(error)),
        };
        Ok(is_ours(volume, local, path, &file)?.then(|| (path.clone(), file)))
    }
}

/// Whether a device has our mark and our file behind it.
fn is_ours(volume: Uuid, local: &LocalAttachment, path: &Path, device: &File) -> Result<bool, LocalError> {
    match loop_device::status(device) {
        Ok(None) => Ok(false),
        Ok(Some(status)) => Ok(status.volume == Some(volume) && local.backing == Some(status.backing)),
        // The exporter behind it has died, and with it all answers but the kernel's own.
        Err(error) => match &local.exporter {
            Some(exporter) => Ok(loop_device::backing_path(path).as_ref() == Some(&exporter.mountpoint)),
            None => Err(LocalError::at(path)(error)),
        },
    }
}

/// The same open file again. What a loop device is made of has to be a regular one.
fn duplicate(file: &File) -> Result<File, LocalError> {
    let failed = |error: io::Error| LocalError::Failed(format!("its data cannot be used: {error}"));
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(LocalError::Unsupported("its data is no regular file, of which no device can be made".to_owned()));
    }
    file.try_clone().map_err(failed)
}

/// Opens what an exporter shows, which lies in a directory that only root can enter.
fn open_exported(path: &Path) -> Result<File, LocalError> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).map_err(LocalError::at(path))
}

impl LocalDevices for HostDevices {
    fn can_attach(&self, format: Format) -> Result<(), LocalError> {
        if !self.privilege.is_root() {
            return Err(LocalError::Unsupported(
                "only root can make block devices, and this tree was mounted by an ordinary user; attach it to an \
                 instance instead"
                    .to_owned(),
            ));
        }
        if !Path::new(loop_device::CONTROL).exists() {
            return Err(LocalError::Unsupported(format!(
                "this host has no {}; load the kernel module loop (modprobe loop) and write 1 again",
                loop_device::CONTROL
            )));
        }
        let is_installed = || {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).any(|directory| directory.join(exporter::PROGRAM).is_file())
        };
        match format {
            Format::Raw => Ok(()),
            Format::Qcow2 if is_installed() => Ok(()),
            Format::Qcow2 => Err(LocalError::Unsupported(format!(
                "a qcow2 volume needs {} to be a block device; install it (Debian: qemu-system-common) and write 1 again",
                exporter::PROGRAM
            ))),
        }
    }

    fn exporter(&self, volume: Uuid) -> Result<Option<Exporter>, LocalError> {
        let home = self.home(volume);
        exporter::find(&home).map_err(LocalError::at(&home))
    }

    fn export(&self, data: &LocalData<'_>) -> Result<Exporter, LocalError> {
        if let Some(running) = self.exporter(data.volume)? {
            return Ok(running);
        }
        let image = duplicate(data.file)?;
        inspect::examine(&image, Some(data.format)).map_err(|refusal| LocalError::Damaged(refusal.to_string()))?;
        let shown = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd()));
        qemu_img::check(&shown, &|| false).map_err(|failure| match failure {
            CheckFailure::Damaged(words) => LocalError::Damaged(format!(
                "its qcow2 data is damaged ({words}); repair it with qemu-img check -r all, or restore it"
            )),
            CheckFailure::Failed(words) => LocalError::Failed(words),
            CheckFailure::Cancelled => LocalError::Failed("given up".to_owned()),
        })?;
        exporter::start(&self.home(data.volume), image).map_err(LocalError::Failed)
    }

    fn end_export(&self, volume: Uuid) -> Result<(), LocalError> {
        exporter::end(&self.home(volume)).map_err(LocalError::Failed)
    }

    fn find(&self, data: &LocalData<'_>, exporter: Option<&Exporter>) -> Result<Option<LocalDevice>, LocalError> {
        let file = self.open_backing(data, exporter)?;
        let backing = loop_device::backing_of(&file).map_err(LocalError::at(Path::new("backing file")))?;
        let found = loop_device::find(data.volume, &file).map_err(LocalError::at(Path::new(loop_device::DEVICES)))?;
        Ok(found.map(|device| LocalDevice { device, backing }))
    }

    fn attach(&self, data: &LocalData<'_>, exporter: Option<&Exporter>) -> Result<LocalDevice, LocalError> {
        if let Some(found) = self.find(data, exporter)? {
            return Ok(found);
        }
        if let Some(exporter) = exporter {
            exporter::read_ahead(exporter);
        }
        let file = self.open_backing(data, exporter)?;
        let control = LocalError::at(Path::new(loop_device::CONTROL));
        let backing = loop_device::backing_of(&file).map_err(&control)?;
        let access = match exporter {
            None => Access::Direct,
            // Exports by FUSE of QEMU 7.2 mix up the bytes of writes that come while another one goes on, as direct ones do.
            Some(_) => Access::Cached,
        };
        let device = loop_device::make(data.volume, &file, access).map_err(&control)?;
        Ok(LocalDevice { device, backing })
    }

    fn is_there(&self, volume: Uuid, local: &LocalAttachment) -> Result<bool, LocalError> {
        Ok(self.open_device(volume, local)?.is_some())
    }

    fn user(&self, volume: Uuid, local: &LocalAttachment) -> Result<Option<String>, LocalError> {
        let Some((path, file)) = self.open_device(volume, local)? else { return Ok(None) };
        // Or it would be a user itself.
        drop(file);
        usage::user(&path).map_err(LocalError::at(&path))
    }

    fn detach(&self, volume: Uuid, local: &LocalAttachment) -> Result<(), LocalError> {
        if let Some(user) = self.user(volume, local)? {
            return Err(LocalError::InUse(user));
        }
        let Some(path) = &local.device else { return Ok(()) };
        let alone = match loop_device::open_alone(path) {
            Ok(alone) => alone,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO)) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                // Its number may be another volume's by now.
                return match self.is_there(volume, local)? {
                    true => {
                        Err(LocalError::InUse(format!("something that cannot be looked at uses {}", path.display())))
                    }
                    false => Ok(()),
                };
            }
            Err(error) => return Err(LocalError::at(path)(error)),
        };
        // Asked through the descriptor that is cleared: it cannot be another device meanwhile.
        if !is_ours(volume, local, path, &alone)? {
            return Ok(());
        }
        loop_device::clear(&alone).map_err(LocalError::at(path))?;
        drop(alone);
        let deadline = Instant::now() + GOING;
        while self.is_there(volume, local)? {
            if Instant::now() >= deadline {
                return Err(LocalError::InUse(format!(
                    "somebody has just opened {}, which goes when he closes it; write 0 again then",
                    path.display()
                )));
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn grow(&self, volume: Uuid, local: &LocalAttachment, size_bytes: u64) -> Result<(), LocalError> {
        let Some((path, device)) = self.open_device(volume, local)? else {
            return Err(LocalError::Failed(
                "its block device is gone; write 0 and then 1 to local_attach to make it again".to_owned(),
            ));
        };
        if let Some(exporter) = &local.exporter {
            let file = open_exported(&exporter.mountpoint)?;
            if file.metadata().map_err(LocalError::at(&path))?.len() < size_bytes {
                file.set_len(size_bytes).map_err(|error| {
                    LocalError::Failed(format!("{} cannot grow: {error}", exporter.mountpoint.display()))
                })?;
            }
        }
        loop_device::set_capacity(&device).map_err(LocalError::at(&path))
    }

    fn watch(&self, exporter: &Exporter) -> io::Result<Option<OwnedFd>> {
        process::watch(exporter)
    }
}
