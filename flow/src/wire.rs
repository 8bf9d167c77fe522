//! The messages between agent and generator, and their codec.
//!
//! The agent opens a WebSocket to `/agents` with the subprotocol [`SUBPROTOCOL`] and says [`AgentMessage::Hello`]; the
//! generator answers [`GeneratorMessage::Welcome`] with the last sequence number that it has stored for that instance.
//! Then the agent sends batches, numbered without gaps, and the generator acknowledges each after it is stored.
//! A batch that was not acknowledged is sent again after a reconnect; the generator recognises it by (instance,
//! sequence) and acknowledges it without counting it twice.
//!
//! A message is an object with one key, its name: `{"ack": {"sequence": 7}}`. Binary frames are MessagePack with named
//! fields, text frames JSON; a peer answers in the form in which it was spoken to. Unknown fields are ignored. The form of
//! a batch is [`Packed`]: a table of ends, and flows that refer to it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use self::batch::{End, Flow, Misfit, Packed, RawEnd};
use crate::{record::FlowRecord, time::Timestamp};

mod batch;
pub mod bounds;

/// The WebSocket subprotocol: its name carries the protocol's major version.
pub const SUBPROTOCOL: &str = "microshield.v1";

/// The path of the generator's endpoint for agents.
pub const AGENTS_PATH: &str = "/agents";

/// The largest message that either side accepts, in bytes. A batch of [`MAX_BATCH_FLOWS`] flows between as many pairs of
/// ordinary pods is a third of it, one of a node that has a hundred ends a thirtieth.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// The most flows that an agent puts into one batch.
pub const MAX_BATCH_FLOWS: usize = 1_000;

/// The reason for a loss under which an agent says, once, that it sees no UDP. Whoever makes policies must know.
pub const UDP_NOT_CAPTURED: &str = "udp_not_captured";

/// The reason under which an agent says, once, that it does not know which UDP sockets are older than it is: of conversations that
/// were under way when it started, whoever speaks first after that is taken for the client.
pub const UDP_OPEN_BEFORE_UNKNOWN: &str = "udp_open_before_unknown";

/// As [`UDP_NOT_CAPTURED`] for SCTP, where the kernel has it and the agent sees no UDP either.
pub const SCTP_NOT_CAPTURED: &str = "sctp_not_captured";

/// How deep values may be nested in each other: as deep as `serde_json` lets them be. Eight times as deep, which is what
/// `rmp_serde` would take, overflows the stack of a thread of 2 MiB.
const MAX_DEPTH: usize = 128;

/// What an agent says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentMessage {
    /// The first message of a connection.
    Hello(Hello),
    /// Flows of one window.
    Batch(Batch),
}

/// What an agent says, with the ends of its flows as they came: for who has met most of them before.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RawMessage<'a> {
    /// As [`AgentMessage::Hello`].
    Hello(Hello),
    /// As [`AgentMessage::Batch`]; whether its flows refer to what there is, is not known yet.
    #[serde(borrow)]
    Batch(Packed<RawEnd<'a>>),
}

/// Who the agent is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Drawn at random when the agent's process starts, and again when it meets a ledger that does not have what was
    /// acknowledged: sequence numbers count within it.
    pub instance: String,
    /// The node's name.
    pub node: String,
    /// The agent's version.
    pub version: String,
    /// Which ends of its records the agent has named; default [`Resolve::Both`].
    #[serde(default)]
    pub resolve: Resolve,
    /// What it captures and how, in words such as `udp`; default none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub capabilities: Vec<String>,
    /// What its clock says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock: Option<Timestamp>,
}

/// Which ends of a record its observer names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resolve {
    /// Both.
    #[default]
    Both,
    /// The observed end, and that in part: pods without their service. The other end stands as external, with the address
    /// and port that the observer's socket had for it, and the generator names both by
    /// [`Index::name_ends`](crate::topology::Index::name_ends), at the time in the record. Because addresses change hands,
    /// such an agent does not add up records of different times.
    Local,
}

