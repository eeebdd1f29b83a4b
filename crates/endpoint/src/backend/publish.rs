//! How a backend makes a snapshot known: to those who watch it, and to those who read the log.

use super::Snapshot;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::watch;

impl Snapshot {
    /// Replaces what is held if this says something else, and numbers it; the number, if it did. The policies are the same only where
    /// they are the same compiled set.
    pub fn publish(mut self, held: &watch::Sender<Arc<Self>>) -> Option<u64> {
        let mut number = None;
        held.send_if_modified(|held| {
            let same = held.generation > 0
                && held.plane == self.plane
                && held.tls == self.tls
                && Arc::ptr_eq(&held.policies, &self.policies)
                && held.groups == self.groups
                && held.policy_unreadable == self.policy_unreadable
                && held.faults == self.faults;
            if !same {
                self.generation = held.generation + 1;
                number = Some(self.generation);
                *held = Arc::new(std::mem::take(&mut self));
            }
            !same
        });
        number
    }
}

/// What was said last of the configuration, to say only what is new.
#[derive(Debug, Default)]
pub struct FaultLog {
    faults: BTreeSet<String>,
    warnings: BTreeSet<String>,
}

impl FaultLog {
    pub fn say(&mut self, faults: &[String], warnings: &[String]) {
        let faults: BTreeSet<String> = faults.iter().cloned().collect();
        let warnings: BTreeSet<String> = warnings.iter().cloned().collect();
        for fault in faults.difference(&self.faults) {
            tracing::error!(fault, "the configuration has a fault");
        }
        for fault in self.faults.difference(&faults) {
            tracing::info!(fault, "a fault of the configuration is gone");
        }
        for warning in warnings.difference(&self.warnings) {
            tracing::warn!(warning, "the configuration is allowed, but unwise");
        }
        (self.faults, self.warnings) = (faults, warnings);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_made_known_and_numbered() {
        let held = watch::Sender::new(Arc::new(Snapshot::default()));
        let policies = Snapshot::default().policies;
        let snapshot = |faults: &[&str]| Snapshot {
            policies: policies.clone(),
            faults: faults.iter().map(|fault| (*fault).to_owned()).collect(),
            ..Snapshot::default()
        };
        // The first is made known even if it is as empty as what was held before it.
        assert_eq!(snapshot(&[]).publish(&held), Some(1));
        let watching = held.subscribe();
        assert_eq!(snapshot(&[]).publish(&held), None);
        assert!(!watching.has_changed().unwrap());
        assert_eq!(snapshot(&["a fault"]).publish(&held), Some(2));
        assert!(watching.has_changed().unwrap());
        assert_eq!(watching.borrow().generation, 2);
        let compiled_anew = Snapshot { policies: Arc::default(), ..snapshot(&["a fault"]) };
        assert_eq!(compiled_anew.publish(&held), Some(3));
    }
}
