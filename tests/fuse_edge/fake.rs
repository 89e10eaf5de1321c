//! A tree small enough to see through: a few files in the root, objects with one file each.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use instancefs::image::extent::Find;
use instancefs::inventory::Change;
use instancefs::model::Class;
use instancefs::model::caller::Caller;
use instancefs::model::reason::Reason;
use instancefs::tree::document::Kind as DocumentKind;
use instancefs::tree::{
    Admission, Attributes, Caching, CallerOf, Content, Data, Directory, FindCompletion, Grant, Interface, Kind, Names,
    Node, NodeCompletion, OpenFile, Place, Position, ReadCompletion, Touched,
};
use instancefs::workflow::drafts_data::Leave;
use instancefs::workflow::request::Completion;
use parking_lot::Mutex;
use uuid::Uuid;

/// The files of the root, by row.
const FILES: [&str; 9] = ["", "value", "readonly", "stream", "slow", "slow2", "slow3", "slow4", "slow5"];
const READ_ONLY: u8 = 2;
const STREAM: u8 = 3;
const FIRST_SLOW: u8 = 4;
/// How long a write to one of the slow files takes.
const SLOWNESS: Duration = Duration::from_secs(3);
/// The image whose only file is bulk data.
const IMAGE: u64 = 900;

/// What a change touches, and whose names it moves.
type Effect = (Vec<Touched>, Vec<(Class, u64, Position)>);

/// See the module.
pub struct Fake {
    names: Names,
    values: Mutex<HashMap<String, String>>,
    stream: std::fs::File,
    wanted: Mutex<HashMap<(u64, Position), Place>>,
    effects: Mutex<HashMap<Uuid, Effect>>,
    bulk: Arc<Bulk>,
    changes: Mutex<Sender<Arc<Vec<Change>>>>,
}

#[derive(Default)]
struct Bulk(Mutex<Vec<u8>>);

impl Fake {
    /// An empty tree, but for one image `data`.
    pub fn new(changes: Sender<Arc<Vec<Change>>>) -> std::io::Result<Fake> {
        let names = Names::new();
        let place = Place { directory: Directory::Class(Class::Image), name: "image".into() };
        names.publish(Node::Object(Class::Image, IMAGE), Some(place));
        Ok(Fake {
            names,
            values: Mutex::default(),
            stream: tempfile::tempfile()?,
            wanted: Mutex::default(),
            effects: Mutex::default(),
            bulk: Arc::default(),
            changes: Mutex::new(changes),
        })
    }

