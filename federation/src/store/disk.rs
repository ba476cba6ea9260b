//! The store on disk: redb, one file, one transaction a batch.
//!
//! redb checks its own pages; every value carries a checksum of its own as well, so that damage is named by
//! log position. The file is checked whole at every open: a member would rather not start than start with
//! less than it promised.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use isthmus_model::ServiceAccount;
use prost011::Message;
use raft::eraftpb::{Entry, HardState, Snapshot};
use redb::{Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, TableDefinition, WriteTransaction};

use super::{Durable, Loaded, Persist, Store, StoreError, WorkloadToken, check};
use crate::der::Fingerprint;
use crate::member::WorkloadTokenError;

/// The file in the member's directory.
pub const FILE: &str = "registry.redb";
/// The form of the file that this build writes.
const FORM: &[u8] = b"isthmus registry 1";
/// Memory for pages: reads happen only at the start.
const CACHE_BYTES: usize = 4 * 1024 * 1024;
/// Workload tokens kept, used and expired ones included.
pub const WORKLOAD_TOKENS_MAX: u64 = 10_000;

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const WORKLOAD_TOKENS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("workload_tokens");

/// A member's file, open.
pub struct DiskStore {
    path: PathBuf,
    database: Database,
    owner: String,
    /// A commit position not written yet: it may be lost, so it waits for the next write that may not.
    pending: Option<HardState>,
    broken: bool,
}

