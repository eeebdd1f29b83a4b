//! `spec.probe` of the group, performed on the application.

use onboarding_wire::onboarding as pb;
use tokio::sync::mpsc;

/// The application's readiness changed (or is known for the first time).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub ready: bool,
    /// For people; empty when ready.
    pub message: String,
}

/// Probes until the receiver is gone; aborted to end it.
pub async fn run(probe: pb::Probe, events: mpsc::Sender<Event>) {
    let _ = (probe, events);
    unimplemented!()
}
