//! The contract of [`Store`], as a program: every engine passes [`check`] in its tests.
//!
//! What needs to reopen a store (durability, schema versions, full disks) depends on the engine and is left to its own
//! tests. Everything here panics with a sentence when the engine breaks the contract.

mod watch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::TryRecvError;
use std::thread;

use super::{Change, Compare, Revision, Store, StoreError};

/// Runs the whole contract. `make` returns a new, empty store with each call.
///
/// # Panics
///
/// When the engine breaks the contract.
pub fn check(make: impl Fn() -> Box<dyn Store>) {
    a_put_is_read_back(&*make());
    revisions_grow_by_one(&*make());
    a_failed_comparison_changes_nothing(&*make());
    a_recreated_key_is_another_one(&*make());
    changes_apply_in_their_order(&*make());
    deletes_remove_and_tolerate_absence(&*make());
    a_list_is_ordered_and_bounded_by_its_prefix(&*make());
    wildcards_are_plain_characters(&*make());
    any_value_survives(&*make());
    one_of_many_contenders_wins(&*make());
    no_increment_is_lost(&*make());
    a_list_is_one_snapshot(&*make());
    watch::a_watcher_receives_all_below_its_prefix_in_order(&*make());
    watch::a_watcher_loses_nothing_under_contention(&*make());
    watch::a_watch_and_a_list_leave_no_gap(&*make());
    watch::a_dropped_watcher_disturbs_nobody(&*make());
    watch::a_watch_ends_with_its_store(make());
}

fn put(key: &str, value: &str) -> Change {
    Change::Put(key.to_owned(), value.as_bytes().to_vec())
}

fn delete(key: &str) -> Change {
    Change::Delete(key.to_owned())
}

fn commit(store: &dyn Store, changes: &[Change]) -> Revision {
    store.transact(&[], changes).expect("a transaction without comparisons commits")
}

fn keys(store: &dyn Store, prefix: &str) -> Vec<String> {
    store.list(prefix).expect("a list is answered").into_iter().map(|record| record.key).collect()
}

fn value(store: &dyn Store, key: &str) -> Option<String> {
    let record = store.get(key).expect("a get is answered")?;
    Some(String::from_utf8(record.value).expect("the test wrote text"))
}

fn a_put_is_read_back(store: &dyn Store) {
    assert_eq!(store.get("a").expect("answered"), None, "a new store is not empty");
    let revision = commit(store, &[put("a", "1"), put("b/c", "2")]);
    for (key, text) in [("a", "1"), ("b/c", "2")] {
        let record = store.get(key).expect("answered").expect("a committed key exists");
        assert_eq!((record.key.as_str(), record.value.as_slice()), (key, text.as_bytes()));
        assert_eq!(record.revision, revision, "a record carries the revision of its transaction");
    }
    let later = commit(store, &[put("a", "3")]);
    assert_eq!(value(store, "a").as_deref(), Some("3"));
    let untouched = store.get("b/c").expect("answered").expect("exists");
    assert_eq!(untouched.revision, revision, "a key's revision changes only when it is written");
    assert_eq!(store.get("a").expect("answered").expect("exists").revision, later);
}

fn revisions_grow_by_one(store: &dyn Store) {
    let first = commit(store, &[put("a", "1")]);
    assert!(first > 0, "revision 0 is before every transaction");
    assert_eq!(commit(store, &[delete("a")]), first + 1);
    assert_eq!(commit(store, &[]), first + 2, "a transaction without changes counts too");
    let refused = store.transact(&[Compare::At("a".to_owned(), first)], &[put("a", "2")]);
    assert!(matches!(refused, Err(StoreError::Conflict { .. })));
    assert_eq!(commit(store, &[put("a", "1")]), first + 3, "a refused transaction uses up no revision");
}

fn a_failed_comparison_changes_nothing(store: &dyn Store) {
    let revision = commit(store, &[put("a", "1"), put("b", "1")]);
    let watch = store.watch("");
    let a_is_old = Compare::At("a".to_owned(), revision);
    for (wrong, blamed) in [
        (Compare::Absent("b".to_owned()), "b"),
        (Compare::At("b".to_owned(), revision + 1), "b"),
        (Compare::At("b".to_owned(), 0), "b"),
        (Compare::At("c".to_owned(), revision), "c"),
    ] {
        match store.transact(&[a_is_old.clone(), wrong], &[put("a", "2"), delete("b"), put("c", "2")]) {
            Err(StoreError::Conflict { key }) => {
                assert_eq!(key, blamed, "the conflict names the wrong key")
            }
            other => panic!("a wrong comparison has to be a conflict, not {other:?}"),
        }
    }
    assert_eq!(value(store, "a").as_deref(), Some("1"), "a refused transaction changed something");
    assert_eq!(keys(store, ""), ["a", "b"], "a refused transaction changed something");
    assert_eq!(watch.try_recv(), Err(TryRecvError::Empty), "a refused transaction was announced");
    store
        .transact(&[a_is_old, Compare::Absent("c".to_owned())], &[put("c", "2")])
        .expect("comparisons that hold let the transaction pass");
    assert_eq!(value(store, "c").as_deref(), Some("2"));
}

fn a_recreated_key_is_another_one(store: &dyn Store) {
    let first = commit(store, &[put("a", "1")]);
    commit(store, &[delete("a")]);
    commit(store, &[put("a", "1")]);
    let stale = store.transact(&[Compare::At("a".to_owned(), first)], &[delete("a")]);
    assert!(matches!(stale, Err(StoreError::Conflict { .. })), "the same value again is not the same record");
}

