//! Bounds on what a well-formed message may say.
//!
//! What passes here is stored, logged and made into names of files and of cluster objects: each string has a length that
//! it cannot exceed, and names have nothing but the characters that Kubernetes allows in them.
//!
//! The generator refuses a whole batch for one thing that is out of bounds, so an agent leaves out the record that is
//! before it gets into any: what [`record`] passes may stand in every batch.

use std::net::{IpAddr, Ipv6Addr};

use super::{End, Flow, Hello, MAX_BATCH_FLOWS, Packed};
use crate::{
    endpoint::{Endpoint, Labels, Pod, Service},
    record::{FlowRecord, Process},
    time::Timestamp,
};

/// The longest string, in bytes. Kubernetes allows 253 for a name and, with its prefix, 317 for a label's key.
const MAX_STRING: usize = 1_024;

/// The longest name, in bytes: that of a DNS subdomain (RFC 1123).
const MAX_NAME: usize = 253;

/// The most labels of an object, or of a selector.
const MAX_LABELS: usize = 256;

/// The most entries in any list of a record: addresses, backends, services of a pod.
const MAX_LIST: usize = 4_096;

/// The most bytes that an end may take in the ledger, by [`size`]. What Kubernetes allows for one object is more, but an
/// ordinary end has half a KiB.
const MAX_END_BYTES: usize = 32 << 10;

/// The most capabilities of an agent.
const MAX_CAPABILITIES: usize = 32;

/// The most reasons for losses in one batch.
const MAX_REASONS: usize = 64;

/// The most connections that one record may stand for: a node that makes a million a second for twelve days.
const MAX_COUNT: u64 = 1 << 40;

/// The last point in time that fits into a signed number of nanoseconds: some day of the year 2262.
const MAX_TIME: Timestamp = Timestamp::from_nanos(i64::MAX.cast_unsigned());

/// What is wrong with a message's content: the field, and what about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Invalid {
    field: String,
    problem: String,
}

impl Invalid {
    fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// The same, with the field seen from further out.
    #[must_use]
    pub fn within(mut self, outer: &str) -> Self {
        self.field = format!("{outer}.{}", self.field);
        self
    }
}

/// Checks a hello.
///
/// # Errors
/// What is wrong with it.
pub fn hello(hello: &Hello) -> Result<(), Invalid> {
    token("instance", &hello.instance)?;
    name("node", &hello.node)?;
    token("version", &hello.version)?;
    at_most("capabilities", hello.capabilities.len(), MAX_CAPABILITIES)?;
    hello
        .capabilities
        .iter()
        .try_for_each(|capability| token("capabilities", capability))?;
    hello.clock.map_or(Ok(()), |clock| time("clock", clock))
}

/// Checks a batch, but for what its ends say.
///
/// # Errors
/// The first that is wrong with it.
pub fn batch<E>(batch: &Packed<E>) -> Result<(), Invalid> {
    if batch.sequence == 0 {
        return Err(Invalid::new("sequence", "batches are numbered from 1"));
    }
    time("window.from", batch.window.from)?;
    time("window.to", batch.window.to)?;
    if batch.window.to < batch.window.from {
        return Err(Invalid::new("window", "ends before it begins"));
    }
    at_most("flows", batch.flows.len(), MAX_BATCH_FLOWS)?;
    at_most("ends", batch.ends.len(), 2 * MAX_BATCH_FLOWS)?;
    at_most("processes", batch.processes.len(), MAX_BATCH_FLOWS)?;
    if !batch.flows.is_empty() {
        name("hostname", &batch.hostname)?;
    }
    for (index, process) in batch.processes.iter().enumerate() {
        check_process(process).map_err(|invalid| invalid.within(&format!("processes[{index}]")))?;
    }
    for (index, flow) in batch.flows.iter().enumerate() {
        check_flow(flow).map_err(|invalid| invalid.within(&format!("flows[{index}]")))?;
    }
    batch
        .check()
        .map_err(|misfit| Invalid::new(misfit.field(), misfit.problem()))?;
    at_most("losses", batch.losses.len(), MAX_REASONS)?;
    for (reason, lost) in &batch.losses {
        token("losses", reason)?;
        if *lost > MAX_COUNT {
            return Err(Invalid::new(
                format!("losses.{reason}"),
                format!("{lost} is too many"),
            ));
        }
    }
    Ok(())
}

