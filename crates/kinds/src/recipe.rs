//! A recipe: what a DEB and an RPM package are made of. Paths of files are checked as text; whether the files are there is for whoever builds.

use crate::fault::{Fault, is_unprintable, shown};
use crate::node;
use crate::reader::{Document, Item, Map};
use std::collections::BTreeMap;

/// One package, in both formats.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    pub name: String,
    /// One line, without a full stop.
    pub summary: String,
    /// Lines, without those that are empty at either end.
    pub description: String,
    pub licence: String,
    /// `Name <address>`
    pub maintainer: String,
    pub homepage: Option<String>,
    /// Of Debian's archive: `net`.
    pub section: String,
    pub depends: Relations,
    pub recommends: Relations,
    pub conflicts: Relations,
    pub provides: Relations,
    /// `Replaces` of a DEB, `Obsoletes` of an RPM.
    pub replaces: Relations,
    /// By the path that each is installed at, which no two have.
    pub files: BTreeMap<String, Entry>,
    pub deb_scripts: DebScripts,
    pub rpm_scripts: RpmScripts,
}

/// To other packages, in the words of each format.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Relations {
    pub deb: Vec<String>,
    pub rpm: Vec<Relation>,
}

/// `name`, or `name >= version`.
#[derive(Debug, Clone, PartialEq)]
pub struct Relation {
    pub name: String,
    pub version: Option<(Comparison, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// `None`: it is in both.
    pub only: Option<PackageFormat>,
    pub owner: String,
    pub group: String,
    pub content: Content,
}

/// In the words of a recipe, `deb` and `rpm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackageFormat {
    Deb,
    Rpm,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    File {
        /// Relative, without `..`: to the root, or to the recipe's folder where it isn't there.
        from: String,
        mode: u16,
        /// Kept as the administrator left it: a conffile, `%config(noreplace)`.
        config: bool,
        /// Compressed on its way into the package.
        gzip: bool,
        /// The package is made without it where it isn't there: a document that only some builds have.
        optional: bool,
    },
    Directory {
        mode: u16,
    },
    Link {
        target: String,
    },
}

/// Files, as [`Content::File`] has them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DebScripts {
    pub preinst: Option<String>,
    pub postinst: Option<String>,
    pub prerm: Option<String>,
    pub postrm: Option<String>,
}

/// Files, as [`Content::File`] has them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RpmScripts {
    pub pre: Option<String>,
    pub post: Option<String>,
    pub preun: Option<String>,
    pub postun: Option<String>,
    pub posttrans: Option<String>,
}

const KIND: &str = "recipe";
const MOST_FILES: usize = 10_000;

/// Reads a recipe: exactly one document. `file` only names it in faults.
///
/// # Errors
/// Every fault of it.
pub fn read(file: &str, text: &str) -> Result<Recipe, Vec<Fault>> {
    let fault = |line, message: String| Fault {
        file: file.to_owned(),
        line,
        object: KIND.to_owned(),
        path: String::new(),
        message,
    };
    let mut documents = node::documents(text);
    let root = match documents.next() {
        None => return Err(vec![fault(1, "the file is empty, and must hold one recipe".to_owned())]),
        Some(Err(error)) => return Err(vec![fault(error.line, error.message)]),
        Some(Ok(node)) => node,
    };
    let document = Document::new(file, KIND.to_owned());
    let recipe = document.root(&root).map().and_then(|mut map| {
        let recipe = recipe(&mut map);
        map.close();
        recipe
    });
    let (mut faults, _) = document.finish();
    faults.extend(documents.take(1).map(|next| match next {
        Ok(node) => fault(node.line, "is a second document; the file must hold one recipe".to_owned()),
        Err(error) => fault(error.line, error.message),
    }));
    match recipe {
        Some(recipe) if faults.is_empty() => Ok(recipe),
        _ if faults.is_empty() => Err(vec![fault(1, "can't be read".to_owned())]),
        _ => Err(faults),
    }
}

