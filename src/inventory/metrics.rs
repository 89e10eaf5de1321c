//! What is counted, where it happens: one atomic addition each, no lock. The text is the tree's.
//!
//! Counters begin at 0 with the daemon, as Prometheus expects of a process.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::model::reason::ERRNO_NAMES;
use crate::model::task::{TaskState, TaskWord};

/// The upper bounds of the histogram of operations, in milliseconds: done at once, within a settle window, after a guest
/// was asked, and after a lot was copied.
pub const DURATION_BOUNDS: [u64; 5] = [100, 1_000, 10_000, 60_000, 600_000];

/// How an operation can end.
pub const OUTCOMES: [TaskState; 3] = [TaskState::Success, TaskState::Failure, TaskState::Cancelled];

/// What is still to be announced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Files and names.
    pub length: usize,
    /// Since when the oldest of them waits; zero if none does.
    pub oldest: Duration,
}

/// Asks the announcer's queue.
pub type AskBacklog = Box<dyn Fn() -> Backlog + Send + Sync>;

/// How many, and how long they took in all.
#[derive(Default)]
struct Timed {
    count: AtomicU64,
    /// Nanoseconds: of five hundred years.
    sum: AtomicU64,
}

impl Timed {
    fn add(&self, took: Duration) {
        self.sum.fetch_add(nanoseconds(took), Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) -> (u64, Duration) {
        (self.count.load(Ordering::Relaxed), Duration::from_nanos(self.sum.load(Ordering::Relaxed)))
    }
}

#[derive(Default)]
struct OfKind {
    outcomes: [AtomicU64; OUTCOMES.len()],
    timed: Timed,
    /// Of those that took no longer than the bound, and longer than the one before.
    buckets: [AtomicU64; DURATION_BOUNDS.len()],
}

/// The operations of one kind that have ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operations {
    /// By outcome, in the order of [`OUTCOMES`].
    pub outcomes: [u64; OUTCOMES.len()],
    /// How many took no longer than each of [`DURATION_BOUNDS`].
    pub within: [u64; DURATION_BOUNDS.len()],
    /// How long they took in all.
    pub sum: Duration,
}

/// What the store has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commits {
    /// Durable transactions.
    pub count: u64,
    /// How long they took in all.
    pub sum: Duration,
    /// The longest of them.
    pub longest: Duration,
    /// Transactions that were not stored.
    pub failures: u64,
}

/// See the module.
pub struct Metrics {
    began: Instant,
    operations: [OfKind; TaskWord::ALL.len()],
    refusals: [AtomicU64; ERRNO_NAMES.len()],
    /// Milliseconds since `began`, plus one; 0: it has not answered yet.
    answered: AtomicU64,
    commits: Timed,
    longest_commit: AtomicU64,
    failed_commits: AtomicU64,
    backlog: OnceLock<AskBacklog>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics {
            began: Instant::now(),
            operations: Default::default(),
            refusals: Default::default(),
            answered: AtomicU64::default(),
            commits: Timed::default(),
            longest_commit: AtomicU64::default(),
            failed_commits: AtomicU64::default(),
            backlog: OnceLock::new(),
        }
    }
}

