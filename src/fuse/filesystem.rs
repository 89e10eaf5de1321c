//! Requests of the kernel: translated into calls of the interface, and its answers into replies.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::edge::{Edge, GENERATION, errno, finish, finish_after, list, open_flags, place};
use super::handle::Purpose;
use super::{inode, read, xattr};
use crate::image::extent::Find;
use crate::model::reason::Reason;
use crate::tree::Node;
use crate::workflow::drafts_data::Leave;

/// The session's side of [`Edge`].
pub struct Frontend {
    /// What it shares with the announcements.
    pub edge: Arc<Edge>,
}

/// Unwraps, or answers with the errno.
macro_rules! answer {
    ($reply:expr, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(errno) => return $reply.error(errno),
        }
    };
}

impl Filesystem for Frontend {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // No FUSE_DO_READDIRPLUS: with each such answer the kernel forgets the access control lists that it knows, so that
        // every `ls -l` would ask for those of all entries again, one by one.
        // Without it the members of shared images are refused by the kernel.
        if config.add_capabilities(InitFlags::FUSE_POSIX_ACL).is_err() {
            log::warn!("this kernel has no access control lists for FUSE: members cannot read shared images");
        }
        // No file here has bits or capabilities that a write would have to take away: the kernel need not ask before each.
        for flags in [InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_HANDLE_KILLPRIV_V2] {
            if let Err(missing) = config.add_capabilities(flags) {
                log::debug!("the kernel has no {missing:?}");
            }
        }
        if let Err(nearest) = config.set_max_write(inode::LARGEST_WRITE) {
            log::debug!("the largest write is {nearest} bytes");
        }
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let parent = answer!(reply, self.edge.node(parent));
        // By error, never by an entry without inode: the kernel would remember that.
        let node = name.to_str().and_then(|name| self.edge.interface.lookup(parent, name));
        match node {
            Some(node) => self.edge.reply_entry(node, reply),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn forget(&self, _request: &Request, _inode: INodeNo, _count: u64) {}

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.edge.reply_attributes(answer!(reply, self.edge.node(inode)), reply);
    }

    fn setattr(
        &self,
        request: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let edge = &self.edge;
        let node = answer!(reply, edge.node(inode));
        answer!(reply, edge.may_set(request, node, mode, uid, gid));
        match size {
            Some(size) => edge.resize(request, node, handle, size, reply),
            None => edge.reply_set_attributes(node, reply),
        }
    }

    fn readlink(&self, _request: &Request, inode: INodeNo, reply: ReplyData) {
        let node = answer!(reply, self.edge.node(inode));
        match self.edge.interface.target(node) {
            Some(target) => reply.data(target.as_bytes()),
            None => reply.error(Errno::EINVAL),
        }
    }

    fn mknod(
        &self,
        _request: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, request: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        let edge = &self.edge;
        let parent = answer!(reply, edge.node(parent));
        let Some(name) = name.to_str() else { return reply.error(Errno::EINVAL) };
        if let Some(replay) = edge.replay(request, None, place(parent, name)) {
            return edge.publish_new(answer!(reply, replay), reply);
        }
        if edge.read_only {
            return reply.error(Errno::EROFS);
        }
        let done = edge.made(parent, reply);
        edge.interface.clone().make_directory(parent, name, edge.caller(request), done);
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let edge = &self.edge;
        let parent = answer!(reply, edge.node(parent));
        let Some(name) = name.to_str() else { return reply.error(Errno::ENOENT) };
        if let Some(replay) = edge.replay(request, place(parent, name), None) {
            edge.publish(answer!(reply, replay));
            return reply.ok();
        }
        if edge.read_only {
            return reply.error(Errno::EROFS);
        }
        let done = finish_after(edge, vec![parent], reply);
        edge.interface.clone().remove_directory(parent, name, edge.caller(request), done);
    }

    fn unlink(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let edge = &self.edge;
        let parent = answer!(reply, edge.node(parent));
        let Some(name) = name.to_str() else { return reply.error(Errno::ENOENT) };
        if let Some(replay) = edge.replay(request, place(parent, name), None) {
            edge.publish(answer!(reply, replay));
            return reply.ok();
        }
        if edge.read_only {
            return reply.error(Errno::EROFS);
        }
        let result = edge.interface.unlink(parent, name, edge.caller(request));
        finish_after(edge, vec![parent], reply)(result);
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let edge = &self.edge;
        let parent = answer!(reply, edge.node(parent));
        let (Some(name), Some(target)) = (name.to_str(), target.to_str()) else { return reply.error(Errno::EPERM) };
        if let Some(replay) = edge.replay(request, None, place(parent, name)) {
            return edge.publish_new(answer!(reply, replay), reply);
        }
        if edge.read_only {
            return reply.error(Errno::EROFS);
        }
        let done = edge.made(parent, reply);
        edge.interface.clone().symlink(parent, name, target, edge.caller(request), done);
    }