    /// Carries out one line of a test; what the kernel is told of it follows by the channel.
    pub fn command(&self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["set", file, value] => {
                self.values.lock().insert((*file).into(), (*value).into());
                self.change(vec![self.file(file)?], vec![]);
            }
            ["append", text] => {
                (&self.stream).write_all(text.as_bytes()).map_err(|error| error.to_string())?;
                self.change(vec![self.file("stream")?], vec![]);
            }
            ["place", number, position, path] => {
                let number = number.parse().map_err(|_| "no number")?;
                let position = match *position {
                    "home" => Position::Home,
                    _ => Position::Name,
                };
                match path.split_once('/') {
                    None => drop(self.wanted.lock().remove(&(number, position))),
                    Some((directory, name)) => {
                        let directory = directory_named(directory).ok_or("no directory")?;
                        self.wanted.lock().insert((number, position), Place { directory, name: name.into() });
                    }
                }
                self.change(vec![], vec![(Class::Instance, number, position)]);
            }
            // Both names are wanted before the first of the two changes is told.
            ["swap", one, other] => {
                let one = one.parse().map_err(|_| "no number")?;
                let other = other.parse().map_err(|_| "no number")?;
                let mut wanted = self.wanted.lock();
                let first = wanted.remove(&(one, Position::Name)).ok_or("no name")?;
                let second = wanted.insert((other, Position::Name), first).ok_or("no name")?;
                wanted.insert((one, Position::Name), second);
                drop(wanted);
                let moved = [one, other].map(|number| (Class::Instance, number, Position::Name));
                self.change(vec![], moved.to_vec());
            }
            // One batch of new objects.
            ["many", first, count] => {
                let first: u64 = first.parse().map_err(|_| "no number")?;
                let count: u64 = count.parse().map_err(|_| "no number")?;
                let numbers = first..first + count;
                for number in numbers.clone() {
                    let place = Place { directory: Directory::Class(Class::Instance), name: number.to_string() };
                    self.wanted.lock().insert((number, Position::Home), place);
                }
                self.change(vec![], numbers.map(|number| (Class::Instance, number, Position::Home)).collect());
            }
            _ => return Err(format!("unknown command {line:?}")),
        }
        Ok(())
    }

    fn file(&self, name: &str) -> Result<Touched, String> {
        let row = FILES.iter().position(|file| *file == name).ok_or("no such file")?;
        let row = u8::try_from(row).map_err(|error| error.to_string())?;
        Ok(Touched { node: Node::File(Directory::Root, row), path: PathBuf::from(name) })
    }

    fn change(&self, touched: Vec<Touched>, moved: Vec<(Class, u64, Position)>) {
        let id = Uuid::new_v4();
        self.effects.lock().insert(id, (touched, moved));
        self.changes.lock().send(Arc::new(vec![Change::Moved(Class::Task, id)])).expect("the mount listens");
    }

    fn value(&self, node: Node) -> Option<String> {
        match node {
            Node::File(Directory::Root, row) => {
                let name = FILES.get(usize::from(row)).filter(|name| !name.is_empty())?;
                Some(self.values.lock().get(*name).map_or("unset\n".into(), |value| format!("{value}\n")))
            }
            Node::Attribute(Class::Instance, number, 1) => Some(format!("{number}\n")),
            _ => None,
        }
    }

    fn exists(&self, number: u64) -> bool {
        self.wanted.lock().contains_key(&(number, Position::Home))
    }
}

fn directory_named(name: &str) -> Option<Directory> {
    match name {
        "instances" => Some(Directory::Class(Class::Instance)),
        "images" => Some(Directory::Class(Class::Image)),
        "trash" => Some(Directory::Trash),
        "by-name" => Some(Directory::ByName),
        _ => None,
    }
}

impl Interface for Fake {
    fn attributes(&self, node: Node) -> Option<Attributes> {
        let file = |mode, size| Attributes {
            kind: Kind::File,
            mode,
            uid: 0,
            gid: 0,
            size,
            allocated: None,
            caching: Caching::Attributes,
            time: 1_000_000_000,
        };
        let directory = Attributes { kind: Kind::Directory, mode: 0o755, ..file(0, 0) };
        match node {
            Node::Directory(_) => Some(directory),
            Node::File(Directory::Root, STREAM) => Some(file(0o444, self.stream.metadata().ok()?.len())),
            Node::File(_, row) => {
                let mode = if row == READ_ONLY { 0o444 } else { 0o666 };
                Some(file(mode, self.value(node)?.len() as u64))
            }
            Node::Object(Class::Image, IMAGE) => Some(directory),
            Node::Object(_, number) => self.exists(number).then_some(directory),
            Node::Attribute(Class::Image, IMAGE, 1) => Some(file(0o666, self.bulk.0.lock().len() as u64)),
            Node::Attribute(_, number, _) => {
                self.exists(number).then_some(())?;
                Some(file(0o644, self.value(node)?.len() as u64))
            }
            Node::NameLink(_, number) => {
                self.exists(number).then_some(())?;
                let size = self.target(node)?.len() as u64;
                Some(Attributes { kind: Kind::Symlink, ..file(0o777, size) })
            }
            Node::StateLink(..) | Node::Key(..) | Node::Events(_) | Node::Scratch(_) => None,
        }
    }

    fn node(&self, inode: u64) -> Option<Node> {
        Node::from_inode(inode, |number| Some(if number == IMAGE { Class::Image } else { Class::Instance }))
    }

