//! How things are done: requests judged and recorded, operations run in journaled steps.

pub mod ledger;
pub mod request;
