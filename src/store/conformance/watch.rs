//! What watchers may rely on.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::Duration;

use super::{commit, delete, keys, put};
use crate::store::{Change, Committed, Revision, Store};

/// How long an engine may take to deliver what it has committed.
const DELIVERY: Duration = Duration::from_secs(10);

fn next(watch: &Receiver<Committed>) -> Committed {
    watch.recv_timeout(DELIVERY).expect("what was committed is delivered")
}

pub(super) fn a_watcher_receives_all_below_its_prefix_in_order(store: &dyn Store) {
    commit(store, &[put("a/0", "before the watch")]);
    let watch = store.watch("a/");
    let everything = store.watch("");
    let first = commit(store, &[put("a/2", "1"), put("b/1", "1"), delete("a/1"), put("a/1", "2")]);
    let foreign = commit(store, &[put("a", "1"), put("ab", "1"), put("a0", "1")]);
    let last = commit(store, &[delete("a/2"), delete("b/1")]);
    assert_eq!(
        next(&watch),
        Committed { revision: first, changes: vec![put("a/2", "1"), delete("a/1"), put("a/1", "2")] }
    );
    assert_eq!(next(&watch), Committed { revision: last, changes: vec![delete("a/2")] });
    assert_eq!(watch.try_recv(), Err(TryRecvError::Empty), "a watcher received what is not below its prefix");
    let revisions: Vec<Revision> = (0..3).map(|_| next(&everything).revision).collect();
    assert_eq!(revisions, [first, foreign, last]);
}

pub(super) fn a_watcher_loses_nothing_under_contention(store: &dyn Store) {
    const THREADS: usize = 4;
    const EACH: usize = 25;
    let watch = store.watch("w/");
    thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                for round in 0..EACH {
                    commit(store, &[put(&format!("w/{thread}/{round}"), "1"), put("elsewhere", "1")]);
                }
            });
        }
    });
    let received: Vec<Committed> = (0..THREADS * EACH).map(|_| next(&watch)).collect();
    assert!(received.windows(2).all(|pair| pair[0].revision < pair[1].revision), "delivered out of order");
    for committed in received {
        let [Change::Put(key, _)] = committed.changes.as_slice() else {
            panic!("one change below the prefix was made, delivered were {:?}", committed.changes);
        };
        let record = store.get(key).expect("answered").expect("exists");
        assert_eq!(record.revision, committed.revision, "a change was delivered under another's revision");
    }
    assert_eq!(watch.try_recv(), Err(TryRecvError::Empty), "something was delivered twice");
}

/// Who watches first and lists then has seen or will receive everything.
pub(super) fn a_watch_and_a_list_leave_no_gap(store: &dyn Store) {
    const ROUNDS: usize = 100;
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                commit(store, &[put(&format!("gap/{round}"), "1")]);
            }
        });
        for _ in 0..10 {
            let watch = store.watch("gap/");
            let mut seen = keys(store, "gap/");
            while seen.len() < ROUNDS {
                for change in next(&watch).changes {
                    match change {
                        Change::Put(key, _) if !seen.contains(&key) => seen.push(key),
                        Change::Put(..) => {}
                        Change::Delete(key) => panic!("nobody deleted {key}"),
                    }
                }
            }
        }
    });
}

pub(super) fn a_dropped_watcher_disturbs_nobody(store: &dyn Store) {
    let kept = store.watch("a");
    drop(store.watch("a"));
    let revision = commit(store, &[put("a", "1")]);
    assert_eq!(next(&kept).revision, revision);
    commit(store, &[put("a", "2")]);
}

pub(super) fn a_watch_ends_with_its_store(store: Box<dyn Store>) {
    let watch = store.watch("a");
    commit(&*store, &[put("a", "1")]);
    drop(store);
    assert!(watch.recv_timeout(DELIVERY).is_ok(), "what was committed is delivered even if the store closes");
    assert!(watch.recv_timeout(DELIVERY).is_err_and(|error| error == RecvTimeoutError::Disconnected));
}