    fn rename(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let edge = &self.edge;
        let from = answer!(reply, edge.node(parent));
        let to = answer!(reply, edge.node(new_parent));
        let (Some(name), Some(new_name)) = (name.to_str(), new_name.to_str()) else {
            return reply.error(Errno::EPERM);
        };
        // The kernel has looked already that the new name is free.
        if !(flags - RenameFlags::RENAME_NOREPLACE).is_empty() {
            return reply.error(Errno::EOPNOTSUPP);
        }
        if let Some(replay) = edge.replay(request, place(from, name), place(to, new_name)) {
            edge.publish(answer!(reply, replay));
            return reply.ok();
        }
        if edge.read_only {
            return reply.error(Errno::EROFS);
        }
        let moved = match from.object_number() {
            Some(_) => Some(from),
            None => edge.interface.lookup(from, name),
        };
        let before = moved.map(|node| (node, edge.interface.admission(node)));
        let tell = edge.clone();
        let answer = finish_after(edge, vec![from, to], reply);
        let done = Box::new(move |result: Result<(), Reason>| {
            if let Some((node, before)) = before {
                tell.admitted(node, &before);
                if let Node::Object(class, number) | Node::NameLink(class, number) = node {
                    tell.links_changed(class, number);
                }
            }
            answer(result);
        });
        edge.interface.clone().rename((from, name), (to, new_name), edge.caller(request), done);
    }

