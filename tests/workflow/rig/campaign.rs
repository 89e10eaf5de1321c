//! One operation, disturbed in every way at every step. Whatever happens: afterwards the world is as before or as after,
//! says so, has all its disks with their contents and nothing else, and the same request again leads to the end.

use std::any::Any;
use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use instancefs::model::Class;
use instancefs::model::change::InstanceChange;
use instancefs::model::instance::Word;
use instancefs::model::reason::Reason;
use instancefs::model::task::TaskState;
use instancefs::model::volume::change::VolumeChange;
use instancefs::workflow::Engine;
use instancefs::workflow::request::{Request, Submission, Wait};
use parking_lot::Mutex;
use tempfile::TempDir;
use uuid::Uuid;

use super::case::{Asked, Case};
use super::devices::WiredDevices;
use super::memory::{FileDisks, MemoryStore};
use super::points::{Disturbance, MOMENTS, Point, beginnings, failures, seconds};
use super::scene::{Scene, Words, errors_agree, is_at_rest};
use super::wire::{Act, Kind, Step, Wire};
use super::wrappers::{WiredBlock, WiredHypervisor, WiredStore};
use crate::lab::{DEADLINE, Life, World, alice, root, until};

/// Points of one campaign that run at the same time: most of them wait.
const WORKERS: usize = 16;

/// How soon what the hypervisor says is shown, at the latest.
const SHOWN: Duration = Duration::from_secs(60);

/// What a point came to.
struct Run {
    first: Vec<Step>,
    recovery: Vec<Step>,
    died: bool,
}

/// The undisturbed course.
struct Reference {
    before: Scene,
    after: Scene,
    parts: Vec<Scene>,
    steps: Vec<Step>,
    /// The row of the table that the operation belongs to.
    row: &'static str,
}

struct Bed {
    world: World,
    disks: Arc<FileDisks>,
    id: Uuid,
    words: Words,
    counts_boots: bool,
}

impl Bed {
    /// A world with the object, and with a bystander whose disk nobody may touch.
    fn new(case: &Case) -> Bed {
        let world = World::on(TempDir::new().unwrap(), Arc::new(MemoryStore::default()));
        let image = world.directory.path().join("images").join(world.image.to_string());
        fs::create_dir_all(&image).unwrap();
        fs::write(image.join("data"), "an image").unwrap();
        let disks = Arc::new(FileDisks::new(world.directory.path().join("disks")));
        let (id, bystander) = {
            let life = live(&world, &disks, &Wire::new(Vec::new()));
            let bystander = life.stopped();
            let id = (case.setup)(&life);
            life.wait_idle(id);
            guests_write(&life);
            (id, bystander)
        };
        let words = Words(vec![(id, "OBJECT"), (bystander, "BYSTANDER"), (world.image, "IMAGE")]);
        Bed { world, disks, id, words, counts_boots: case.counts_boots }
    }

    fn scene(&self, life: &Life<'_>, class: Class) -> Scene {
        Scene::of(life, class, self.id, &self.words, self.counts_boots)
    }
}

fn live<'a>(world: &'a World, disks: &Arc<FileDisks>, wire: &Arc<Wire>) -> Life<'a> {
    let store = WiredStore { inner: world.store.clone(), wire: wire.clone() };
    let hypervisor = WiredHypervisor { inner: world.hypervisor.clone(), wire: wire.clone() };
    let block = WiredBlock { inner: disks.clone(), wire: wire.clone() };
    let devices = WiredDevices { inner: world.devices.clone(), wire: wire.clone() };
    world.begin_life_on(Arc::new(store), Arc::new(hypervisor), Arc::new(block), Arc::new(devices), |_| {})
}

/// Each guest writes to its disks, unless it has.
pub fn guests_write(life: &Life<'_>) {
    for instance in life.inventory.instances() {
        for disk in &instance.record.disks {
            let path = life.world.directory.path().join("disks").join(&disk.reference);
            if !fs::read_to_string(&path).unwrap().contains("written by") {
                let mut file = fs::OpenOptions::new().append(true).open(path).unwrap();
                writeln!(file, "written by the guest of {}", instance.id).unwrap();
            }
        }
    }
}

