//! The kernel's edge: the only room that knows fuser. Requests in, replies out, no domain rules.
//!
//! - [`Mount`] starts and ends it.
//! - `filesystem` translates requests, with what `edge` holds; `handle` holds open files, `inode` says what the kernel may believe.
//! - `acl` writes the access control lists that the kernel decides by.
//! - `announce` takes the inventory's changes to the kernel: it invalidates, queues announcements (`queue`), and wakes
//!   whoever polls (`watch`).
//! - `child` keeps the [`announcer`] process alive, which repeats changes as file operations through the mount (`job`).
//!
//! No thread of this process ever touches the mount: one that waits for an answer of its own process makes the process
//! unkillable.

mod acl;
mod announce;
pub mod announcer;
mod caller;
mod child;
mod device;
mod edge;
mod filesystem;
mod fusermount;
mod handle;
mod inode;
mod job;
mod lender;
mod pool;
mod published;
mod queue;
mod read;
mod told;
mod watch;
mod xattr;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use crossbeam_channel::unbounded;
use fuser::{Config, Session, SessionACL};
use parking_lot::{Condvar, Mutex};

use self::announce::{Publisher, Stale, invalidate};
use self::caller::Callers;
use self::child::Announcer;
pub use self::child::OnAnnouncer;
use self::device::{Connection, Mounted, mount_at};
pub use self::device::{open as open_device, take_away};
use self::edge::Edge;
use self::filesystem::Frontend;
use self::handle::Handles;
use self::lender::Lender;
use self::pool::Pool;
use self::queue::Queue;
use self::told::Told;
use self::watch::{Pollers, Versions};
use crate::inventory::Change;
use crate::inventory::metrics::Backlog;
use crate::privilege::Privilege;
use crate::tree::Interface;

/// The name of the source and of the file system's subtype in the table of mounts.
pub const NAME: &str = "instancefs";

/// More threads cost locality and win nothing, not even three, of which the kernel wakes now one and now another: no request
/// is waited for in them, but for one at a time that writes data after it has answered (see [`Lender`]).
const SESSION_THREADS: usize = 2;
/// The name of the thread that ends with the connection.
const SESSION: &str = "session";

/// How to mount.
pub struct Options {
    /// Where.
    pub mountpoint: PathBuf,
    /// Who mounts, and how then: see [`Privilege`].
    pub privilege: Privilege,
    /// Refuse every request that would change something, `EROFS`.
    pub read_only: bool,
    /// Raise inotify events for changes, by an announcer process.
    pub announce: bool,
    /// The program whose subcommand [`announcer::SUBCOMMAND`] is [`announcer::main`]; `None`: this one.
    pub program: Option<PathBuf>,
    /// Is told each time the announcer begins to work, and why it has ended. Called from a thread of its own.
    pub on_announcer: OnAnnouncer,
}

#[derive(Default)]
struct End {
    result: Mutex<Option<Result<(), String>>>,
    came: Condvar,
}

