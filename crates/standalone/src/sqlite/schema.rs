//! The file: its tables, its version, whether it is whole.

use super::row;
use anyhow::{Context, bail};
use onboarding_core::name::RegistrationName;
use onboarding_endpoint::backend::Stored;
use rusqlite::{Connection, OpenFlags};
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// `user_version` of the file that this code writes.
const VERSION: i64 = 2;

/// Times are RFC 3339 in UTC, so that the file can be read with `sqlite3`; identities and reports are JSON as in a war's `spec`.
const TABLES: &str = "
CREATE TABLE registration (
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('live', 'ended')),
    key_thumbprint TEXT,
    key_replay TEXT,
    ended_at TEXT,
    group_namespace TEXT,
    group_name TEXT,
    identity TEXT,
    claimed_only TEXT,
    issuer_short_name TEXT,
    evidence_replay TEXT,
    report TEXT,
    created_at TEXT,
    token_expires_at TEXT,
    replica TEXT,
    session TEXT,
    connection_since TEXT,
    disconnect_reason TEXT,
    ready INTEGER,
    health_message TEXT,
    health_since TEXT,
    PRIMARY KEY (namespace, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE sequence (only INTEGER PRIMARY KEY CHECK (only = 1), version INTEGER NOT NULL) STRICT;
INSERT INTO sequence VALUES (1, 0);
";
/// From version 1: since when a workload is ready, or isn't.
const FROM_1: &str = "ALTER TABLE registration ADD COLUMN health_since TEXT";

type Opened = (Connection, u64, HashMap<RegistrationName, Arc<Stored>>);

/// The connection, the last version given, and all that is on record.
pub fn open(path: &Path) -> anyhow::Result<Opened> {
    let what = || format!("opening the registry {}", path.display());
    // Made by us, so that it (and SQLite's files beside it, which take its mode) is ours alone.
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path).with_context(what)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let mut connection = Connection::open_with_flags(path, flags).with_context(what)?;
    connection.busy_timeout(Duration::from_secs(5)).with_context(what)?;
    match read(&mut connection) {
        Ok((sequence, loaded)) => Ok((connection, sequence, loaded)),
        Err(error) if is_damage(&error) => Err(error.context(format!(
            "the registry {0} is damaged; stop the plane, move {0}, {0}-wal and {0}-shm away (keep them for the vendor), or put a backup in their place, then start it again: without them every agent onboards anew by itself",
            path.display()
        ))),
        Err(error) => Err(error.context(what())),
    }
}

pub fn store_sequence(connection: &Connection, sequence: u64) -> rusqlite::Result<()> {
    connection.prepare_cached("UPDATE sequence SET version = ?1 WHERE only = 1")?.execute([sequence as i64])?;
    Ok(())
}

fn read(connection: &mut Connection) -> anyhow::Result<(u64, HashMap<RegistrationName, Arc<Stored>>)> {
    // First of all: what isn't ours is not to be changed, and what is damaged not to be made worse.
    let sound: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if sound != "ok" {
        return Err(Damaged(sound).into());
    }
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    match (version, tables) {
        (VERSION | 1, _) | (0, 0) => {}
        (0, _) => bail!("it is an SQLite file of something else; give the plane a data directory of its own"),
        (newer, _) => bail!("its schema is version {newer}, this plane knows {VERSION}; run the plane that wrote it"),
    }
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        bail!("its file system doesn't allow SQLite's write-ahead log (journal mode {mode}); use a local disk");
    }
    connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF;")?;
    if version != VERSION {
        let transaction = connection.transaction()?;
        transaction.execute_batch(if version == 0 { TABLES } else { FROM_1 })?;
        transaction.pragma_update(None, "user_version", VERSION)?;
        transaction.commit()?;
    }
    let sequence: i64 = connection.query_row("SELECT version FROM sequence", [], |row| row.get(0))?;
    let sequence = u64::try_from(sequence).map_err(|_| Damaged("a negative version".to_owned()))?;
    let mut statement = connection.prepare(row::SELECT)?;
    let mut rows = statement.query([])?;
    let mut loaded = HashMap::new();
    while let Some(row) = rows.next()? {
        let (name, stored) = row::read(row)?.map_err(Damaged)?;
        if stored.version == 0 || stored.version > sequence {
            return Err(
                Damaged(format!("{name} has version {}, the last one given is {sequence}", stored.version)).into()
            );
        }
        loaded.insert(name, Arc::new(stored));
    }
    Ok((sequence, loaded))
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Damaged(String);

fn is_damage(error: &anyhow::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    error.is::<Damaged>()
        || error
            .downcast_ref::<rusqlite::Error>()
            .and_then(rusqlite::Error::sqlite_error_code)
            .is_some_and(|code| matches!(code, DatabaseCorrupt | NotADatabase))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was acknowledged is on the disk: a crash of the machine can't be made here, and these are what it rests on.
    #[test]
    fn a_commit_is_synced_whether_the_file_is_new_or_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.sqlite");
        for _ in 0..2 {
            let (connection, ..) = open(&path).unwrap();
            let mode: String = connection.query_row("PRAGMA journal_mode", [], |row| row.get(0)).unwrap();
            let synchronous: i64 = connection.query_row("PRAGMA synchronous", [], |row| row.get(0)).unwrap();
            // 2 is FULL: the log is synced at every commit; 1, NORMAL, wouldn't be enough with it.
            assert_eq!((mode.as_str(), synchronous), ("wal", 2));
        }
    }
}