fn recipe(map: &mut Map<'_>) -> Option<Recipe> {
    let name = map.required_as("name", name);
    let summary = map.required_as("summary", summary);
    let text = map.required("description").and_then(|item| description(&item));
    let licence = map.required_as("licence", crate::syntax::any);
    let maintainer = map.required_as("maintainer", maintainer);
    let homepage = map.optional_as("homepage", homepage);
    let section = map.required_as("section", section);
    let mut relations = |key| map.optional(key).and_then(|item| read_relations(&item)).unwrap_or_default();
    let [depends, recommends, conflicts] = ["depends", "recommends", "conflicts"].map(&mut relations);
    let [provides, replaces] = ["provides", "replaces"].map(&mut relations);
    let files = map.required("files").map(|item| files(&item)).unwrap_or_default();
    let (mut deb_scripts, mut rpm_scripts) = (DebScripts::default(), RpmScripts::default());
    if let Some(mut scripts) = map.optional("scripts").and_then(|item| item.map()) {
        if let Some(mut deb) = scripts.optional("deb").and_then(|item| item.map()) {
            deb_scripts = DebScripts {
                preinst: deb.optional_as("preinst", source),
                postinst: deb.optional_as("postinst", source),
                prerm: deb.optional_as("prerm", source),
                postrm: deb.optional_as("postrm", source),
            };
            deb.close();
        }
        if let Some(mut rpm) = scripts.optional("rpm").and_then(|item| item.map()) {
            rpm_scripts = RpmScripts {
                pre: rpm.optional_as("pre", source),
                post: rpm.optional_as("post", source),
                preun: rpm.optional_as("preun", source),
                postun: rpm.optional_as("postun", source),
                posttrans: rpm.optional_as("posttrans", source),
            };
            rpm.close();
        }
        scripts.close();
    }
    Some(Recipe {
        name: name?,
        summary: summary?,
        description: text?,
        licence: licence?,
        maintainer: maintainer?,
        homepage,
        section: section?,
        depends,
        recommends,
        conflicts,
        provides,
        replaces,
        files,
        deb_scripts,
        rpm_scripts,
    })
}

fn description(item: &Item<'_>) -> Option<String> {
    let text = item.text()?;
    if text.trim().is_empty() {
        item.fault("must not be empty");
        return None;
    }
    if text.lines().any(|line| line.chars().any(is_unprintable)) {
        item.fault("has a control character in it");
        return None;
    }
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    Some(lines.join("\n").trim_matches('\n').to_owned())
}

fn read_relations(item: &Item<'_>) -> Option<Relations> {
    let mut map = item.map()?;
    let relations = Relations { deb: map.texts("deb", deb_relation), rpm: map.texts("rpm", rpm_relation) };
    map.close();
    Some(relations)
}

fn files(item: &Item<'_>) -> BTreeMap<String, Entry> {
    let mut files = BTreeMap::new();
    let items = item.items().unwrap_or_default();
    if items.len() > MOST_FILES {
        item.fault(format!("has {} items; {MOST_FILES} are the most", items.len()));
    }
    for item in items.into_iter().take(MOST_FILES) {
        let Some((to, entry)) = entry(&item) else { continue };
        if files.insert(to.clone(), entry).is_some() {
            item.fault_at("to", format!("{} is there twice", shown(&to)));
        }
    }
    // What is below a path that isn't a directory could never be unpacked.
    let below: Vec<_> = files.keys().flat_map(|path| parents(path).map(|parent| (path.clone(), parent))).collect();
    for (path, parent) in below {
        if files.get(&parent).is_some_and(|entry| !matches!(entry.content, Content::Directory { .. })) {
            item.fault(format!("{} can't be below {}, which is no directory", shown(&path), shown(&parent)));
        }
    }
    files
}

fn parents(path: &str) -> impl Iterator<Item = String> {
    path.match_indices('/').skip(1).map(|(end, _)| path[..end].to_owned())
}

