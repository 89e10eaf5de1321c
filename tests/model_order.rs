//! The order of refusals, for every combination of what can stand in the way of a word.

use instancefs::model::caller::Role;
use instancefs::model::instance::{Situation, State, Verdict, Word, decide};
use instancefs::model::protection::{Level, Lock, Protection};
use instancefs::model::task::Operation;

const ROLES: [Role; 5] = [Role::Root, Role::Mounter, Role::Owner, Role::Member, Role::Stranger];

fn protections() -> Vec<Protection> {
    let lock = |level| Lock { by: "ada".into(), at: 1, level, reason: String::new() };
    vec![
        Protection::default(),
        Protection { lock: Some(lock(Level::Owner)), disable_terminate: false },
        Protection { lock: Some(lock(Level::Admin)), disable_terminate: true },
        Protection { lock: None, disable_terminate: true },
    ]
}

fn words() -> Vec<Word> {
    State::ALL.into_iter().map(Word::State).chain([Word::Deleted]).collect()
}

/// First match decides, in the words of the interface.
fn expected(situation: &Situation<'_>, word: Word) -> Result<&'static str, i32> {
    let target = situation.task.and_then(Operation::target);
    let deletes = matches!(word, Word::State(State::SoftDeleted) | Word::Deleted);
    let locked = situation.protection.lock.is_some();
    if situation.role == Role::Stranger {
        return Err(libc::EACCES);
    }
    if target == Some(word.word()) {
        return Ok("join");
    }
    let is_true = Word::State(situation.state) == word
        || (situation.state == State::ShelvedOffloaded && word == Word::State(State::Shelved));
    if target.is_none() && is_true {
        return Ok("true");
    }
    if matches!(word, Word::State(State::Draft | State::Building | State::Resized | State::Error)) {
        return Err(libc::EINVAL);
    }
    if locked || (deletes && situation.protection.disable_terminate) {
        return Err(libc::EPERM);
    }
    if word == Word::Deleted && !matches!(situation.state, State::Draft | State::SoftDeleted) {
        return Err(libc::EPERM);
    }
    if word.word() == "rescued" {
        return Err(libc::EOPNOTSUPP);
    }
    if situation.unreachable.is_some() && !(word == Word::Deleted && situation.state == State::Draft) {
        return Err(libc::ENODEV);
    }
    if situation.task.is_some() {
        return Err(libc::EBUSY);
    }
    let from: &[State] = match word {
        Word::State(State::Active) => &[
            State::Draft,
            State::Stopped,
            State::Paused,
            State::Suspended,
            State::Error,
            State::Shelved,
            State::ShelvedOffloaded,
            State::SoftDeleted,
        ],
        Word::State(State::Stopped) => {
            &[State::Draft, State::Active, State::Error, State::Shelved, State::ShelvedOffloaded, State::SoftDeleted]
        }
        Word::State(State::Paused | State::Suspended) => &[State::Active],
        Word::State(State::SoftDeleted) => &[
            State::Active,
            State::Paused,
            State::Suspended,
            State::Stopped,
            State::Rescued,
            State::Resized,
            State::Shelved,
            State::ShelvedOffloaded,
            State::Error,
        ],
        Word::State(State::Shelved) => &[State::Active, State::Stopped],
        Word::State(State::ShelvedOffloaded) => &[State::Active, State::Stopped, State::Shelved],
        _ => &[State::Draft, State::SoftDeleted],
    };
    if from.contains(&situation.state) { Ok("start") } else { Err(libc::EINVAL) }
}

#[test]
fn the_first_thing_in_the_way_of_a_word_decides() {
    let tasks = [
        None,
        Some(Operation::Stop),
        Some(Operation::Start),
        Some(Operation::RebootHard),
        Some(Operation::DiscardDraft),
    ];
    let mut cells = 0;
    for state in State::ALL {
        for word in words() {
            for protection in protections() {
                for role in ROLES {
                    for task in &tasks {
                        for unreachable in [None, Some("it is down")] {
                            let situation = Situation {
                                role,
                                state,
                                is_defined: true,
                                before_bin: None,
                                task: task.as_ref(),
                                protection: &protection,
                                unreachable,
                            };
                            let got = match decide(&situation, word) {
                                Ok(Verdict::AlreadyTrue) => Ok("true"),
                                Ok(Verdict::Join) => Ok("join"),
                                Ok(Verdict::Start(_)) => Ok("start"),
                                Err(reason) => {
                                    assert!(!reason.to_string().is_empty());
                                    Err(reason.errno())
                                }
                            };
                            assert_eq!(got, expected(&situation, word), "{word:?} in {situation:?}");
                            cells += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(cells, 12 * 13 * 5 * 4 * 5 * 2);
}

#[test]
fn every_word_that_is_offered_is_allowed_and_no_other_is() {
    for state in State::ALL {
        for protection in protections() {
            let situation = Situation {
                role: Role::Owner,
                state,
                is_defined: true,
                before_bin: None,
                task: None,
                protection: &protection,
                unreachable: None,
            };
            let offered = instancefs::model::instance::available(&situation);
            for word in Word::REQUESTS {
                let starts = matches!(decide(&situation, word), Ok(Verdict::Start(_)));
                assert_eq!(offered.contains(&word.word()), starts, "{word:?} in {state:?}");
            }
        }
    }
}
