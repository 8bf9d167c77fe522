//! What MicroShield's agent and generator both speak.
//!
//! * [`record`]: one observed flow, as JSON a superset of what MicroShield's `linker.py` writes;
//! * [`endpoint`]: the named ends of a flow;
//! * [`lost`]: what was lost, as a line among records;
//! * [`parser`]: records from JSON, many of them;
//! * [`observations`]: records added up by what makes them the same observation;
//! * [`wire`]: the messages between agent and generator, their bounded codec, and the bounds of what they say;
//! * [`scope_log`]: the log of the modified Weave Scope probe;
//! * [`segment`]: the bytes of a file of an agent's spool;
//! * [`causes`]: errors as a line for people;
//! * [`locate`]: on which line of a YAML or JSON text a field stands;
//! * [`topology`]: the cluster's objects and the index that answers (address, time) → endpoint;
//! * `logging`, behind the feature of that name: what the programs say of themselves;
//! * `source`, behind the feature of that name: the index kept current from a file or the Kubernetes API;
//! * `transport`, behind the feature of that name: TLS and bearer tokens from files, connections by name, the
//!   listener for those who watch a process.
//!
//! Nothing but `source` and `transport` does I/O, reads a clock or starts a task.
#![forbid(unsafe_code)]

#[cfg(feature = "source")]
pub mod backoff;
pub mod causes;
pub mod endpoint;
pub mod locate;
#[cfg(feature = "logging")]
pub mod logging;
pub mod lost;
mod metered;
pub mod observations;
pub mod parser;
pub mod record;
pub mod scope_log;
pub mod segment;
#[cfg(feature = "source")]
pub mod source;
pub mod time;
pub mod topology;
#[cfg(feature = "transport")]
pub mod transport;
pub mod wire;
