use super::*;
use crate::tree::Directory;

const OBJECT: u64 = 16;

fn file(row: u8) -> Touched {
    Touched { node: Node::Attribute(Class::Instance, OBJECT, row), path: format!("file{row}").into() }
}

fn open() -> Queue {
    let queue = Queue::default();
    queue.open(std::process::id());
    queue
}

fn sent(queue: &Queue) -> (u64, String) {
    match queue.next() {
        Step::Touch(id, _, path) => (id, path.display().to_string()),
        step => panic!("{step:?}"),
    }
}

fn compared(queue: &Queue) -> Pending {
    match queue.next() {
        Step::Compare(pending) => pending,
        step => panic!("{step:?}"),
    }
}

fn coming() -> Move {
    let place = Place { directory: Directory::Class(Class::Instance), name: "a".into() };
    Move { class: Class::Instance, number: OBJECT, position: Position::Home, from: None, to: Some(place) }
}

#[test]
fn a_change_during_an_announcement_asks_for_one_more_after_a_pause() {
    let queue = open();
    queue.touch(file(1));
    let start = Instant::now();
    let (first, _) = sent(&queue);
    assert!(queue.is_announcing(file(1).node.inode()));
    queue.touch(file(1));
    queue.touch(file(1));
    queue.done(first, 0);
    let (second, _) = sent(&queue);
    assert!(start.elapsed() >= QUIET);
    queue.done(second, 0);
    queue.touch(file(2));
    assert_eq!(sent(&queue).1, "file2");
}

#[test]
fn a_file_that_was_not_found_is_looked_for_once_more() {
    let queue = open();
    queue.touch(file(1));
    let (first, _) = sent(&queue);
    queue.done(first, libc::ENOENT);
    let (second, _) = sent(&queue);
    queue.done(second, libc::ENOENT);
    queue.touch(file(2));
    let (other, path) = sent(&queue);
    assert_eq!(path, "file2", "it is not there, and is let go");
    queue.done(other, 0);
}

#[test]
fn what_an_announcer_had_when_it_died_is_announced_by_the_next() {
    let queue = open();
    queue.touch(file(1));
    sent(&queue);
    queue.close();
    queue.open(1);
    assert_eq!(sent(&queue).1, "file1");
}

#[test]
fn the_files_of_an_object_wait_for_its_names() {
    let queue = open();
    queue.moved(Class::Instance, OBJECT, Position::Home);
    queue.touch(file(1));
    assert_eq!(compared(&queue).positions, [Position::Home]);
    let id = queue.start(coming()).expect("a job");
    assert_eq!(queue.replay(None, coming().to.as_ref()), Some(coming()));
    queue.done(id, 0);
    let pending = compared(&queue);
    queue.agree(&pending);
    assert_eq!(sent(&queue).1, "file1");
}

#[test]
fn a_replay_that_fails_or_changes_nothing_is_published_when_it_is_late() {
    let queue = open();
    queue.moved(Class::Instance, OBJECT, Position::Home);
    compared(&queue);
    let id = queue.start(coming()).expect("a job");
    queue.done(id, 0);
    compared(&queue);
    assert_eq!(queue.start(coming()), None, "the same again");
    let rest = compared(&queue);
    assert!(rest.positions.is_empty());
    queue.agree(&rest);
    match queue.next() {
        Step::Publish(Class::Instance, OBJECT, positions) => assert_eq!(positions, [Position::Home]),
        step => panic!("{step:?}"),
    }
    assert_eq!(queue.replay(None, coming().to.as_ref()), None, "too late");
}

#[test]
fn a_change_during_a_comparison_is_compared_again() {
    let queue = open();
    queue.moved(Class::Instance, OBJECT, Position::Home);
    let pending = compared(&queue);
    queue.moved(Class::Instance, OBJECT, Position::Name);
    queue.agree(&pending);
    assert_eq!(compared(&queue).positions, [Position::Home, Position::Name]);
}

#[test]
fn only_threads_of_the_announcer_are_taken_for_it() {
    let queue = open();
    assert!(queue.is_announcer(u32::try_from(nix::unistd::gettid().as_raw()).expect("an id")));
    assert!(!queue.is_announcer(1));
    queue.close();
    assert!(!queue.is_announcer(std::process::id()));
}
