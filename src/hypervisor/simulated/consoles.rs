//! Consoles of simulated guests: they print what is typed. A screen greets as QEMU's does.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::thread;

use uuid::Uuid;

use crate::hypervisor::{ConsoleDevice, HypervisorError};

/// The first bytes of an RFB server.
const GREETING: &[u8] = b"RFB 003.008\n";

struct Open {
    guest: Uuid,
    device: ConsoleDevice,
    socket: UnixStream,
    /// Alive as long as its client.
    client: Weak<()>,
}

/// The open consoles of all guests.
#[derive(Default)]
pub(super) struct Consoles {
    open: Vec<Open>,
}

impl Consoles {
    /// A serial console has one client at a time, as libvirt has it (`src/conf/virchrdev.c`).
    pub(super) fn open(&mut self, guest: Uuid, device: ConsoleDevice) -> Result<UnixStream, HypervisorError> {
        self.open.retain(|open| open.client.strong_count() > 0);
        if device == ConsoleDevice::Serial && self.open.iter().any(|open| open.guest == guest && open.device == device)
        {
            return Err(HypervisorError::Failed(
                "operation failed: Active console session exists for this domain".to_owned(),
            ));
        }
        let failed = |error: io::Error| HypervisorError::Failed(format!("no console: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let client = Arc::new(());
        self.open.push(Open {
            guest,
            device,
            socket: ours.try_clone().map_err(failed)?,
            client: Arc::downgrade(&client),
        });
        thread::Builder::new()
            .name("simulated-console".to_owned())
            .spawn(move || {
                if let Err(error) = echo(&ours, device) {
                    log::debug!("a simulated console's client went away: {error}");
                }
                let _closed = ours.shutdown(Shutdown::Both);
                drop(client);
            })
            .map_err(failed)?;
        Ok(theirs)
    }

    /// The guest's run has ended.
    pub(super) fn end(&mut self, guest: Uuid) {
        self.open.retain(|open| {
            if open.guest == guest {
                let _closed = open.socket.shutdown(Shutdown::Both);
            }
            open.guest != guest
        });
    }
}

fn echo(mut socket: &UnixStream, device: ConsoleDevice) -> io::Result<()> {
    match device {
        ConsoleDevice::Serial => {}
        ConsoleDevice::Vnc => socket.write_all(GREETING)?,
    }
    let mut buffer = [0; 4096];
    loop {
        match socket.read(&mut buffer)? {
            0 => return Ok(()),
            count => socket.write_all(&buffer[..count])?,
        }
    }
}
