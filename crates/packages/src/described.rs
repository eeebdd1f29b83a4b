//! What a package says of itself: its name, its version, what it is for, and what an index says about it.

use crate::name::{Architecture, Format};
use flate2::read::GzDecoder;
use liblzma::read::XzDecoder;
use md5::{Digest, Md5};
use rpm::PackageMetadata;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};

/// Of the archive with the control file, unpacked.
const LARGEST_CONTROL: u64 = 16 << 20;
/// Of what a package unpacks to.
const LARGEST_DATA: u64 = 8 << 30;

/// Why a file isn't a package that this repository could have.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("it is neither a deb nor an rpm package")]
    Neither,
    #[error("it is broken: {0}")]
    Broken(String),
    #[error("it is {0}, a source package")]
    IsSource(String),
    #[error("it is {name} {version} for {architecture}; this repository has onboarding-agent and istio-sidecar")]
    Foreign { name: String, version: String, architecture: String },
    #[error("it is {name} {version} for {architecture}; this repository is for amd64 and arm64")]
    OtherArchitecture { name: String, version: String, architecture: String },
}

/// One package, by what is in it.
pub struct Described {
    pub name: String,
    /// As the format writes it: `1.2.3-1`.
    pub version: String,
    pub architecture: Architecture,
    pub details: Details,
}

pub enum Details {
    /// The fields of the control file, in their order, with what each has on further lines.
    Deb(Vec<(String, String)>),
    Rpm(Box<PackageMetadata>),
}

impl Described {
    pub fn format(&self) -> Format {
        match self.details {
            Details::Deb(_) => Format::Deb,
            Details::Rpm(_) => Format::Rpm,
        }
    }

    /// # Errors
    /// It is none, or not one of ours.
    pub fn read(bytes: &[u8]) -> Result<Self, Fault> {
        let (name, version, architecture, details) = if bytes.starts_with(b"!<arch>\n") {
            let fields = control(bytes)?;
            let field = |name: &str| {
                let found = fields.iter().find(|(field, _)| field.eq_ignore_ascii_case(name));
                found
                    .map(|(_, value)| value.clone())
                    .ok_or_else(|| Fault::Broken(format!("its control file has no {name}")))
            };
            (field("Package")?, field("Version")?, field("Architecture")?, Details::Deb(fields))
        } else if bytes.starts_with(&[0xed, 0xab, 0xee, 0xdb]) {
            let metadata = PackageMetadata::parse(&mut &bytes[..]).map_err(|error| Fault::Broken(error.to_string()))?;
            let broken = |error: rpm::Error| Fault::Broken(error.to_string());
            let name = metadata.get_name().map_err(broken)?.to_owned();
            if metadata.is_source_package() {
                return Err(Fault::IsSource(name));
            }
            let version = metadata.get_version().map_err(broken)?;
            let version = format!("{version}-{}", metadata.get_release().map_err(broken)?);
            (name, version, metadata.get_arch().map_err(broken)?.to_owned(), Details::Rpm(Box::new(metadata)))
        } else {
            return Err(Fault::Neither);
        };
        let found = Architecture::ALL.into_iter().find(|it| match details {
            Details::Deb(_) => it.name() == architecture,
            Details::Rpm(_) => it.of_rpm() == architecture,
        });
        if !["onboarding-agent", "istio-sidecar"].contains(&name.as_str()) {
            return Err(Fault::Foreign { name, version, architecture });
        }
        match found {
            Some(found) => Ok(Self { name, version, architecture: found, details }),
            None => Err(Fault::OtherArchitecture { name, version, architecture }),
        }
    }
}

