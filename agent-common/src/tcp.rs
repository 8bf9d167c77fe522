//! What a TCP state change means.
//!
//! The states are those of `include/net/tcp_states.h`; the kernel reports each change through `inet_sock_set_state`
//! (`net/ipv4/af_inet.c`, since 4.16).

/// `TCP_ESTABLISHED`.
pub const ESTABLISHED: i32 = 1;
/// `TCP_SYN_SENT`.
pub const SYN_SENT: i32 = 2;
/// `TCP_SYN_RECV`.
pub const SYN_RECV: i32 = 3;
/// `TCP_FIN_WAIT1`.
pub const FIN_WAIT1: i32 = 4;
/// `TCP_CLOSE`.
pub const CLOSE: i32 = 7;
/// `TCP_CLOSE_WAIT`.
pub const CLOSE_WAIT: i32 = 8;
/// `TCP_LISTEN`.
pub const LISTEN: i32 = 10;

/// The state changes that say who connects to whom. Every other change is of no interest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transition {
    /// A process called `connect`; runs in that process. Addresses and the server's port are known, the client's port
    /// is not chosen yet.
    ConnectStarted,
    /// The server answered; usually runs in a softirq.
    Connected,
    /// The server refused, did not answer in time, or the process gave up.
    ConnectFailed,
    /// A process called `listen`; runs in that process.
    ListenStarted,
    /// The listener was closed.
    ListenEnded,
    /// The other end called too, at the same time (simultaneous open, RFC 9293, 3.5). From here on the socket goes through the
    /// states of one that a listener has made.
    Crossed,
    /// A handshake with a listener was completed, or one of two calls that have crossed; runs in a softirq, so the current
    /// task is anybody.
    Answered,
    /// Such a handshake came to nothing.
    Unanswered,
    /// A process closed the socket before such a handshake was completed: a server that has served already, which TCP fast open
    /// lets it do (RFC 7413), or a caller that gives up.
    ClosedEarly,
    /// A connection that had come about has ended.
    Ended,
}

/// What the change from `old` to `new` means; `None` if nothing that matters here.
///
/// Direction comes from here and nowhere else: never from port numbers.
#[inline(always)]
#[must_use]
pub const fn classify(old: i32, new: i32) -> Option<Transition> {
    match (old, new) {
        (CLOSE, SYN_SENT) => Some(Transition::ConnectStarted),
        (SYN_SENT, ESTABLISHED) => Some(Transition::Connected),
        (SYN_SENT, CLOSE) => Some(Transition::ConnectFailed),
        (CLOSE, LISTEN) => Some(Transition::ListenStarted),
        (LISTEN, CLOSE) => Some(Transition::ListenEnded),
        (SYN_SENT, SYN_RECV) => Some(Transition::Crossed),
        (SYN_RECV, ESTABLISHED) => Some(Transition::Answered),
        (SYN_RECV, CLOSE) => Some(Transition::Unanswered),
        (SYN_RECV, FIN_WAIT1) => Some(Transition::ClosedEarly),
        _ => None,
    }
}

/// As [`classify`], and the end of connections.
#[inline(always)]
#[must_use]
pub const fn classify_all(old: i32, new: i32) -> Option<Transition> {
    match classify(old, new) {
        None if new == CLOSE => Some(Transition::Ended),
        transition => transition,
    }
}

/// Whether a socket in this state has a connection that its own end has not closed yet.
#[inline(always)]
#[must_use]
pub const fn is_open(state: i32) -> bool {
    matches!(state, ESTABLISHED | CLOSE_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_has_one_meaning_at_each_end() {
        // The life of a client's socket, of a refused one, of a listener, of an accepted socket, of one whose server was done
        // before the handshake was (`tcp_close`), and of two that call each other.
        let lives: [(&[i32], &[Transition]); 6] = [
            (
                &[CLOSE, SYN_SENT, ESTABLISHED, FIN_WAIT1, 5, CLOSE],
                &[Transition::ConnectStarted, Transition::Connected],
            ),
            (
                &[CLOSE, SYN_SENT, CLOSE],
                &[Transition::ConnectStarted, Transition::ConnectFailed],
            ),
            (
                &[CLOSE, LISTEN, CLOSE],
                &[Transition::ListenStarted, Transition::ListenEnded],
            ),
            (
                &[LISTEN, SYN_RECV, ESTABLISHED, 8, 9, CLOSE],
                &[Transition::Answered],
            ),
            (
                &[LISTEN, SYN_RECV, FIN_WAIT1, 5, CLOSE],
                &[Transition::ClosedEarly],
            ),
            (
                &[CLOSE, SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT1, 11, CLOSE],
                &[
                    Transition::ConnectStarted,
                    Transition::Crossed,
                    Transition::Answered,
                ],
            ),
        ];
        for (states, meaning) in lives {
            let found: std::vec::Vec<_> = states
                .windows(2)
                .filter_map(|pair| classify(pair[0], pair[1]))
                .collect();
            assert_eq!(found, meaning, "{states:?}");
        }
    }

    extern crate std;
}