impl DiskStore {
    /// Opens or creates the file in `dir`, which becomes 0700, the file 0600.
    ///
    /// # Errors
    /// [`StoreError`], with the cause and what to do.
    pub fn open(dir: &Path, mesh: &str, cluster: &str) -> Result<Self, StoreError> {
        let path = dir.join(FILE);
        let io = |error: std::io::Error| StoreError::Io { file: path.display().to_string(), what: error.to_string() };
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        let existed = path.exists();
        if existed && std::fs::metadata(&path).map_err(io)?.len() == 0 {
            // redb would make a fresh database of it, and the member would forget what it voted.
            return Err(corrupt(&path, "the file is empty".into()));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        drop(options.open(&path).map_err(io)?);
        let database = open_checked(&path)?;
        let mut store =
            Self { owner: format!("mesh {mesh}, cluster {cluster}"), path, database, pending: None, broken: false };
        match existed {
            true => store.check_owner()?,
            false => store.stamp()?,
        }
        Ok(store)
    }

    fn fault(&self, error: impl std::fmt::Display) -> StoreError {
        StoreError::Io { file: self.path.display().to_string(), what: error.to_string() }
    }

    fn stamp(&mut self) -> Result<(), StoreError> {
        let owner = self.owner.clone();
        self.transact(|transaction| {
            transaction.open_table(LOG)?;
            transaction.open_table(WORKLOAD_TOKENS)?;
            let mut meta = transaction.open_table(META)?;
            meta.insert("form", sealed(FORM).as_slice())?;
            meta.insert("owner", sealed(owner.as_bytes()).as_slice())?;
            Ok(())
        })
    }

    fn check_owner(&self) -> Result<(), StoreError> {
        let form = self.meta("form")?.ok_or_else(|| corrupt(&self.path, "it has no form".into()))?;
        if form != FORM {
            let found = String::from_utf8_lossy(&form).into_owned();
            return Err(corrupt(&self.path, format!("its form is {found:?}, this build reads {FORM:?}")));
        }
        let found = self.meta("owner")?.ok_or_else(|| corrupt(&self.path, "it has no owner".into()))?;
        if found != self.owner.as_bytes() {
            let found = String::from_utf8_lossy(&found).into_owned();
            let file = self.path.display().to_string();
            return Err(StoreError::Foreign { file, found, expected: self.owner.clone() });
        }
        Ok(())
    }

    /// One value of the meta table, its seal checked.
    fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            let table = self.database.begin_read()?.open_table(META)?;
            Ok(table.get(key)?.map(|value| value.value().to_vec()))
        };
        let sealed = read().map_err(|error| corrupt(&self.path, format!("meta {key:?}: {error}")))?;
        sealed.map(|bytes| self.unsealed(&format!("meta {key:?}"), &bytes)).transpose()
    }

    fn unsealed(&self, what: &str, bytes: &[u8]) -> Result<Vec<u8>, StoreError> {
        unseal(bytes)
            .map(<[u8]>::to_vec)
            .ok_or_else(|| corrupt(&self.path, format!("{what}: its checksum does not fit")))
    }

    fn decoded<M: Message + Default>(&self, key: &str) -> Result<M, StoreError> {
        let bytes = self.meta(key)?.unwrap_or_default();
        M::decode(bytes.as_slice()).map_err(|error| corrupt(&self.path, format!("meta {key:?}: {error}")))
    }

    /// Runs one transaction; on return it is safe on disk, or the store is useless.
    fn transact(&mut self, work: impl FnOnce(&WriteTransaction) -> Result<(), redb::Error>) -> Result<(), StoreError> {
        if self.broken {
            return Err(self.fault("a write failed before"));
        }
        // Broken until proven otherwise: after a failed fsync the pages may be gone from the cache, and a
        // second try would succeed over a hole.
        self.broken = true;
        let done = || -> Result<(), redb::Error> {
            let transaction = self.database.begin_write()?;
            work(&transaction)?;
            transaction.commit()?;
            Ok(())
        };
        done().map_err(|error| self.fault(error))?;
        self.broken = false;
        Ok(())
    }

    fn read_log(&self) -> Result<Vec<Entry>, StoreError> {
        let table = self.database.begin_read().map_err(redb::Error::from).and_then(|read| Ok(read.open_table(LOG)?));
        let table = table.map_err(|error| corrupt(&self.path, format!("log: {error}")))?;
        let rows = table.iter().map_err(|error| corrupt(&self.path, format!("log: {error}")))?;
        let mut entries = Vec::new();
        for row in rows {
            let (key, value) = row.map_err(|error| corrupt(&self.path, format!("log: {error}")))?;
            let index = key.value();
            let bytes = self.unsealed(&format!("log position {index}"), value.value())?;
            let entry = Entry::decode(bytes.as_slice())
                .map_err(|error| corrupt(&self.path, format!("log position {index}: {error}")))?;
            if entry.index != index {
                return Err(corrupt(&self.path, format!("log position {index} holds entry {}", entry.index)));
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    /// Keeps a workload token until it is used or long expired.
    ///
    /// # Errors
    /// [`StoreError`]; the caller then stops the member.
    pub fn mint(&mut self, hash: [u8; 32], account: ServiceAccount, ends: u64, now: u64) -> Result<(), StoreError> {
        let token = WorkloadToken { account, expires_unix_s: ends, used: false };
        let bytes = sealed(&serde_json::to_vec(&token).map_err(|error| self.fault(error))?);
        self.transact(|transaction| {
            let mut table = transaction.open_table(WORKLOAD_TOKENS)?;
            if redb::ReadableTableMetadata::len(&table)? >= WORKLOAD_TOKENS_MAX {
                table.retain(|_, value| token_of(value).is_some_and(|token| token.expires_unix_s > now))?;
            }
            table.insert(hash.as_slice(), bytes.as_slice())?;
            Ok(())
        })
    }

    /// Uses a workload token: whoever comes first gets the account, once that is on disk.
    ///
    /// # Errors
    /// [`WorkloadTokenError`].
    pub fn redeem(&mut self, hash: [u8; 32], now: u64) -> Result<ServiceAccount, WorkloadTokenError> {
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            let table = self.database.begin_read()?.open_table(WORKLOAD_TOKENS)?;
            Ok(table.get(hash.as_slice())?.map(|value| value.value().to_vec()))
        };
        let found = read().map_err(|error| WorkloadTokenError::Store(self.fault(error)))?;
        let token = found.and_then(|bytes| token_of(&bytes)).ok_or(WorkloadTokenError::Unknown)?;
        if token.used {
            return Err(WorkloadTokenError::Used);
        }
        if token.expires_unix_s < now {
            return Err(WorkloadTokenError::Expired(token.expires_unix_s));
        }
        let account = token.account.clone();
        let used = WorkloadToken { used: true, ..token };
        let bytes = serde_json::to_vec(&used).map_err(|error| WorkloadTokenError::Store(self.fault(error)))?;
        let bytes = sealed(&bytes);
        self.transact(|transaction| {
            transaction.open_table(WORKLOAD_TOKENS)?.insert(hash.as_slice(), bytes.as_slice())?;
            Ok(())
        })
        .map_err(WorkloadTokenError::Store)?;
        Ok(account)
    }
}

impl Store for DiskStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        let snapshot: Snapshot = self.decoded("snapshot")?;
        let base = match self.meta("base")? {
            None => (0, 0),
            Some(bytes) => pair(&bytes).ok_or_else(|| corrupt(&self.path, "meta \"base\" is not 16 bytes".into()))?,
        };
        let loaded = Loaded {
            hard_state: self.decoded("hard_state")?,
            base,
            entries: self.read_log()?,
            snapshot,
            in_group: self.meta("in_group")?.is_some_and(|flag| flag == [1]),
            forgetful: self.meta("forgetful")?.is_some_and(|flag| flag == [1]),
            fresh: self.meta("hard_state")?.is_none() && self.meta("in_group")?.is_none(),
        };
        check(&loaded).map_err(|what| corrupt(&self.path, what))?;
        Ok(loaded)
    }

    fn write(&mut self, persist: &Persist) -> Result<Durable, StoreError> {
        if let Some(hard_state) = &persist.hard_state {
            self.pending = Some(hard_state.clone());
        }
        if persist.lazy || persist.is_empty() {
            return Ok(persist.made_durable());
        }
        let hard_state = self.pending.take();
        self.transact(|transaction| {
            let mut meta = transaction.open_table(META)?;
            let mut log = transaction.open_table(LOG)?;
            if let Some(snapshot) = &persist.install {
                log.retain(|_, _| false)?;
                let at = snapshot.metadata.clone().unwrap_or_default();
                meta.insert("snapshot", sealed(&snapshot.encode_to_vec()).as_slice())?;
                meta.insert("base", sealed(&unpair(at.index, at.term)).as_slice())?;
            }
            if let Some(first) = persist.entries.first() {
                log.retain_in(first.index.., |_, _| false)?;
            }
            for entry in &persist.entries {
                log.insert(entry.index, sealed(&entry.encode_to_vec()).as_slice())?;
            }
            if let Some((snapshot, keep_from)) = &persist.compact {
                meta.insert("snapshot", sealed(&snapshot.encode_to_vec()).as_slice())?;
                let taken = snapshot.metadata.as_ref().map_or(0, |at| at.index);
                let drop_to = keep_from.saturating_sub(1).min(taken);
                let last = log.get(drop_to)?.and_then(|row| Some(Entry::decode(unseal(row.value())?).ok()?.term));
                if let Some(term) = last {
                    meta.insert("base", sealed(&unpair(drop_to, term)).as_slice())?;
                    log.retain_in(..=drop_to, |_, _| false)?;
                }
            }
            if let Some(in_group) = persist.in_group {
                meta.insert("in_group", sealed(&[u8::from(in_group)]).as_slice())?;
            }
            if let Some(forgetful) = persist.forgetful {
                meta.insert("forgetful", sealed(&[u8::from(forgetful)]).as_slice())?;
            }
            if let Some(hard_state) = &hard_state {
                meta.insert("hard_state", sealed(&hard_state.encode_to_vec()).as_slice())?;
            }
            Ok(())
        })?;
        Ok(persist.made_durable())
    }
}

