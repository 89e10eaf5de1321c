//! What is done without anybody asking for it at that moment: the bin is emptied of what has expired, what a move into
//! the bin left to do is tried again, the shelf is tidied, and offers that nobody took end.
//!
//! The keeper asks like everybody else, as the daemon itself, so that the judge and the operation look at everything
//! again. It calls nobody and waits for no operation: an object that has a task is left alone. What is refused is asked
//! once, so that the refusal is seen, and again when there would be another answer.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::delete;
use super::engine::{Message, Shared};
use super::request::{Request, Submission, Wait};
use super::shelve::{self, Due};
use crate::inventory::{Image, Instance, Transfer, Volume};
use crate::model::caller::Caller;
use crate::model::change::{Effect, ImageChange, InstanceChange, judge_image, judge_instance};
use crate::model::reason::Reason;
use crate::model::record::{BinEntry, InstanceBin};
use crate::model::task::Operation;
use crate::model::transfer::TransferChange;
use crate::model::volume::change::VolumeChange;
use crate::model::{image, instance, transfer, volume};

const OFFLOADED: instance::Word = instance::Word::State(instance::State::ShelvedOffloaded);

/// How often it looks.
const EVERY: Duration = Duration::from_secs(60);
/// What was begun and may have failed is asked for again after [`EVERY`], doubled so often.
const DOUBLINGS: u32 = 6;
/// How often the host's uptime is stored while something waits for it. A crash of the host costs so much of it.
const STORE_EVERY: Duration = Duration::from_secs(600);

/// How others call it.
#[derive(Default)]
pub(super) struct Calls {
    /// Look now.
    look: AtomicBool,
    /// And ask again at once for what may have failed.
    impatient: AtomicBool,
}

impl Shared {
    /// Has the keeper look now.
    pub(super) fn wake_keeper(&self, impatient: bool) {
        self.keeper.impatient.fetch_or(impatient, Ordering::AcqRel);
        self.keeper.look.store(true, Ordering::Release);
        self.gate.wake();
    }
}

/// Both clocks.
#[derive(Clone, Copy)]
struct Moment {
    /// Unix seconds.
    now: u64,
    /// Seconds.
    uptime: u64,
}

/// What is to be done about an object.
enum Wanted<C> {
    /// Its time is over: ask for this; the file is named where it is refused.
    Now(C, &'static str),
    /// Something was left to do: ask for this, though not at first sight, since somebody may have given it up.
    Again(C, &'static str),
    /// Nothing for so many seconds.
    Later(u64),
    /// Nothing.
    Nothing,
}

/// What was asked for an object.
struct Asked {
    /// The refusal that was shown.
    refusal: Option<Reason>,
    tries: u32,
    not_before: Instant,
}

impl Asked {
    /// Not asked for yet, and not to be before then.
    fn new(refusal: Option<Reason>, not_before: Instant) -> Asked {
        Asked { refusal, tries: 0, not_before }
    }
}

/// See the module.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    asked: HashMap<Uuid, Asked>,
    stored: Instant,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>) -> Keeper {
        Keeper { shared, asked: HashMap::new(), stored: Instant::now() }
    }

    /// Until the engine ends.
    pub(super) fn run(mut self) {
        loop {
            let pause = self.look();
            let shared = &self.shared;
            shared.gate.sleep(pause, &|| shared.keeper.look.swap(false, Ordering::AcqRel));
            if shared.gate.stopping() {
                self.store_uptime();
                return;
            }
        }
    }

