//! What requests and announcements share, and how it answers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{
    Errno, FileHandle, FopenFlags, Generation, INodeNo, Notifier, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyWrite, Request,
};

use super::acl;
use super::caller::Callers;
use super::handle::{Handle, Handles, Purpose};
use super::inode;
use super::lender::Lender;
use super::pool::Pool;
use super::queue::Queue;
use super::told::Told;
use super::watch::{Pollers, Versions};
use crate::image::extent::{Find, find};
use crate::model::Class;
use crate::model::caller::Caller;
use crate::model::reason::Reason;
use crate::tree::document::Step;
use crate::tree::{Admission, Attributes, Caching, Content, Data, Directory, Interface, Kind, Node, Place};
use crate::workflow::request::Completion;

/// Longest value that a file takes in one write.
const LONGEST_VALUE: usize = 4096;
const TOO_LONG: &str = "a value has at most 4096 bytes";
/// `.` and `..` come before an interface's cookies.
const DOTS: u64 = 2;
/// Entries fetched at a time.
const CHUNK: usize = 128;
/// Inode numbers are never used again, so one generation does.
pub const GENERATION: Generation = Generation(0);

/// What requests and announcements share.
pub struct Edge {
    /// The tree.
    pub interface: Arc<dyn Interface>,
    /// `-o ro`.
    pub read_only: bool,
    /// Whether there is an announcer.
    pub announce: bool,
    /// Open files.
    pub handles: Handles,
    /// When files changed.
    pub versions: Versions,
    /// Who polls.
    pub pollers: Pollers,
    /// What the kernel was told of rights.
    pub told: Told,
    /// What is to be announced.
    pub queue: Arc<Queue>,
    /// Who asks.
    pub callers: Callers,
    /// Disk reads.
    pub pool: Pool,
    /// The way to the kernel, once there is a mount.
    pub kernel: OnceLock<Notifier>,
    /// The end.
    pub stopping: AtomicBool,
    /// Whether a session thread may wait for a disk.
    pub lender: Lender,
}

impl Edge {
    /// Whether the mount is being ended.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Who asks, with all that `/proc` says of him.
    pub fn caller(&self, request: &Request) -> Caller {
        self.callers.resolve(request.uid(), request.gid(), request.pid())
    }

    /// The place behind an inode number.
    pub fn node(&self, inode: INodeNo) -> Result<Node, Errno> {
        self.interface.node(inode.0).ok_or(Errno::ENOENT)
    }

    /// The node with its attributes for the kernel.
    pub fn describe(&self, node: Node) -> Option<(Attributes, fuser::FileAttr)> {
        let attributes = self.interface.attributes(node)?;
        let changed = self.versions.time(node.inode());
        Some((attributes, inode::attributes(node, &attributes, changed)))
    }

