//! The files of the manifests directory as they are on the disk now.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Ten thousand policies in one file are about 6 MB.
const MAX_FILE: u64 = 32 << 20;
const MAX_FILES: usize = 50_000;
const MAX_DEPTH: usize = 32;

#[derive(Debug, Default)]
pub struct Scan {
    /// By the path as people would type it: its text, or why it can't be read.
    pub files: BTreeMap<PathBuf, Result<String, String>>,
    /// Directories that can't be read, and why: whatever was known below them is unreadable.
    pub unreadable: BTreeMap<PathBuf, String>,
    /// Where a change must be noticed: directories, resolved, with device and inode.
    pub watch: BTreeSet<(PathBuf, u64, u64)>,
}

/// Reads every `*.yaml`, `*.yml` and `*.json` below `root`. Links are followed, and each file is read once, whatever leads to it.
/// Names that begin with a dot are left out: editors' drafts, and `..data` of a mounted ConfigMap, whose files are reached by the links beside it.
pub fn scan(root: &Path) -> Scan {
    let mut walk = Walk::default();
    walk.directory(root, 0);
    // A root that is replaced as a whole is noticed where its name is.
    if let Some(parent) = root.parent() {
        walk.watch(if parent.as_os_str().is_empty() { Path::new(".") } else { parent });
    }
    walk.scan
}

#[derive(Default)]
struct Walk {
    scan: Scan,
    seen: BTreeSet<PathBuf>,
}

impl Walk {
    fn directory(&mut self, path: &Path, depth: usize) {
        if depth > MAX_DEPTH {
            self.scan.unreadable.insert(path.to_owned(), format!("more than {MAX_DEPTH} directories deep"));
            return;
        }
        match path.canonicalize() {
            Ok(resolved) if !self.seen.insert(resolved.clone()) => return,
            Ok(_) => {}
            Err(error) => {
                self.scan.unreadable.insert(path.to_owned(), error.to_string());
                return;
            }
        }
        self.watch(path);
        let entries = fs::read_dir(path).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
        let mut entries = match entries {
            Ok(entries) => entries,
            Err(error) => {
                self.scan.unreadable.insert(path.to_owned(), error.to_string());
                return;
            }
        };
        entries.sort_by_key(|entry| entry.file_name());
        for entry in entries {
            if !entry.file_name().to_string_lossy().starts_with('.') {
                self.entry(&entry.path(), depth);
            }
        }
    }

    fn entry(&mut self, path: &Path, depth: usize) {
        let wanted =
            path.extension().is_some_and(|extension| matches!(extension.to_str(), Some("yaml" | "yml" | "json")));
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => self.directory(path, depth + 1),
            Ok(_) if wanted => self.file(path),
            Ok(_) => {}
            // Removed since it was listed.
            Err(_) if fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) => {}
            Err(error) if wanted => {
                self.scan.files.insert(path.to_owned(), Err(error.to_string()));
            }
            Err(_) => {}
        }
    }

    fn file(&mut self, path: &Path) {
        if let Ok(resolved) = path.canonicalize() {
            if let Some(parent) = resolved.parent() {
                self.watch(parent);
            }
            if !self.seen.insert(resolved) {
                return;
            }
        }
        if self.scan.files.len() >= MAX_FILES {
            let problem = format!("there are more than {MAX_FILES} files");
            self.scan.unreadable.insert(path.to_owned(), problem);
            return;
        }
        match read(path) {
            // Removed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => {
                self.scan.files.insert(path.to_owned(), result.map_err(|error| error.to_string()));
            }
        }
    }

    fn watch(&mut self, path: &Path) {
        if let Ok(resolved) = path.canonicalize()
            && let Ok(found) = fs::metadata(&resolved)
        {
            self.scan.watch.insert((resolved, found.dev(), found.ino()));
        }
    }
}

fn read(path: &Path) -> io::Result<String> {
    let other = |problem: &str| io::Error::other(problem.to_owned());
    // Asked before it is opened: opening a pipe would wait for its writer.
    if !fs::metadata(path)?.is_file() {
        return Err(other("isn't a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(other("is larger than 32 MiB; split it"));
    }
    String::from_utf8(bytes).map_err(|_| other("isn't UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn names(scan: &Scan, root: &Path) -> Vec<String> {
        scan.files.keys().map(|path| path.strip_prefix(root).unwrap().display().to_string()).collect()
    }

    #[test]
    fn a_mounted_config_map_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for version in ["..2026_1", "..2026_2"] {
            fs::create_dir(root.join(version)).unwrap();
            fs::write(root.join(version).join("mesh.yaml"), version).unwrap();
        }
        symlink("..2026_2", root.join("..data")).unwrap();
        symlink("..data/mesh.yaml", root.join("mesh.yaml")).unwrap();
        let scan = scan(root);
        assert_eq!(scan.files, [(root.join("mesh.yaml"), Ok("..2026_2".to_owned()))].into());
        assert!(scan.watch.iter().any(|(path, ..)| path.ends_with("..2026_2")), "{:?}", scan.watch);
        assert!(scan.unreadable.is_empty());
    }

    #[test]
    fn links_are_followed_but_not_in_circles_and_not_twice() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::write(elsewhere.path().join("far.yml"), "far").unwrap();
        fs::create_dir_all(root.join("sub/deeper")).unwrap();
        fs::write(root.join("sub/deeper/a.json"), "{}").unwrap();
        fs::write(root.join("sub/README.md"), "no").unwrap();
        fs::write(root.join(".draft.yaml"), "no").unwrap();
        symlink(root, root.join("sub/round")).unwrap();
        symlink(elsewhere.path().join("far.yml"), root.join("linked.yaml")).unwrap();
        symlink(elsewhere.path(), root.join("zz")).unwrap();
        let scan = scan(root);
        assert_eq!(names(&scan, root), ["linked.yaml", "sub/deeper/a.json"]);
        assert!(scan.watch.iter().any(|(path, ..)| *path == elsewhere.path().canonicalize().unwrap()));
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        symlink("nowhere", root.join("dangling.yaml")).unwrap();
        fs::write(root.join("latin.yaml"), [0xe9]).unwrap();
        nix::unistd::mkfifo(&root.join("pipe.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        File::create(root.join("vast.yaml")).unwrap().set_len(MAX_FILE + 1).unwrap();
        let scan1 = scan(root);
        let said = |name: &str| scan1.files[&root.join(name)].clone().unwrap_err();
        assert!(said("dangling.yaml").contains("No such file"));
        assert!(said("latin.yaml").contains("isn't UTF-8"));
        assert!(said("pipe.yaml").contains("regular file"));
        assert!(said("vast.yaml").contains("larger than 32 MiB"));

        let gone = root.join("gone");
        let scan2 = scan(&gone);
        assert!(scan2.unreadable.contains_key(&gone));
        assert!(scan2.watch.iter().any(|(path, ..)| *path == root.canonicalize().unwrap()), "noticed when it comes");
    }
}