    fn lookup(&self, parent: Node, name: &str) -> Option<Node> {
        match parent {
            Node::Directory(Directory::Root) => match directory_named(name) {
                Some(directory) => Some(Node::Directory(directory)),
                None => self.file(name).ok().map(|touched| touched.node),
            },
            Node::Directory(directory) => self.names.lookup(directory, name),
            Node::Object(Class::Image, number) => (name == "data").then_some(Node::Attribute(Class::Image, number, 1)),
            Node::Object(class, number) => (name == "number").then_some(Node::Attribute(class, number, 1)),
            _ => None,
        }
    }

    fn list(&self, directory: Node, cookie: u64, each: &mut dyn FnMut(u64, &str, Node) -> bool) -> Result<(), Reason> {
        match directory {
            Node::Directory(Directory::Root) => {
                let directories = ["instances", "images", "trash", "by-name"].into_iter();
                let entries = FILES.iter().skip(1).copied().chain(directories);
                for (number, name) in (1..).zip(entries).filter(|(number, _)| *number > cookie) {
                    if let Some(node) = self.lookup(directory, name)
                        && !each(number, name, node)
                    {
                        break;
                    }
                }
            }
            Node::Directory(directory) => self.names.list(directory, cookie, each),
            _ => {}
        }
        Ok(())
    }

    fn target(&self, node: Node) -> Option<String> {
        match node {
            Node::NameLink(_, number) => Some(format!("../instances/{number}")),
            _ => None,
        }
    }

    fn content(&self, node: Node, _uid: u32) -> Result<Content, Reason> {
        if node == Node::File(Directory::Root, STREAM) {
            let stream = self.stream.try_clone().map_err(|error| Reason::Failed(error.to_string()))?;
            return Ok(Content::File(Arc::new(stream)));
        }
        let value = self.value(node).ok_or_else(|| Reason::NotFound("file".into()))?;
        Ok(Content::Snapshot(value.into_bytes().into()))
    }

    fn grants(&self, _node: Node) -> Vec<Grant> {
        Vec::new()
    }

    fn admission(&self, _node: Node) -> Admission {
        Admission::default()
    }

    fn generation(&self, _node: Node) -> u32 {
        3
    }

    fn document(&self, _node: Node) -> Option<DocumentKind> {
        None
    }

    fn refuse(&self, _node: Node, _caller: &Caller, reason: Reason, done: Completion) {
        done(Err(reason));
    }

    fn may_open(&self, _node: Node, _caller: CallerOf<'_>) -> bool {
        true
    }

    fn is_read_only(&self, node: Node) -> bool {
        node == Node::File(Directory::Root, READ_ONLY)
    }

    fn write(&self, file: OpenFile, caller: Caller, bytes: &[u8], done: Completion) {
        let text = String::from_utf8_lossy(bytes).trim_end().to_owned();
        match file.node {
            Node::File(Directory::Root, FIRST_SLOW..) => {
                std::thread::spawn(move || {
                    std::thread::sleep(SLOWNESS);
                    done(Ok(()));
                });
            }
            Node::File(Directory::Root, row) if text == "who" => {
                let who = format!("{}/{}/{:?}/{}", caller.uid, caller.login, caller.groups, file.generation);
                self.values.lock().insert(FILES[usize::from(row)].into(), who);
                done(Ok(()));
            }
            Node::File(Directory::Root, row) if !text.is_empty() || file.written => {
                if !text.is_empty() {
                    self.values.lock().insert(FILES[usize::from(row)].into(), text);
                }
                done(Ok(()));
            }
            _ => done(Err(Reason::Malformed("no such word".into()))),
        }
    }

    fn make_directory(self: Arc<Self>, parent: Node, name: &str, _caller: Caller, done: NodeCompletion) {
        let (Node::Directory(directory @ Directory::Class(Class::Instance)), Ok(number)) = (parent, name.parse())
        else {
            return done(Err(Reason::Policy("not here".into())));
        };
        let place = Place { directory, name: name.into() };
        self.wanted.lock().insert((number, Position::Home), place.clone());
        let node = Node::Object(Class::Instance, number);
        // As in the real tree, the change is on its way before the name is published.
        self.change(vec![], vec![(Class::Instance, number, Position::Home)]);
        self.names.publish(node, Some(place));
        done(Ok(node));
    }

