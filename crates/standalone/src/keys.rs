//! The keys that sign tokens, in a file of the data directory.

use crate::data_dir::DataDir;
use async_trait::async_trait;
use onboarding_endpoint::backend::{KeyStore, RegistryError};
use std::sync::{Arc, Mutex, PoisonError};

const FILE: &str = "token-keys";
/// The first line: this, the version, the SHA-256 of what follows.
const MAGIC: &str = "onboarding-token-keys";

pub struct FileKeyStore {
    data: Arc<DataDir>,
    /// One store at a time: it compares before it replaces.
    one_at_a_time: Arc<Mutex<()>>,
}

impl FileKeyStore {
    pub fn new(data: Arc<DataDir>) -> Self {
        Self { data, one_at_a_time: Arc::default() }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&DataDir) -> Result<T, RegistryError> + Send + 'static,
    ) -> Result<T, RegistryError> {
        let (data, lock) = (self.data.clone(), self.one_at_a_time.clone());
        tokio::task::spawn_blocking(move || {
            let _guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
            work(&data)
        })
        .await
        .map_err(|error| RegistryError::Unavailable(error.to_string()))?
    }
}

#[async_trait]
impl KeyStore for FileKeyStore {
    async fn load(&self) -> Result<(Vec<u8>, u64), RegistryError> {
        self.blocking(load).await
    }

    async fn store(&self, expected: u64, keys: &[u8]) -> Result<u64, RegistryError> {
        let keys = keys.to_vec();
        self.blocking(move |data| {
            let (_, held) = load(data)?;
            if held != expected {
                return Err(RegistryError::Conflict);
            }
            let version = held + 1;
            let mut file = format!("{MAGIC} {version} {}\n", digest(&keys)).into_bytes();
            file.extend_from_slice(&keys);
            data.replace(FILE, &file).map_err(|error| {
                RegistryError::Unavailable(format!("writing {}: {error}", data.file(FILE).display()))
            })?;
            Ok(version)
        })
        .await
    }
}

fn load(data: &DataDir) -> Result<(Vec<u8>, u64), RegistryError> {
    let unavailable = |problem: String| RegistryError::Unavailable(format!("{}: {problem}", data.file(FILE).display()));
    let Some(bytes) = data.read(FILE).map_err(|error| unavailable(error.to_string()))? else {
        return Ok((Vec::new(), 0));
    };
    parse(&bytes).ok_or_else(|| {
        unavailable("isn't a whole key file; move it away and restart the plane: tokens are issued anew".to_owned())
    })
}

fn parse(bytes: &[u8]) -> Option<(Vec<u8>, u64)> {
    let end = bytes.iter().position(|byte| *byte == b'\n')?;
    let keys = bytes.get(end + 1..)?;
    let head = std::str::from_utf8(bytes.get(..end)?).ok()?;
    let mut words = head.split(' ');
    let (magic, version, sum) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
    (magic == MAGIC && words.next().is_none() && sum == digest(keys)).then(|| (keys.to_vec(), version))
}

fn digest(bytes: &[u8]) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keys_are_replaced_only_by_who_saw_the_last_ones() {
        let dir = tempfile::tempdir().unwrap();
        let data = Arc::new(DataDir::open(dir.path()).unwrap());
        let store = FileKeyStore::new(data.clone());
        assert_eq!(store.load().await.unwrap(), (Vec::new(), 0));
        assert_eq!(store.store(0, b"a\nb").await.unwrap(), 1);
        assert!(matches!(store.store(0, b"c").await, Err(RegistryError::Conflict)));
        assert_eq!(FileKeyStore::new(data).load().await.unwrap(), (b"a\nb".to_vec(), 1));
        assert_eq!(store.store(1, b"c").await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_damaged_key_file_is_neither_used_nor_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let data = Arc::new(DataDir::open(dir.path()).unwrap());
        let store = FileKeyStore::new(data.clone());
        store.store(0, b"secret").await.unwrap();
        let mut bytes = data.read(FILE).unwrap().unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(data.file(FILE), &bytes).unwrap();
        for result in [store.load().await.map(|_| ()), store.store(1, b"x").await.map(|_| ())] {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("move it away"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert_eq!(data.read(FILE).unwrap().unwrap(), bytes);
    }
}
