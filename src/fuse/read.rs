//! What a read is answered with.

use fuser::{Errno, ReplyData};

use super::edge::{Edge, errno};
use super::handle::{Handle, Purpose};
use super::pool::read_fully;
use crate::model::reason::Reason;
use crate::tree::Content;

/// Answers with at most `size` bytes from `offset` on, of the file as it was when it was opened; from the pool if a disk
/// has to be waited for.
pub fn answer(edge: &Edge, handle: &Handle, offset: u64, size: usize, uid: u32, reply: ReplyData) {
    let content = match &handle.purpose {
        Purpose::Announcement => return reply.error(Errno::EBADF),
        Purpose::Data(data) => {
            let done = Box::new(move |result: Result<Vec<u8>, Reason>| match result {
                Ok(bytes) => reply.data(bytes.get(..size).unwrap_or(&bytes)),
                Err(reason) => reply.error(errno(&reason)),
            });
            return data.read_at(offset, size, done);
        }
        Purpose::Value => edge.content(handle, offset, uid),
    };
    match content {
        Err(errno) => reply.error(errno),
        Ok(Content::Snapshot(bytes)) => reply.data(part(&bytes, offset, size)),
        Ok(Content::Secret(secret)) => reply.data(part(secret.bytes(), offset, size)),
        Ok(Content::File(file)) => edge.pool.run(move || match read_fully(&file, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error.into()),
        }),
        Ok(Content::Draft(file, data)) => edge.pool.run(move || {
            data.settle();
            match read_fully(&file, offset, size) {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(error.into()),
            }
        }),
        Ok(Content::Piece(piece)) => edge.pool.run(move || match piece.read(offset, size, read_fully) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error.into()),
        }),
    }
}

fn part(bytes: &[u8], offset: u64, size: usize) -> &[u8] {
    let rest = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
    rest.get(..size).unwrap_or(rest)
}
