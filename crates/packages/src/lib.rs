//! Packages of the agent and the sidecar: their names, whether a file is a whole one, and, with the feature `make`, how they are built,
//! signed and indexed.
//!
//! Never in here: HTTP. Whoever only serves packages takes this crate without `make`, and so has no code that signs.

#[cfg(feature = "make")]
mod apt;
pub mod archive;
#[cfg(feature = "make")]
pub mod build;
#[cfg(feature = "make")]
pub mod described;
pub mod index;
#[cfg(feature = "make")]
pub mod key;
#[cfg(feature = "make")]
pub mod library;
pub mod name;
#[cfg(feature = "make")]
pub mod published;
#[cfg(feature = "make")]
mod yum;

/// In lower-case hexadecimal.
#[cfg(feature = "make")]
pub(crate) fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