fn entry(item: &Item<'_>) -> Option<(String, Entry)> {
    let mut map = item.map()?;
    let to = map.required_as("to", destination);
    let content = match map.one_of(&["from", "directory", "link"]).first() {
        Some(("from", from)) => {
            let from = from.parse(source);
            let mode = map.optional_as("mode", mode).unwrap_or(0o644);
            let config = map.optional("config").and_then(|item| item.boolean()).unwrap_or(false);
            let gzip = map.optional("gzip").and_then(|item| item.boolean()).unwrap_or(false);
            let optional = map.optional("optional").and_then(|item| item.boolean()).unwrap_or(false);
            if let Some(to) = to.as_deref().filter(|to| gzip && !to.ends_with(".gz")) {
                map.fault_at("to", format!("{} must end in .gz, as it is compressed", shown(to)));
            }
            from.map(|from| Content::File { from, mode, config, gzip, optional })
        }
        Some(("directory", directory)) => {
            if directory.boolean() == Some(false) {
                directory.fault("must be true, or not be there");
            }
            Some(Content::Directory { mode: map.optional_as("mode", mode).unwrap_or(0o755) })
        }
        Some((_, target)) => target.parse(link_target).map(|target| Content::Link { target }),
        None => None,
    };
    let only = map.optional_as("only", format);
    let owner = map.optional_as("owner", account).unwrap_or_else(|| "root".to_owned());
    let group = map.optional_as("group", account).unwrap_or_else(|| "root".to_owned());
    map.close();
    Some((to?, Entry { only, owner, group, content: content? }))
}

fn format(text: &str) -> Result<PackageFormat, String> {
    match text {
        "deb" => Ok(PackageFormat::Deb),
        "rpm" => Ok(PackageFormat::Rpm),
        _ => Err(format!("must be deb or rpm, and is {}", shown(text))),
    }
}

/// A name that Debian and RPM both allow (Debian policy, 5.6.1).
fn name(text: &str) -> Result<String, String> {
    match is_name(text) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be a package's name (2 to 100 lower-case letters, digits, '+', '-' and '.', beginning with a letter or digit), and is {}",
            shown(text)
        )),
    }
}

fn is_name(text: &str) -> bool {
    (2..=100).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte))
}

/// Debian policy, 3.4.1.
fn summary(text: &str) -> Result<String, String> {
    match text.chars().count() {
        ..=80 if !text.ends_with('.') => Ok(text.to_owned()),
        ..=80 => Err("must not end in a full stop".to_owned()),
        count => Err(format!("has {count} characters; 80 are the most")),
    }
}

fn maintainer(text: &str) -> Result<String, String> {
    let named = text.split_once(" <").is_some_and(|(name, address)| {
        !name.trim().is_empty() && address.strip_suffix('>').is_some_and(|address| address.contains('@'))
    });
    match named {
        true => Ok(text.to_owned()),
        false => Err(format!("must be a name and an address, as in Name <name@example.org>, and is {}", shown(text))),
    }
}

fn homepage(text: &str) -> Result<String, String> {
    match text.strip_prefix("https://").is_some_and(|rest| !rest.is_empty() && !rest.contains(char::is_whitespace)) {
        true => Ok(text.to_owned()),
        false => Err(format!("must be a URL that begins with https://, and is {}", shown(text))),
    }
}

fn section(text: &str) -> Result<String, String> {
    match text.bytes().all(|byte| byte.is_ascii_lowercase() || b"-/".contains(&byte)) {
        true => Ok(text.to_owned()),
        false => Err(format!("must be a section of Debian's archive, as net, and is {}", shown(text))),
    }
}

/// One item of Debian's lists: alternatives with `|`, versions in parentheses (Debian policy, 7.1).
fn deb_relation(text: &str) -> Result<String, String> {
    let alternative = |text: &str| {
        let (package, version) = match text.trim().split_once(" (") {
            Some((package, version)) => (package, version.strip_suffix(')')?.split_once(' ')),
            None => (text.trim(), Some(("=", "0"))),
        };
        let (comparison, version) = version?;
        let known = ["<<", "<=", "=", ">=", ">>"].contains(&comparison) && !version.trim().is_empty();
        let package = package.split_once(':').map_or(package, |(package, _)| package);
        (known && is_name(package) && version.bytes().all(|byte| byte.is_ascii_graphic())).then_some(())
    };
    match text.split('|').all(|part| alternative(part).is_some()) {
        true => Ok(text.trim().to_owned()),
        false => Err(format!(
            "must be a relation of Debian's, as in adduser or libc6 (>= 2.17) or a | b, and is {}",
            shown(text)
        )),
    }
}

