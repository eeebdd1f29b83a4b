//! Manifests of files and directories, or the objects of a cluster, and what they admit.

use crate::plane::cluster::{Cluster, Problem};
use crate::plane::objects::{CONTROL_PLANES, GROUPS, ISTIO_SYSTEM, POLICIES};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::GroupName;
use onboarding_core::policy::{Policy, PolicySet};
use onboarding_kinds::control_plane::Onboarding;
use onboarding_kinds::crd::limits;
use onboarding_kinds::fault::Fault;
use onboarding_kinds::manifest::{self, Manifest, Manifests, Object};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Everything that the given paths hold.
#[derive(Debug, Default)]
pub struct Loaded {
    pub items: Vec<Manifest>,
    /// By file in the order of reading, then by line; those between documents included.
    pub faults: Vec<Fault>,
    pub warnings: Vec<Fault>,
    /// What is beyond what a cluster takes, though a plane does.
    pub too_large: Vec<Fault>,
    /// Paths that can't be read, and why.
    pub unread: Vec<String>,
    /// Directories without a manifest.
    pub empty: Vec<String>,
}

/// Larger ones aren't manifests. Ten thousand policies in one file are about 6 MB.
const LARGEST_FILE: u64 = 32 << 20;
const DEEPEST: usize = 32;

/// Reads files, directories (every `*.yaml`, `*.yml` and `*.json` below) and `-` (standard input), each file once, whatever leads to it.
///
/// Links are followed. Names that begin with a dot are left out below a directory, as the plane does: editors' drafts, and
/// `..data` of a mounted ConfigMap, whose files are reached by the links beside it.
pub fn load(paths: &[PathBuf]) -> Loaded {
    let mut walk = Walk::default();
    paths.iter().for_each(|path| walk.argument(path));
    let mut loaded = walk.loaded;
    let between = manifest::cross_check(&loaded.items);
    loaded.faults.extend(between);
    let order: HashMap<&str, usize> = walk.files.iter().enumerate().map(|(n, file)| (file.as_str(), n)).collect();
    let place = |fault: &Fault| (order.get(fault.file.as_str()).copied(), fault.line);
    loaded.faults.sort_by_key(place);
    loaded.warnings.sort_by_key(place);
    loaded
}

/// What faults of a cluster's objects have in place of a file.
const CLUSTER: &str = "cluster";

/// The policies and groups of a cluster, in one namespace or in all, and its ControlPlane.
pub fn of_cluster(cluster: &Cluster, namespace: Option<&str>) -> Result<Loaded, Problem> {
    let mut objects = cluster.list(&POLICIES, namespace)?;
    objects.extend(cluster.list(&GROUPS, namespace)?);
    objects.extend(cluster.list(&CONTROL_PLANES, Some(ISTIO_SYSTEM))?);
    Ok(of_objects(&objects))
}

/// The objects of a cluster, each read as if it were a file: the API server may hold what its schema would refuse today.
///
/// One that is being deleted is as good as gone, whoever still holds it up by a finalizer.
pub fn of_objects(objects: &[Value]) -> Loaded {
    let mut loaded = Loaded::default();
    for object in objects.iter().filter(|object| object.pointer("/metadata/deletionTimestamp").is_none()) {
        let read = manifest::read(CLUSTER, &as_manifest(object));
        loaded.items.extend(read.items);
        loaded.faults.extend(read.faults);
        loaded.warnings.extend(read.warnings);
    }
    loaded.faults.extend(manifest::cross_check(&loaded.items));
    loaded
}

/// Without what the API server and controllers add for themselves.
fn as_manifest(object: &Value) -> String {
    let mut manifest = object.clone();
    if let Value::Object(fields) = &mut manifest {
        fields.remove("status");
        let metadata = fields.get("metadata").cloned().unwrap_or_default();
        let kept = ["namespace", "name", "labels"].into_iter();
        let kept = kept.filter_map(|field| Some((field, metadata.get(field)?.clone())));
        fields.insert(
            "metadata".to_owned(),
            kept.fold(json!({}), |mut metadata, (field, value)| {
                metadata[field] = value;
                metadata
            }),
        );
    }
    manifest.to_string()
}

#[derive(Default)]
struct Walk {
    loaded: Loaded,
    files: Vec<String>,
    seen: HashSet<PathBuf>,
}