/// Flows of one window, and what was lost in it. On its way it is [`Packed`].
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Counts without gaps within an agent's instance; an instance that the generator does not know may begin with any
    /// number.
    pub sequence: u64,
    /// The span of time in which the flows were seen.
    pub window: Window,
    /// The flows.
    pub flows: Vec<FlowRecord>,
    /// Observations lost in the window, by reason; empty when nothing was.
    pub losses: BTreeMap<String, u64>,
    /// How the agent was when it made the batch.
    pub health: Option<Health>,
}

/// How an agent is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Flows that wait in memory to be sent.
    #[serde(default)]
    pub pending: u64,
    /// Batches in its spool.
    #[serde(default)]
    pub spool_batches: u64,
    /// What these take, in bytes.
    #[serde(default)]
    pub spool_bytes: u64,
    /// For how many seconds its view of the cluster's objects has not been current.
    #[serde(default)]
    pub watch_stale_seconds: u64,
}

/// A span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Its start.
    pub from: Timestamp,
    /// Its end.
    pub to: Timestamp,
}

impl Window {
    /// The shortest span that has both in it.
    #[must_use]
    pub fn widened(self, other: Self) -> Self {
        Self {
            from: self.from.min(other.from),
            to: self.to.max(other.to),
        }
    }
}

/// What the generator says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GeneratorMessage {
    /// The answer to [`AgentMessage::Hello`].
    Welcome {
        /// The last sequence number stored for this instance; 0 if none.
        last_sequence: u64,
    },
    /// The batch with this number is stored, and all before it.
    Ack {
        /// The batch's number.
        sequence: u64,
    },
    /// The generator closes the connection for this reason.
    Refuse {
        /// For people.
        reason: String,
        /// Whether the last message itself is at fault, so that it would be refused again.
        #[serde(default)]
        malformed: bool,
    },
}

/// How messages are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// MessagePack in binary frames.
    MessagePack,
    /// JSON in text frames.
    Json,
}

