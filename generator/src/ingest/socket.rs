//! An agent's WebSocket (RFC 6455), server's side, that reads a message only when it is told that there is room for it.
//!
//! A message's first header says how long it is. Until there is room it stays with its sender and with TCP, and when it has
//! been taken nothing of its space is kept. So what a connection takes while nothing is under way does not depend on how
//! long its messages are, nor do all together take more than the room that is given. Headers and what is sent are
//! [`tungstenite`]'s.

use std::io::Cursor;

use flow::wire::Encoding;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::{
    self, Bytes,
    error::{CapacityError, ProtocolError},
    protocol::{
        CloseFrame,
        frame::{
            Frame, FrameHeader,
            coding::{Control, Data, OpCode},
        },
    },
};

/// What is read at once as long as no message's contents are, in bytes: some headers and control frames.
const HEAD: usize = 1 << 10;

/// The longest contents of a control frame, in bytes (section 5.5).
const MAX_CONTROL: usize = 125;

/// A connection after its handshake.
#[derive(Debug)]
pub(super) struct Socket<S> {
    stream: S,
    /// What was read and is not consumed yet lies between `start` and `end`.
    head: Box<[u8; HEAD]>,
    start: usize,
    end: usize,
    /// The frame whose contents arrive.
    frame: Option<Arriving>,
    /// The contents so far of the message that arrives, and its form.
    message: Vec<u8>,
    encoding: Option<Encoding>,
    /// Whether there is room for it.
    admitted: bool,
    /// The longest message, in bytes.
    limit: usize,
    /// The peer has given a sign of life that nobody was told of yet, and what is to be answered to its last ping.
    alive: bool,
    pong: Option<Bytes>,
}

/// A data frame, of which so many bytes are still to come.
#[derive(Debug)]
struct Arriving {
    is_final: bool,
    mask: [u8; 4],
    length: usize,
    left: usize,
}

/// What the peer has sent.
#[derive(Debug)]
pub(super) enum Heard {
    /// The beginning of a message, for which so many bytes of room are needed: nothing more is read before
    /// [`Socket::admit`].
    Announced(usize),
    /// All of it.
    Message {
        /// Its contents.
        bytes: Vec<u8>,
        /// Text is JSON, binary data MessagePack.
        encoding: Encoding,
    },
    /// Pings or pongs, and the answer to the last of the pings.
    Alive(Option<Frame>),
    /// Its goodbye.
    Close(Option<CloseFrame>),
}

/// What was taken of what has been read.
enum Taken {
    /// Enough to be told.
    Heard(Heard),
    /// There may be more.
    Something,
    /// More must be read first.
    Nothing,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    /// Of what came in by a handshake; messages may have so many bytes.
    pub(super) fn new(stream: S, limit: usize) -> Self {
        Self {
            stream,
            head: Box::new([0; HEAD]),
            start: 0,
            end: 0,
            frame: None,
            message: Vec::new(),
            encoding: None,
            admitted: false,
            limit,
            alive: false,
            pong: None,
        }
    }

    /// Takes messages up to this length from now on, in bytes.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// There is room for the message that was announced.
    pub(super) fn admit(&mut self) {
        self.admitted = true;
    }

