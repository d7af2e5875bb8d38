//! Frames over blocking pipes. What they mean is `protocol::exec`'s.

use std::cell::RefCell;
use std::io::{self, Read, Write};

use protocol::frame::{FrameError, HEADER_BYTES, Header, Messages};

/// The other side of a pipe cannot be understood or reached.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The pipe broke.
    #[error("the pipe broke")]
    Io(#[from] io::Error),
    /// What came is not a frame.
    #[error("what came is not a frame")]
    Frame(#[from] FrameError),
}

/// The writing side of a pipe.
#[derive(Debug)]
pub struct Outbox<W> {
    // One thread speaks, from callbacks that only share it.
    pipe: RefCell<W>,
}

impl<W: Write> Outbox<W> {
    /// Speaks into `pipe`.
    pub fn new(pipe: W) -> Self {
        Self { pipe: RefCell::new(pipe) }
    }

    /// Writes one message and flushes it.
    ///
    /// # Errors
    /// [`WireError`] if it is too large or the pipe is gone.
    pub fn send(&self, message: &impl Messages) -> Result<(), WireError> {
        let frame = message.to_frame()?;
        let mut pipe = self.pipe.borrow_mut();
        pipe.write_all(&frame)?;
        Ok(pipe.flush()?)
    }
}

/// Reads one message; None if the pipe ended between messages.
///
/// # Errors
/// [`WireError`] if it ended within one, or what came is not a message of this conversation.
pub fn receive<M: Messages>(pipe: &mut impl Read) -> Result<Option<M>, WireError> {
    let mut header = [0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        match pipe.read(&mut header[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let header = Header::parse(header, M::BYTES_MAX)?;
    let mut body = vec![0; header.len];
    pipe.read_exact(&mut body)?;
    Ok(Some(M::from_body(header, &body)?))
}

#[cfg(test)]
mod tests {
    use protocol::exec::{FromExecutor, Ready};

    use super::*;

    #[test]
    fn messages_come_back_and_a_cut_one_is_an_error() {
        let ready = Ready { build: "b".into(), backend: "cpu".into(), threads: 2 };
        let outbox = Outbox::new(Vec::new());
        outbox.send(&FromExecutor::from(ready.clone())).unwrap();
        let bytes = outbox.pipe.into_inner();
        let mut pipe = bytes.as_slice();
        assert_eq!(receive::<FromExecutor>(&mut pipe).unwrap(), Some(FromExecutor::Ready(ready)));
        assert_eq!(receive::<FromExecutor>(&mut pipe).unwrap(), None);
        for length in 1..bytes.len() {
            assert!(receive::<FromExecutor>(&mut &bytes[..length]).is_err());
        }
    }
}