    /// Answers with a place's attributes.
    pub fn reply_attributes(&self, node: Node, reply: ReplyAttr) {
        match self.describe(node) {
            Some((attributes, attr)) => reply.attr(&inode::lifetime(attributes.caching), &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Answers a request that set attributes. The kernel believes this answer even if they were invalidated meanwhile (by
    /// a change of owner, say), so it must not believe it for long: it asks again before it relies on them.
    pub fn reply_set_attributes(&self, node: Node, reply: ReplyAttr) {
        match self.describe(node) {
            Some((_, attr)) => reply.attr(&Duration::ZERO, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Answers with a place that was looked up or made.
    pub fn reply_entry(&self, node: Node, reply: ReplyEntry) {
        if let Some((attributes, attr)) = self.describe(node) {
            return reply.entry(&inode::lifetime(attributes.caching), &attr, GENERATION);
        }
        match inode::remains(node).filter(|_| self.interface.names().published(node).is_some()) {
            Some(remains) => reply.entry(&Duration::ZERO, &inode::attributes(node, &remains, None), GENERATION),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// All files of an object have another owner, group, mode or access control list. The kernel checks those, and
    /// believes what it was told until it is told otherwise. Only attributes are invalidated, for which it waits for nobody.
    pub fn rights_changed(&self, number: u64) {
        let Some(kernel) = self.kernel.get() else { return };
        for inode in inode::object_inodes(number) {
            // Most are none that the kernel knows, which it says.
            let _ = kernel.inval_inode(INodeNo(inode), -1, 0);
        }
    }

    /// The access control list of a place; `None` if its mode says it all.
    pub fn access_list(&self, node: Node) -> Option<Vec<u8>> {
        let grants = self.interface.grants(node);
        acl::encode(self.interface.attributes(node).filter(|_| !grants.is_empty())?.mode, &grants)
    }

    /// Tells the kernel before a request is answered that changed rights: whoever gives an object away or takes a right
    /// back may rely on it at once. `before` is how it was when the request came.
    pub fn admitted(&self, node: Node, before: &Admission) {
        if self.interface.admission(node) != *before
            && let Some(number) = node.object_number()
        {
            self.rights_changed(number);
        }
    }

    /// The handle of a number, made if another process gave it out.
    pub fn handle(&self, number: FileHandle, inode: INodeNo) -> Result<Arc<Handle>, Errno> {
        match self.handles.get(number.0) {
            Some(handle) => Ok(handle),
            None => Ok(self.handles.adopt(number.0, self.node(inode)?)),
        }
    }

    /// What a read at this offset is served from.
    pub fn content(&self, handle: &Handle, offset: u64, uid: u32) -> Result<Content, Errno> {
        // Taken before the content: a change in between is then seen as one that was not read.
        let sequence = self.versions.sequence(handle.node.inode());
        match handle.held() {
            Some(content @ (Content::Snapshot(_) | Content::Secret(_))) if offset > 0 => return Ok(content),
            Some(content @ (Content::File(_) | Content::Draft(..))) => {
                handle.saw(sequence);
                return Ok(content);
            }
            // From its beginning it is looked for again: the log may have been made or replaced since.
            Some(content @ Content::Piece(_)) if offset > 0 => {
                handle.saw(sequence);
                return Ok(content);
            }
            None if offset > 0 && handle.is_adopted() => return Err(Errno::ESTALE),
            Some(Content::Snapshot(_) | Content::Secret(_) | Content::Piece(_)) | None => {}
        }
        let content = self.interface.content(handle.node, uid).map_err(|reason| errno(&reason))?;
        handle.hold(content.clone(), sequence);
        Ok(content)
    }

    /// Whether attributes may be set: to what they are.
    pub fn may_set(
        &self,
        request: &Request,
        node: Node,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> Result<(), Errno> {
        if self.read_only && !self.queue.is_announcer(request.pid()) {
            return Err(Errno::EROFS);
        }
        let attributes = self.interface.attributes(node).ok_or(Errno::ENOENT)?;
        let same = mode.is_none_or(|mode| mode & 0o7777 == u32::from(attributes.mode))
            && uid.is_none_or(|uid| uid == attributes.uid)
            && gid.is_none_or(|gid| gid == attributes.gid);
        // Tools give a temporary file the attributes of what it shall replace.
        if same || matches!(node, Node::Scratch(_)) { Ok(()) } else { Err(Errno::EPERM) }
    }

    /// A truncation: of bulk data; it means nothing elsewhere.
    pub fn resize(
        self: &Arc<Edge>,
        request: &Request,
        node: Node,
        handle: Option<FileHandle>,
        size: u64,
        reply: ReplyAttr,
    ) {
        // truncate(2), which opens nothing that could be refused.
        if handle.is_none() && self.interface.is_read_only(node) {
            return reply.error(Errno::EACCES);
        }
        if !may_have_data(node) {
            return self.reply_set_attributes(node, reply);
        }
        let open = handle.and_then(|handle| self.handles.get(handle.0)).and_then(|handle| match &handle.purpose {
            Purpose::Data(data) => Some(Ok(data.clone())),
            Purpose::Value | Purpose::Announcement => None,
        });
        let data = match open.or_else(|| self.open_data(node, self.caller(request), true)) {
            Some(Ok(data)) => data,
            Some(Err(errno)) => return reply.error(errno),
            None if handle.is_none() && self.interface.is_read_only(node) => return reply.error(Errno::EACCES),
            None => return self.reply_set_attributes(node, reply),
        };
        let edge = self.clone();
        let held = data.clone();
        let done = Box::new(move |result: Result<(), Reason>| {
            drop(held);
            match result {
                Ok(()) => edge.reply_set_attributes(node, reply),
                Err(reason) => reply.error(errno(&reason)),
            }
        });
        data.truncate(size, done);
    }

    /// Where the next data or hole of an open file begins, so that copies of sparse files are sparse.
    pub fn find(&self, request: &Request, handle: &Handle, offset: u64, what: Find, reply: ReplyLseek) {
        let answer = |reply: ReplyLseek, found: Option<u64>| match found.and_then(|found| i64::try_from(found).ok()) {
            Some(found) => reply.offset(found),
            None => reply.error(Errno::ENXIO),
        };
        if let Purpose::Data(data) = &handle.purpose {
            let done = Box::new(move |result: Result<Option<u64>, Reason>| match result {
                Ok(found) => answer(reply, found),
                Err(reason) => reply.error(errno(&reason)),
            });
            return data.find(offset, what, done);
        }
        // Copying tools ask before they read.
        let content = match handle.held() {
            None if may_have_data(handle.node) => match self.content(handle, 0, request.uid()) {
                Ok(content) => Some(content),
                Err(errno) => return reply.error(errno),
            },
            held => held,
        };
        let (file, draft) = match content {
            Some(Content::File(file)) => (Some(file), None),
            Some(Content::Draft(file, draft)) => (Some(file), Some(draft)),
            Some(Content::Snapshot(_) | Content::Secret(_) | Content::Piece(_)) | None => (None, None),
        };
        if let Some(file) = file {
            return self.pool.run(move || {
                if let Some(draft) = draft {
                    draft.settle();
                }
                match find(&file, offset, what) {
                    Ok(found) => answer(reply, found),
                    Err(error) => reply.error(error.into()),
                }
            });
        }
        let Some(attributes) = self.interface.attributes(handle.node) else { return reply.error(Errno::ENOENT) };
        let found = match what {
            Find::Data => offset,
            Find::Hole => attributes.size,
        };
        answer(reply, (offset < attributes.size).then_some(found));
    }

    /// One write of a value, or of a piece of a document.
    pub fn write_value(
        self: &Arc<Edge>,
        request: &Request,
        handle: Arc<Handle>,
        offset: u64,
        data: &[u8],
        reply: ReplyWrite,
    ) {
        let Ok(count) = u32::try_from(data.len()) else { return reply.error(Errno::EINVAL) };
        let caller = self.caller(request);
        let writer = handle.clone();
        let governed = self.interface.governed(handle.node);
        let before = self.interface.admission(governed);
        let edge = self.clone();
        let done: Completion = Box::new(move |result| match result {
            Ok(()) => {
                writer.wrote();
                edge.admitted(governed, &before);
                match governed.object_number() {
                    Some(number) if edge.interface.admission(governed) != before => {
                        let interface = edge.interface.clone();
                        let answer = Box::new(move || reply.written(count));
                        edge.told.after(number, || interface.admission(governed), answer);
                    }
                    Some(_) | None => reply.written(count),
                }
            }
            Err(reason) => reply.error(errno(&reason)),
        });
        let step = match self.interface.document(handle.node) {
            Some(kind) => handle.collect(kind, &caller, offset == 0, data),
            None if data.len() > LONGEST_VALUE => return done(Err(Reason::Malformed(TOO_LONG.to_owned()))),
            None => return self.interface.write(handle.open_file(), caller, data, done),
        };
        match step {
            Ok(Step::Wait) => done(Ok(())),
            Ok(Step::Commit(document)) => self.interface.write(handle.open_file(), caller, &document, done),
            Err(reason) => self.interface.refuse(handle.node, &caller, reason, done),
        }
    }

    /// A handle is released: what is left in it of a document is dropped, which is said.
    pub fn released(&self, handle: &Handle) {
        if let Some(writer) = handle.unfinished() {
            let reason = "the file was closed before the document was complete, so the rest of it was dropped";
            let reason = Reason::Malformed(reason.to_owned());
            self.interface.refuse(handle.node, &writer, reason, Box::new(|_refused| {}));
        }
    }

    /// Bulk data, if the place is some.
    pub fn open_data(&self, node: Node, caller: Caller, writing: bool) -> Option<Result<Arc<dyn Data>, Errno>> {
        let result = self.interface.open_data(node, caller, writing)?;
        Some(result.map_err(|reason| errno(&reason)))
    }

    /// What an open is for.
    pub fn purpose(&self, request: &Request, node: Node, writing: bool) -> Result<Purpose, Errno> {
        if writing && self.queue.is_announcer(request.pid()) {
            let announced = self.queue.is_announcing(node.inode());
            return if announced { Ok(Purpose::Announcement) } else { Err(Errno::EPERM) };
        }
        if !self.interface.may_open(node, &|| self.caller(request)) {
            return Err(Errno::EACCES);
        }
        if writing && self.read_only {
            return Err(Errno::EROFS);
        }
        if writing && self.interface.is_read_only(node) {
            return Err(Errno::EACCES);
        }
        if !may_have_data(node) {
            return Ok(Purpose::Value);
        }
        let caller = match writing {
            true => self.caller(request),
            false => self.callers.plain(request.uid(), request.gid()),
        };
        match self.open_data(node, caller, writing) {
            Some(data) => Ok(Purpose::Data(data?)),
            // It became an image since this was asked above.
            None if writing && self.interface.is_read_only(node) => Err(Errno::EACCES),
            None => Ok(Purpose::Value),
        }
    }
}

/// The places that [`Interface::open_data`] has to be asked about.
pub fn may_have_data(node: Node) -> bool {
    match node {
        Node::Attribute(Class::Image, ..) | Node::Scratch(_) => true,
        Node::Attribute(
            Class::Instance | Class::Task | Class::Flavor | Class::Volume | Class::Transfer | Class::Backend,
            ..,
        )
        | Node::Key(..)
        | Node::Events(_)
        | Node::Directory(_)
        | Node::File(..)
        | Node::Object(..)
        | Node::NameLink(..)
        | Node::StateLink(..) => false,
    }
}

/// The errno of a refusal.
pub fn errno(reason: &Reason) -> Errno {
    Errno::from_i32(reason.errno())
}

/// A name in one of the directories whose entries come and go.
pub fn place(directory: Node, name: &str) -> Option<Place> {
    match directory {
        Node::Directory(directory) => Some(Place { directory, name: name.to_owned() }),
        Node::File(..)
        | Node::Object(..)
        | Node::Attribute(..)
        | Node::Key(..)
        | Node::Events(_)
        | Node::NameLink(..)
        | Node::StateLink(..)
        | Node::Scratch(_) => None,
    }
}

/// How the kernel is to treat an open file.
pub fn open_flags(caching: Caching, purpose: &Purpose) -> FopenFlags {
    match (purpose, caching) {
        (Purpose::Value, Caching::Everything) => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
        (Purpose::Value, Caching::Attributes | Caching::Nothing) | (Purpose::Announcement, _) => {
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH
        }
        // Whoever closes it learns whether what was acknowledged was written.
        (Purpose::Data(_), _) => FopenFlags::FOPEN_DIRECT_IO,
    }
}

/// Answers a request that gives nothing back.
pub fn finish(reply: ReplyEmpty) -> Box<dyn FnOnce(Result<(), Reason>) + Send> {
    Box::new(move |result| match result {
        Ok(()) => reply.ok(),
        Err(reason) => reply.error(errno(&reason)),
    })
}

/// The same for a request that adds or removes names in these directories.
pub fn finish_after(
    edge: &Arc<Edge>,
    directories: Vec<Node>,
    reply: ReplyEmpty,
) -> Box<dyn FnOnce(Result<(), Reason>) + Send> {
    let edge = edge.clone();
    let done = finish(reply);
    Box::new(move |result| {
        if result.is_ok() {
            directories.into_iter().for_each(|directory| edge.directory_changed(directory));
        }
        done(result);
    })
}

/// Calls `each` with the next offset, the name and the place of each entry from `offset` on, until it returns false.
/// Entries are fetched before they are looked at: the interface may hold locks while it lists.
pub fn list(
    edge: &Edge,
    directory: Node,
    offset: u64,
    each: &mut dyn FnMut(u64, &str, Node) -> bool,
) -> Result<(), Errno> {
    let root = Node::Directory(Directory::Root);
    if edge.interface.attributes(directory).is_none_or(|attributes| attributes.kind != Kind::Directory) {
        return Err(Errno::ENOTDIR);
    }
    if offset == 0 && !each(1, ".", directory) || offset <= 1 && !each(DOTS, "..", root) {
        return Ok(());
    }
    let mut cookie = offset.saturating_sub(DOTS);
    loop {
        let mut entries = Vec::with_capacity(CHUNK);
        edge.interface
            .list(directory, cookie, &mut |cookie, name, node| {
                entries.push((cookie, name.to_owned(), node));
                entries.len() < CHUNK
            })
            .map_err(|reason| errno(&reason))?;
        for (next, name, node) in &entries {
            cookie = *next;
            if !each(next.saturating_add(DOTS), name, *node) {
                return Ok(());
            }
        }
        if entries.len() < CHUNK {
            return Ok(());
        }
    }
}
