//! The progress bars of `wait`, one for each object with a task; only where somebody looks at a terminal.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{IsTerminal, stderr};
use std::path::{Path, PathBuf};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

const TEMPLATE: &str = "{prefix} {msg} [{bar:30}] {pos:>3}% {elapsed}";

/// See the module.
pub struct Progress(Option<Bars>);

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    shown: RefCell<HashMap<PathBuf, ProgressBar>>,
}

impl Progress {
    /// Bars on a terminal, nothing elsewhere.
    pub fn new() -> Progress {
        Progress(stderr().is_terminal().then(Bars::default))
    }

    /// Shows how far a task is.
    pub fn show(&self, path: &Path, task: &str, percent: Option<u64>) {
        let Some(bars) = &self.0 else { return };
        let mut shown = bars.shown.borrow_mut();
        let bar = shown.entry(path.to_owned()).or_insert_with(|| {
            let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(100).with_style(style.progress_chars("=> "));
            // All at once: what is set after adding is drawn one by one.
            bars.all.add(bar.with_prefix(path.display().to_string()).with_message(task.to_owned()))
        });
        bar.set_message(task.to_owned());
        bar.set_position(percent.unwrap_or(0).min(100));
        bar.tick();
    }

    /// This object is done.
    pub fn hide(&self, path: &Path) {
        let Some(bars) = &self.0 else { return };
        if let Some(bar) = bars.shown.borrow_mut().remove(path) {
            bar.finish_and_clear();
            bars.all.remove(&bar);
        }
    }

    /// All are done.
    pub fn clear(&self) {
        if let Some(bars) = &self.0 {
            let _ = bars.all.clear();
        }
    }
}
