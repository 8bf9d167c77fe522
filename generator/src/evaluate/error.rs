//! What is wrong with a policy.

use flow::locate::FieldPath;

use super::field::At;

/// A policy that the API server would refuse.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("NetworkPolicy {policy}: {field}: {problem}")]
pub struct InvalidPolicy {
    /// `namespace/name`.
    pub policy: String,
    /// The field.
    pub field: FieldPath,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum Problem {
    #[error("is missing")]
    Missing,
    #[error("`{0}` is not a name that Kubernetes accepts")]
    Name(String),
    #[error("another policy has the same namespace and name")]
    Duplicate,
    #[error("`{0}` is not a policy type: `Ingress` or `Egress`")]
    PolicyType(String),
    #[error("more than two policy types")]
    PolicyTypes,
    #[error("`{0}` is not an operator: `In`, `NotIn`, `Exists` or `DoesNotExist`")]
    Operator(String),
    #[error("operator `{0}` needs at least one value")]
    ValuesMissing(String),
    #[error("operator `{0}` takes no values")]
    ValuesForbidden(String),
    #[error("`{0}` is not the key of a label")]
    LabelKey(String),
    #[error("`{0}` is not the value of a label")]
    LabelValue(String),
    #[error("has none of `podSelector`, `namespaceSelector` and `ipBlock`")]
    EmptyPeer,
    #[error("`ipBlock` stands beside a selector")]
    MixedPeer,
    #[error("`{0}` is not a CIDR")]
    Cidr(String),
    #[error("`{except}` is not a part of `{cidr}`")]
    Except { except: String, cidr: String },
    #[error("`{0}` is not a protocol: `TCP`, `UDP` or `SCTP`")]
    Protocol(String),
    #[error("{0} is not a port: 1 to 65535")]
    PortNumber(i32),
    #[error(
        "`{0}` is not the name of a port: at most 15 lower case letters, digits and `-`, at least one letter"
    )]
    PortName(String),
    #[error("stands without a `port`")]
    EndWithoutPort,
    #[error("stands beside a `port` that is a name")]
    EndOfNamedPort,
    #[error("{end} is less than `port`, {port}")]
    EndBeforePort { port: u16, end: i32 },
}

/// A [`Problem`] and its place in a policy that the caller knows.
pub(super) type Flaw = (FieldPath, Problem);

impl Problem {
    pub(super) fn at(self, at: &At<'_>) -> Flaw {
        (at.path(), self)
    }
}
