//! A figure beside what it is measured against, for people and as JSON.

use serde::Serialize;
use std::fmt::Write;

/// One row: what was measured, several times, and what it stands beside.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// As in `join, JWT, 8 at once: CPU of the plane`.
    pub name: String,
    /// As in `ms`, `KiB`, `joins/s`.
    pub unit: &'static str,
    /// One for each repetition.
    pub ours: Vec<f64>,
    /// At least one of them measured in the same run.
    pub against: Vec<Against>,
    /// In words: `at most 2 x the cryptography`. Empty: none, it is there to explain another.
    pub goal: String,
    /// The same however often it is measured: the size of a file.
    #[serde(skip)]
    exact: bool,
}

/// The floor that nobody gets below with this library on this machine, or what somebody else's program needs.
#[derive(Debug, Clone, Serialize)]
pub struct Against {
    /// As in `its cryptography`, `SPIRE 1.13.3`.
    pub what: String,
    pub samples: Vec<f64>,
    /// Not measured in this run; where the value comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<&'static str>,
}

impl Figure {
    /// `floor`: what it stands beside, or its peer; measured in the same run.
    pub fn new(
        name: impl Into<String>,
        unit: &'static str,
        ours: Vec<f64>,
        floor: (impl Into<String>, Vec<f64>),
    ) -> Self {
        let alone = Self { name: name.into(), unit, ours, against: Vec::new(), goal: String::new(), exact: false };
        alone.against(floor.0, floor.1)
    }

    /// Of which there is nothing to repeat: the size of a file.
    pub fn exact(name: impl Into<String>, unit: &'static str, ours: f64, peer: (impl Into<String>, f64)) -> Self {
        Self { exact: true, ..Self::new(name, unit, vec![ours], (peer.0, vec![peer.1])) }
    }

    /// Another of the same run.
    pub fn against(mut self, what: impl Into<String>, samples: Vec<f64>) -> Self {
        self.against.push(Against { what: what.into(), samples, source: None });
        self
    }

    /// Measured at another time; `source` says when and how.
    pub fn beside(mut self, what: impl Into<String>, value: f64, source: &'static str) -> Self {
        self.against.push(Against { what: what.into(), samples: vec![value], source: Some(source) });
        self
    }

    pub fn goal(mut self, goal: impl Into<String>) -> Self {
        self.goal = goal.into();
        self
    }

    /// # Errors
    /// Something of it was measured in this run, and less often than asked for.
    pub fn has_samples(&self, repeat: usize) -> anyhow::Result<()> {
        let measured = self.against.iter().filter(|against| against.source.is_none());
        let all = measured.map(|against| (against.what.as_str(), &against.samples)).chain([("ours", &self.ours)]);
        for (what, samples) in all.filter(|_| !self.exact) {
            anyhow::ensure!(
                samples.len() >= repeat,
                "{}: {what} was measured {} times of {repeat}",
                self.name,
                samples.len()
            );
        }
        Ok(())
    }

    /// For people: a line for the figure and one for each thing that it stands beside.
    pub fn lines(&self) -> String {
        let mut out = String::new();
        let mut row = |name: &str, value: &str, unit: &str, more: &str| {
            let line = format!("{name:<58} {value:>28} {unit:<8} {more}");
            // Writing into a String doesn't fail.
            let _ = writeln!(out, "{}", line.trim_end());
        };
        row(&self.name, &spread(&self.ours), self.unit, &self.goal);
        for against in &self.against {
            let ratio = match (median(&self.ours), median(&against.samples)) {
                (Some(ours), Some(theirs)) if theirs != 0.0 => format!("ours is {} x", number(ours / theirs)),
                _ => String::new(),
            };
            let source = against.source.map(|source| format!(" ({source})")).unwrap_or_default();
            row(&format!("    {}", against.what), &spread(&against.samples), self.unit, &format!("{ratio}{source}"));
        }
        out
    }
}

/// `None`: of nothing.
pub fn median(samples: &[f64]) -> Option<f64> {
    quantile(samples, 0.5)
}

/// The sample below which this share lies: `0.99`.
pub fn quantile(samples: &[f64], share: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    sorted.get((last as f64 * share).round() as usize).copied()
}

/// `median (least..most)`.
fn spread(samples: &[f64]) -> String {
    let Some(middle) = median(samples) else { return "-".to_owned() };
    if samples.len() == 1 {
        return number(middle);
    }
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let most = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{} ({}..{})", number(middle), number(least), number(most))
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_says_its_spread_and_its_ratio() {
        let figure = Figure::new("join: CPU", "ms", vec![3.0, 1.0, 2.0], ("its cryptography", vec![1.0]))
            .beside("SPIRE 1.13.3", 4.0, "measured earlier")
            .goal("at most 2 x");
        let text = figure.lines();
        assert!(text.contains("2.00 (1.00..3.00) ms") && text.contains("at most 2 x"), "{text}");
        assert!(text.contains("ours is 2.00 x\n") && text.contains("ours is 0.500 x (measured earlier)"), "{text}");
        let nothing = Figure::new("none", "ms", Vec::new(), ("its floor", Vec::new())).lines();
        let rows: Vec<Vec<_>> = nothing.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows, [vec!["none", "-", "ms"], vec!["its", "floor", "-", "ms"]]);
    }

    #[test]
    fn a_figure_knows_what_was_measured_too_seldom() {
        let why = |figure: &Figure| figure.has_samples(2).map_err(|error| error.to_string());
        let twice = Figure::new("rate", "joins/s", vec![1.0, 2.0], ("its floor", vec![3.0, 4.0]));
        assert_eq!(why(&twice.clone().beside("SPIRE 1.13.3", 4.0, "measured earlier")), Ok(()));
        assert_eq!(why(&twice.against("nginx", vec![5.0])), Err("rate: nginx was measured 1 times of 2".to_owned()));
        let once = Figure::new("rate", "joins/s", vec![1.0], ("its floor", vec![3.0, 4.0]));
        assert_eq!(why(&once), Err("rate: ours was measured 1 times of 2".to_owned()));
        assert_eq!(why(&Figure::exact("size", "MiB", 5.5, ("pilot-agent", 30.1))), Ok(()));
    }

    #[test]
    fn a_quantile_is_a_sample() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&samples, 0.99), Some(99.0));
        assert_eq!(quantile(&samples, 0.0), Some(1.0));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