/// Sets a damaged file aside and puts a fresh one in its place, whose log comes from the other clusters.
///
/// Votes and promises are forgotten with the old file, so the member takes no part in the Raft group until
/// the group has replaced it (after 10 minutes of silence, where another cluster can take its place), or
/// it was evicted and has joined again. Workload tokens that were not used yet are gone. Returns where the
/// old file lies now.
///
/// # Errors
/// [`StoreError::Io`], and [`StoreError::Busy`] while a member runs on the file.
pub fn restore(dir: &Path, mesh: &str, cluster: &str) -> Result<PathBuf, StoreError> {
    let path = dir.join(FILE);
    let io = |error: std::io::Error| StoreError::Io { file: path.display().to_string(), what: error.to_string() };
    // Sound or damaged, it is set aside, as the operator said; but not from under a running member.
    if let Err(busy @ StoreError::Busy { .. }) = DiskStore::open(dir, mesh, cluster) {
        return Err(busy);
    }
    let unused = |number: &u32| !dir.join(format!("{FILE}.damaged-{number}")).exists();
    let number = (1..u32::MAX).find(unused).unwrap_or(u32::MAX);
    let aside = dir.join(format!("{FILE}.damaged-{number}"));
    std::fs::rename(&path, &aside).map_err(io)?;
    let mut fresh = DiskStore::open(dir, mesh, cluster)?;
    let _proof = fresh.write(&Persist { forgetful: Some(true), in_group: Some(false), ..Persist::default() })?;
    Ok(aside)
}

