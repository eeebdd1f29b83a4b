//! Labels and the standard label selector (`matchLabels` and `matchExpressions`, as Kubernetes defines them).

use std::collections::BTreeMap;

pub type Labels = BTreeMap<String, String>;

/// Every requirement must hold; without any it selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    pub requirements: Vec<Requirement>,
}

/// `matchLabels` entries are `In` with one value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operator {
    In(Vec<String>),
    /// Also holds where the label is absent.
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

impl LabelSelector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.first_mismatch(labels).is_none()
    }

    /// The first requirement that these labels don't meet.
    pub fn first_mismatch(&self, labels: &Labels) -> Option<&Requirement> {
        self.requirements.iter().find(|requirement| {
            let value = labels.get(&requirement.key);
            !match &requirement.operator {
                Operator::In(wanted) => value.is_some_and(|value| wanted.contains(value)),
                Operator::NotIn(unwanted) => value.is_none_or(|value| !unwanted.contains(value)),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
            }
        })
    }
}
