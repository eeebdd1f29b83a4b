//! The indexes of yum and dnf: `primary`, `filelists` and `other`, and `repomd.xml` that names them by their digests (as createrepo_c writes
//! them).

use crate::build::compressed;
use crate::described::{Described, Details};
use crate::index::{in_pool, of_yum};
use crate::name::Architecture;
use quick_xml::escape::escape;
use rpm::{Dependency, DependencyFlags, FileType, PackageMetadata};
use std::fmt::Write as _;
use std::io;

/// One repository in the sense of yum: a suite and an architecture.
pub(crate) struct Base {
    /// Below the directory of packages.
    pub path: String,
    /// The kind, the name of its file below the base, compressed, and what is in it.
    pub data: Vec<Data>,
}

pub(crate) struct Data {
    pub kind: &'static str,
    pub path: String,
    pub compressed: Vec<u8>,
    digest: String,
    open_digest: String,
    open_size: usize,
}

/// A package as its index needs it.
pub(crate) struct Listed<'a> {
    pub described: &'a Described,
    pub digest: &'a str,
    pub length: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("compressing an index")]
    Compress(#[from] io::Error),
    #[error("reading an RPM package's header")]
    Rpm(#[from] rpm::Error),
}

impl Base {
    pub fn new(suite: &str, architecture: Architecture, packages: &[Listed<'_>]) -> Result<Self, Error> {
        let path = of_yum(suite, architecture);
        let [mut primary, mut filelists, mut other] = [
            ("metadata", "common\" xmlns:rpm=\"http://linux.duke.edu/metadata/rpm"),
            ("filelists", "filelists"),
            ("otherdata", "other"),
        ]
        .map(|(root, namespace)| {
            format!(
                "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
                 <{root} xmlns=\"http://linux.duke.edu/metadata/{namespace}\" packages=\"{}\">\n",
                packages.len()
            )
        });
        for listed in packages {
            let Details::Rpm(metadata) = &listed.described.details else { continue };
            write_primary(&mut primary, listed, metadata)?;
            let head = head(listed, metadata)?;
            let _ = write!(filelists, "{head}\n{}</package>\n", files(metadata, false)?);
            let _ = writeln!(other, "{head}</package>");
        }
        primary.push_str("</metadata>\n");
        filelists.push_str("</filelists>\n");
        other.push_str("</otherdata>\n");
        let data = [("primary", primary), ("filelists", filelists), ("other", other)]
            .map(|(kind, text)| Data::new(kind, &text))
            .into_iter()
            .collect::<Result<_, _>>()?;
        Ok(Self { path, data })
    }

    /// `repomd.xml`, of this date in seconds since 1970.
    pub fn repomd(&self, date: u32) -> String {
        let mut text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<repomd xmlns=\"http://linux.duke.edu/metadata/repo\">\n\
             <revision>{date}</revision>\n"
        );
        for data in &self.data {
            let Data { kind, path, digest, open_digest, open_size, .. } = data;
            let size = data.compressed.len();
            let _ = write!(
                text,
                "<data type=\"{kind}\">\n<checksum type=\"sha256\">{digest}</checksum>\n\
                 <open-checksum type=\"sha256\">{open_digest}</open-checksum>\n<location href=\"{path}\"/>\n\
                 <timestamp>{date}</timestamp>\n<size>{size}</size>\n<open-size>{open_size}</open-size>\n</data>\n"
            );
        }
        text + "</repomd>\n"
    }
}

/// What `revision` of a `repomd.xml` says.
pub(crate) fn date_of(repomd: &str) -> Option<u32> {
    repomd.split_once("<revision>")?.1.split_once("</revision>")?.0.parse().ok()
}

/// Where a package of a base is, below the base.
pub(crate) fn location(described: &Described, digest: &str) -> String {
    in_pool(digest, &described.name, &described.version, &format!(".{}.rpm", described.architecture.of_rpm()))
}

impl Data {
    fn new(kind: &'static str, text: &str) -> io::Result<Self> {
        let compressed = compressed(text.as_bytes())?;
        let digest = crate::sha256(&compressed);
        Ok(Self {
            kind,
            path: format!("repodata/{digest}-{kind}.xml.gz"),
            compressed,
            digest,
            open_digest: crate::sha256(text.as_bytes()),
            open_size: text.len(),
        })
    }
}

fn head(listed: &Listed<'_>, metadata: &PackageMetadata) -> Result<String, rpm::Error> {
    let (name, arch) = (metadata.get_name()?, metadata.get_arch()?);
    let digest = listed.digest;
    Ok(format!(
        "<package pkgid=\"{digest}\" name=\"{}\" arch=\"{}\">{}",
        escape(name),
        escape(arch),
        version(metadata)?
    ))
}

fn version(metadata: &PackageMetadata) -> Result<String, rpm::Error> {
    let epoch = metadata.get_epoch().unwrap_or(0);
    let (version, release) = (metadata.get_version()?, metadata.get_release()?);
    Ok(format!("<version epoch=\"{epoch}\" ver=\"{}\" rel=\"{}\"/>", escape(version), escape(release)))
}

fn write_primary(text: &mut String, listed: &Listed<'_>, metadata: &PackageMetadata) -> Result<(), rpm::Error> {
    let or_nothing = |value: Result<&str, rpm::Error>| escape(value.unwrap_or_default()).into_owned();
    let built = metadata.get_build_time().unwrap_or(0);
    let offsets = metadata.get_package_segment_offsets();
    let _ = write!(
        text,
        "<package type=\"rpm\">\n<name>{}</name>\n<arch>{}</arch>\n{}\n\
         <checksum type=\"sha256\" pkgid=\"YES\">{}</checksum>\n<summary>{}</summary>\n<description>{}</description>\n\
         <packager>{}</packager>\n<url>{}</url>\n<time file=\"{built}\" build=\"{built}\"/>\n\
         <size package=\"{}\" installed=\"{}\" archive=\"0\"/>\n<location href=\"{}\"/>\n<format>\n\
         <rpm:license>{}</rpm:license>\n<rpm:vendor>{}</rpm:vendor>\n<rpm:group>{}</rpm:group>\n\
         <rpm:buildhost>{}</rpm:buildhost>\n<rpm:sourcerpm>{}</rpm:sourcerpm>\n\
         <rpm:header-range start=\"{}\" end=\"{}\"/>\n",
        escape(metadata.get_name()?),
        escape(metadata.get_arch()?),
        version(metadata)?,
        listed.digest,
        or_nothing(metadata.get_summary()),
        or_nothing(metadata.get_description()),
        or_nothing(metadata.get_packager()),
        or_nothing(metadata.get_url()),
        listed.length,
        metadata.get_installed_size().unwrap_or(0),
        escape(location(listed.described, listed.digest)),
        or_nothing(metadata.get_license()),
        or_nothing(metadata.get_vendor()),
        or_nothing(metadata.get_group()),
        or_nothing(metadata.get_build_host()),
        or_nothing(metadata.get_source_rpm()),
        offsets.header,
        offsets.payload,
    );
    for (kind, dependencies) in [
        ("provides", metadata.get_provides()),
        ("requires", metadata.get_requires()),
        ("conflicts", metadata.get_conflicts()),
        ("obsoletes", metadata.get_obsoletes()),
        ("recommends", metadata.get_recommends()),
    ] {
        text.push_str(&relations(kind, &dependencies.unwrap_or_default()));
    }
    text.push_str(&files(metadata, true)?);
    text.push_str("</format>\n</package>\n");
    Ok(())
}

/// Without what rpm requires of itself, as createrepo_c has it.
fn relations(kind: &str, dependencies: &[Dependency]) -> String {
    let mut entries = Vec::new();
    for dependency in dependencies.iter().filter(|it| !it.name.starts_with("rpmlib(")) {
        let mut entry = format!("<rpm:entry name=\"{}\"", escape(&dependency.name));
        let has = |flag| dependency.flags.contains(flag);
        let (less, equal, greater) =
            (has(DependencyFlags::LESS), has(DependencyFlags::EQUAL), has(DependencyFlags::GREATER));
        let comparison = match (less, equal, greater) {
            (true, false, false) => "LT",
            (true, true, false) => "LE",
            (false, true, false) => "EQ",
            (false, true, true) => "GE",
            (false, false, true) => "GT",
            _ => "",
        };
        if !comparison.is_empty() && !dependency.version.is_empty() {
            let (epoch, rest) = dependency.version.split_once(':').unwrap_or(("0", &dependency.version));
            let (version, release) = rest.split_once('-').map_or((rest, None), |(version, rel)| (version, Some(rel)));
            let _ = write!(entry, " flags=\"{comparison}\" epoch=\"{}\" ver=\"{}\"", escape(epoch), escape(version));
            if let Some(release) = release {
                let _ = write!(entry, " rel=\"{}\"", escape(release));
            }
        }
        if kind == "requires" && has(DependencyFlags::SCRIPT_PRE) {
            entry.push_str(" pre=\"1\"");
        }
        entry.push_str("/>\n");
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    match entries.is_empty() {
        true => String::new(),
        false => format!("<rpm:{kind}>\n{}</rpm:{kind}>\n", entries.concat()),
    }
}

/// `few`: only those that others may depend on (createrepo_c's `cr_is_primary`).
fn files(metadata: &PackageMetadata, few: bool) -> Result<String, rpm::Error> {
    let mut text = String::new();
    for entry in metadata.get_file_entries()? {
        let path = entry.path().to_string_lossy().into_owned();
        if few && !(path.starts_with("/etc/") || path.contains("bin/") || path == "/usr/lib/sendmail") {
            continue;
        }
        let kind = if entry.file_type() == FileType::Dir { " type=\"dir\"" } else { "" };
        let _ = writeln!(text, "<file{kind}>{}</file>", escape(&path));
    }
    Ok(text)
}
