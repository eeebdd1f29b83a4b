//! The keys that sign tokens, in a Secret of the plane's namespace, so that every replica signs and verifies with the same.

use crate::names::{FIELD_MANAGER, MANAGED_BY};
use crate::source::follow::chain;
use async_trait::async_trait;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use onboarding_endpoint::backend::{KeyStore, RegistryError};
use onboarding_runtime::backoff::Backoff;
use std::time::Duration;

/// The Secret, of type `Opaque`.
pub const TOKEN_KEYS: &str = "onboarding-plane-token-keys";
/// Its key.
const KEYS: &str = "keys";
const TRY: Duration = Duration::from_secs(5);
const TRIES: usize = 3;
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(1);

/// [`KeyStore`] in a Secret. The version is its `resourceVersion`.
pub struct SecretKeyStore {
    api: Api<Secret>,
    namespace: String,
}

impl SecretKeyStore {
    /// `namespace`: the plane's.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), namespace: namespace.to_owned() }
    }

    /// Tried again where that can help. A write that was carried out though it seemed to fail is a conflict when it is tried again.
    async fn call<T, F: Future<Output = kube::Result<T>>>(
        &self,
        doing: &str,
        request: impl Fn() -> F,
    ) -> Result<T, RegistryError> {
        let mut backoff = Backoff::new(FIRST_DELAY, LONGEST_DELAY);
        let mut problem = String::new();
        for attempt in 0..TRIES {
            if attempt > 0 {
                tokio::time::sleep(backoff.next_delay()).await;
            }
            match tokio::time::timeout(TRY, request()).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => return Err(RegistryError::Conflict),
                Ok(Err(kube::Error::Api(status))) if (400..500).contains(&status.code) && status.code != 429 => {
                    return Err(self.unavailable(doing, &status.message));
                }
                Ok(Err(error)) => problem = chain(&error),
                Err(_) => problem = format!("not answered within {TRY:?}"),
            }
        }
        Err(self.unavailable(doing, &problem))
    }

    fn unavailable(&self, doing: &str, problem: &str) -> RegistryError {
        RegistryError::Unavailable(format!("{doing} the Secret {}/{TOKEN_KEYS}: {problem}", self.namespace))
    }

    fn version(&self, secret: &Secret) -> Result<u64, RegistryError> {
        let version = secret.metadata.resource_version.as_deref().and_then(|version| version.parse().ok());
        version.ok_or_else(|| self.unavailable("reading", "its resourceVersion isn't a number"))
    }
}

#[async_trait]
impl KeyStore for SecretKeyStore {
    async fn load(&self) -> Result<(Vec<u8>, u64), RegistryError> {
        let Some(secret) = self.call("reading", || self.api.get_opt(TOKEN_KEYS)).await? else {
            return Ok((Vec::new(), 0));
        };
        let version = self.version(&secret)?;
        // One without keys in it was made by somebody else, for them.
        let keys = secret.data.unwrap_or_default().remove(KEYS).unwrap_or_default();
        Ok((keys.0, version))
    }

    async fn store(&self, expected: u64, keys: &[u8]) -> Result<u64, RegistryError> {
        let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        let data = Some([(KEYS.to_owned(), ByteString(keys.to_vec()))].into());
        let stored = if expected == 0 {
            let metadata = ObjectMeta {
                name: Some(TOKEN_KEYS.to_owned()),
                labels: Some([(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())].into()),
                ..ObjectMeta::default()
            };
            let secret = Secret { metadata, data, type_: Some("Opaque".to_owned()), ..Secret::default() };
            self.call("creating", || self.api.create(&params, &secret)).await?
        } else {
            // What others wrote on it (labels, an owner) stays.
            let secret = self.call("reading", || self.api.get_opt(TOKEN_KEYS)).await?;
            let mut secret = secret.ok_or(RegistryError::Conflict)?;
            if self.version(&secret)? != expected {
                return Err(RegistryError::Conflict);
            }
            secret.data = data;
            self.call("replacing", || self.api.replace(TOKEN_KEYS, &params, &secret)).await?
        };
        self.version(&stored)
    }
}