/// The engine of a life, for those who act in the middle of its steps.
type Slot = Arc<Mutex<Option<Arc<Engine>>>>;

fn act(disturbance: Disturbance, slot: &Slot, marker: &Arc<Mutex<Option<Arc<Wire>>>>, class: Class, id: Uuid) -> Act {
    let ask = |changes: Vec<(Request, bool)>| -> Act {
        let (slot, marker) = (slot.clone(), marker.clone());
        Act::Meanwhile(Arc::new(move || {
            let Some(engine) = slot.lock().clone() else { return };
            for (request, marks) in &changes {
                let (answer, answered) = channel();
                let wire = marker.lock().clone().filter(|_| *marks);
                engine.submit(Submission {
                    caller: if *marks { alice() } else { root() },
                    file: "state".to_owned(),
                    request: request.clone(),
                    wait: Wait::Accepted,
                    done: Box::new(move |result: Result<(), Reason>| {
                        if let (Some(wire), Ok(())) = (&wire, &result) {
                            wire.mark();
                        }
                        drop(answer.send(result));
                    }),
                });
                // The engine's own thread answers, and cannot wait for itself.
                if thread::current().name() != Some("engine") {
                    drop(answered.recv_timeout(DEADLINE).expect("answered"));
                }
            }
        }))
    };
    // Of a volume's operation the instance that it owns beside it.
    let owned = if class == Class::Volume { super::table::HOLDER } else { id };
    let of_instance = |change: InstanceChange| Request::Instance { id: owned, changes: vec![change] };
    match disturbance {
        Disturbance::Death(moment) => Act::Die(moment),
        Disturbance::Failure(failure) => Act::Fail(failure),
        Disturbance::Lock if class == Class::Volume => {
            ask(vec![(Request::Volume { id, changes: vec![VolumeChange::Locked(true)] }, true)])
        }
        Disturbance::Lock => ask(vec![(of_instance(InstanceChange::Locked(true)), true)]),
        Disturbance::Cancel => ask(vec![(of_instance(InstanceChange::ResetState), false)]),
        Disturbance::Others => ask(Word::REQUESTS
            .into_iter()
            .map(InstanceChange::State)
            .chain([InstanceChange::RebootHard, InstanceChange::RebootSoft, InstanceChange::Vcpus(7)])
            .map(|change| (of_instance(change), false))
            .collect()),
    }
}

