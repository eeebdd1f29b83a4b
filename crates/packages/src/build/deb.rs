//! deb(5): `ar` of `debian-binary`, `control.tar.xz` and `data.tar.xz`.

use super::{Error, Files, Source, XZ};
use liblzma::write::XzEncoder;
use md5::{Digest, Md5};
use onboarding_kinds::recipe::{Content, Entry, Relations};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use tar::{EntryType, Header};

pub(super) fn pack(source: &Source<'_>, files: &Files<'_>) -> Result<Vec<u8>, Error> {
    let mut archive = ar::Builder::new(Vec::new());
    let (control, data) = (control(source, files)?, data(source, files)?);
    for (name, content) in
        [("debian-binary", b"2.0\n".as_slice()), ("control.tar.xz", &control), ("data.tar.xz", &data)]
    {
        let mut header = ar::Header::new(name.into(), content.len() as u64);
        header.set_mtime(source.time.into());
        header.set_mode(0o100_644);
        archive.append(&header, content)?;
    }
    Ok(archive.into_inner()?)
}

fn control(source: &Source<'_>, files: &Files<'_>) -> io::Result<Vec<u8>> {
    let mut members = vec![("control", 0o644, fields(source, files)), ("md5sums", 0o644, sums(files))];
    let conffiles: String =
        files.iter().filter(|(_, (entry, _))| is_config(entry)).fold(String::new(), |all, (path, _)| all + path + "\n");
    if !conffiles.is_empty() {
        members.push(("conffiles", 0o644, conffiles));
    }
    for name in ["preinst", "postinst", "prerm", "postrm"] {
        if let Some(script) = source.scripts.get(name) {
            members.push((name, 0o755, script.clone()));
        }
    }
    members.sort_unstable_by_key(|member| member.0);
    let mut tar = tar::Builder::new(XzEncoder::new(Vec::new(), XZ));
    append(&mut tar, source.time, "./", &Header::new_gnu(), EntryType::Directory, 0o755, ("root", "root"), b"")?;
    for (name, mode, content) in members {
        let path = format!("./{name}");
        let owner = ("root", "root");
        append(&mut tar, source.time, &path, &Header::new_gnu(), EntryType::Regular, mode, owner, content.as_bytes())?;
    }
    tar.into_inner()?.finish()
}

fn data(source: &Source<'_>, files: &Files<'_>) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(XzEncoder::new(Vec::new(), XZ));
    let root = ("root", "root");
    append(&mut tar, source.time, "./", &Header::new_gnu(), EntryType::Directory, 0o755, root, b"")?;
    let mut made = BTreeSet::new();
    for (path, (entry, content)) in files {
        // Every directory on the way belongs to the package too, as dpkg wants it.
        for (end, _) in path.match_indices('/').skip(1) {
            let parent = &path[..end];
            if !files.contains_key(parent) && made.insert(parent) {
                let path = format!(".{parent}/");
                append(&mut tar, source.time, &path, &Header::new_gnu(), EntryType::Directory, 0o755, root, b"")?;
            }
        }
        let owner = (entry.owner.as_str(), entry.group.as_str());
        let mut header = Header::new_gnu();
        let (kind, mode, path) = match &entry.content {
            Content::File { mode, .. } => (EntryType::Regular, *mode, format!(".{path}")),
            Content::Directory { mode } => (EntryType::Directory, *mode, format!(".{path}/")),
            Content::Link { target } => {
                header.set_link_name_literal(target)?;
                (EntryType::Symlink, 0o777, format!(".{path}"))
            }
        };
        append(&mut tar, source.time, &path, &header, kind, mode, owner, content)?;
    }
    tar.into_inner()?.finish()
}

/// Names decide about owners where the machine knows them; the numbers are root's.
#[allow(clippy::too_many_arguments, reason = "what a tar entry has")]
fn append<W: io::Write>(
    tar: &mut tar::Builder<W>,
    time: u32,
    path: &str,
    header: &Header,
    kind: EntryType,
    mode: u16,
    (owner, group): (&str, &str),
    content: &[u8],
) -> io::Result<()> {
    let mut header = header.clone();
    header.set_entry_type(kind);
    header.set_mode(mode.into());
    header.set_mtime(time.into());
    header.set_size(content.len() as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_username(owner)?;
    header.set_groupname(group)?;
    // `set_path` drops the "./" that dpkg's own archives begin with, so the name is written as it is where it fits.
    let name = &mut header.as_gnu_mut().ok_or_else(|| io::Error::other("no GNU header"))?.name;
    if path.len() <= name.len() {
        name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        tar.append(&header, content)
    } else {
        header.set_cksum();
        tar.append_data(&mut header, path, content)
    }
}

fn is_config(entry: &Entry) -> bool {
    matches!(entry.content, Content::File { config: true, .. })
}

/// Configuration changes, so its sums aren't kept (as dh_md5sums does it).
fn sums(files: &Files<'_>) -> String {
    let mut sums = String::new();
    for (path, (entry, content)) in files {
        if matches!(entry.content, Content::File { config: false, .. }) {
            let digest = Md5::digest(content);
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            let _ = writeln!(sums, "{digest}  {}", &path[1..]);
        }
    }
    sums
}

fn fields(source: &Source<'_>, files: &Files<'_>) -> String {
    let recipe = source.recipe;
    // Policy, 5.6.20: KiB, each file rounded up, one for everything else.
    let size: u64 = files
        .values()
        .map(|(entry, content)| match entry.content {
            Content::File { .. } => (content.len() as u64).div_ceil(1024),
            Content::Directory { .. } | Content::Link { .. } => 1,
        })
        .sum();
    let mut control = String::new();
    let mut field = |name: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(control, "{name}: {value}");
        }
    };
    let list = |relations: &Relations| relations.deb.join(", ");
    field("Package", &recipe.name);
    field("Version", &source.version.deb());
    field("Architecture", source.architecture.name());
    field("Maintainer", &recipe.maintainer);
    field("Installed-Size", &size.to_string());
    field("Depends", &list(&recipe.depends));
    field("Recommends", &list(&recipe.recommends));
    field("Conflicts", &list(&recipe.conflicts));
    field("Replaces", &list(&recipe.replaces));
    field("Provides", &list(&recipe.provides));
    field("Section", &recipe.section);
    field("Priority", "optional");
    field("Homepage", recipe.homepage.as_deref().unwrap_or_default());
    field("Description", &recipe.summary);
    // An empty line is a dot (policy, 5.6.13).
    for line in recipe.description.lines() {
        let _ = writeln!(control, " {}", if line.is_empty() { "." } else { line });
    }
    control
}