    /// What comes next. Nothing is lost if it is not waited for to the end.
    ///
    /// # Errors
    /// If the connection is lost, or the peer does not keep to the protocol.
    pub(super) async fn next(&mut self) -> tungstenite::Result<Heard> {
        loop {
            match self.take()? {
                Taken::Heard(heard) => return Ok(heard),
                Taken::Something => continue,
                Taken::Nothing => {}
            }
            let read = match &mut self.frame {
                // What follows the frame stays in the stream.
                Some(frame) => {
                    let mut rest = (&mut self.stream).take(frame.left as u64);
                    let read = rest.read_buf(&mut self.message).await?;
                    frame.left -= read;
                    read
                }
                None => {
                    self.head.copy_within(self.start..self.end, 0);
                    self.end -= self.start;
                    self.start = 0;
                    let read = self.stream.read(&mut self.head[self.end..]).await?;
                    self.end += read;
                    read
                }
            };
            if read == 0 {
                return Err(ProtocolError::ResetWithoutClosingHandshake.into());
            }
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// If the connection is lost.
    pub(super) async fn send(&mut self, frame: Frame) -> tungstenite::Result<()> {
        let mut bytes = Vec::with_capacity(frame.len());
        frame.format(&mut bytes)?;
        self.stream.write_all(&bytes).await?;
        Ok(self.stream.flush().await?)
    }

    /// Ends our side, and reads the peer's to its end: were the connection dropped with anything unread, TCP would reset it
    /// and throw away what is on its way to the peer.
    pub(super) async fn drain(&mut self) {
        if self.stream.shutdown().await.is_ok() {
            while matches!(self.stream.read(&mut self.head[..]).await, Ok(1..)) {}
        }
    }

    /// Takes the next of what has been read.
    fn take(&mut self) -> tungstenite::Result<Taken> {
        let taken = match &self.frame {
            None => self.take_header()?,
            Some(_) if self.admitted => self.take_contents()?,
            // Room may be long in coming, and the peer waits for its answer.
            Some(_) if self.alive => self.take_sign(),
            // One in pieces does not say how long it will be.
            Some(frame) => Taken::Heard(Heard::Announced(if frame.is_final {
                frame.length
            } else {
                self.limit
            })),
        };
        Ok(match taken {
            Taken::Nothing if self.frame.is_none() && self.alive => self.take_sign(),
            taken => taken,
        })
    }

    /// Takes the sign of life. Of many pings the last is answered (section 5.5.3).
    fn take_sign(&mut self) -> Taken {
        self.alive = false;
        Taken::Heard(Heard::Alive(self.pong.take().map(Frame::pong)))
    }

    /// Takes the next header, and of a control frame the contents.
    fn take_header(&mut self) -> tungstenite::Result<Taken> {
        let head = &self.head[self.start..self.end];
        let mut cursor = Cursor::new(head);
        let Some((header, length)) = FrameHeader::parse(&mut cursor)? else {
            return Ok(Taken::Nothing);
        };
        let begin = cursor.position() as usize;
        if header.rsv1 || header.rsv2 || header.rsv3 {
            return Err(ProtocolError::NonZeroReservedBits.into());
        }
        let Some(mask) = header.mask else {
            return Err(ProtocolError::UnmaskedFrameFromClient.into());
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let data = match header.opcode {
            OpCode::Data(data) => data,
            OpCode::Control(_) if !header.is_final => {
                return Err(ProtocolError::FragmentedControlFrame.into());
            }
            OpCode::Control(_) if length > MAX_CONTROL => {
                return Err(ProtocolError::ControlFrameTooBig.into());
            }
            OpCode::Control(control) => {
                let Some(contents) = head[begin..].get(..length) else {
                    return Ok(Taken::Nothing);
                };
                let mut contents = contents.to_vec();
                unmask(&mut contents, mask);
                self.start += begin + length;
                return self.control(control, contents);
            }
        };
        self.encoding = Some(match (data, self.encoding) {
            (Data::Continue, Some(encoding)) => encoding,
            (Data::Continue, None) => return Err(ProtocolError::UnexpectedContinueFrame.into()),
            (data, Some(_)) => return Err(ProtocolError::ExpectedFragment(data).into()),
            (Data::Text, None) => Encoding::Json,
            (Data::Binary, None) => Encoding::MessagePack,
            (Data::Reserved(code), None) => {
                return Err(ProtocolError::UnknownDataFrameType(code).into());
            }
        });
        let size = self.message.len().saturating_add(length);
        if size > self.limit {
            let max_size = self.limit;
            return Err(CapacityError::MessageTooLong { size, max_size }.into());
        }
        self.start += begin;
        self.frame = Some(Arriving {
            is_final: header.is_final,
            mask,
            length,
            left: length,
        });
        Ok(Taken::Something)
    }

    fn control(&mut self, control: Control, contents: Vec<u8>) -> tungstenite::Result<Taken> {
        match control {
            Control::Ping => self.pong = Some(contents.into()),
            Control::Pong => {}
            Control::Close => {
                let frame = match contents.split_first_chunk() {
                    None if contents.is_empty() => None,
                    None => return Err(ProtocolError::InvalidCloseSequence.into()),
                    Some((code, reason)) => Some(CloseFrame {
                        code: u16::from_be_bytes(*code).into(),
                        reason: std::str::from_utf8(reason)?.into(),
                    }),
                };
                return Ok(Taken::Heard(Heard::Close(frame)));
            }
            Control::Reserved(code) => {
                return Err(ProtocolError::UnknownControlFrameType(code).into());
            }
        }
        self.alive = true;
        Ok(Taken::Something)
    }

    /// Takes what there is of a frame's contents, and the message if they are its last.
    fn take_contents(&mut self) -> tungstenite::Result<Taken> {
        let Some(frame) = &mut self.frame else {
            return Ok(Taken::Nothing);
        };
        if self.message.is_empty() {
            // One in pieces has room for the longest. Growing by and by, it could take twice that.
            self.message.reserve_exact(if frame.is_final {
                frame.length
            } else {
                self.limit
            });
        }
        let read = frame.left.min(self.end - self.start);
        let contents = &self.head[self.start..self.start + read];
        self.message.extend_from_slice(contents);
        self.start += read;
        frame.left -= read;
        if frame.left > 0 {
            return Ok(Taken::Nothing);
        }
        let begin = self.message.len() - frame.length;
        unmask(&mut self.message[begin..], frame.mask);
        let is_final = frame.is_final;
        self.frame = None;
        let Some(encoding) = self.encoding.take_if(|_| is_final) else {
            return Ok(Taken::Something);
        };
        self.admitted = false;
        let bytes = std::mem::take(&mut self.message);
        if encoding == Encoding::Json {
            std::str::from_utf8(&bytes)?;
        }
        Ok(Taken::Heard(Heard::Message { bytes, encoding }))
    }
}

/// Section 5.3.
fn unmask(bytes: &mut [u8], mask: [u8; 4]) {
    let (words, rest) = bytes.as_chunks_mut::<4>();
    let key = u32::from_ne_bytes(mask);
    for word in words {
        *word = (u32::from_ne_bytes(*word) ^ key).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests;