/// Why a message could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Longer than [`MAX_MESSAGE_BYTES`].
    #[error("message of {0} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")]
    TooLong(usize),
    /// Not MessagePack, or not one of the messages.
    #[error("malformed MessagePack: {0}")]
    MessagePack(#[from] rmp_serde::decode::Error),
    /// Not JSON, or not one of the messages.
    #[error("malformed JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// Not a batch in MessagePack that begins with its number.
    #[error("not an encoded batch")]
    NoBatch,
    /// The message cannot be expressed in MessagePack.
    #[error("cannot encode: {0}")]
    Encode(#[from] rmp_serde::encode::Error),
}

/// Encodes a message.
///
/// # Errors
/// [`WireError::TooLong`] if no peer would accept it.
pub fn encode<M: Serialize>(message: &M, encoding: Encoding) -> Result<Vec<u8>, WireError> {
    let bytes = match encoding {
        Encoding::MessagePack => {
            let mut bytes = Vec::new();
            message.serialize(&mut rmp_serde::Serializer::new(&mut bytes).with_struct_map())?;
            bytes
        }
        Encoding::Json => to_vec(message, encoding)?,
    };
    within_limit(&bytes)?;
    Ok(bytes)
}

/// Decodes a message.
///
/// # Errors
/// If it is too long or malformed; the reason is fit to be sent to the peer.
pub fn decode<'a, M: Deserialize<'a>>(bytes: &'a [u8], encoding: Encoding) -> Result<M, WireError> {
    within_limit(bytes)?;
    match encoding {
        Encoding::MessagePack => {
            let mut deserializer = rmp_serde::Deserializer::from_read_ref(bytes);
            deserializer.set_max_depth(MAX_DEPTH);
            Ok(M::deserialize(&mut deserializer)?)
        }
        Encoding::Json => from_slice(bytes, encoding),
    }
}

/// Encodes in the form that is for people, in which addresses are text, also in MessagePack: what an end is.
fn to_vec<M: Serialize>(message: &M, encoding: Encoding) -> Result<Vec<u8>, WireError> {
    Ok(match encoding {
        Encoding::MessagePack => {
            let mut bytes = Vec::new();
            message.serialize(
                &mut rmp_serde::Serializer::new(&mut bytes)
                    .with_struct_map()
                    .with_human_readable(),
            )?;
            bytes
        }
        Encoding::Json => serde_json::to_vec(message)?,
    })
}

/// Decodes what [`to_vec`] encodes.
fn from_slice<'a, M: Deserialize<'a>>(bytes: &'a [u8], encoding: Encoding) -> Result<M, WireError> {
    Ok(match encoding {
        Encoding::MessagePack => {
            let mut deserializer =
                rmp_serde::Deserializer::from_read_ref(bytes).with_human_readable();
            deserializer.set_max_depth(MAX_DEPTH);
            M::deserialize(&mut deserializer)?
        }
        Encoding::Json => serde_json::from_slice(bytes)?,
    })
}

/// Gives a batch that was encoded in MessagePack with the number 0 its own number, without decoding it.
///
/// # Errors
/// If `message` is not what [`encode`] makes of such a batch.
pub fn with_sequence(message: &[u8], sequence: u64) -> Result<Vec<u8>, WireError> {
    // A map of one entry; its key; a map of at most fifteen entries, of which the first is the number.
    let Some([0x81, 0xa5, b'b', b'a', b't', b'c', b'h', 0x80..=0x8f]) = message.first_chunk::<8>()
    else {
        return Err(WireError::NoBatch);
    };
    let (head, rest) = message.split_at(8);
    let Some([b'\xa8', b's', b'e', b'q', b'u', b'e', b'n', b'c', b'e', 0]) =
        rest.first_chunk::<10>()
    else {
        return Err(WireError::NoBatch);
    };
    let mut numbered = Vec::with_capacity(message.len() + size_of::<u64>());
    numbered.extend(head);
    numbered.extend(&rest[..9]);
    sequence.serialize(&mut rmp_serde::Serializer::new(&mut numbered))?;
    numbered.extend(&rest[10..]);
    within_limit(&numbered)?;
    Ok(numbered)
}

fn within_limit(bytes: &[u8]) -> Result<(), WireError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(WireError::TooLong(bytes.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: &str = r#"{"batch": {"sequence": 7, "window": {"from": 1.5, "to": 2.5}, "losses": {"ring_full": 3},
        "hostname": "node-1", "sources": ["ebpf"],
        "ends": [{"address": "10.0.0.1",
                  "pod": {"id": "u", "namespace": "n", "name": "p", "addresses": ["10.0.0.1"], "labels": {"a": "b"}}},
                 {"address": "fd00::1"}],
        "processes": [{"pid": 7, "comm": "curl"}],
        "flows": [{"src": 0, "dst": 1, "port": 53, "protocol": "UDP", "direction": "egress", "count": 12,
                   "first_seen": 2.0, "last_seen": 2.25, "process": 0, "via": "[fd00::1]:53"},
                  {"src": 1, "dst": 0, "port": 80, "last_seen": 2.25, "hostname": "node-2", "sources": []}],
        "health": {"pending": 3, "spool_batches": 1, "spool_bytes": 100, "watch_stale_seconds": 0}}}"#;

    #[test]
    fn a_batch_is_the_records_that_its_flows_are() {
        let AgentMessage::Batch(batch) = decode(BATCH.as_bytes(), Encoding::Json).unwrap() else {
            panic!("no batch");
        };
        let records: Vec<FlowRecord> = [
            r#"{"timestamp": 2.25, "hostname": "node-1", "protocol": "UDP", "direction": "egress", "count": 12,
                "first_seen": 2.0, "tuple": {"src_addr": "10.0.0.1", "src_port": 0, "dst_addr": "fd00::1", "dst_port": 53},
                "src": {"pod": {"id": "u", "namespace": "n", "name": "p", "addresses": ["10.0.0.1"], "labels": {"a": "b"}}},
                "dst": {}, "process": {"pid": 7, "comm": "curl"}, "sources": ["ebpf"], "via": "[fd00::1]:53"}"#,
            r#"{"timestamp": 2.25, "hostname": "node-2",
                "tuple": {"src_addr": "fd00::1", "src_port": 0, "dst_addr": "10.0.0.1", "dst_port": 80},
                "dst": {"pod": {"id": "u", "namespace": "n", "name": "p", "addresses": ["10.0.0.1"], "labels": {"a": "b"}}},
                "src": {}}"#,
        ]
        .map(|record| serde_json::from_str(record).unwrap())
        .into();
        assert_eq!(batch.flows, records);
    }

    #[test]
    fn an_end_that_is_not_there_is_refused() {
        for (place, other, field) in [
            (r#""src": 0"#, r#""src": 2"#, "flows[0].src"),
            (r#""dst": 0"#, r#""dst": 4294967295"#, "flows[1].dst"),
            (r#""process": 0"#, r#""process": 1"#, "flows[0].process"),
        ] {
            let broken = BATCH.replace(place, other);
            let error = decode::<AgentMessage>(broken.as_bytes(), Encoding::Json).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }

    #[test]
    fn equal_ends_have_equal_bytes() {
        let message: AgentMessage = decode(BATCH.as_bytes(), Encoding::Json).unwrap();
        for encoding in [Encoding::MessagePack, Encoding::Json] {
            let [one, other] = [(); 2].map(|()| encode(&message, encoding).unwrap());
            let [one, other] = [&one, &other].map(|bytes| {
                let RawMessage::Batch(batch) = decode(bytes, encoding).unwrap() else {
                    panic!("no batch");
                };
                batch.ends
            });
            assert_eq!(one, other);
            let AgentMessage::Batch(batch) = &message else {
                panic!("no batch");
            };
            let end = one[0].decode(encoding).unwrap();
            assert_eq!(end.endpoint, batch.flows[0].src);
        }
    }

    #[test]
    fn a_batch_survives_both_encodings() {
        let message: AgentMessage = decode(BATCH.as_bytes(), Encoding::Json).unwrap();
        for encoding in [Encoding::MessagePack, Encoding::Json] {
            let bytes = encode(&message, encoding).unwrap();
            assert_eq!(decode::<AgentMessage>(&bytes, encoding).unwrap(), message);
        }
    }

    #[test]
    fn a_number_can_be_given_after_encoding() {
        let AgentMessage::Batch(batch) = decode(BATCH.as_bytes(), Encoding::Json).unwrap() else {
            panic!("no batch");
        };
        let numbered = |sequence| {
            let batch = Batch {
                sequence,
                ..batch.clone()
            };
            encode(&AgentMessage::Batch(batch), Encoding::MessagePack).unwrap()
        };
        let bare = numbered(0);
        for sequence in [0, 1, 127, 128, 70_000, u64::MAX] {
            assert_eq!(with_sequence(&bare, sequence).unwrap(), numbered(sequence));
        }
        for other in [&numbered(7), &bare[1..], &bare[..12]] {
            assert!(matches!(with_sequence(other, 1), Err(WireError::NoBatch)));
        }
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let later = BATCH.replace(r#""sequence""#, r#""later": [1, {"x": null}], "sequence""#);
        assert_eq!(
            decode::<AgentMessage>(later.as_bytes(), Encoding::Json).unwrap(),
            decode::<AgentMessage>(BATCH.as_bytes(), Encoding::Json).unwrap()
        );
    }

    #[test]
    fn a_message_that_is_too_long_is_neither_sent_nor_read() {
        let hello = AgentMessage::Hello(Hello {
            instance: "x".repeat(MAX_MESSAGE_BYTES),
            node: String::new(),
            version: String::new(),
            resolve: Resolve::Both,
            capabilities: Vec::new(),
            clock: None,
        });
        assert!(matches!(
            encode(&hello, Encoding::Json),
            Err(WireError::TooLong(_))
        ));
        let bytes = vec![b' '; MAX_MESSAGE_BYTES + 1];
        assert!(matches!(
            decode::<AgentMessage>(&bytes, Encoding::Json),
            Err(WireError::TooLong(_))
        ));
    }

    #[test]
    fn deep_nesting_is_refused() {
        let json = "[".repeat(100_000);
        assert!(decode::<AgentMessage>(json.as_bytes(), Encoding::Json).is_err());
        let mut packed = b"\x81\xa5batch\x81\xa5later".to_vec();
        packed.resize(100_000, 0x91);
        let error = decode::<AgentMessage>(&packed, Encoding::MessagePack).unwrap_err();
        assert!(error.to_string().contains("depth limit"), "{error}");
    }
}
