//! How things are done: requests judged and recorded, operations run in journaled steps.
//!
//! [`engine`] takes requests, `turn` is its thread, `judge` and `apply` decide and record them (`subject` is an object as
//! they see it, `beginning` what must hold before an operation begins, `draft` what somebody begins to describe).
//! `operation` runs what takes longer, step by step as `journal` demands, and `ending` records what came of it.
//! [`recovery`] takes up what an earlier life of the program left. What time brings is asked for by `keeper`, what others
//! did to protected domains is answered by `protector` and `kept`.

mod apply;
mod backends;
mod beginning;
mod bin;
mod boot;
mod commit;
pub mod console_log;
pub mod consoles;
mod copies;
mod define_again;
mod delete;
mod discard;
mod draft;
pub mod drafts_data;
mod ending;
pub mod engine;
pub mod events;
mod gate;
mod import;
mod journal;
mod judge;
mod keeper;
mod kept;
mod lanes;
pub mod ledger;
mod network;
mod offers;
mod operation;
mod orders;
mod power;
mod progress;
mod protector;
mod reboot;
pub mod reconcile;
mod reconfigure;
pub mod recovery;
pub mod request;
mod seed;
mod shelve;
mod subject;
mod transfer;
mod turn;
pub mod uptime;
mod volume;

pub use drafts_data::{DraftData, Writer};
pub use engine::{Engine, Parts, Settings};
pub use recovery::load;