/// `name`, or `name >= 1.2`.
fn rpm_relation(text: &str) -> Result<Relation, String> {
    let refused =
        || format!("must be a relation of RPM's, as in shadow-utils or glibc >= 2.17, and is {}", shown(text));
    let is_word = |word: &str| !word.starts_with('(') && word.bytes().all(|byte| byte.is_ascii_graphic());
    let parts: Vec<&str> = text.split_whitespace().collect();
    match parts.as_slice() {
        [name] if is_word(name) => Ok(Relation { name: (*name).to_owned(), version: None }),
        [name, comparison, version] if is_word(name) && is_word(version) => {
            let comparison = match *comparison {
                "<" => Comparison::Less,
                "<=" => Comparison::LessOrEqual,
                "=" => Comparison::Equal,
                ">=" => Comparison::GreaterOrEqual,
                ">" => Comparison::Greater,
                _ => return Err(refused()),
            };
            Ok(Relation { name: (*name).to_owned(), version: Some((comparison, (*version).to_owned())) })
        }
        _ => Err(refused()),
    }
}

fn has_only_parts(path: &str) -> bool {
    path.split('/').all(|part| !matches!(part, "" | "." | "..")) && path.len() <= 1024
}

fn destination(text: &str) -> Result<String, String> {
    match text.strip_prefix('/').is_some_and(|rest| has_only_parts(rest) && rest.is_ascii() && !rest.contains(' ')) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be an absolute path in ASCII, without spaces, '.', '..' and a '/' at its end, and is {}",
            shown(text)
        )),
    }
}

fn source(text: &str) -> Result<String, String> {
    match has_only_parts(text) {
        true => Ok(text.to_owned()),
        false => Err(format!("must be a relative path without '.' and '..', and is {}", shown(text))),
    }
}

fn link_target(text: &str) -> Result<String, String> {
    match text.len() <= 1024 && text.is_ascii() && !text.contains(' ') {
        true => Ok(text.to_owned()),
        false => Err(format!("must be a path in ASCII, without spaces, and is {}", shown(text))),
    }
}

fn mode(text: &str) -> Result<u16, String> {
    let digits = text.len() == 4 && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    let refused = || format!("must be four octal digits in quotes, as in '0644', and is {}", shown(text));
    if !digits {
        return Err(refused());
    }
    u16::from_str_radix(text, 8).map_err(|_| refused())
}