/// A life with these disturbances, until it has died or its work is done. `then` looks at it if it has not died.
fn disturbed<T>(
    bed: &Bed,
    disturbances: &[(usize, Disturbance)],
    asked: Option<&Asked>,
    class: Class,
    then: impl FnOnce(&Life<'_>, Option<Result<(), Reason>>) -> T,
) -> (Vec<Step>, Option<T>) {
    let (slot, marker) = (Slot::default(), Arc::new(Mutex::new(None)));
    let plan = disturbances.iter().map(|(at, what)| (*at, act(*what, &slot, &marker, class, bed.id))).collect();
    let wire = Wire::new(plan);
    *marker.lock() = Some(wire.clone());
    let life = live(&bed.world, &bed.disks, &wire);
    *slot.lock() = Some(life.engine.clone());
    let answered = asked.map(|asked| life.submit(&asked.caller(), asked.request(bed.id), Wait::Settle));
    let answer = Mutex::new(None);
    until("the work is done, or the program dead", || {
        if let Some(result) = answered.as_ref().and_then(|answered| answered.try_recv().ok()) {
            *answer.lock() = Some(result);
        }
        wire.is_dead() || ((asked.is_none() || answer.lock().is_some()) && is_idle(&life, class, bed.id))
    });
    let result = wire.ends().then(|| then(&life, answer.into_inner()));
    *slot.lock() = None;
    *marker.lock() = None;
    (wire.steps(), result)
}

fn is_idle(life: &Life<'_>, class: Class, id: Uuid) -> bool {
    match class {
        Class::Image => life.inventory.image(id).is_none_or(|image| image.task.is_none()),
        Class::Volume => life.inventory.volume(id).is_none_or(|volume| volume.task.is_none()),
        Class::Instance | Class::Task | Class::Flavor | Class::Transfer | Class::Backend => {
            life.inventory.instance(id).is_none_or(|instance| instance.task.is_none())
        }
    }
}

fn reference(case: &Case, row_of: fn(&instancefs::model::task::Operation) -> &'static str) -> Reference {
    let class = case.asked.class();
    let end_of = |asked: &Asked| {
        let bed = Bed::new(case);
        let (_, before) = disturbed(&bed, &[], None, class, |life, _| bed.scene(life, class));
        let (steps, after) = disturbed(&bed, &[], Some(asked), class, |life, answer| {
            answer.expect("answered").unwrap_or_else(|reason| panic!("{asked:?} fails undisturbed: {reason}"));
            is_at_rest(life, &bed.disks, None);
            errors_agree(life);
            let tasks = life.inventory.tasks();
            let latest = tasks.iter().filter(|task| task.record.object == bed.id).max_by_key(|task| task.record.number);
            (bed.scene(life, class), latest.map(|task| row_of(&task.record.operation)))
        });
        let (after, row) = after.expect("it lives");
        (before.expect("it lives"), after, steps, row)
    };
    let (before, after, steps, row) = end_of(&case.asked);
    let parts = case.parts.iter().map(|part| end_of(part).1).collect();
    assert_eq!((before.state.as_str(), after.state.as_str()), case.states);
    let disks = |scene: &Scene| scene.files.keys().filter(|path| path.starts_with("disks/OBJECT/")).count().max(1) - 1;
    assert_eq!((disks(&before), disks(&after)), case.disks, "{before:#?} {after:#?}");
    Reference { before, after, parts, steps, row: row.unwrap_or("no operation") }
}

/// Runs one point, and judges its end.
fn run(case: &Case, reference: &Reference, point: &Point) -> Run {
    let class = case.asked.class();
    let bed = Bed::new(case);
    let (first, lived) = disturbed(&bed, &point.first, Some(&case.asked), class, |life, answer| {
        judge(case, reference, point, &bed, life, answer);
    });
    let locked_at = first.iter().position(|step| step.is_marked).unwrap_or(first.len());
    for step in &first[locked_at..] {
        assert!(!is_destruction(step), "{} after it was locked", step.call);
    }
    let died = lived.is_none();
    let (recovery, lived) = match died {
        false => (Vec::new(), Some(())),
        true => {
            disturbed(&bed, &point.recovery, None, class, |life, _| judge(case, reference, point, &bed, life, None))
        }
    };
    if first.iter().any(|step| step.is_marked) {
        // The lock is stored, and binds the recovery too.
        for step in &recovery {
            assert!(!is_destruction(step), "{} in the recovery of what was locked before", step.call);
        }
    }
    if lived.is_none() {
        disturbed(&bed, &[], None, class, |life, _| judge(case, reference, point, &bed, life, None));
    }
    Run { first, recovery, died }
}

/// What nobody does to a locked instance.
fn is_destruction(step: &Step) -> bool {
    match step.kind {
        Kind::Hypervisor => ["undefine", "power_off", "shutdown", "reboot", "detach_disk"].contains(&step.call),
        Kind::Block => step.call == "remove",
        Kind::Commit => false,
    }
}

fn judge(
    case: &Case,
    reference: &Reference,
    point: &Point,
    bed: &Bed,
    life: &Life<'_>,
    answer: Option<Result<(), Reason>>,
) {
    let class = case.asked.class();
    let condemned = (case.disks.1 < case.disks.0).then_some(bed.id);
    is_at_rest(life, &bed.disks, condemned);
    errors_agree(life);
    let locked = point.first.iter().any(|(_, what)| matches!(what, Disturbance::Lock));
    let scene = settled(bed, life, class, |scene| {
        let mut ends = [&reference.before, &reference.after].into_iter().chain(&reference.parts);
        ends.any(|end| end == scene)
            || (case.between)(&reference.before, scene)
            // What a lock keeps from being undone stays, and is recorded.
            || (locked && scene.keeps(&reference.before))
    });
    let scene = scene.unwrap_or_else(|scene| {
        let differences = (scene.difference(&reference.before), scene.difference(&reference.after));
        panic!("an end that is none: compared with before\n{}compared with after\n{}", differences.0, differences.1)
    });
    let has_data =
        |scene: &Scene| scene.files.values().any(|content| content.contains("written by the guest of OBJECT"));
    let may_lose_data = !has_data(&reference.before) || !has_data(&reference.after);
    assert!(may_lose_data || has_data(&scene), "what the guest wrote is lost: {scene:#?}");
    let is_after = |what: &str| {
        let end = settled(bed, life, class, |scene| *scene == reference.after);
        end.unwrap_or_else(|scene| panic!("{what}, and it is\n{}", scene.difference(&reference.after)));
    };
    let tasks = life.inventory.tasks();
    let mut tasks: Vec<_> = tasks.iter().filter(|task| task.record.object == bed.id).collect();
    tasks.sort_by_key(|task| task.record.number);
    let mine = tasks.iter().filter(|task| row_is(reference, &task.record.operation)).count();
    assert!(mine <= 1 || !matches!(point.first.first(), Some((_, Disturbance::Others))), "two operations: {tasks:?}");
    let errors = match class {
        Class::Image => life.inventory.image(bed.id).map(|image| image.record.errors.clone()),
        Class::Volume => life.inventory.volume(bed.id).map(|volume| volume.record.errors.clone()),
        Class::Instance | Class::Task | Class::Flavor | Class::Transfer | Class::Backend => {
            life.inventory.instance(bed.id).map(|instance| instance.record.errors.clone())
        }
    };
    let others = matches!(point.first.first(), Some((_, Disturbance::Others)));
    match (answer, &errors) {
        (Some(Ok(())), errors) => {
            is_after("it said success");
            if let (Some(errors), false) = (errors, others) {
                // The second name of a protected disk is another matter, of which last_error may tell.
                let error = errors.last().filter(|line| line.file != "kept");
                assert_eq!(error, None, "it said success, and last_error says otherwise");
            }
        }
        (Some(Err(reason)), Some(errors)) if !others => {
            // A device that is made again in the background meanwhile is a success, after which the line is history.
            // And the second names that a lock wants tell of their own failures, after it.
            let told = match class {
                Class::Volume => errors.lines.last(),
                Class::Instance | Class::Image | Class::Task | Class::Flavor | Class::Transfer | Class::Backend => {
                    errors.last().and_then(|_| errors.lines.iter().rfind(|line| line.file != "kept"))
                }
            };
            assert_eq!(told.map(|line| line.reason.clone()), Some(reason.to_string()));
        }
        (Some(Err(_)) | None, _) => {}
    }
    if let Some(latest) = tasks.last().filter(|task| row_is(reference, &task.record.operation)) {
        match latest.record.state {
            TaskState::Success => is_after("the task says success"),
            TaskState::Failure | TaskState::Cancelled | TaskState::Pending | TaskState::Processing => {}
        }
    }
    again(case, reference, bed, life);
}

fn row_is(reference: &Reference, operation: &instancefs::model::task::Operation) -> bool {
    super::table::row(operation) == reference.row
}

/// The scene once it is as wanted, or else as it stays: what the hypervisor says is shown a moment later.
fn settled(bed: &Bed, life: &Life<'_>, class: Class, wanted: impl Fn(&Scene) -> bool) -> Result<Scene, Scene> {
    let deadline = Instant::now() + SHOWN;
    loop {
        let scene = bed.scene(life, class);
        if wanted(&scene) {
            return Ok(scene);
        }
        if Instant::now() > deadline {
            return Err(scene);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whatever happened, the same request leads to the end now.
fn again(case: &Case, reference: &Reference, bed: &Bed, life: &Life<'_>) {
    let class = case.asked.class();
    let exists = life.inventory.get(class, bed.id).is_some();
    if !exists {
        return;
    }
    if let Some(instance) = life.inventory.instance(bed.id)
        && instance.record.protection.lock.is_some()
    {
        life.change(&alice(), bed.id, InstanceChange::Locked(false)).unwrap();
    }
    if let Some(volume) = life.inventory.volume(bed.id)
        && volume.record.protection.lock.is_some()
    {
        life.change_volume(&alice(), bed.id, VolumeChange::Locked(false)).unwrap();
    }
    until("the hypervisor is back", || life.inventory.health().hypervisor.unreachable().is_none());
    let deadline = Instant::now() + SHOWN;
    let result = loop {
        match life.ask(&case.asked.caller(), case.asked.request(bed.id)) {
            // A definition that was read before the change is shown until it is read again.
            // And a tool that another point starts holds the files of all, until it is another program. And the news of a
            // lost connection may come after the look at it. And a device that a death left behind is made again in the
            // background.
            Err(
                Reason::StoppedOnly | Reason::InUse(_) | Reason::Unreachable(_) | Reason::Busy { task: "attaching" },
            ) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(20));
            }
            // Named things are not made or removed twice.
            Err(Reason::Exists | Reason::NotFound(_)) if bed.scene(life, class) == reference.after => break Ok(()),
            result => break result,
        }
    };
    until("it is idle", || is_idle(life, class, bed.id));
    assert_eq!(result, Ok(()), "the same request again");
    is_at_rest(life, &bed.disks, None);
    let scene = settled(bed, life, class, |scene| match case.settles {
        true => *scene == reference.after,
        false => scene.files == reference.after.files,
    });
    scene.unwrap_or_else(|scene| panic!("the same request again leads to\n{}", scene.difference(&reference.after)));
}

/// All points that begin so. Each is counted.
fn points_from(case: &Case, reference: &Reference, beginning: (usize, Disturbance), seed: usize, count: &AtomicUsize) {
    let attempt = |point: Point| {
        count.fetch_add(1, Ordering::Relaxed);
        let result = catch_unwind(AssertUnwindSafe(|| run(case, reference, &point)));
        result.unwrap_or_else(|panic| panic!("{point}: {}", words(&*panic)))
    };
    let once = attempt(Point { first: vec![beginning], recovery: Vec::new() });
    let moment = MOMENTS[seed / 2 % 2];
    match beginning.1 {
        Disturbance::Death(_) => {
            for index in seconds(if once.died { once.recovery.len() } else { 0 }, seed) {
                let recovery = vec![(index + 1, Disturbance::Death(moment))];
                attempt(Point { first: vec![beginning], recovery });
            }
        }
        Disturbance::Failure(_) | Disturbance::Cancel | Disturbance::Lock => {
            let later = once.first.len().saturating_sub(beginning.0);
            for index in seconds(later, seed) {
                let at = beginning.0 + index + 1;
                let kinds = failures(once.first[at - 1].kind);
                let second = match seed / 2 % 3 {
                    0 => Disturbance::Failure(kinds[seed / 2 % kinds.len()]),
                    _ => Disturbance::Death(moment),
                };
                attempt(Point { first: vec![beginning, (at, second)], recovery: Vec::new() });
            }
        }
        Disturbance::Others => {}
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_else(|| "a panic".to_owned())
}

/// All points of all cases of a row.
pub fn campaign(name: &'static str, cases: &[Case]) {
    let count = AtomicUsize::new(0);
    let failed = Mutex::new(Vec::new());
    for case in cases {
        let reference = reference(case, super::table::row);
        assert_eq!(reference.row, name, "the case is in another row's place");
        let beginnings = beginnings(&reference.steps, case.asked.meets_others());
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..WORKERS {
                scope.spawn(|| {
                    while let Some((seed, beginning)) = {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        beginnings.get(index).map(|beginning| (index, *beginning))
                    } {
                        let all = AssertUnwindSafe(|| points_from(case, &reference, beginning, seed, &count));
                        if let Err(panic) = catch_unwind(all) {
                            failed.lock().push(format!("{:?}: {}", case.asked, words(&*panic)));
                        }
                    }
                });
            }
        });
    }
    let count = count.into_inner();
    let failed = failed.into_inner();
    println!("{name}: {count} points");
    report(name, count);
    let shown = failed.iter().take(8).cloned().collect::<Vec<_>>().join("\n\n");
    assert!(failed.is_empty(), "{} of {count} points fail:\n{shown}", failed.len());
}

/// For the last lines of scripts/test.
fn report(name: &str, count: usize) {
    if let Some(path) = std::env::var_os("INSTANCEFS_POINTS") {
        let line = format!("{name} {count}\n");
        let file = fs::OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the points are reported");
    }
}

/// How long guests of the table take at most to shut down.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(1);
