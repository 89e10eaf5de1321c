//! Where, and by what, an operation is disturbed.

use std::fmt;

use instancefs::store::power_loss::Moment;

use super::wire::{Failure, Kind, Step};

/// What disturbs.
#[derive(Clone, Copy, Debug)]
pub enum Disturbance {
    Death(Moment),
    Failure(Failure),
    Lock,
    Cancel,
    Others,
}

/// One point: disturbances by step, in the operation's life and in the one that recovers it.
#[derive(Clone, Debug, Default)]
pub struct Point {
    pub first: Vec<(usize, Disturbance)>,
    pub recovery: Vec<(usize, Disturbance)>,
}

impl fmt::Display for Point {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}, in recovery {:?}", self.first, self.recovery)
    }
}

/// How a step can fail.
pub fn failures(kind: Kind) -> Vec<Failure> {
    match kind {
        Kind::Hypervisor => vec![
            Failure::Refused,
            Failure::WrongState,
            Failure::Lost { applied: false },
            Failure::Lost { applied: true },
        ],
        Kind::Block => {
            vec![Failure::NoSpace, Failure::Quota, Failure::Io { applied: false }, Failure::Io { applied: true }]
        }
        Kind::Commit => vec![Failure::NoSpace, Failure::Io { applied: false }],
    }
}

pub const MOMENTS: [Moment; 2] = [Moment::Before, Moment::After];

/// The first disturbances: each kind at each step.
pub fn beginnings(steps: &[Step], meets_others: bool) -> Vec<(usize, Disturbance)> {
    let mut all = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        let at = index + 1;
        all.extend(MOMENTS.map(|moment| (at, Disturbance::Death(moment))));
        all.extend(failures(step.kind).into_iter().map(|failure| (at, Disturbance::Failure(failure))));
        // The first commit is the claim: before it nothing runs that anybody could meet.
        if at > 1 && meets_others {
            all.extend([Disturbance::Lock, Disturbance::Cancel, Disturbance::Others].map(|what| (at, what)));
        }
    }
    all
}

/// Which of `count` later steps are disturbed as well: all in a long run, else one, another for each second beginning.
pub fn seconds(count: usize, seed: usize) -> Vec<usize> {
    match (count, std::env::var_os("INSTANCEFS_LONG")) {
        (0, _) => Vec::new(),
        (_, Some(_)) => (0..count).collect(),
        (_, None) if seed.is_multiple_of(2) => vec![(seed / 2).wrapping_mul(7919) % count],
        (_, None) => Vec::new(),
    }
}
