//! Ports of a rule.

use flow::record::Protocol;
use k8s_openapi::{
    api::networking::v1::NetworkPolicyPort, apimachinery::pkg::util::intstr::IntOrString,
};

use serde::Serialize;

use super::{
    error::{Flaw, Problem},
    field::At,
};
use crate::syntax;

/// Ports of one protocol that a rule lets through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) protocol: Protocol,
    pub(super) numbers: Numbers,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    /// From the first to the last, both included.
    Range(u16, u16),
    /// The port of the destination pod that a container declares by this name, for the same protocol.
    Named(String),
}

/// A port that a container declares by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct NamedPort {
    /// The name.
    pub name: String,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The port in the pod.
    pub port: u16,
}

impl Ports {
    /// The port numbers at a destination with these named ports, first and last.
    pub(super) fn range(&self, named: &[NamedPort]) -> Option<(u16, u16)> {
        match &self.numbers {
            Numbers::Range(first, last) => Some((*first, *last)),
            // Of several containers' ports of one name the first counts, as in `podutil.FindPort` of Kubernetes.
            Numbers::Named(name) => named
                .iter()
                .find(|port| port.name == *name && port.protocol == self.protocol)
                .map(|port| (port.port, port.port)),
        }
    }

    /// The name, if they are given by one.
    pub(super) fn name(&self) -> Option<&str> {
        match &self.numbers {
            Numbers::Range(..) => None,
            Numbers::Named(name) => Some(name),
        }
    }

    pub(super) fn compile(port: &NetworkPolicyPort, at: &At<'_>) -> Result<Self, Flaw> {
        let protocol = match port.protocol.as_deref() {
            None | Some("TCP") => Protocol::Tcp,
            Some("UDP") => Protocol::Udp,
            Some("SCTP") => Protocol::Sctp,
            Some(other) => {
                return Err(Problem::Protocol(other.to_owned()).at(&at.field("protocol")));
            }
        };
        let port_at = at.field("port");
        let end_at = at.field("endPort");
        let numbers = match (&port.port, port.end_port) {
            (None, None) => Numbers::Range(1, u16::MAX),
            (None, Some(_)) => return Err(Problem::EndWithoutPort.at(&end_at)),
            (Some(IntOrString::Int(first)), end) => {
                let first = number(*first).map_err(|problem| problem.at(&port_at))?;
                let last = match end {
                    None => first,
                    Some(end) if end < i32::from(first) => {
                        return Err(Problem::EndBeforePort { port: first, end }.at(&end_at));
                    }
                    Some(end) => number(end).map_err(|problem| problem.at(&end_at))?,
                };
                Numbers::Range(first, last)
            }
            (Some(IntOrString::String(_)), Some(_)) => {
                return Err(Problem::EndOfNamedPort.at(&end_at));
            }
            (Some(IntOrString::String(name)), None) if syntax::is_port_name(name) => {
                Numbers::Named(name.clone())
            }
            (Some(IntOrString::String(name)), None) => {
                return Err(Problem::PortName(name.clone()).at(&port_at));
            }
        };
        Ok(Self { protocol, numbers })
    }
}

fn number(number: i32) -> Result<u16, Problem> {
    u16::try_from(number)
        .ok()
        .filter(|number| *number > 0)
        .ok_or(Problem::PortNumber(number))
}