/// Opens the file, checking every page.
fn open_checked(path: &Path) -> Result<Database, StoreError> {
    let file = path.display().to_string();
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    // A damaged file must end in a message, whatever a parser deep inside makes of it.
    let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| builder.create(path)));
    match opened {
        Ok(Ok(database)) => Ok(database),
        Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(StoreError::Busy { file }),
        Ok(Err(DatabaseError::Storage(redb::StorageError::Io(error))))
            if error.kind() != std::io::ErrorKind::InvalidData && error.kind() != std::io::ErrorKind::UnexpectedEof =>
        {
            Err(StoreError::Io { file, what: error.to_string() })
        }
        Ok(Err(error)) => Err(corrupt(path, error.to_string())),
        Err(_) => Err(corrupt(path, "its structure makes no sense".into())),
    }
}

fn corrupt(path: &Path, what: String) -> StoreError {
    StoreError::Corrupt { file: path.display().to_string(), what }
}

/// A value with 8 bytes of its SHA-256 in front.
fn sealed(value: &[u8]) -> Vec<u8> {
    let mut bytes = Fingerprint::of(value).0[..8].to_vec();
    bytes.extend_from_slice(value);
    bytes
}

fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (seal, value) = bytes.split_at_checked(8)?;
    (Fingerprint::of(value).0[..8] == *seal).then_some(value)
}

fn token_of(bytes: &[u8]) -> Option<WorkloadToken> {
    serde_json::from_slice(unseal(bytes)?).ok()
}

fn unpair(index: u64, term: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&index.to_be_bytes());
    bytes[8..].copy_from_slice(&term.to_be_bytes());
    bytes
}

