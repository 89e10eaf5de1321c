//! The announcer as its parent sees it: started, fed, and started again when it dies.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::announcer::SUBCOMMAND;
use super::device::Mounted;
use super::job::{self, Job, Report};
use super::queue::Queue;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Who lived this long had no lasting trouble.
const HEALTHY: Duration = Duration::from_secs(30);

/// Is told whether the announcer works.
pub type OnAnnouncer = Box<dyn Fn(Result<(), String>) + Send>;

#[derive(Default)]
struct Process {
    child: Option<Child>,
    input: Option<ChildStdin>,
    stopping: bool,
}

/// The child process.
pub struct Announcer {
    program: PathBuf,
    mounted: Mounted,
    queue: Arc<Queue>,
    process: Mutex<Process>,
    stopped: Condvar,
}

impl Announcer {
    /// Not yet started.
    pub fn new(program: PathBuf, mounted: Mounted, queue: Arc<Queue>) -> Announcer {
        Announcer { program, mounted, queue, process: Mutex::default(), stopped: Condvar::new() }
    }

    /// Sends a job; false if it did not arrive.
    pub fn send(&self, job: &Job) -> bool {
        let Ok(line) = job::line(job) else { return false };
        let mut process = self.process.lock();
        process.input.as_mut().is_some_and(|input| input.write_all(&line).is_ok())
    }

    /// Keeps it alive until [`Announcer::kill`]. Has to be called by a thread that lives as long as the daemon: the child
    /// dies with the thread that started it.
    pub fn supervise(&self, on_announcer: &OnAnnouncer) {
        let mut pause = FIRST_PAUSE;
        loop {
            let started = Instant::now();
            let ended = match self.live(on_announcer) {
                Ok(status) => format!("it ended with {status}"),
                Err(error) => format!("it does not start: {error}"),
            };
            let mut process = self.process.lock();
            if process.stopping {
                return;
            }
            drop(process);
            log::warn!("announcer: {ended}; names and changes raise no inotify events until it is back");
            on_announcer(Err(ended));
            if started.elapsed() > HEALTHY {
                pause = FIRST_PAUSE;
            }
            process = self.process.lock();
            if !process.stopping {
                self.stopped.wait_for(&mut process, pause);
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One life of it.
    fn live(&self, on_announcer: &OnAnnouncer) -> std::io::Result<String> {
        let output = {
            let mut process = self.process.lock();
            if process.stopping {
                return Ok("the daemon's end".into());
            }
            let mut child = Command::new(&self.program)
                .arg(SUBCOMMAND)
                .arg(&self.mounted.path)
                .arg(self.mounted.device.to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .current_dir("/")
                .spawn()?;
            process.input = child.stdin.take();
            let output = child.stdout.take();
            process.child = Some(child);
            output
        };
        if let Some(output) = output {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { break };
                match serde_json::from_str(&line) {
                    Ok(Report::Ready) => {
                        let process = self.process.lock().child.as_ref().map(Child::id);
                        if let Some(process) = process {
                            self.queue.open(process);
                            on_announcer(Ok(()));
                        }
                    }
                    Ok(Report::Done { id, errno }) => self.queue.done(id, errno),
                    Err(error) => {
                        log::warn!("announcer: says what nobody understands: {error}");
                        break;
                    }
                }
            }
        }
        // It is recognised until nothing of it is left: a request of it must not be taken for a user's.
        let child = {
            let mut process = self.process.lock();
            process.input = None;
            process.child.take()
        };
        let status = child.map(|mut child| child.kill().and_then(|()| child.wait()));
        self.queue.close();
        match status {
            Some(status) => Ok(status?.to_string()),
            None => Ok("an unknown status".into()),
        }
    }

    /// Ends it and [`Announcer::supervise`]. Does not wait: it may be stuck in the mount until that is gone.
    pub fn kill(&self) {
        let mut process = self.process.lock();
        process.stopping = true;
        if let Some(child) = process.child.as_mut()
            && let Err(error) = child.kill()
        {
            log::warn!("announcer: cannot be killed: {error}");
        }
        self.stopped.notify_all();
    }
}
