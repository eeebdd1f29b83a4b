//! An HTTP service of a cloud, whose configuration a test changes while it runs.

use axum::Router;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::net::TcpListener;

/// What a service answers from.
pub(crate) type Shared<C> = Arc<Mutex<C>>;

/// One that runs; it ends with this value.
pub struct Emulator<C> {
    pub address: SocketAddr,
    config: Shared<C>,
    task: tokio::task::JoinHandle<()>,
}

impl<C> Emulator<C> {
    /// On a free port of 127.0.0.1.
    pub(crate) async fn start(config: C, router: impl FnOnce(Shared<C>) -> Router) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let config = Arc::new(Mutex::new(config));
        let router = router(config.clone());
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { address, config, task })
    }

    /// Changes what it says from now on.
    pub fn change(&self, change: impl FnOnce(&mut C)) {
        change(&mut self.config.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl<C> Drop for Emulator<C> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Until the process ends.
pub(crate) async fn serve<C>(
    listener: TcpListener,
    config: C,
    router: impl FnOnce(Shared<C>) -> Router,
) -> anyhow::Result<()> {
    Ok(axum::serve(listener, router(Arc::new(Mutex::new(config)))).await?)
}
