//! The ways of losing something in the kernel, each with its own per-CPU counter.

/// Why the kernel programs lost an observation or a part of it. The discriminant is the index of its counter.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// A connection was not counted: the map of flows was full and the ring buffer too.
    FlowsAndRingFull = 0,
    /// A connection was not counted: the tracepoint's record or the socket could not be read.
    SocketUnreadable = 1,
    /// A connection was not counted: no generation of the map of flows was active.
    NoActiveMap = 2,
    /// A connecting process was not remembered: its flow may lack pid, name and cgroup.
    ConnectOwnersFull = 3,
    /// A listening process was not remembered: its flows may lack pid and name.
    ListenersFull = 4,
    /// A datagram of an unknown peer was not counted: the map of peers was full, or had been, so that nobody knows which end
    /// has spoken first.
    UdpPeersFull = 5,
    /// An address that a process named was not remembered, for the same reason: answers from behind a translation may look
    /// like a client's.
    UdpNamesFull = 6,
    /// A connection that was to be told apart was counted with others of its flow: the ring buffer was full.
    ConnectionsAdded = 7,
    /// The end of a connection was not reported: the ring buffer was full.
    ClosesLost = 8,
    /// A connection's beginning was not remembered: the map of open ones was full, so its end will not be reported.
    OpenFull = 9,
    /// A connection that was made while the agent started may be counted twice: there was no room to remember that it
    /// is counted.
    WitnessedFull = 10,
    /// A connection that was open before the agent started was not counted: there was no room for it, or its socket
    /// could not be read.
    OpenBefore = 11,
    /// An SCTP association was not counted at its client: the map of those that are being made was full.
    SctpCallsFull = 12,
    /// A conversation may be counted the wrong way round: its socket is older than the agent, and both ends have ports as servers
    /// have.
    UdpDirectionGuessed = 13,
    /// A connection was counted the wrong way round: its call met one from the other end, and there was no room to remember
    /// that.
    CrossedFull = 14,
    /// Something was not kept with a socket, for which the kernel had no memory: flows of UDP and SCTP may lack pid and name,
    /// and of UDP be counted the wrong way round.
    SocketStorage = 15,
}

/// The number of counters.
pub const LOSSES: u32 = 16;

impl Loss {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; LOSSES as usize] = [
        Self::FlowsAndRingFull,
        Self::SocketUnreadable,
        Self::NoActiveMap,
        Self::ConnectOwnersFull,
        Self::ListenersFull,
        Self::UdpPeersFull,
        Self::UdpNamesFull,
        Self::ConnectionsAdded,
        Self::ClosesLost,
        Self::OpenFull,
        Self::WitnessedFull,
        Self::OpenBefore,
        Self::SctpCallsFull,
        Self::UdpDirectionGuessed,
        Self::CrossedFull,
        Self::SocketStorage,
    ];

    /// Whether each is a TCP connection that was not counted. Of what the others are about something is not known, or it is
    /// counted all the same, or it is a datagram.
    #[must_use]
    pub const fn is_connection(self) -> bool {
        !matches!(
            self,
            Self::ConnectOwnersFull
                | Self::ListenersFull
                | Self::UdpPeersFull
                | Self::UdpNamesFull
                | Self::ConnectionsAdded
                | Self::ClosesLost
                | Self::OpenFull
                | Self::WitnessedFull
                | Self::SctpCallsFull
                | Self::UdpDirectionGuessed
                | Self::SocketStorage
        )
    }

    /// The reason's name in batches, logs and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FlowsAndRingFull => "flows_and_ring_full",
            Self::SocketUnreadable => "socket_unreadable",
            Self::NoActiveMap => "no_active_map",
            Self::ConnectOwnersFull => "connect_owners_full",
            Self::ListenersFull => "listeners_full",
            Self::UdpPeersFull => "udp_peers_full",
            Self::UdpNamesFull => "udp_names_full",
            Self::ConnectionsAdded => "connections_added_up",
            Self::ClosesLost => "closes_lost",
            Self::OpenFull => "open_connections_full",
            Self::WitnessedFull => "witnessed_full",
            Self::OpenBefore => "open_before",
            Self::SctpCallsFull => "sctp_calls_full",
            Self::UdpDirectionGuessed => "udp_direction_guessed",
            Self::CrossedFull => "crossed_calls_full",
            Self::SocketStorage => "socket_storage_refused",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_s_index_is_its_place_in_the_list() {
        for (index, loss) in Loss::ALL.into_iter().enumerate() {
            assert_eq!(loss as usize, index);
        }
    }
}
