//! Who has changed rights is answered once the kernel was told of all that this changed: while attributes of a file that it
//! asks for are invalidated once more, it decides by those that it had before.

use std::collections::HashMap;

use parking_lot::Mutex;

use crate::tree::Admission;

type Answer = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Object {
    /// What the kernel was told of last.
    last: Option<Admission>,
    waiting: Vec<Answer>,
}

/// See the module.
#[derive(Default)]
pub struct Told {
    objects: Mutex<HashMap<u64, Object>>,
}

impl Told {
    /// Calls `answer` once the kernel was told of an object's rights as they are now. `now` reads them; that of no object
    /// is the default.
    pub fn after(&self, number: u64, now: impl FnOnce() -> Admission, answer: Answer) {
        let mut objects = self.objects.lock();
        // Read under the lock: what changes after this is told after this.
        let now = now();
        let is_told = objects.get(&number).is_some_and(|object| object.last.as_ref() == Some(&now));
        if is_told || now == Admission::default() {
            drop(objects);
            return answer();
        }
        objects.entry(number).or_default().waiting.push(answer);
    }

    /// The kernel was told of these rights.
    pub fn told(&self, number: u64, admission: Admission) {
        let waiting = {
            let mut objects = self.objects.lock();
            let object = objects.entry(number).or_default();
            object.last = Some(admission);
            std::mem::take(&mut object.waiting)
        };
        waiting.into_iter().for_each(|answer| answer());
    }

    /// The object is gone.
    pub fn forget(&self, number: u64) {
        let gone = self.objects.lock().remove(&number);
        gone.into_iter().flat_map(|object| object.waiting).for_each(|answer| answer());
    }
}
