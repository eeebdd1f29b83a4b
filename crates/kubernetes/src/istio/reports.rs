//! What each sidecar made of its boot configuration, and how far its agent is therefore.

use crate::registry::{Behind, BehindReason, Standing, Standings};
use jiff::Timestamp;
use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::RegistrationName;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What a sidecar said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastReport {
    pub at: Timestamp,
    pub boot_version: String,
    pub accepted: bool,
    /// The sidecar's own words, cleaned and shortened.
    pub message: String,
}

/// Of each workload that is followed here.
pub(super) struct Reports {
    held: Mutex<HashMap<RegistrationName, Progress>>,
    standings: Arc<dyn Standings>,
}

#[derive(Default)]
pub(super) struct Progress {
    /// A new session may begin before the old one is over.
    followers: usize,
    pub last: Option<LastReport>,
    /// The version of all that there is, whether it was sent or not, and the group that it was made of.
    newest: Option<(String, Arc<WorkloadGroup>)>,
    /// What the agent came with, or was sent since.
    has: String,
    /// It came with what it has: an agent that was started before says again what its sidecar made of it, if it ever did.
    came_with: bool,
    /// Why there is no boot configuration.
    problem: Option<String>,
}

impl Reports {
    pub fn new(standings: Arc<dyn Standings>) -> Arc<Self> {
        Arc::new(Self { held: Mutex::default(), standings })
    }

    pub fn get<T>(&self, name: &RegistrationName, read: impl FnOnce(&Progress) -> T) -> Option<T> {
        self.with(|held| held.get(name).map(read))
    }

    pub fn reported(&self, name: &RegistrationName, report: LastReport) {
        self.edit(name, |progress| progress.last = Some(report));
    }

    fn edit(&self, name: &RegistrationName, edit: impl FnOnce(&mut Progress)) {
        self.with(|held| {
            if let Some(progress) = held.get_mut(name) {
                edit(progress);
                self.standings.stands(name, progress.standing());
            }
        });
    }

