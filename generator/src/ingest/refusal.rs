//! Why a connection is closed by the generator, as the peer is told.

use std::fmt;

use flow::wire::WireError;
use tokio_tungstenite::tungstenite::{
    self,
    error::ProtocolError,
    protocol::{CloseFrame, frame::coding::CloseCode},
};

/// The longest reason in a close frame: a control frame carries 125 bytes, of which the code takes two (RFC 6455,
/// section 5.5).
const MAX_CLOSE_REASON: usize = 123;

/// The longest reason in any case, in bytes: reasons quote what the peer sent, and go into the log.
const MAX_REASON: usize = 500;

/// Why a connection is closed, and the code for it (RFC 6455, section 7.4.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The code in the close frame.
    pub code: CloseCode,
    /// For people: one line of bounded length.
    pub reason: String,
}

impl Refusal {
    /// Whether the message itself is at fault, so that it would be refused again.
    pub fn is_of_the_message(&self) -> bool {
        matches!(self.code, CloseCode::Invalid | CloseCode::Size)
    }

    /// 1002: what came is no part of the protocol, or not at this point.
    pub fn protocol(reason: impl Into<String>) -> Self {
        Self::new(CloseCode::Protocol, reason)
    }

    /// 1007: the message is malformed, or says what cannot be.
    pub fn invalid(reason: impl Into<String>) -> Self {
        Self::new(CloseCode::Invalid, reason)
    }

    /// 1008: the peer breaks a rule that the codes have no word for.
    pub fn policy(reason: impl Into<String>) -> Self {
        Self::new(CloseCode::Policy, reason)
    }

    /// 1009: the message is too long.
    pub fn too_big(reason: impl Into<String>) -> Self {
        Self::new(CloseCode::Size, reason)
    }

    /// 1011: the generator cannot do its part.
    pub fn failure(reason: impl Into<String>) -> Self {
        Self::new(CloseCode::Error, reason)
    }

    fn new(code: CloseCode, reason: impl Into<String>) -> Self {
        let mut reason = reason.into().replace(char::is_control, "\u{fffd}");
        reason.truncate(reason.floor_char_boundary(MAX_REASON));
        Self { code, reason }
    }

    /// What a read error says about the peer; nothing if the connection just ended.
    pub(super) fn from_socket(error: &tungstenite::Error) -> Option<Self> {
        match error {
            tungstenite::Error::Capacity(_) => Some(Self::too_big(error.to_string())),
            tungstenite::Error::Utf8(_) => Some(Self::invalid(error.to_string())),
            tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
            tungstenite::Error::Protocol(_) => Some(Self::protocol(error.to_string())),
            _ => None,
        }
    }

    /// The close frame, with as much of the reason as it can carry.
    pub(super) fn close_frame(&self) -> CloseFrame {
        let end = self.reason.floor_char_boundary(MAX_CLOSE_REASON);
        CloseFrame {
            code: self.code,
            reason: self.reason[..end].into(),
        }
    }
}

impl From<WireError> for Refusal {
    fn from(error: WireError) -> Self {
        match error {
            WireError::TooLong(_) => Self::too_big(error.to_string()),
            _ => Self::invalid(error.to_string()),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.reason, u16::from(self.code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_peer_sent_is_quoted_with_restraint() {
        let reason = Refusal::invalid(format!(
            "unknown variant `\n\u{1b}[2J{}`",
            "é".repeat(1_000)
        ))
        .reason;
        assert!(
            reason.starts_with("unknown variant `\u{fffd}\u{fffd}[2Jéé"),
            "{reason}"
        );
        assert!(reason.len() <= MAX_REASON);
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        for (reason, length) in [
            ("short".to_owned(), 5),
            ("x".repeat(500), 123),
            (format!("{}é", "x".repeat(121)), 123),
            (format!("{}é", "x".repeat(122)), 122),
        ] {
            let frame = Refusal::protocol(reason.clone()).close_frame();
            assert_eq!(frame.reason.len(), length);
            assert!(reason.starts_with(frame.reason.as_str()));
        }
    }
}