/// A mounted tree. Dropping it leaves the mount as it is: only [`Mount::stop`] unmounts.
pub struct Mount {
    edge: Arc<Edge>,
    mounted: Mounted,
    announcer: Option<Arc<Announcer>>,
    end: Arc<End>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Mount {
    /// Mounts and serves. The initial content's names have to be published in the interface before this, or their
    /// changes be in the channel: those are published without events.
    pub fn start(
        interface: Arc<dyn Interface>,
        changes: Receiver<Arc<Vec<Change>>>,
        options: Options,
    ) -> io::Result<Mount> {
        let queue = Arc::new(Queue::default());
        let edge = Arc::new(Edge {
            interface,
            read_only: options.read_only,
            announce: options.announce,
            handles: Handles::new(),
            versions: Versions::default(),
            pollers: Pollers::default(),
            told: Told::default(),
            queue: queue.clone(),
            callers: Callers::new(options.privilege),
            pool: Pool::start()?,
            kernel: OnceLock::new(),
            stopping: AtomicBool::new(false),
            lender: Lender::new(),
        });
        let (stale, stale_names) = unbounded();
        let publisher = Arc::new(Publisher::new(edge.clone(), stale));
        for batch in changes.try_iter() {
            publisher.publish_names(&batch);
        }
        // No kernel has cached anything yet.
        stale_names.try_iter().for_each(drop);

        let (connection, mounted) = mount_at(&options.mountpoint, NAME, options.privilege)?;
        let mut config = Config::default();
        config.n_threads = Some(SESSION_THREADS);
        config.clone_fd = false;
        let frontend = Frontend { edge: edge.clone() };
        let session = match Session::from_fd(frontend, connection, SessionACL::All, config) {
            Ok(session) => session,
            Err(error) => {
                mounted.unmount()?;
                return Err(error);
            }
        };
        let announcer = options.announce.then(|| {
            let program = options.program.unwrap_or_else(|| PathBuf::from("/proc/self/exe"));
            Arc::new(Announcer::new(program, mounted.clone(), queue))
        });
        let mount = Mount { edge, mounted, announcer, end: Arc::default(), threads: Mutex::default() };
        if let Err(error) = mount.start_threads(session, &publisher, changes, stale_names, options.on_announcer) {
            mount.stop()?;
            return Err(error);
        }
        Ok(mount)
    }

    fn start_threads(
        &self,
        session: Session<Frontend>,
        publisher: &Arc<Publisher>,
        changes: Receiver<Arc<Vec<Change>>>,
        stale_names: crossbeam_channel::Receiver<Stale>,
        on_announcer: OnAnnouncer,
    ) -> io::Result<()> {
        let spawn =
            |name: &str, body: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name(name.to_owned()).spawn(body);
        let notifier = session.notifier();
        let _ = self.edge.kernel.set(notifier.clone());
        let end = self.end.clone();
        let serve = move || {
            let result = session.run().map_err(|error| error.to_string());
            *end.result.lock() = Some(result);
            end.came.notify_all();
        };
        let mut threads = self.threads.lock();
        threads.push(spawn(SESSION, Box::new(serve))?);
        let kernel = notifier.clone();
        // Not joined: the kernel may keep it waiting for a lock for as long as a user likes. It ends with its channel.
        spawn("invalidation", Box::new(move || invalidate(stale_names, &kernel)))?;
        let publish = publisher.clone();
        threads.push(spawn("publisher", Box::new(move || publish.run(&changes, &notifier)))?);
        let dispatch = publisher.clone();
        let announcer = self.announcer.clone();
        threads.push(spawn("dispatcher", Box::new(move || dispatch.dispatch(announcer.as_deref())))?);
        if let Some(announcer) = self.announcer.clone() {
            threads.push(spawn("supervisor", Box::new(move || announcer.supervise(&on_announcer)))?);
        }
        Ok(())
    }

    /// What is still to be announced. Returns at once.
    pub fn backlog(&self) -> Backlog {
        self.edge.queue.backlog()
    }

    /// Waits until it is unmounted, by whomever.
    pub fn wait(&self) -> io::Result<()> {
        let mut result = self.end.result.lock();
        loop {
            match &*result {
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => return Err(io::Error::other(error.clone())),
                None => self.end.came.wait(&mut result),
            }
        }
    }

    /// Ends it: the announcer first, so that nothing of ours is inside, then the mount, also while files in it are open.
    /// Requests under way are answered with `ECONNABORTED`. May be called again.
    pub fn stop(&self) -> io::Result<()> {
        self.edge.stopping.store(true, Ordering::Release);
        if let Some(announcer) = &self.announcer {
            announcer.kill();
        }
        let connection = self.mounted.unmount()?;
        if connection == Connection::Lingering {
            // Who still has a file open is served until this process ends, and not waited for.
            self.end.result.lock().get_or_insert(Ok(()));
            self.end.came.notify_all();
        }
        self.edge.queue.stop();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if connection == Connection::Lingering && name == SESSION {
                continue;
            }
            if thread.join().is_err() {
                log::error!("the thread {name} has panicked");
            }
        }
        self.edge.handles.close_all();
        Ok(())
    }
}