/// One `tar` member of the `ar` archive, unpacked as it is read.
fn member<'a>(bytes: &'a [u8], wanted: &str) -> Result<Box<dyn Read + 'a>, Fault> {
    let broken = |error: io::Error| Fault::Broken(error.to_string());
    let mut archive = ar::Archive::new(bytes);
    // The entries' content is taken from the bytes themselves, so that it can be read after the archive.
    let mut offset = 8;
    while let Some(entry) = archive.next_entry() {
        let entry = entry.map_err(broken)?;
        let name = String::from_utf8_lossy(entry.header().identifier()).trim_end_matches('/').to_owned();
        let size = usize::try_from(entry.header().size()).unwrap_or(usize::MAX);
        let start: usize = offset + 60;
        let content = start.checked_add(size).and_then(|end| bytes.get(start..end));
        let content = content.ok_or_else(|| Fault::Broken(format!("{name} goes beyond its end")))?;
        drop(entry);
        offset = start + size + size % 2;
        let Some(compression) = name.strip_prefix(wanted) else { continue };
        return Ok(match compression {
            ".tar" => Box::new(content),
            ".tar.gz" => Box::new(GzDecoder::new(content)),
            ".tar.xz" => Box::new(XzDecoder::new(content)),
            _ => {
                return Err(Fault::Broken(format!(
                    "{name} is compressed in a way that old systems and this program don't read; xz and gzip are read"
                )));
            }
        });
    }
    Err(Fault::Broken(format!("it has no {wanted}.tar")))
}

fn control(bytes: &[u8]) -> Result<Vec<(String, String)>, Fault> {
    let text = control_file(bytes, "control")?.ok_or_else(|| Fault::Broken("it has no control file".to_owned()))?;
    let mut fields: Vec<(String, String)> = Vec::new();
    let mut seen = BTreeSet::new();
    for line in text.trim_end().lines() {
        let broken = || Fault::Broken(format!("its control file has the line {line:?}"));
        match line.strip_prefix([' ', '\t']) {
            Some(more) if !more.trim().is_empty() => {
                let last = fields.last_mut().ok_or_else(broken)?;
                last.1.push_str("\n ");
                last.1.push_str(more);
            }
            Some(_) => return Err(broken()),
            None => {
                let (name, value) = line.split_once(':').ok_or_else(broken)?;
                let plain = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
                if !plain || !seen.insert(name.to_lowercase()) {
                    return Err(broken());
                }
                fields.push((name.to_owned(), value.trim().to_owned()));
            }
        }
    }
    Ok(fields)
}

/// A file of the control archive, if it is there.
fn control_file(bytes: &[u8], wanted: &str) -> Result<Option<String>, Fault> {
    let broken = |error: io::Error| Fault::Broken(format!("its control archive can't be read: {error}"));
    let mut archive = tar::Archive::new(member(bytes, "control")?.take(LARGEST_CONTROL));
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = entry.path_bytes().into_owned();
        if path.strip_prefix(b"./").unwrap_or(&path) == wanted.as_bytes() {
            let mut text = String::new();
            entry.read_to_string(&mut text).map_err(broken)?;
            return Ok(Some(text));
        }
    }
    Ok(None)
}

/// Reads all of a package and compares it with the checksums in it.
///
/// # Errors
/// It is broken, or something in it isn't what its checksum says.
pub fn check_content(bytes: &[u8]) -> Result<(), Fault> {
    if bytes.starts_with(b"!<arch>\n") {
        return check_deb(bytes);
    }
    let broken = |error: rpm::Error| Fault::Broken(error.to_string());
    let package = rpm::Package::parse(&mut &bytes[..]).map_err(broken)?;
    package.verify_digests().map_err(broken)
}

fn check_deb(bytes: &[u8]) -> Result<(), Fault> {
    let mut sums = BTreeMap::new();
    for line in control_file(bytes, "md5sums")?.unwrap_or_default().lines() {
        let broken = || Fault::Broken(format!("its md5sums has the line {line:?}"));
        let (sum, path) = line.split_once("  ").ok_or_else(broken)?;
        sums.insert(path.to_owned(), sum.to_owned());
    }
    let broken = |error: io::Error| Fault::Broken(format!("its data can't be read: {error}"));
    let mut archive = tar::Archive::new(member(bytes, "data")?.take(LARGEST_DATA));
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
        let wanted = sums.remove(&path);
        let mut digest = Md5::new();
        let mut block = vec![0; 64 << 10];
        loop {
            match entry.read(&mut block).map_err(broken)? {
                0 => break,
                read => digest.update(&block[..read]),
            }
        }
        let digest: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if wanted.is_some_and(|wanted| wanted != digest) {
            return Err(Fault::Broken(format!("{path} isn't what its md5sums says")));
        }
    }
    // To the end of what is compressed, where its own checksum is.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(broken)?;
    match sums.keys().next() {
        Some(path) => Err(Fault::Broken(format!("{path} is in its md5sums and not in it"))),
        None => Ok(()),
    }
}
