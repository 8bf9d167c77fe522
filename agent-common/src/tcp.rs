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
/// `TCP_CLOSE`.
pub const CLOSE: i32 = 7;
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
    /// A handshake with a listener was completed; runs in a softirq, so the current task is anybody.
    Accepted,
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
        (SYN_RECV, ESTABLISHED) => Some(Transition::Accepted),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_connection_has_one_meaning_at_each_end() {
        // The life of a client's socket, of a refused one, of a listener and of an accepted socket.
        let lives: [(&[i32], &[Transition]); 4] = [
            (
                &[CLOSE, SYN_SENT, ESTABLISHED, 4, 5, CLOSE],
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
                &[Transition::Accepted],
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
