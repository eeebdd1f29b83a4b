//! Ready, or what is missing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The reasons for which a process isn't ready; ready when there is none.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    missing: Arc<Mutex<BTreeMap<&'static str, String>>>,
}

impl Readiness {
    pub fn missing(&self, what: &'static str, why: impl Into<String>) {
        self.lock().insert(what, why.into());
    }
    pub fn ready(&self, what: &'static str) {
        self.lock().remove(what);
    }
    /// `what: why`, a line each; empty when ready.
    pub fn reasons(&self) -> Vec<String> {
        self.lock().iter().map(|(what, why)| format!("{what}: {why}")).collect()
    }
    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, String>> {
        // A map of strings is whole whatever panicked while it was held.
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
