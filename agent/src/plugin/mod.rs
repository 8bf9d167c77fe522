//! What Weave Scope is given: `--scope-plugin SOCKET` serves Scope's plugin protocol, so that Scope draws the connections that only
//! the agent sees.
//!
//! Each report interval the probe asks `GET /report` on the socket; it merges the answer into its own report. The probe
//! waits for half a second and takes no more than 50 MB; see [`recent::MAX_FLOWS`] for how far below that we stay.
//!
//! An answer holds the flows of the last [`recent::SPAN`]. Scope's app shows what it was told in the last 15 seconds, so an edge
//! whose connections are made now and then, as by a health check or a scrape, stays on the map instead of blinking.

pub mod answer;
pub mod recent;
mod serve;
pub mod socket;

use std::sync::Arc;

use tokio::sync::mpsc;

pub use self::{serve::Plugin, socket::PluginSocket};
use crate::collector::Report;
use recent::Recent;

/// Lets the plugin see the reports on their way to who takes them away. Ends when there are no more, or nobody takes them.
pub async fn tap(mut from: mpsc::Receiver<Report>, to: mpsc::Sender<Report>, recent: Arc<Recent>) {
    while let Some(report) = from.recv().await {
        recent.add(&report.records);
        if to.send(report).await.is_err() {
            return;
        }
    }
}