    /// Looks at everything; says when to look again.
    fn look(&mut self) -> Duration {
        let is_impatient = self.shared.keeper.impatient.swap(false, Ordering::AcqRel);
        if is_impatient {
            self.asked.values_mut().for_each(|asked| *asked = Asked::new(asked.refusal.take(), Instant::now()));
        }
        let again = if is_impatient { Duration::ZERO } else { EVERY };
        let moment = Moment { now: self.shared.settings.clock.now(), uptime: self.shared.uptime.seconds() };
        let inventory = self.shared.parts.ledger.inventory().clone();
        let unreachable = inventory.health().hypervisor.unreachable().map(str::to_owned);
        let caller = Caller::daemon();
        let mut pause = EVERY;
        let mut ripe = HashSet::new();
        for instance in inventory.instances() {
            let (change, file, first) = match self.of_instance(&instance, moment) {
                Wanted::Now(change, file) => (change, file, Duration::ZERO),
                Wanted::Again(change, file) => (change, file, again),
                Wanted::Later(seconds) => {
                    pause = pause.min(Duration::from_secs(seconds));
                    continue;
                }
                Wanted::Nothing => continue,
            };
            ripe.insert(instance.id);
            if instance.task.is_none() {
                let verdict = judged_instance(&instance, &caller, unreachable.as_deref(), &change);
                let request = Request::Instance { id: instance.id, changes: vec![change] };
                self.ask(&caller, (instance.id, first), verdict, request, file);
            }
        }
        for image in inventory.images() {
            let (change, file) = match of_image(&image, moment) {
                Wanted::Now(change, file) | Wanted::Again(change, file) => (change, file),
                Wanted::Later(seconds) => {
                    pause = pause.min(Duration::from_secs(seconds));
                    continue;
                }
                Wanted::Nothing => continue,
            };
            ripe.insert(image.id);
            if image.task.is_none() {
                let path = self.shared.image_path(image.id);
                let verdict = judge_image(&image.situation(&caller), &image.record, &change)
                    .and_then(|_| delete::may_delete_image(&inventory, &image, &path))
                    .and_then(|()| instance::reachable(unreachable.as_deref()));
                let request = Request::Image { id: image.id, changes: vec![change] };
                self.ask(&caller, (image.id, Duration::ZERO), verdict, request, file);
            }
        }
        for volume in inventory.volumes() {
            let (change, file) = match of_volume(&volume, moment) {
                Wanted::Now(change, file) | Wanted::Again(change, file) => (change, file),
                Wanted::Later(seconds) => {
                    pause = pause.min(Duration::from_secs(seconds));
                    continue;
                }
                Wanted::Nothing => continue,
            };
            ripe.insert(volume.id);
            if volume.task.is_none() {
                let verdict = volume::change::judge(&volume.situation(&caller, None), &change)
                    .and_then(|_| instance::reachable(unreachable.as_deref()));
                let request = Request::Volume { id: volume.id, changes: vec![change] };
                self.ask(&caller, (volume.id, Duration::ZERO), verdict, request, file);
            }
        }
        for offer in inventory.transfers() {
            match of_offer(&offer, moment) {
                Wanted::Now(change, file) | Wanted::Again(change, file) => {
                    ripe.insert(offer.id);
                    let request = Request::Transfer { id: offer.id, change };
                    self.ask(&caller, (offer.id, Duration::ZERO), Ok(()), request, file);
                }
                Wanted::Later(seconds) => pause = pause.min(Duration::from_secs(seconds)),
                Wanted::Nothing => {}
            }
        }
        self.shared.offers.tidy(moment.uptime);
        self.asked.retain(|id, _| ripe.contains(id));
        if self.stored.elapsed() >= STORE_EVERY {
            self.store_uptime();
        }
        pause
    }

    /// Asks for an object, at first sight of it after some time, unless the answer is known.
    fn ask(
        &mut self,
        caller: &Caller,
        (id, first): (Uuid, Duration),
        verdict: Result<(), Reason>,
        request: Request,
        file: &'static str,
    ) {
        let now = Instant::now();
        let asked = self.asked.entry(id).or_insert_with(|| Asked::new(None, now + first));
        match verdict {
            // It is shown by `health`, and does not last.
            Err(Reason::Unreachable(_)) => return,
            Err(reason) if asked.refusal.as_ref() == Some(&reason) => return,
            Err(reason) => {
                log::warn!("{id} is left as it is: {reason}");
                asked.refusal = Some(reason);
            }
            Ok(()) if now < asked.not_before => return,
            Ok(()) => {
                asked.refusal = None;
                asked.not_before = now + EVERY * (1 << asked.tries.min(DOUBLINGS));
                asked.tries += 1;
            }
        }
        self.shared.tell(Message::Submit(Submission {
            caller: caller.clone(),
            file: file.to_owned(),
            request,
            wait: Wait::Accepted,
            done: Box::new(|_shown_with_the_object| {}),
        }));
    }

