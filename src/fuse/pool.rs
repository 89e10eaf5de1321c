//! A few threads for disk reads, which a request thread must never wait for, and those reads.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crossbeam_channel::{Sender, unbounded};

const THREADS: usize = 3;

type Work = Box<dyn FnOnce() + Send>;

/// The threads; they end when it is dropped.
pub struct Pool {
    sender: Sender<Work>,
}

impl Pool {
    /// Starts the threads.
    pub fn start() -> std::io::Result<Pool> {
        let (sender, receiver) = unbounded::<Work>();
        for number in 0..THREADS {
            let receiver = receiver.clone();
            std::thread::Builder::new().name(format!("disk-{number}")).spawn(move || {
                for work in receiver {
                    work();
                }
            })?;
        }
        Ok(Pool { sender })
    }

    /// Runs this soon.
    pub fn run(&self, work: impl FnOnce() + Send + 'static) {
        // Fails only when every thread is gone; dropping the work then drops its reply, which answers `EIO`.
        let _ = self.sender.send(Box::new(work));
    }
}

/// Up to `size` bytes; fewer only at the end.
pub fn read_fully(file: &File, offset: u64, size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    let mut filled = 0;
    while filled < size {
        match file.read_at(&mut bytes[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}
