//! What people read: the listing, and the answer to what isn't there.

use crate::catalog::Inventory;
use crate::script::NAME;
use crate::uri::{CHECKSUM, ROOT, by_content};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::fmt::Write;

/// URIs in the answer to what isn't there.
const MOST_NAMED: usize = 100;

/// The HTML of the directory `path`, which is below the root and ends in `/` or is empty. `None`: there is no such directory.
pub(crate) fn listing(inventory: &Inventory, path: &str) -> Option<String> {
    // The name of an entry to its row: a directory's name ends in `/`.
    let mut rows = BTreeMap::new();
    let plain = |name: &str| format!("<tr><td><a href=\"{name}\">{name}</a></td></tr>");
    for rest in inventory.signed.iter().filter_map(|uri| uri.strip_prefix(path)) {
        let name = rest.split_inclusive('/').next().unwrap_or(rest);
        rows.insert(name.to_owned(), plain(name));
    }
    for (package, version) in &inventory.whole {
        let uri = package.to_string();
        let Some(rest) = uri.strip_prefix(path) else { continue };
        let row = match rest.split_once('/') {
            Some((directory, _)) => (format!("{directory}/"), plain(&format!("{directory}/"))),
            None => {
                let (length, digest) = (version.length(), &version.digest);
                let held = by_content(digest, package);
                let modified = Timestamp::try_from(version.modified()).unwrap_or(Timestamp::UNIX_EPOCH);
                let row = format!(
                    "<tr><td><a href=\"{rest}\">{rest}</a></td><td>{length}</td><td>{modified:.0}</td>\
                     <td><a href=\"{rest}{CHECKSUM}\">{rest}{CHECKSUM}</a></td>\
                     <td><a href=\"{held}\">{digest}</a></td></tr>"
                );
                (rest.to_owned(), row)
            }
        };
        rows.insert(row.0, row.1);
    }
    if rows.is_empty() && !path.is_empty() {
        return None;
    }
    let title = format!("Packages: {ROOT}{path}");
    let up = if path.is_empty() { "" } else { "<p><a href=\"../\">one up</a></p>\n" };
    let empty = if rows.is_empty() { "<p>There are no packages yet.</p>\n" } else { "" };
    let script = if path.is_empty() {
        format!("<p><a href=\"{NAME}\">{NAME}</a> installs the agent and the sidecar.</p>\n")
    } else {
        String::new()
    };
    let rows: String = rows.into_values().fold(String::new(), |all, row| all + &row + "\n");
    Some(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\"><title>{title}</title></head>\n<body>\n\
         <h1>{title}</h1>\n{up}{script}{empty}<table>\n\
         <tr><th>Name</th><th>Bytes</th><th>Modified</th><th>Checksum</th><th>This very file, by its SHA-256</th></tr>\n\
         {rows}</table>\n</body>\n</html>\n"
    ))
}

/// `why`: of this URI, if more is known than that it isn't there.
pub(crate) fn not_found(inventory: &Inventory, why: Option<&str>) -> String {
    let mut text = match why {
        Some(why) => format!("This package can't be had: {why}.\n"),
        None => "There is nothing here.\n".to_owned(),
    };
    if inventory.whole.is_empty() {
        text.push_str("The repository has no packages yet; whoever runs it puts them in.\n");
        return text;
    }
    let _ = writeln!(text, "What there is, each with {CHECKSUM} too:");
    for (package, _) in inventory.whole.iter().take(MOST_NAMED) {
        let _ = writeln!(text, "{ROOT}{package}");
    }
    if inventory.whole.len() > MOST_NAMED {
        let _ = writeln!(text, "and more: {ROOT} lists all");
    }
    if !inventory.signed.is_empty() {
        text.push_str("Signed, for apt and dnf, the key and what they begin with:\n");
        for path in inventory.signed.iter().take(MOST_NAMED) {
            let _ = writeln!(text, "{ROOT}{path}");
        }
    }
    text
}
