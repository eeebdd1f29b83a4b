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

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    fn selector(operators: Vec<Operator>) -> LabelSelector {
        let requirement = |operator| Requirement { key: "app".to_owned(), operator };
        LabelSelector { requirements: operators.into_iter().map(requirement).collect() }
    }

    #[test]
    fn operators_as_kubernetes_defines_them() {
        let values = || vec!["ratings".to_owned(), "reviews".to_owned()];
        // The operator; whether it holds for app=reviews, app=details, no label app.
        let cases = [
            (Operator::In(values()), [true, false, false]),
            (Operator::NotIn(values()), [false, true, true]),
            (Operator::Exists, [true, true, false]),
            (Operator::DoesNotExist, [false, false, true]),
        ];
        for (operator, wanted) in cases {
            let selector = selector(vec![operator]);
            let found = [labels(&[("app", "reviews")]), labels(&[("app", "details")]), labels(&[("class", "vm")])]
                .map(|labels| selector.matches(&labels));
            assert_eq!(found, wanted, "{selector:?}");
        }
    }

    #[test]
    fn nothing_required_selects_everything() {
        assert!(LabelSelector::default().matches(&Labels::new()));
    }

    #[test]
    fn every_requirement_must_hold_and_the_first_that_does_not_is_named() {
        let both = selector(vec![Operator::Exists, Operator::NotIn(vec!["details".to_owned()])]);
        assert!(both.matches(&labels(&[("app", "ratings")])));
        assert_eq!(both.first_mismatch(&labels(&[("app", "details")])), Some(&both.requirements[1]));
        assert_eq!(both.first_mismatch(&Labels::new()), Some(&both.requirements[0]));
    }
}
