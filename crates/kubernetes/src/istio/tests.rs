use super::fixtures::name;
use super::*;

#[test]
fn a_report_is_kept_while_somebody_follows() {
    let reports = Arc::new(Reports::default());
    let known = |reports: &Reports| reports.with(|held| held.len());
    let first = Followed::new(reports.clone(), name());
    let second = Followed::new(reports.clone(), name());
    drop(first);
    assert_eq!(known(&reports), 1);
    drop(second);
    assert_eq!(known(&reports), 0);
}