impl Walk {
    fn argument(&mut self, path: &Path) {
        if path == Path::new("-") {
            if self.seen.insert(path.to_owned()) {
                let text = bounded(io::stdin().lock());
                self.text("-", text);
            }
            return;
        }
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                let before = self.files.len();
                self.directory(path, 0);
                if self.files.len() == before && self.loaded.unread.is_empty() {
                    self.loaded.empty.push(path.display().to_string());
                }
            }
            Ok(_) => self.file(path),
            Err(error) => self.unread(path, &error),
        }
    }

    fn directory(&mut self, path: &Path, depth: usize) {
        if depth > DEEPEST {
            return self.unread(path, &io::Error::other(format!("more than {DEEPEST} directories deep")));
        }
        match path.canonicalize() {
            Ok(resolved) if !self.seen.insert(resolved.clone()) => return,
            Ok(_) => {}
            Err(error) => return self.unread(path, &error),
        }
        let entries = fs::read_dir(path).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
        let mut entries = match entries {
            Ok(entries) => entries,
            Err(error) => return self.unread(path, &error),
        };
        entries.sort_by_key(|entry| entry.file_name());
        for entry in entries.iter().filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b".")) {
            self.entry(&entry.path(), depth);
        }
    }

    fn entry(&mut self, path: &Path, depth: usize) {
        let is_manifest =
            path.extension().is_some_and(|extension| matches!(extension.to_str(), Some("yaml" | "yml" | "json")));
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => self.directory(path, depth + 1),
            Ok(found) if is_manifest && found.is_file() => self.file(path),
            // Opening a pipe would wait for its writer.
            Ok(_) if is_manifest => self.unread(path, &io::Error::other("isn't a regular file")),
            Err(error) if is_manifest => self.unread(path, &error),
            Ok(_) | Err(_) => {}
        }
    }

    fn file(&mut self, path: &Path) {
        let is_new = path.canonicalize().map(|resolved| self.seen.insert(resolved)).unwrap_or(true);
        if is_new {
            self.text(&path.display().to_string(), File::open(path).and_then(bounded));
        }
    }

    fn text(&mut self, file: &str, bytes: io::Result<Vec<u8>>) {
        match bytes {
            Ok(bytes) => {
                self.files.push(file.to_owned());
                self.loaded.too_large.extend(limits::beyond(file, &String::from_utf8_lossy(&bytes)));
                let read = read(file, bytes);
                self.loaded.items.extend(read.items);
                self.loaded.faults.extend(read.faults);
                self.loaded.warnings.extend(read.warnings);
            }
            Err(error) => self.unread(Path::new(file), &error),
        }
    }

    fn unread(&mut self, path: &Path, error: &io::Error) {
        self.loaded.unread.push(format!("reading {}: {error}", path.display()));
    }
}

fn bounded(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(LARGEST_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(io::Error::other("is larger than 32 MiB; split it"));
    }
    Ok(bytes)
}

/// Text in another encoding is a fault of the file, with the line where it begins.
fn read(file: &str, bytes: Vec<u8>) -> Manifests {
    match String::from_utf8(bytes) {
        Ok(text) => manifest::read(file, &text),
        Err(error) => {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
            let message = "isn't UTF-8 text".to_owned();
            let fault = Fault { file: file.to_owned(), line, object: String::new(), path: String::new(), message };
            Manifests { faults: vec![fault], policy_unreadable: true, ..Manifests::default() }
        }
    }
}

/// Text of one small file, or of standard input for `-`.
pub fn read_file(path: &Path) -> anyhow::Result<String> {
    let bytes = if path == Path::new("-") { bounded(io::stdin().lock()) } else { File::open(path).and_then(bounded) };
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).map_err(|_| io::Error::other("isn't UTF-8 text")));
    text.map_err(|error| anyhow::Error::new(error).context(format!("reading {}", path.display())))
}

/// Of all the files of a command line only one may be standard input, which can be read once.
pub fn stdin_once<'a>(files: impl Iterator<Item = &'a PathBuf>) -> anyhow::Result<()> {
    let count = files.filter(|path| path.as_os_str() == "-").count();
    anyhow::ensure!(count < 2, "standard input can be read once; only one of the files may be -");
    Ok(())
}

/// Who may join what, as the plane would make it of these manifests.
pub struct Admission {
    pub policies: PolicySet,
    pub groups: BTreeMap<GroupName, WorkloadGroup>,
    /// `spec.meshExpansion.onboarding` of every ControlPlane that enables it.
    pub planes: Vec<Onboarding>,
}

impl Loaded {
    /// Faults of which nobody can say what they are in: a file that isn't YAML, a document that isn't a mapping.
    pub fn unintelligible(&self) -> impl Iterator<Item = &Fault> {
        self.faults.iter().filter(|fault| fault.object.is_empty() && fault.path.is_empty())
    }

    /// An error where something couldn't be read at all; every path that couldn't is in it.
    pub fn all_read(&self) -> anyhow::Result<()> {
        match self.unread.as_slice() {
            [] => Ok(()),
            unread => Err(anyhow::anyhow!("{}", unread.join("; "))),
        }
    }

    /// What is valid, also beside the others; the rest counts as absent. Of two with one name nobody can say which is meant.
    pub fn admission(self) -> Admission {
        let (mut seen, mut doubled) = (HashSet::new(), HashSet::new());
        for item in &self.items {
            let Some((kind, namespace, name)) = item.object.identity() else { continue };
            let key = (kind, namespace.to_owned(), name.to_owned());
            if !seen.insert(key.clone()) {
                doubled.insert(key);
            }
        }
        let is_doubled = |object: &Object| {
            object
                .identity()
                .is_some_and(|(kind, namespace, name)| doubled.contains(&(kind, namespace.to_owned(), name.to_owned())))
        };
        let (mut policies, mut groups, mut planes): (Vec<Policy>, _, _) = (Vec::new(), BTreeMap::new(), Vec::new());
        for item in self.items {
            match item.object {
                object if is_doubled(&object) => {}
                Object::OnboardingPolicy(policy) => policies.push(policy),
                Object::WorkloadGroup(group) => {
                    groups.insert(group.name.clone(), group);
                }
                Object::ControlPlane(plane) => planes.extend(plane.onboarding),
                _ => {}
            }
        }
        Admission { policies: PolicySet::compile(policies), groups, planes }
    }
}
