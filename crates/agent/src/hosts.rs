//! The lines of `/etc/hosts` that map the mesh's services to the egress listeners, kept in a marked block.

use onboarding_wire::onboarding::HostAlias;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

pub const BEGIN: &str = "# BEGIN onboarding-agent";
pub const END: &str = "# END onboarding-agent";

/// Why the file was left as it was.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    #[error("can't read {file}", file = .file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("can't write {file}; run this as root", file = .file.display())]
    Write {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{file} has `{BEGIN}` without `{END}` after it, or twice; repair it by hand, nothing was changed", file = .file.display())]
    Marks { file: PathBuf },
    #[error("{file} is larger than {MOST_BYTES} bytes; nothing was changed", file = .file.display())]
    TooLarge { file: PathBuf },
}

const MOST_BYTES: u64 = 16 * 1024 * 1024;
/// glibc reads long lines, others don't.
const NAMES_PER_LINE: usize = 8;

/// `127.0.0.2 ratings.bookinfo ratings.bookinfo.svc ...`; what isn't an address or a host name is left out.
pub fn lines(aliases: &[HostAlias]) -> Vec<String> {
    aliases
        .iter()
        .filter_map(|alias| Some((alias.ip.parse::<IpAddr>().ok()?, alias)))
        .flat_map(|(ip, alias)| {
            let names: Vec<&str> = alias.names.iter().map(String::as_str).filter(|name| is_host_name(name)).collect();
            names.chunks(NAMES_PER_LINE).map(|names| format!("{ip} {}", names.join(" "))).collect::<Vec<_>>()
        })
        .collect()
}

/// The plane's words end up in a file that root writes: nothing but host names.
fn is_host_name(name: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    // Whoever maps localhost takes over this host's own services.
    name.len() <= 253 && name.split('.').all(is_label) && !name.eq_ignore_ascii_case("localhost")
}

/// Puts the lines into the marked block, which is added at the end where there is none, and taken out where there are no lines.
/// True: the file was changed.
pub fn write(file: &Path, lines: &[String]) -> Result<bool, HostsError> {
    let read = |source| HostsError::Read { file: file.to_owned(), source };
    // Through a symbolic link, as editors do.
    let target = fs::canonicalize(file).map_err(read)?;
    let metadata = fs::metadata(&target).map_err(read)?;
    if metadata.len() > MOST_BYTES {
        return Err(HostsError::TooLarge { file: file.to_owned() });
    }
    let old = fs::read(&target).map_err(read)?;
    let new = replaced(&old, lines).ok_or_else(|| HostsError::Marks { file: file.to_owned() })?;
    if new == old {
        return Ok(false);
    }
    let written = rename_over(&target, &metadata, &new).or_else(|error| match error.kind() {
        // A bind mount (containers have their hosts file so), or a directory that can't be written: the file itself may be.
        io::ErrorKind::ResourceBusy
        | io::ErrorKind::CrossesDevices
        | io::ErrorKind::PermissionDenied
        | io::ErrorKind::ReadOnlyFilesystem => in_place(&target, &new),
        _ => Err(error),
    });
    written.map(|()| true).map_err(|source| HostsError::Write { file: file.to_owned(), source })
}

/// `None`: the marks can't be understood.
fn replaced(old: &[u8], lines: &[String]) -> Option<Vec<u8>> {
    // Bytes: the rest of the file is somebody else's, in whatever encoding.
    let parts: Vec<&[u8]> = old.split_inclusive(|byte| *byte == b'\n').collect();
    let at = |mark: &str| -> Vec<usize> {
        let is_mark = |part: &&[u8]| part.trim_ascii() == mark.as_bytes();
        parts.iter().enumerate().filter(|(_, part)| is_mark(part)).map(|(index, _)| index).collect()
    };
    let block = match (at(BEGIN).as_slice(), at(END).as_slice()) {
        ([], []) => None,
        ([begin], [end]) if begin < end => Some((*begin, *end)),
        _ => return None,
    };
    let (before, after) = match block {
        Some((begin, end)) => (parts[..begin].concat(), parts[end + 1..].concat()),
        None => (old.to_vec(), Vec::new()),
    };
    let mut new = before;
    if !lines.is_empty() {
        if new.last().is_some_and(|byte| *byte != b'\n') {
            new.push(b'\n');
        }
        let text = lines.iter().fold(format!("{BEGIN}\n"), |text, line| text + line + "\n");
        new.extend_from_slice(text.as_bytes());
        new.extend_from_slice(END.as_bytes());
        new.push(b'\n');
    }
    new.extend_from_slice(&after);
    Some(new)
}