    fn remove_directory(self: Arc<Self>, _parent: Node, _name: &str, _caller: Caller, done: Completion) {
        done(Err(Reason::NotEmpty));
    }

    fn unlink(&self, _parent: Node, _name: &str, _caller: Caller) -> Result<(), Reason> {
        Err(Reason::Policy("never".into()))
    }

    fn symlink(self: Arc<Self>, _parent: Node, _name: &str, _target: &str, _caller: Caller, done: NodeCompletion) {
        done(Err(Reason::Policy("never".into())));
    }

    fn rename(self: Arc<Self>, _from: (Node, &str), _to: (Node, &str), _caller: Caller, done: Completion) {
        done(Err(Reason::Policy("never".into())));
    }

    fn create(&self, _parent: Node, _name: &str, _caller: Caller) -> Result<Node, Reason> {
        Err(Reason::NotFound("such attribute".into()))
    }

    fn open_data(&self, node: Node, _caller: Caller, _writing: bool) -> Option<Result<Arc<dyn Data>, Reason>> {
        (node == Node::Attribute(Class::Image, IMAGE, 1)).then(|| Ok(self.bulk.clone() as Arc<dyn Data>))
    }

    fn touched(&self, change: &Change) -> Vec<Touched> {
        self.effect(change).0
    }

    fn moved(&self, change: &Change) -> Vec<(Class, u64, Position)> {
        self.effect(change).1
    }

    fn wanted(&self, _class: Class, number: u64, position: Position) -> Option<Place> {
        self.wanted.lock().get(&(number, position)).cloned()
    }

    fn names(&self) -> &Names {
        &self.names
    }

    fn directory_path(&self, directory: Directory) -> PathBuf {
        match directory {
            Directory::Class(class) => class.directory().into(),
            Directory::Trash => "trash".into(),
            Directory::ByName => "by-name".into(),
            _ => PathBuf::new(),
        }
    }
}

impl Fake {
    fn effect(&self, change: &Change) -> Effect {
        match change {
            Change::Moved(Class::Task, id) => self.effects.lock().get(id).cloned().unwrap_or_default(),
            Change::Object { .. } | Change::Moved(_, _) | Change::Health | Change::Events(_) | Change::Console(..) => {
                Default::default()
            }
        }
    }
}

impl Data for Bulk {
    fn write_at(&self, offset: u64, bytes: &[u8], _leave: Leave, done: Completion) {
        let mut content = self.0.lock();
        let start = usize::try_from(offset).expect("a small test");
        let end = start + bytes.len();
        if content.len() < end {
            content.resize(end, 0);
        }
        content[start..end].copy_from_slice(bytes);
        drop(content);
        done(Ok(()));
    }

    fn read_at(&self, offset: u64, size: usize, done: ReadCompletion) {
        let content = self.0.lock();
        let start = usize::try_from(offset).expect("a small test").min(content.len());
        let bytes = content[start..(start + size).min(content.len())].to_vec();
        drop(content);
        done(Ok(bytes));
    }

    fn truncate(&self, length: u64, done: Completion) {
        self.0.lock().resize(usize::try_from(length).expect("a small test"), 0);
        done(Ok(()));
    }

    fn allocate(&self, _: u64, _: u64, _: i32, done: Completion) {
        done(Err(Reason::Unsupported("nothing is allocated in advance here".to_owned())));
    }

    fn find(&self, offset: u64, what: Find, done: FindCompletion) {
        let end = self.0.lock().len() as u64;
        done(Ok((offset < end).then_some(match what {
            Find::Data => offset,
            Find::Hole => end,
        })));
    }

    fn sync(&self, done: Completion) {
        done(Ok(()));
    }

    fn flush(&self, done: Completion) {
        done(Ok(()));
    }
}