impl Metrics {
    /// An operation has ended; one that is not final counts nowhere.
    pub fn operation_ended(&self, kind: TaskWord, outcome: TaskState, took: Duration) {
        let place = TaskWord::ALL.iter().position(|word| *word == kind);
        let Some(of_kind) = place.and_then(|place| self.operations.get(place)) else { return };
        let Some(outcome) = OUTCOMES.iter().position(|word| *word == outcome) else { return };
        of_kind.outcomes[outcome].fetch_add(1, Ordering::Relaxed);
        of_kind.timed.add(took);
        let bucket = DURATION_BOUNDS.iter().position(|bound| took <= Duration::from_millis(*bound));
        if let Some(bucket) = bucket {
            of_kind.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The operations that have ended, by kind.
    pub fn operations(&self) -> impl Iterator<Item = (TaskWord, Operations)> + '_ {
        TaskWord::ALL.into_iter().zip(&self.operations).map(|(kind, of_kind)| {
            let outcomes = of_kind.outcomes.each_ref().map(|count| count.load(Ordering::Relaxed));
            let mut below = 0;
            let within = of_kind.buckets.each_ref().map(|count| {
                below += count.load(Ordering::Relaxed);
                below
            });
            (kind, Operations { outcomes, within, sum: of_kind.timed.read().1 })
        })
    }

    /// A request was refused with this errno.
    pub fn refused(&self, errno: i32) {
        let known = ERRNO_NAMES.iter().position(|(number, _)| *number == errno);
        if let Some(count) = known.and_then(|place| self.refusals.get(place)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Refusals by the errno's name.
    pub fn refusals(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        ERRNO_NAMES.iter().zip(&self.refusals).map(|((_, name), count)| (*name, count.load(Ordering::Relaxed)))
    }

    /// The hypervisor has answered, whatever it said.
    pub fn hypervisor_answered(&self) {
        let since = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.answered.store(since + 1, Ordering::Relaxed);
    }

    /// How long ago that was; `None` before the first time.
    pub fn since_answer(&self) -> Option<Duration> {
        let answered = self.answered.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.began.elapsed().saturating_sub(Duration::from_millis(answered)))
    }

    /// A transaction is durable.
    pub fn committed(&self, took: Duration) {
        self.commits.add(took);
        self.longest_commit.fetch_max(nanoseconds(took), Ordering::Relaxed);
    }

    /// A transaction was not stored.
    pub fn commit_failed(&self) {
        self.failed_commits.fetch_add(1, Ordering::Relaxed);
    }

    /// What the store has done.
    pub fn commits(&self) -> Commits {
        let (count, sum) = self.commits.read();
        let longest = Duration::from_nanos(self.longest_commit.load(Ordering::Relaxed));
        Commits { count, sum, longest, failures: self.failed_commits.load(Ordering::Relaxed) }
    }

    /// From here on this is asked for the backlog. It must return at once. The first call counts.
    pub fn set_backlog(&self, ask: AskBacklog) {
        let _first_one_stays = self.backlog.set(ask);
    }

    /// What is still to be announced; `None` without a mount.
    pub fn backlog(&self) -> Option<Backlog> {
        self.backlog.get().map(|ask| ask())
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(metrics: &Metrics, kind: TaskWord) -> Operations {
        metrics.operations().find(|(word, _)| *word == kind).expect("every kind is there").1
    }

    #[test]
    fn an_operation_counts_in_every_bucket_that_it_fits_in() {
        let metrics = Metrics::default();
        let ended = |outcome, took| metrics.operation_ended(TaskWord::Starting, outcome, Duration::from_millis(took));
        ended(TaskState::Success, 100);
        ended(TaskState::Success, 5_000);
        ended(TaskState::Failure, 3_600_000);
        let starting = of(&metrics, TaskWord::Starting);
        assert_eq!(starting.outcomes, [2, 1, 0]);
        assert_eq!(starting.within, [1, 1, 2, 2, 2]);
        assert_eq!(starting.sum, Duration::from_millis(3_605_100));
        assert_eq!(of(&metrics, TaskWord::Stopping).outcomes, [0, 0, 0]);
    }

    #[test]
    fn what_has_not_ended_does_not_count() {
        let metrics = Metrics::default();
        metrics.operation_ended(TaskWord::Starting, TaskState::Processing, Duration::ZERO);
        assert_eq!(of(&metrics, TaskWord::Starting).outcomes, [0, 0, 0]);
    }

    #[test]
    fn the_longest_commit_stays() {
        let metrics = Metrics::default();
        metrics.committed(Duration::from_secs(3));
        metrics.committed(Duration::from_secs(1));
        metrics.commit_failed();
        let (sum, longest) = (Duration::from_secs(4), Duration::from_secs(3));
        assert_eq!(metrics.commits(), Commits { count: 2, sum, longest, failures: 1 });
    }

    #[test]
    fn a_hypervisor_that_never_answered_has_no_age() {
        let metrics = Metrics::default();
        assert_eq!(metrics.since_answer(), None);
        metrics.hypervisor_answered();
        assert!(metrics.since_answer().is_some());
    }
}