fn pair(bytes: &[u8]) -> Option<(u64, u64)> {
    let (index, term) = bytes.split_at_checked(8)?;
    Some((u64::from_be_bytes(index.try_into().ok()?), u64::from_be_bytes(term.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Result<DiskStore, StoreError> {
        DiskStore::open(dir, "m", "c0")
    }

    fn entry(index: u64, term: u64) -> Entry {
        Entry { index, term, data: format!("entry {index} of {term}").into_bytes(), ..Entry::default() }
    }

    fn state(term: u64, commit: u64) -> Option<HardState> {
        Some(HardState { term, vote: 1, commit })
    }

    #[test]
    fn what_was_written_is_read_back_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path()).unwrap();
        assert!(store.load().unwrap().fresh);
        let entries = (1..=5).map(|index| entry(index, 1)).collect();
        let persist = Persist { entries, hard_state: state(1, 3), in_group: Some(true), ..Persist::default() };
        let _ = store.write(&persist).unwrap();
        // A new leader replaces the tail.
        let persist = Persist { entries: vec![entry(4, 2)], hard_state: state(2, 3), ..Persist::default() };
        let _ = store.write(&persist).unwrap();
        drop(store);
        let loaded = open(dir.path()).unwrap().load().unwrap();
        assert_eq!(loaded.entries.iter().map(|e| e.term).collect::<Vec<_>>(), [1, 1, 1, 2]);
        assert_eq!((loaded.hard_state.term, loaded.in_group, loaded.fresh), (2, true, false));
    }

    #[test]
    fn two_members_never_open_one_file_and_another_cluster_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).unwrap();
        assert!(matches!(open(dir.path()), Err(StoreError::Busy { .. })));
        drop(store);
        assert!(matches!(DiskStore::open(dir.path(), "m", "c1"), Err(StoreError::Foreign { .. })));
    }

    #[test]
    fn a_flipped_byte_or_a_truncation_never_yields_less_than_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path()).unwrap();
        let entries: Vec<_> = (1..=50).map(|index| entry(index, 1)).collect();
        let persist = Persist { entries, hard_state: state(1, 50), in_group: Some(true), ..Persist::default() };
        let _ = store.write(&persist).unwrap();
        drop(store);
        let whole = std::fs::read(dir.path().join(FILE)).unwrap();
        let mut refused = 0;
        let stride = (whole.len() / 150).max(1);
        let damages = (0..whole.len()).step_by(stride).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            bytes
        });
        let cuts = (1..20).map(|part| whole[..whole.len() * part / 20].to_vec());
        let quiet = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        for damaged in damages.chain(cuts) {
            let place = tempfile::tempdir().unwrap();
            std::fs::write(place.path().join(FILE), damaged).unwrap();
            match open(place.path()).and_then(|mut store| store.load()) {
                Ok(loaded) => assert_eq!((loaded.entries.len(), loaded.hard_state.commit), (50, 50), "silently less"),
                Err(StoreError::Corrupt { file, .. }) => {
                    assert!(file.ends_with(FILE));
                    refused += 1;
                }
                Err(other) => panic!("{other}"),
            }
        }
        std::panic::set_hook(quiet);
        assert!(refused > 20, "only {refused} damages were seen");
    }

    #[test]
    fn a_restored_store_starts_afresh_and_remembers_that_it_forgot() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path()).unwrap();
        assert!(matches!(restore(dir.path(), "m", "c0"), Err(StoreError::Busy { .. })));
        let persist =
            Persist { entries: vec![entry(1, 1)], hard_state: state(1, 1), in_group: Some(true), ..Persist::default() };
        let _ = store.write(&persist).unwrap();
        drop(store);
        std::fs::write(dir.path().join(FILE), b"rubbish").unwrap();
        let error = open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("isthmus store restore"), "{error}");
        let aside = restore(dir.path(), "m", "c0").unwrap();
        assert_eq!(std::fs::read(aside).unwrap(), b"rubbish");
        let loaded = open(dir.path()).unwrap().load().unwrap();
        assert!(loaded.forgetful && !loaded.in_group && !loaded.fresh && loaded.entries.is_empty());
    }

    #[test]
    fn a_workload_token_serves_once_and_not_after_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path()).unwrap();
        let account = ServiceAccount { namespace: "shop".parse().unwrap(), name: "cart".parse().unwrap() };
        store.mint([7; 32], account.clone(), 100, 0).unwrap();
        store.mint([8; 32], account.clone(), 100, 0).unwrap();
        assert_eq!(store.redeem([7; 32], 50).unwrap(), account);
        drop(store);
        let mut store = open(dir.path()).unwrap();
        assert!(matches!(store.redeem([7; 32], 50), Err(WorkloadTokenError::Used)));
        assert!(matches!(store.redeem([8; 32], 101), Err(WorkloadTokenError::Expired(100))));
        assert!(matches!(store.redeem([9; 32], 50), Err(WorkloadTokenError::Unknown)));
    }
}