fn changes_apply_in_their_order(store: &dyn Store) {
    commit(store, &[put("a", "1"), put("a", "2"), delete("b"), put("b", "1"), put("c", "1"), delete("c")]);
    assert_eq!(value(store, "a").as_deref(), Some("2"));
    assert_eq!(value(store, "b").as_deref(), Some("1"));
    assert_eq!(value(store, "c"), None);
}

fn deletes_remove_and_tolerate_absence(store: &dyn Store) {
    commit(store, &[put("a", "1"), put("a/b", "1")]);
    commit(store, &[delete("a"), delete("never")]);
    assert_eq!(keys(store, ""), ["a/b"], "a delete removes its key and no other");
    store.transact(&[Compare::Absent("a".to_owned())], &[put("a", "2")]).expect("a deleted key is absent");
}

fn a_list_is_ordered_and_bounded_by_its_prefix(store: &dyn Store) {
    let stored = ["a", "a/", "a/1", "a/10", "a/2", "a/b/c", "a0", "aa", "b", "ä/1", "\u{10ffff}/x"];
    let changes: Vec<Change> = stored.iter().rev().map(|key| put(key, "1")).collect();
    commit(store, &changes);
    assert_eq!(keys(store, ""), stored, "all keys, by their bytes");
    assert_eq!(keys(store, "a/"), ["a/", "a/1", "a/10", "a/2", "a/b/c"]);
    assert_eq!(keys(store, "a/1"), ["a/1", "a/10"], "a prefix is a string, not a folder");
    assert_eq!(keys(store, "a/b"), ["a/b/c"]);
    assert_eq!(keys(store, "\u{10ffff}"), ["\u{10ffff}/x"], "the last character has no successor");
    assert_eq!(keys(store, "ä"), ["ä/1"]);
    assert_eq!(keys(store, "A/"), [""; 0], "keys differ in case");
}

fn wildcards_are_plain_characters(store: &dyn Store) {
    commit(store, &[put("a%c", "1"), put("abc", "1"), put("a_c", "1"), put("a*c", "1"), put("a'c", "1")]);
    for key in ["a%", "a_", "a*", "a'"] {
        assert_eq!(keys(store, key), [format!("{key}c")], "{key} has to stand for itself");
    }
    assert_eq!(keys(store, "%"), [""; 0]);
    commit(store, &[delete("a%c"), delete("a_c")]);
    assert_eq!(keys(store, ""), ["a'c", "a*c", "abc"]);
}

fn any_value_survives(store: &dyn Store) {
    let large: Vec<u8> = (0..1_u32 << 20).map(|index| (index % 251) as u8).collect();
    let values: [&[u8]; 6] = [b"", b"\0", b"a\0b", b"\xff\xfe", "ünïcode {\"a\": 1}\n".as_bytes(), &large];
    for (index, expected) in values.iter().enumerate() {
        let key = format!("value/{index}");
        commit(store, &[Change::Put(key.clone(), expected.to_vec())]);
        let record = store.get(&key).expect("answered").expect("exists");
        assert!(record.value == *expected, "value {index} came back changed");
    }
    let listed = store.list("value/").expect("answered");
    assert_eq!(listed.len(), values.len());
    assert!(listed.iter().zip(values).all(|(record, expected)| record.value == expected));
}

fn one_of_many_contenders_wins(store: &dyn Store) {
    for round in 0..10 {
        let key = format!("claim/{round}");
        let winners = thread::scope(|scope| {
            let contenders: Vec<_> = (0..8)
                .map(|contender| {
                    let key = &key;
                    scope.spawn(move || {
                        let name = contender.to_string();
                        match store.transact(&[Compare::Absent(key.clone())], &[put(key, &name)]) {
                            Ok(_) => Some(name),
                            Err(StoreError::Conflict { .. }) => None,
                            Err(other) => {
                                panic!("contention has to end in a conflict, not {other:?}")
                            }
                        }
                    })
                })
                .collect();
            contenders.into_iter().filter_map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
        });
        assert_eq!(winners.len(), 1, "exactly one contender wins a claim");
        assert_eq!(value(store, &key), Some(winners[0].clone()), "the winner's value is the one stored");
    }
}

fn no_increment_is_lost(store: &dyn Store) {
    const THREADS: u64 = 8;
    const INCREMENTS: u64 = 25;
    commit(store, &[put("n", "0")]);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..INCREMENTS {
                    increment(store, "n");
                }
            });
        }
    });
    assert_eq!(value(store, "n"), Some((THREADS * INCREMENTS).to_string()), "an increment was lost");
}

fn increment(store: &dyn Store, key: &str) {
    loop {
        let record = store.get(key).expect("answered").expect("exists");
        let count: u64 = String::from_utf8(record.value).expect("text").parse().expect("a number");
        match store.transact(&[Compare::At(key.to_owned(), record.revision)], &[put(key, &(count + 1).to_string())]) {
            Ok(_) => return,
            Err(StoreError::Conflict { .. }) => {}
            Err(other) => panic!("contention has to end in a conflict, not {other:?}"),
        }
    }
}

fn a_list_is_one_snapshot(store: &dyn Store) {
    let pair = |text: &str| [put("pair/a", text), put("pair/z", text)];
    commit(store, &pair("start"));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..200 {
                commit(store, &pair(&round.to_string()));
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            let listed = store.list("pair/").expect("a list is answered while others write");
            assert_eq!(listed.len(), 2);
            assert_eq!(listed[0].value, listed[1].value, "a list mixed two transactions");
            assert_eq!(listed[0].revision, listed[1].revision, "a list mixed two transactions");
        }
    });
}