    fn with<T>(&self, act: impl FnOnce(&mut HashMap<RegistrationName, Progress>) -> T) -> T {
        act(&mut self.held.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Progress {
    pub fn is_newest(&self, version: &str) -> bool {
        self.newest.as_ref().is_some_and(|(newest, _)| newest == version)
    }

    fn standing(&self) -> Option<Standing> {
        let behind = |reason, message: &str| Some(Standing::Behind(Behind { reason, message: message.to_owned() }));
        let last = self.last.as_ref().filter(|last| self.is_newest(&last.boot_version));
        match (&self.newest, last, &self.problem) {
            (Some((_, group)), Some(last), _) if last.accepted => Some(Standing::Applied(group.clone())),
            (_, Some(last), _) => {
                let message = format!("the sidecar goes on without its newest boot configuration: {}", last.message);
                behind(BehindReason::Refused, &message)
            }
            (_, None, Some(problem)) => behind(BehindReason::NoBootConfiguration, problem),
            (None, None, None) => None,
            (Some((newest, _)), None, None) if *newest != self.has => behind(
                BehindReason::WaitsForRestart,
                "a newer boot configuration takes a new start of the sidecar; it has it with its next session",
            ),
            (Some(_), None, None) if self.came_with => None,
            (Some(_), None, None) => {
                behind(BehindReason::NotApplied, "the sidecar has not come up with its newest boot configuration yet")
            }
        }
    }
}

/// Its report is kept for as long as somebody follows the workload.
pub(super) struct Followed {
    reports: Arc<Reports>,
    name: RegistrationName,
}

impl Followed {
    /// `held`: the version that the agent came with.
    pub fn new(reports: Arc<Reports>, name: RegistrationName, held: &str) -> Self {
        reports.with(|all| {
            let progress = all.entry(name.clone()).or_default();
            progress.followers += 1;
            progress.last = None;
            (progress.has, progress.came_with) = (held.to_owned(), true);
        });
        Self { reports, name }
    }

    pub fn newest(&self, version: &str, group: &Arc<WorkloadGroup>) {
        self.reports.edit(&self.name, |progress| progress.newest = Some((version.to_owned(), group.clone())));
    }

    /// Of the newest, or of what it was started with.
    pub fn sent(&self, version: &str) {
        self.reports.edit(&self.name, |progress| {
            progress.came_with &= progress.has == version;
            version.clone_into(&mut progress.has);
            progress.problem = None;
        });
    }

    /// `has_newest`: what there is could be made, and something else is missing.
    pub fn problem(&self, words: &str, has_newest: bool) {
        self.reports.edit(&self.name, |progress| {
            progress.newest.take_if(|_| !has_newest);
            progress.problem = Some(words.to_owned());
        });
    }

    /// Nothing is in the way any more.
    pub fn no_problem(&self) {
        self.reports.edit(&self.name, |progress| progress.problem = None);
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.reports.with(|held| {
            if let Some(progress) = held.get_mut(&self.name) {
                progress.followers -= 1;
                if progress.followers == 0 {
                    held.remove(&self.name);
                    self.reports.standings.stands(&self.name, None);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::fixtures::{group, name};

    #[derive(Default)]
    struct Told(Mutex<Vec<String>>);

    impl Standings for Told {
        fn stands(&self, _: &RegistrationName, standing: Option<Standing>) {
            let word = match standing {
                None => "-",
                Some(Standing::Applied(_)) => "Applied",
                Some(Standing::Behind(behind)) => behind.reason.as_str(),
            };
            self.0.lock().unwrap().push(word.to_owned());
        }
    }

    impl Told {
        fn last(&self) -> String {
            self.0.lock().unwrap().last().cloned().unwrap_or_default()
        }
    }

    fn report(version: &str, accepted: bool) -> LastReport {
        LastReport { at: Timestamp::UNIX_EPOCH, boot_version: version.to_owned(), accepted, message: "why".to_owned() }
    }

    #[test]
    fn a_report_is_kept_while_somebody_follows() {
        let told = Arc::new(Told::default());
        let reports = Reports::new(told.clone());
        let known = |reports: &Reports| reports.with(|held| held.len());
        let first = Followed::new(reports.clone(), name(), "");
        let second = Followed::new(reports.clone(), name(), "");
        drop(first);
        assert_eq!((known(&reports), told.last()), (1, String::new()));
        drop(second);
        assert_eq!((known(&reports), told.last().as_str()), (0, "-"));
    }

    #[test]
    fn each_stage_is_told() {
        let told = Arc::new(Told::default());
        let reports = Reports::new(told.clone());
        let group = Arc::new(group());
        let followed = Followed::new(reports.clone(), name(), "");
        followed.problem("no mesh", false);
        assert_eq!(told.last(), "NoBootConfiguration");
        followed.newest("1", &group);
        followed.sent("1");
        assert_eq!(told.last(), "NotApplied");
        reports.reported(&name(), report("1", true));
        assert_eq!(told.last(), "Applied");
        // Another that waits, and takes effect after all.
        followed.newest("2", &group);
        assert_eq!(told.last(), "WaitsForRestart");
        followed.sent("2");
        assert_eq!(told.last(), "NotApplied");
        reports.reported(&name(), report("2", false));
        assert_eq!(told.last(), "Refused");
        reports.reported(&name(), report("2", true));
        assert_eq!(told.last(), "Applied");
        // What isn't about the configuration itself leaves it as it is; what is doesn't.
        followed.problem("no token", true);
        assert_eq!(told.last(), "Applied");
        followed.problem("the mesh is gone", false);
        assert_eq!(told.last(), "NoBootConfiguration");
    }

    #[test]
    fn of_one_that_comes_back_the_sidecar_says_it_again() {
        let told = Arc::new(Told::default());
        let reports = Reports::new(told.clone());
        let followed = Followed::new(reports.clone(), name(), "1");
        followed.newest("1", &Arc::new(group()));
        // Its token.
        followed.sent("1");
        assert_eq!(told.last(), "-", "what was known of it is as true as before");
        reports.reported(&name(), report("1", true));
        assert_eq!(told.last(), "Applied");
    }
}
