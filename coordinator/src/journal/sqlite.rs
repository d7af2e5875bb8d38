//! The journal in an embedded SQLite file: one writer, write-ahead log, synced at every commit. Local disk only.
//!
//! Does not keep snapshots: a replay reads every event. Does not delete anything.

use std::fs::File;
use std::path::{Path, PathBuf};

use protocol::time::UnixMillis;
use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior, params};
use rustix::fs::{FlockOperation, flock};

use super::{Header, Journal, JournalError, SCHEMA};
use crate::scheduler::{Event, Record};

/// Changes to the file's tables, oldest first. Only ever appended to: the file's `user_version` counts those it has.
pub(super) const MIGRATIONS: &[&str] = &["
    CREATE TABLE header (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY,
        at_ms INTEGER NOT NULL,
        kind TEXT NOT NULL,
        body TEXT NOT NULL
    ) STRICT;
"];

/// Tells the file from other SQLite files: `bone` in ASCII.
const APPLICATION_ID: u32 = 0x626f_6e65;

/// An open journal. The lock on the file beside it lasts as long as this value, or the process.
#[derive(Debug)]
pub struct SqliteJournal {
    path: PathBuf,
    connection: Connection,
    header: Header,
    last_seq: u64,
    _lock: File,
}

impl SqliteJournal {
    /// Makes a journal where none is.
    ///
    /// # Errors
    /// [`JournalError::InUse`]; [`JournalError::Io`] with `AlreadyExists`; what the disk says.
    pub fn create(path: &Path, header: &Header) -> Result<Self, JournalError> {
        let lock = lock(path)?;
        if path.exists() {
            let source = std::io::Error::from(std::io::ErrorKind::AlreadyExists);
            return Err(JournalError::Io { doing: "create", path: path.to_owned(), source });
        }
        // Under another name until it is whole: a journal cut short while it was made is none.
        let unfinished = path.with_extension("new");
        for name in [unfinished.clone(), side_file(&unfinished, "-wal"), side_file(&unfinished, "-shm")] {
            match std::fs::remove_file(&name) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(JournalError::Io { doing: "create", path: name, source });
                }
                _ => {}
            }
        }
        let sqlite = |source| JournalError::Sqlite { doing: "create", path: path.to_owned(), source };
        write_new(&unfinished, header).map_err(sqlite)?;
        let io = |source| JournalError::Io { doing: "create", path: path.to_owned(), source };
        std::fs::rename(&unfinished, path).map_err(io)?;
        sync_directory(path).map_err(io)?;
        Self::open_locked(path, &header.cluster, lock)
    }

    /// Opens the journal of `cluster`, brings its tables up to date and locks it.
    ///
    /// # Errors
    /// Every kind of [`JournalError`] but `ThreadGone`. Of an unreadable or newer journal nothing is changed.
    pub fn open(path: &Path, cluster: &str) -> Result<Self, JournalError> {
        if !path.exists() {
            return Err(JournalError::Missing { path: path.to_owned() });
        }
        Self::open_locked(path, cluster, lock(path)?)
    }

    fn open_locked(path: &Path, cluster: &str, lock: File) -> Result<Self, JournalError> {
        let sqlite = |source| match is_not_a_database(&source) {
            true => JournalError::Damaged { path: path.to_owned(), seq: 0, detail: format!("{source}") },
            false => JournalError::Sqlite { doing: "open", path: path.to_owned(), source },
        };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags).map_err(sqlite)?;
        let damaged = |detail: String| JournalError::Damaged { path: path.to_owned(), seq: 0, detail };
        let application: u32 = connection.query_row("PRAGMA application_id", [], |row| row.get(0)).map_err(sqlite)?;
        if application != APPLICATION_ID {
            return Err(damaged("it is not a bonepile journal".to_owned()));
        }
        let found: u32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(sqlite)?;
        if found > SCHEMA {
            return Err(JournalError::Newer { path: path.to_owned(), found });
        }
        configure(&connection).map_err(sqlite)?;
        migrate(&mut connection, found).map_err(sqlite)?;
        let header = read_header(&connection).map_err(sqlite)?.map_err(damaged)?;
        if header.cluster != cluster {
            let (found, expected) = (header.cluster, cluster.to_owned());
            return Err(JournalError::OtherCluster { path: path.to_owned(), found, expected });
        }
        let last_seq: i64 =
            connection.query_row("SELECT coalesce(max(seq), 0) FROM events", [], |row| row.get(0)).map_err(sqlite)?;
        let last_seq = u64::try_from(last_seq).map_err(|_| damaged(format!("event {last_seq}")))?;
        Ok(Self { path: path.to_owned(), connection, header, last_seq, _lock: lock })
    }

    fn failed(&self, doing: &'static str) -> impl Fn(rusqlite::Error) -> JournalError + use<> {
        let path = self.path.clone();
        move |source| JournalError::Sqlite { doing, path: path.clone(), source }
    }

    fn damaged(&self, seq: u64, detail: &impl ToString) -> JournalError {
        JournalError::Damaged { path: self.path.clone(), seq, detail: detail.to_string() }
    }
}