fn rename_over(target: &Path, metadata: &fs::Metadata, bytes: &[u8]) -> io::Result<()> {
    let directory = target.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let temporary = directory.join(format!(".onboarding-agent-hosts.{:016x}", rand::random::<u64>()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
        // Only root may give a file away; whoever isn't root owns it already, or could not write here.
        std::os::unix::fs::fchown(&file, Some(metadata.uid()), Some(metadata.gid()))?;
        file.sync_all()?;
        fs::rename(&temporary, target)
    })();
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn in_place(target: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).open(target)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(ip: &str, names: &[&str]) -> HostAlias {
        HostAlias { ip: ip.to_owned(), names: names.iter().map(|name| (*name).to_owned()).collect() }
    }

    #[test]
    fn lines_hold_addresses_and_host_names_only() {
        let aliases = [
            alias(
                "127.0.0.2",
                &["ratings.bookinfo", "ratings.bookinfo.svc", "evil\n1.2.3.4 bank.example", "localhost"],
            ),
            alias("not an address", &["a"]),
            alias("127.0.0.3", &["*.example.org"]),
        ];
        assert_eq!(lines(&aliases), ["127.0.0.2 ratings.bookinfo ratings.bookinfo.svc"]);
        let many: Vec<String> = (0..20).map(|index| format!("s{index}.ns")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(lines(&[alias("::1", &many)]).len(), 3);
    }

    #[test]
    fn the_block_is_added_replaced_and_removed_and_the_rest_stays() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("hosts");
        let rest = b"127.0.0.1 localhost\n# \xff not UTF-8\n10.0.0.1 db";
        fs::write(&file, rest).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o604)).unwrap();
        let a = ["127.0.0.2 a.ns".to_owned()];
        assert!(write(&file, &a).unwrap());
        assert!(!write(&file, &a).unwrap(), "nothing to change the second time");
        let text = fs::read(&file).unwrap();
        assert!(text.starts_with(rest));
        assert!(text.ends_with(b"\n# BEGIN onboarding-agent\n127.0.0.2 a.ns\n# END onboarding-agent\n"));
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o604);
        let mut more = text.clone();
        more.extend_from_slice(b"10.0.0.2 later\n");
        fs::write(&file, more).unwrap();
        assert!(write(&file, &["127.0.0.2 b.ns".to_owned()]).unwrap());
        let text = fs::read(&file).unwrap();
        assert!(text.ends_with(b"127.0.0.2 b.ns\n# END onboarding-agent\n10.0.0.2 later\n"));
        assert!(write(&file, &[]).unwrap());
        let mut expected = rest.to_vec();
        expected.extend_from_slice(b"\n10.0.0.2 later\n");
        assert_eq!(fs::read(&file).unwrap(), expected);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn broken_marks_change_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("hosts");
        for text in [
            format!("{BEGIN}\n127.0.0.2 a\n"),
            format!("{END}\n{BEGIN}\n"),
            format!("{BEGIN}\n{END}\n{BEGIN}\n{END}\n"),
        ] {
            fs::write(&file, &text).unwrap();
            let error = write(&file, &["127.0.0.2 b".to_owned()]).unwrap_err();
            assert!(matches!(error, HostsError::Marks { .. }), "{error}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
    }

    #[test]
    fn a_missing_file_is_an_error_that_names_it() {
        let error = write(Path::new("/no/such/hosts"), &[]).unwrap_err().to_string();
        assert_eq!(error, "can't read /no/such/hosts");
    }
}