    fn of_instance(&self, instance: &Instance, moment: Moment) -> Wanted<InstanceChange> {
        if let Some(bin) = &instance.record.bin {
            return of_binned(bin, moment);
        }
        match shelve::due(instance, moment.now, &self.shared.settings) {
            Due::Offload => Wanted::Now(InstanceChange::State(OFFLOADED), "state"),
            Due::Tidy => {
                shelve::tidy(&self.shared, instance.id, moment.now);
                Wanted::Nothing
            }
            Due::Later(seconds) => Wanted::Later(seconds),
            Due::Never => Wanted::Nothing,
        }
    }

    /// Stores the host's uptime if something waits for it.
    fn store_uptime(&mut self) {
        self.stored = Instant::now();
        let inventory = self.shared.parts.ledger.inventory();
        let waits = |entry: Option<&BinEntry>| entry.is_some_and(|entry| entry.expiry.is_some());
        let is_awaited = inventory.images().iter().any(|image| waits(image.record.bin.as_ref()))
            || inventory.volumes().iter().any(|volume| waits(volume.record.bin.as_ref()))
            || inventory.instances().iter().any(|instance| waits(instance.record.bin.as_ref().map(|bin| &bin.entry)))
            || inventory.transfers().iter().any(|offer| offer.record.state == transfer::State::Pending);
        if is_awaited && let Err(error) = self.shared.uptime.store(&self.shared.parts.ledger) {
            log::warn!("how long the host was up is not stored: {error}");
        }
    }
}

fn of_binned(bin: &InstanceBin, moment: Moment) -> Wanted<InstanceChange> {
    if !bin.is_settled {
        // Its guest may still run: before that is over nothing can be deleted.
        return Wanted::Again(InstanceChange::SettleBin, "state");
    }
    expires(&bin.entry, moment, InstanceChange::State(instance::Word::Deleted))
}

fn of_image(image: &Image, moment: Moment) -> Wanted<ImageChange> {
    let deletion = ImageChange::State(image::Word::Deleted);
    image.record.bin.as_ref().map_or(Wanted::Nothing, |entry| expires(entry, moment, deletion))
}

/// One that is offered to somebody is in no bin.
fn of_volume(volume: &Volume, moment: Moment) -> Wanted<VolumeChange> {
    let deletion = VolumeChange::State(volume::Word::Deleted);
    volume.record.bin.as_ref().map_or(Wanted::Nothing, |entry| expires(entry, moment, deletion))
}

fn of_offer(offer: &Transfer, moment: Moment) -> Wanted<TransferChange> {
    match offer.record.state {
        transfer::State::Pending => match offer.record.expiry.left(moment.now, moment.uptime) {
            0 => Wanted::Now(TransferChange::Expire, "expires_at"),
            seconds => Wanted::Later(seconds),
        },
        transfer::State::Accepted | transfer::State::Cancelled | transfer::State::Expired => Wanted::Nothing,
    }
}

fn expires<C>(entry: &BinEntry, moment: Moment, deletion: C) -> Wanted<C> {
    match entry.expires(moment.now).map(|expiry| expiry.left(moment.now, moment.uptime)) {
        Some(0) => Wanted::Now(deletion, "expires_at"),
        Some(seconds) => Wanted::Later(seconds),
        None => Wanted::Nothing,
    }
}

fn judged_instance(
    instance: &Instance,
    caller: &Caller,
    unreachable: Option<&str>,
    change: &InstanceChange,
) -> Result<(), Reason> {
    let situation = instance.situation(caller, unreachable);
    match judge_instance(&situation, &instance.record, instance.name(), change)? {
        Effect::Start(Operation::Delete) => delete::may_delete_instance(instance),
        Effect::Start(_) | Effect::AlreadyTrue | Effect::Record | Effect::Join | Effect::Reset | Effect::Remove => {
            Ok(())
        }
    }
}