    fn link(&self, _request: &Request, _inode: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn open(&self, request: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let edge = &self.edge;
        let node = answer!(reply, edge.node(inode));
        let Some(attributes) = edge.interface.attributes(node) else { return reply.error(Errno::ENOENT) };
        let purpose = answer!(reply, edge.purpose(request, node, flags.acc_mode() != OpenAccMode::O_RDONLY));
        let flags = open_flags(attributes.caching, &purpose);
        let number = edge.handles.open(node, edge.interface.generation(node), purpose);
        reply.opened(FileHandle(number), flags);
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        _mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let edge = &self.edge;
        let parent = answer!(reply, edge.node(parent));
        if edge.queue.is_announcer(request.pid()) {
            return reply.error(Errno::EPERM);
        }
        if edge.read_only {
            return reply.error(Errno::EROFS);
        }
        // A redirect to a misspelt attribute must fail; tools that make temporary files say that they must be new.
        let Some(name) = name.to_str().filter(|_| flags & libc::O_EXCL != 0) else {
            return reply.error(Errno::ENOENT);
        };
        let caller = edge.caller(request);
        let created = edge.interface.create(parent, name, caller.clone());
        let node = answer!(reply, created.map_err(|reason| errno(&reason)));
        let Some((attributes, attr)) = edge.describe(node) else { return reply.error(Errno::ENOENT) };
        let purpose = match edge.open_data(node, caller, true) {
            Some(data) => Purpose::Data(answer!(reply, data)),
            None => Purpose::Value,
        };
        edge.directory_changed(parent);
        let flags = open_flags(attributes.caching, &purpose);
        let number = edge.handles.open(node, edge.interface.generation(node), purpose);
        reply.created(&inode::lifetime(attributes.caching), &attr, GENERATION, FileHandle(number), flags);
    }

    fn read(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let handle = answer!(reply, self.edge.handle(handle, inode));
        read::answer(&self.edge, &handle, offset, size as usize, request.uid(), reply);
    }

    fn write(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let edge = &self.edge;
        let handle = answer!(reply, edge.handle(handle, inode));
        match &handle.purpose {
            Purpose::Announcement => reply.error(Errno::EBADF),
            Purpose::Data(bulk) => {
                let Ok(count) = u32::try_from(data.len()) else { return reply.error(Errno::EINVAL) };
                let done = Box::new(move |result: Result<(), Reason>| match result {
                    Ok(()) => reply.written(count),
                    Err(reason) => reply.error(errno(&reason)),
                });
                let early = flags.0 & (libc::O_DIRECT | libc::O_SYNC | libc::O_DSYNC) == 0;
                let lent = early.then(|| edge.lender.lend()).flatten();
                bulk.write_at(offset, data, Leave { early, here: lent.is_some() }, done);
            }
            // Half of a value may have gone to the daemon before us.
            Purpose::Value if handle.is_adopted() && offset > 0 => reply.error(Errno::ESTALE),
            Purpose::Value => edge.write_value(request, handle, offset, data, reply),
        }
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        match self.edge.handles.get(handle.0).as_deref().map(|handle| &handle.purpose) {
            Some(Purpose::Data(data)) => data.flush(finish(reply)),
            Some(Purpose::Value | Purpose::Announcement) | None => reply.ok(),
        }
    }

    fn release(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.edge.pollers.remove(inode.0, handle.0);
        if let Some(handle) = self.edge.handles.close(handle.0) {
            self.edge.released(&handle);
        }
        reply.ok();
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, handle: FileHandle, _only_data: bool, reply: ReplyEmpty) {
        match self.edge.handles.get(handle.0).as_deref().map(|handle| &handle.purpose) {
            Some(Purpose::Data(data)) => data.sync(finish(reply)),
            // A write that has returned is durable.
            Some(Purpose::Value | Purpose::Announcement) | None => reply.ok(),
        }
    }

    fn opendir(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn readdir(&self, _request: &Request, inode: INodeNo, _handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let edge = &self.edge;
        let directory = answer!(reply, edge.node(inode));
        let result = list(edge, directory, offset, &mut |cookie, name, node| {
            let Some(attributes) = edge.interface.attributes(node) else { return true };
            !reply.add(INodeNo(node.inode()), cookie, inode::file_type(attributes.kind), name)
        });
        match result {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsyncdir(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _data: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _inode: INodeNo, reply: ReplyStatfs) {
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 0);
    }

    fn setxattr(
        &self,
        _request: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let node = answer!(reply, self.edge.node(inode));
        match xattr::set(&self.edge, node, name, value) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn getxattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let node = answer!(reply, self.edge.node(inode));
        let value = answer!(reply, xattr::get(&self.edge, node, name));
        xattr::reply(&value, size, reply);
    }

    fn listxattr(&self, _request: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let node = answer!(reply, self.edge.node(inode));
        xattr::reply(&xattr::list(&self.edge, node), size, reply);
    }

    fn removexattr(&self, _request: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let node = answer!(reply, self.edge.node(inode));
        reply.error(xattr::remove(&self.edge, node, name));
    }

    fn ioctl(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _request: &Request,
        inode: INodeNo,
        number: FileHandle,
        notifier: PollNotifier,
        _events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        let edge = &self.edge;
        let handle = answer!(reply, edge.handle(number, inode));
        // Before looking: a change in between then wakes.
        if flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY) {
            edge.pollers.add(inode.0, number.0, notifier);
        }
        let mut ready = PollEvents::POLLIN | PollEvents::POLLRDNORM | PollEvents::POLLOUT | PollEvents::POLLWRNORM;
        if handle.is_behind(edge.versions.sequence(inode.0)) {
            ready |= PollEvents::POLLPRI | PollEvents::POLLERR;
        }
        reply.poll(ready);
    }

    fn fallocate(
        &self,
        _request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let handle = answer!(reply, self.edge.handle(handle, inode));
        match &handle.purpose {
            Purpose::Data(data) => data.allocate(offset, length, mode, finish(reply)),
            Purpose::Value | Purpose::Announcement => reply.error(Errno::EOPNOTSUPP),
        }
    }

    fn lseek(
        &self,
        request: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let handle = answer!(reply, self.edge.handle(handle, inode));
        let what = match whence {
            libc::SEEK_DATA => Find::Data,
            libc::SEEK_HOLE => Find::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        match u64::try_from(offset) {
            Ok(offset) => self.edge.find(request, &handle, offset, what, reply),
            Err(_) => reply.error(Errno::ENXIO),
        }
    }

    fn copy_file_range(
        &self,
        _request: &Request,
        _inode_in: INodeNo,
        _handle_in: FileHandle,
        _offset_in: u64,
        _inode_out: INodeNo,
        _handle_out: FileHandle,
        _offset_out: u64,
        _length: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel then reads and writes.
        reply.error(Errno::EOPNOTSUPP);
    }
}