fn check_flow(flow: &Flow) -> Result<(), Invalid> {
    if let Some(hostname) = &flow.hostname {
        name("hostname", hostname)?;
    }
    numbers(flow.count, flow.port)?;
    times(flow.first_seen(), flow.last_seen, flow.timestamp())
}

fn numbers(count: u64, port: u16) -> Result<(), Invalid> {
    // 0 counts nothing, and only says who else saw what was counted before.
    if count > MAX_COUNT {
        return Err(Invalid::new(
            "count",
            format!("{count} is more than {MAX_COUNT}"),
        ));
    }
    if port == 0 {
        return Err(Invalid::new("port", "0: the server's port is missing"));
    }
    Ok(())
}

fn times(first_seen: Timestamp, last_seen: Timestamp, own: Timestamp) -> Result<(), Invalid> {
    time("last_seen", last_seen)?;
    time("timestamp", own)?;
    if last_seen < first_seen {
        return Err(Invalid::new("last_seen", "is before `first_seen`"));
    }
    Ok(())
}

fn check_process(process: &Process) -> Result<(), Invalid> {
    text("comm", &process.comm)?;
    process
        .container
        .as_deref()
        .map_or(Ok(()), |container| token("container", container))
}

/// Checks a record, with its ends.
///
/// # Errors
/// The first that is wrong with it.
pub fn record(record: &FlowRecord) -> Result<(), Invalid> {
    name("hostname", &record.hostname)?;
    numbers(record.count, record.tuple.dst_port)?;
    times(record.first_seen, record.last_seen, record.timestamp)?;
    if let Some(process) = &record.process {
        check_process(process).map_err(|invalid| invalid.within("process"))?;
    }
    check_endpoint(&record.src).map_err(|invalid| invalid.within("src"))?;
    check_endpoint(&record.dst).map_err(|invalid| invalid.within("dst"))
}

/// Checks an end.
///
/// # Errors
/// The first that is wrong with it.
pub fn end(end: &End) -> Result<(), Invalid> {
    check_endpoint(&end.endpoint)
}

fn check_endpoint(end: &Endpoint) -> Result<(), Invalid> {
    endpoint(end)?;
    let bytes = size(end);
    if bytes > MAX_END_BYTES {
        return Err(Invalid::new(
            "labels, addresses and names",
            format!("{bytes} bytes, the limit is {MAX_END_BYTES}"),
        ));
    }
    Ok(())
}

/// What the parts of an end take that can be long, in bytes; other strings are few and bounded each by itself.
fn size(end: &Endpoint) -> usize {
    fn of_labels(labels: &Labels) -> usize {
        labels
            .iter()
            .map(|(key, value)| 2 * size_of::<String>() + key.len() + value.len())
            .sum()
    }
    fn of_addresses(addresses: &[IpAddr]) -> usize {
        size_of_val(addresses)
    }
    fn of_service(service: &Service) -> usize {
        of_labels(&service.labels) + of_labels(&service.selector) + of_addresses(&service.backends)
    }
    fn of_pod(pod: &Pod) -> usize {
        let services = pod.services.iter();
        of_labels(&pod.labels)
            + of_addresses(&pod.addresses)
            + services
                .map(|name| size_of::<String>() + name.len())
                .sum::<usize>()
    }
    match end {
        Endpoint::Pod { pod, service } => of_pod(pod) + service.as_deref().map_or(0, of_service),
        Endpoint::Service(service) => of_service(service),
        Endpoint::Node(node) => of_addresses(&node.addresses),
        Endpoint::External(_) => 0,
    }
}