/// The name of a user or a group.
fn account(text: &str) -> Result<String, String> {
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte);
    match text.len() <= 32 && text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_') && text.bytes().all(inside)
    {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be the name of a user or group (at most 32 lower-case letters, digits, '_' and '-'), and is {}",
            shown(text)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
name: onboarding-agent
summary: Joins this machine to a mesh
description: |
  First line.

  Second paragraph.
licence: Apache-2.0
maintainer: Onboarding <onboarding@example.org>
homepage: https://example.org/
section: net
depends: {deb: ['libc6 (>= 2.17)', adduser | passwd], rpm: ['glibc >= 2.17', shadow-utils]}
recommends: {deb: [istio-sidecar]}
files:
- {to: /usr/bin/onboarding-agent, from: onboarding-agent, mode: '0755'}
- {to: /etc/onboarding-agent/agent.config.yaml, from: agent.config.yaml, mode: '0640', group: onboarding-agent, config: true}
- {to: /var/lib/onboarding-agent, directory: true, mode: '0700', owner: onboarding-agent, group: onboarding-agent}
- {to: /usr/share/link, link: target, only: rpm}
- {to: /usr/share/man/man8/x.8.gz, from: x.8, gzip: true, optional: true}
scripts:
  deb: {postinst: deb/postinst}
  rpm: {post: rpm/post}
";

    #[test]
    fn a_recipe_is_what_it_says() {
        let recipe = read("r.yaml", GOOD).unwrap();
        assert_eq!(recipe.description, "First line.\n\nSecond paragraph.");
        assert_eq!(recipe.depends.deb, ["libc6 (>= 2.17)", "adduser | passwd"]);
        let glibc =
            Relation { name: "glibc".to_owned(), version: Some((Comparison::GreaterOrEqual, "2.17".to_owned())) };
        assert_eq!(recipe.depends.rpm[0], glibc);
        assert_eq!(recipe.files.len(), 5);
        let config = &recipe.files["/etc/onboarding-agent/agent.config.yaml"];
        assert_eq!((config.owner.as_str(), config.group.as_str()), ("root", "onboarding-agent"));
        let wanted = Content::File {
            from: "agent.config.yaml".to_owned(),
            mode: 0o640,
            config: true,
            gzip: false,
            optional: false,
        };
        assert_eq!((&config.content, config.only), (&wanted, None));
        assert_eq!(recipe.files["/usr/share/link"].only, Some(PackageFormat::Rpm));
        let page = Content::File { from: "x.8".to_owned(), mode: 0o644, config: false, gzip: true, optional: true };
        assert_eq!(recipe.files["/usr/share/man/man8/x.8.gz"].content, page);
        assert_eq!(recipe.files["/var/lib/onboarding-agent"].content, Content::Directory { mode: 0o700 });
        assert_eq!(recipe.deb_scripts.postinst.as_deref(), Some("deb/postinst"));
    }

    /// One change each to what is good; what is said about it.
    #[test]
    fn every_fault_is_said_with_its_path() {
        for (old, new, said) in [
            ("name: onboarding-agent", "name: Agent", "name: must be a package's name"),
            ("name: onboarding-agent\n", "", "name: is required"),
            ("mesh\n", "mesh.\n", "summary: must not end in a full stop"),
            ("Onboarding <onboarding@example.org>", "Onboarding", "maintainer: must be a name and an address"),
            ("https://example.org/", "http://example.org/", "homepage: must be a URL"),
            ("section: net", "section: Net!", "section: must be a section"),
            ("section: net", "sections: net", "sections: is unknown here; did you mean section?"),
            ("libc6 (>= 2.17)", "libc6 >= 2.17", "depends.deb[0]: must be a relation of Debian's"),
            ("glibc >= 2.17", "glibc => 2.17", "depends.rpm[0]: must be a relation of RPM's"),
            ("recommends: {deb:", "recommends: {dbe:", "recommends.dbe: is unknown here; did you mean deb?"),
            ("to: /usr/bin/onboarding-agent", "to: usr/bin/x", "files[0].to: must be an absolute path"),
            ("to: /usr/bin/onboarding-agent", "to: /usr/../x", "files[0].to: must be an absolute path"),
            ("to: /usr/bin/onboarding-agent", "to: /usr/bin/", "files[0].to: must be an absolute path"),
            ("from: onboarding-agent", "from: ../x", "files[0].from: must be a relative path"),
            ("from: onboarding-agent", "from: /etc/passwd", "files[0].from: must be a relative path"),
            ("mode: '0755'", "mode: '755'", "files[0].mode: must be four octal digits"),
            ("mode: '0755'", "mode: '0855'", "files[0].mode: must be four octal digits"),
            ("mode: '0755'", "mode: 0755", "files[0].mode: must be text"),
            ("mode: '0755'", "link: x", "files[0].link: can't be there together with from"),
            ("group: onboarding-agent, config", "group: A B, config", "files[1].group: must be the name of a user"),
            ("directory: true, mode", "directory: false, mode", "files[2].directory: must be true"),
            ("link: target", "target: x", "files[3]: must have one of from, directory, link"),
            ("link: target", "link: target, mode: '0644'", "files[3].mode: is unknown here"),
            ("only: rpm", "only: apk", "files[3].only: must be deb or rpm, and is \"apk\""),
            ("only: rpm", "optional: true", "files[3].optional: is unknown here"),
            ("man8/x.8.gz", "man8/x.8", "files[4].to: \"/usr/share/man/man8/x.8\" must end in .gz"),
            (
                "/usr/share/link",
                "/usr/bin/onboarding-agent",
                "files[3].to: \"/usr/bin/onboarding-agent\" is there twice",
            ),
            ("/usr/share/link", "/usr/bin/onboarding-agent/x", "can't be below \"/usr/bin/onboarding-agent\""),
            ("{postinst: deb/postinst}", "{post: x}", "scripts.deb.post: is unknown here"),
            ("scripts:\n", "---\nscripts:\n", "is a second document"),
        ] {
            assert!(GOOD.contains(old), "{old}");
            let faults = read("r.yaml", &GOOD.replacen(old, new, 1)).unwrap_err();
            let said_all: Vec<_> = faults.iter().map(ToString::to_string).collect();
            assert!(said_all.iter().any(|fault| fault.contains(said)), "{new}: {said}: {said_all:#?}");
        }
        assert!(read("r.yaml", "").unwrap_err()[0].to_string().contains("the file is empty"));
        assert!(read("r.yaml", "name: [").is_err());
    }
}
