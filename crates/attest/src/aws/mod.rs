pub mod document;
pub mod sts;