fn endpoint(endpoint: &Endpoint) -> Result<(), Invalid> {
    match endpoint {
        Endpoint::Pod {
            pod: it,
            service: its,
        } => {
            pod(it).map_err(|invalid| invalid.within("pod"))?;
            its.as_deref().map_or(Ok(()), service)
        }
        Endpoint::Service(it) => service(it),
        Endpoint::Node(node) => {
            node_name("node.name", &node.name)?;
            at_most("node.addresses", node.addresses.len(), MAX_LIST)
        }
        Endpoint::External(_) => Ok(()),
    }
}

fn pod(pod: &Pod) -> Result<(), Invalid> {
    text("id", &pod.uid)?;
    name("namespace", &pod.namespace)?;
    name("name", &pod.name)?;
    labels("labels", &pod.labels)?;
    if let Some(workload) = &pod.workload {
        name("workload.kind", &workload.kind)?;
        name("workload.name", &workload.name)?;
    }
    if let Some(node) = &pod.node {
        name("node", node)?;
    }
    at_most("addresses", pod.addresses.len(), MAX_LIST)?;
    at_most("services", pod.services.len(), MAX_LIST)?;
    pod.services
        .iter()
        .try_for_each(|service| name("services", service))
}

fn service(service: &Service) -> Result<(), Invalid> {
    let check = || {
        text("id", &service.uid)?;
        name("namespace", &service.namespace)?;
        name("name", &service.name)?;
        labels("labels", &service.labels)?;
        labels("selector", &service.selector)?;
        at_most("backends", service.backends.len(), MAX_LIST)
    };
    check().map_err(|invalid: Invalid| invalid.within("service"))
}

fn labels(field: &str, labels: &Labels) -> Result<(), Invalid> {
    at_most(field, labels.len(), MAX_LABELS)?;
    labels.iter().try_for_each(|(key, value)| {
        text(field, key)?;
        text(field, value)
    })
}

/// A name becomes a part of a path: it has no separator, and is neither `.` nor `..`.
fn name(field: &str, name: &str) -> Result<(), Invalid> {
    let of_its_alphabet = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
    if name.is_empty() {
        Err(Invalid::new(field, "is empty"))
    } else if name.len() > MAX_NAME {
        Err(too_long(field, name.len(), MAX_NAME))
    } else if !of_its_alphabet || name.starts_with('.') {
        Err(Invalid::new(
            field,
            format!("{} is not a name", name.escape_default()),
        ))
    } else {
        Ok(())
    }
}

/// The name of a node, or an address of it where nothing tells its name.
fn node_name(field: &str, text: &str) -> Result<(), Invalid> {
    // The addresses of version 6 are what has another alphabet.
    if text.parse::<Ipv6Addr>().is_ok() {
        return Ok(());
    }
    name(field, text)
}

/// A short printable word, fit for a line of a log.
fn token(field: &str, token: &str) -> Result<(), Invalid> {
    if token.is_empty() {
        Err(Invalid::new(field, "is empty"))
    } else if token.len() > MAX_NAME {
        Err(too_long(field, token.len(), MAX_NAME))
    } else if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        Err(Invalid::new(
            field,
            format!(
                "{} has other than printable characters",
                token.escape_default()
            ),
        ))
    } else {
        Ok(())
    }
}

fn text(field: &str, text: &str) -> Result<(), Invalid> {
    if text.len() > MAX_STRING {
        return Err(too_long(field, text.len(), MAX_STRING));
    }
    Ok(())
}

fn time(field: &str, time: Timestamp) -> Result<(), Invalid> {
    if time > MAX_TIME {
        return Err(Invalid::new(field, "is after the year 2262"));
    }
    Ok(())
}

fn at_most(field: &str, length: usize, limit: usize) -> Result<(), Invalid> {
    if length > limit {
        return Err(Invalid::new(
            field,
            format!("{length} entries, the limit is {limit}"),
        ));
    }
    Ok(())
}

fn too_long(field: &str, length: usize, limit: usize) -> Invalid {
    Invalid::new(field, format!("{length} bytes, the limit is {limit}"))
}

#[cfg(test)]
mod tests;
