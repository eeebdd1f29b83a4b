//! RPM version 4 with an xz payload and SHA-256 of files, which rpm 4.11 (CentOS 7) and everything later reads.

use super::{Error, Files, Source, XZ};
use onboarding_kinds::recipe::{Comparison, Content, Relation};
use rpm::{BuildConfig, CompressionWithLevel, Dependency, FileOptions, PackageBuilder, Scriptlet};

pub(super) fn pack(source: &Source<'_>, files: &Files<'_>) -> Result<Vec<u8>, Error> {
    let recipe = source.recipe;
    let architecture = source.architecture.of_rpm();
    let version = &source.version.upstream;
    let mut builder = PackageBuilder::new(&recipe.name, version, &recipe.licence, architecture, &recipe.summary);
    builder
        .using_config(BuildConfig::v4().compression(CompressionWithLevel::Xz(XZ)).source_date(source.time))
        .release(source.version.release.as_deref().unwrap_or("1"))
        .description(&recipe.description)
        .packager(&recipe.maintainer)
        .vendor(recipe.maintainer.split(" <").next().unwrap_or_default())
        .group("System Environment/Daemons")
        .add_changelog_entry(format!("{} - {version}", recipe.maintainer), format!("- Version {version}"), source.time)
        // The machine that builds is no part of the package.
        .build_host("localhost");
    if let Some(homepage) = &recipe.homepage {
        builder.url(homepage);
    }
    for (path, (entry, content)) in files {
        let owned = |options: rpm::FileOptionsBuilder| options.user(&entry.owner).group(&entry.group);
        match &entry.content {
            Content::File { mode, config, .. } => {
                let mut options = owned(FileOptions::new(*path)).permissions(*mode);
                if *config {
                    options = options.config().noreplace();
                }
                if ["/usr/share/doc/", "/usr/share/man/"].iter().any(|docs| path.starts_with(docs)) {
                    options = options.doc();
                }
                if path.starts_with("/usr/share/licenses/") {
                    options = options.license();
                }
                builder.with_file_contents(content.to_vec(), options)?;
            }
            Content::Directory { mode } => {
                builder.with_dir_entry(owned(FileOptions::dir(*path)).permissions(*mode))?;
            }
            Content::Link { target } => {
                builder.with_symlink(owned(FileOptions::symlink(*path, target)))?;
            }
        }
    }
    for relation in &recipe.depends.rpm {
        builder.requires(dependency(relation));
    }
    for relation in &recipe.recommends.rpm {
        builder.recommends(dependency(relation));
    }
    for relation in &recipe.conflicts.rpm {
        builder.conflicts(dependency(relation));
    }
    for relation in &recipe.provides.rpm {
        builder.provides(dependency(relation));
    }
    for relation in &recipe.replaces.rpm {
        builder.obsoletes(dependency(relation));
    }
    // What an rpm that is too old for it must know of (rpm's own lib/rpmds.c).
    builder.requires(Dependency::rpmlib("PayloadIsXz", "5.2-1"));
    if format!("{version}{:?}", source.version.release).contains('~') {
        builder.requires(Dependency::rpmlib("TildeInVersions", "4.10.0-1"));
    }
    let script = |name| source.scripts.get(name).map(|script| scriptlet(script));
    if let Some(script) = script("pre") {
        builder.pre_install_script(script);
    }
    if let Some(script) = script("post") {
        builder.post_install_script(script);
    }
    if let Some(script) = script("preun") {
        builder.pre_uninstall_script(script);
    }
    if let Some(script) = script("postun") {
        builder.post_uninstall_script(script);
    }
    if let Some(script) = script("posttrans") {
        builder.post_trans_script(script);
    }
    let mut bytes = Vec::new();
    builder.build()?.write(&mut bytes)?;
    Ok(bytes)
}

/// RPM runs a scriptlet's text with a program of its own choosing, so that the first line says which.
fn scriptlet(script: &str) -> Scriptlet {
    let (first, rest) = script.split_once('\n').unwrap_or((script, ""));
    let program: Vec<&str> = first.trim_start_matches("#!").split_whitespace().collect();
    Scriptlet::new(rest).prog(if program.is_empty() { vec!["/bin/sh"] } else { program })
}

fn dependency(relation: &Relation) -> Dependency {
    let name = &relation.name;
    let Some((comparison, version)) = &relation.version else { return Dependency::any(name) };
    match comparison {
        Comparison::Less => Dependency::less(name, version),
        Comparison::LessOrEqual => Dependency::less_eq(name, version),
        Comparison::Equal => Dependency::eq(name, version),
        Comparison::GreaterOrEqual => Dependency::greater_eq(name, version),
        Comparison::Greater => Dependency::greater(name, version),
    }
}