impl Journal for SqliteJournal {
    fn header(&self) -> &Header {
        &self.header
    }

    fn append(&mut self, batch: &[Record]) -> Result<(), JournalError> {
        let failed = self.failed("append to");
        let mut last_seq = self.last_seq;
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(&failed)?;
        {
            let mut insert = transaction
                .prepare_cached("INSERT INTO events (seq, at_ms, kind, body) VALUES (?1, ?2, ?3, ?4)")
                .map_err(&failed)?;
            for record in batch {
                assert_eq!(record.seq, last_seq + 1, "events are appended without gaps");
                last_seq = record.seq;
                let body = serde_json::to_string(&record.event).expect("an event is plain data");
                let (seq, at) = (signed(record.seq), signed(record.at.0));
                insert.execute(params![seq, at, record.event.kind(), body]).map_err(&failed)?;
            }
        }
        transaction.commit().map_err(&failed)?;
        self.last_seq = last_seq;
        Ok(())
    }

    fn read_from(&mut self, seq: u64, each: &mut dyn FnMut(Record)) -> Result<(), JournalError> {
        let failed = self.failed("read");
        let mut expected = seq.max(1);
        {
            let mut select = self
                .connection
                .prepare("SELECT seq, at_ms, body FROM events WHERE seq >= ?1 ORDER BY seq")
                .map_err(&failed)?;
            let mut rows = select.query([signed(expected)]).map_err(&failed)?;
            while let Some(row) = rows.next().map_err(|error| self.damaged(expected, &error))? {
                let (at, event) = read_row(row, expected).map_err(|detail| self.damaged(expected, &detail))?;
                each(Record { seq: expected, at, event });
                expected += 1;
            }
        }
        // An append whose answer was lost may have come through.
        self.last_seq = expected - 1;
        Ok(())
    }

    fn probe(&mut self) -> Result<(), JournalError> {
        let failed = self.failed("write to");
        self.connection
            .execute("INSERT OR REPLACE INTO header (key, value) VALUES ('probe', hex(randomblob(2048)))", [])
            .map(drop)
            .map_err(failed)
    }
}

fn read_row(row: &rusqlite::Row<'_>, expected: u64) -> Result<(UnixMillis, Event), String> {
    let seq: i64 = row.get(0).map_err(|error| error.to_string())?;
    if seq != signed(expected) {
        return Err(format!("it is missing, the next one is {seq}"));
    }
    let at: i64 = row.get(1).map_err(|error| error.to_string())?;
    let at = u64::try_from(at).map_err(|_| format!("its time is {at}"))?;
    let body = row.get_ref(2).and_then(|body| Ok(body.as_str()?)).map_err(|error| error.to_string())?;
    let event = serde_json::from_str(body).map_err(|error| format!("it does not read: {error}"))?;
    Ok((UnixMillis(at), event))
}

/// Takes the lock on the file beside the journal. On the journal itself it would be lost whenever SQLite closes the file.
fn lock(path: &Path) -> Result<File, JournalError> {
    let lock_path = side_file(path, ".lock");
    let io = |source| JournalError::Io { doing: "lock", path: lock_path.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&lock_path).map_err(io)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(JournalError::InUse { path: path.to_owned() }),
        Err(errno) => Err(io(errno.into())),
    }
}

fn write_new(path: &Path, header: &Header) -> Result<(), rusqlite::Error> {
    let mut connection = Connection::open(path)?;
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    configure(&connection)?;
    migrate(&mut connection, 0)?;
    let rows = [
        ("id", header.id.clone()),
        ("cluster", header.cluster.clone()),
        ("store_uuid", header.store_uuid.clone()),
        ("seed", header.seed.to_string()),
        ("created_at_ms", header.created_at.0.to_string()),
    ];
    for (key, value) in rows {
        connection.execute("INSERT INTO header (key, value) VALUES (?1, ?2)", [key, &value])?;
    }
    // Closing the last connection moves the log into the file, so that the rename takes everything along.
    connection.close().map_err(|(_, error)| error)
}

fn configure(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")
}

fn migrate(connection: &mut Connection, found: u32) -> Result<(), rusqlite::Error> {
    for (version, migration) in (1u32..).zip(MIGRATIONS).skip(found as usize) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(migration)?;
        transaction.pragma_update(None, "user_version", version)?;
        transaction.commit()?;
    }
    Ok(())
}

fn read_header(connection: &Connection) -> Result<Result<Header, String>, rusqlite::Error> {
    let value = |key: &str| {
        connection
            .query_row("SELECT value FROM header WHERE key = ?1", [key], |row| row.get::<_, String>(0))
            .optional()
            .map(|value| value.ok_or_else(|| format!("its header has no {key}")))
    };
    let (id, cluster, store_uuid) = (value("id")?, value("cluster")?, value("store_uuid")?);
    let (seed, created_at) = (value("seed")?, value("created_at_ms")?);
    let number = |text: String| text.parse::<u64>().map_err(|_| format!("its header has `{text}` for a number"));
    Ok((|| {
        Ok(Header {
            id: id?,
            cluster: cluster?,
            store_uuid: store_uuid?,
            seed: seed.and_then(number)?,
            created_at: created_at.and_then(number).map(UnixMillis)?,
        })
    })())
}

