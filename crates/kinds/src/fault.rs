//! One thing that is wrong with a document.

use std::fmt;

/// `Display` is `FILE:LINE: KIND NAMESPACE/NAME: FIELD.PATH: what is wrong`, in one line, with control characters escaped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    pub file: String,
    /// From 1.
    pub line: usize,
    /// `OnboardingPolicy bookinfo/narrow`; of an agent's file only the kind; empty where no kind could be read.
    pub object: String,
    /// `spec.allow[0].workloads[0].aws.accounts`; empty for a document as a whole.
    pub path: String,
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let _ = f;
        unimplemented!()
    }
}