/// SQLite's integers are signed; ours do not get that far.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn side_file(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

fn is_not_a_database(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}

#[cfg(test)]
mod tests {
    use protocol::ids::TokenId;

    use super::*;
    use crate::scheduler::event::TokenCreated;

    fn header() -> Header {
        Header {
            id: "0123".to_owned(),
            cluster: "lab".to_owned(),
            store_uuid: "uuid".to_owned(),
            seed: 3,
            created_at: UnixMillis(5),
        }
    }

    fn record(seq: u64) -> Record {
        let token = TokenCreated { token: TokenId(seq), secret_hash: [7; 32], expires_at: UnixMillis(9), uses: 1 };
        Record { seq, at: UnixMillis(10 + seq), event: Event::TokenCreated(token) }
    }

    fn read(journal: &mut SqliteJournal) -> Result<Vec<Record>, JournalError> {
        let mut records = Vec::new();
        journal.read_from(1, &mut |record| records.push(record))?;
        Ok(records)
    }

    #[test]
    fn what_was_appended_is_there_after_reopening() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal.db");
        assert!(matches!(SqliteJournal::open(&path, "lab"), Err(JournalError::Missing { .. })));
        let mut journal = SqliteJournal::create(&path, &header()).unwrap();
        journal.append(&[record(1), record(2)]).unwrap();
        journal.append(&[record(3)]).unwrap();
        drop(journal);
        let mut journal = SqliteJournal::open(&path, "lab").unwrap();
        assert_eq!(journal.header(), &header());
        assert_eq!(read(&mut journal).unwrap(), [record(1), record(2), record(3)]);
        journal.append(&[record(4)]).unwrap();
        let mut from_third = Vec::new();
        journal.read_from(3, &mut |record| from_third.push(record.seq)).unwrap();
        assert_eq!(from_third, [3, 4]);
    }

    #[test]
    fn two_coordinators_cannot_share_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal.db");
        let journal = SqliteJournal::create(&path, &header()).unwrap();
        assert!(matches!(SqliteJournal::open(&path, "lab"), Err(JournalError::InUse { .. })));
        drop(journal);
        assert!(SqliteJournal::open(&path, "lab").is_ok());
        assert!(matches!(SqliteJournal::open(&path, "other"), Err(JournalError::OtherCluster { .. })));
        assert!(SqliteJournal::create(&path, &header()).is_err());
    }

    #[test]
    fn a_newer_schema_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal.db");
        drop(SqliteJournal::create(&path, &header()).unwrap());
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", SCHEMA + 1).unwrap();
        drop(connection);
        let error = SqliteJournal::open(&path, "lab").unwrap_err();
        assert!(matches!(error, JournalError::Newer { found, .. } if found == SCHEMA + 1));
        assert!(error.is_damage());
    }

    #[test]
    fn a_gap_and_an_unreadable_event_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal.db");
        let mut journal = SqliteJournal::create(&path, &header()).unwrap();
        journal.append(&[record(1), record(2), record(3)]).unwrap();
        journal.connection.execute("UPDATE events SET body = '{\"Nonsense\":{}}' WHERE seq = 3", []).unwrap();
        let error = read(&mut journal).unwrap_err();
        assert!(matches!(error, JournalError::Damaged { seq: 3, .. }), "{error}");
        journal.connection.execute("DELETE FROM events WHERE seq = 2", []).unwrap();
        let error = read(&mut journal).unwrap_err();
        assert!(error.to_string().contains("is damaged at event 2: it is missing, the next one is 3"), "{error}");
    }

    #[test]
    fn garbage_in_its_place_is_told_from_a_journal() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal.db");
        std::fs::write(&path, "not a database at all, but long enough to look at".repeat(100)).unwrap();
        let error = SqliteJournal::open(&path, "lab").unwrap_err();
        assert!(error.is_damage(), "{error}");
    }

    #[test]
    fn a_full_disk_loses_nothing_and_the_journal_goes_on_when_there_is_room() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal.db");
        let mut journal = SqliteJournal::create(&path, &header()).unwrap();
        journal.append(&[record(1)]).unwrap();
        let pages: u32 = journal.connection.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
        let limit = |journal: &SqliteJournal, pages: u32| {
            journal.connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).unwrap();
        };
        limit(&journal, pages);
        let many: Vec<_> = (2..200).map(record).collect();
        let error = journal.append(&many).unwrap_err();
        assert_eq!(error.hint().unwrap(), "make room on the disk of the state directory");
        assert_eq!(read(&mut journal).unwrap(), [record(1)]);
        assert!(journal.probe().is_err());
        limit(&journal, 10_000);
        journal.probe().unwrap();
        journal.append(&many).unwrap();
        assert_eq!(read(&mut journal).unwrap().len(), 199);
    }
}
