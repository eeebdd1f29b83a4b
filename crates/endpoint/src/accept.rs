//! Taking connections in, for every listener of ours: bounded in all, and of one address.

use crate::limits::{AddressGuard, Addresses};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Before the next try where a connection can't be accepted.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// What a connection holds for as long as it is open.
#[derive(Debug)]
pub struct Place {
    _one_of_all: OwnedSemaphorePermit,
    _one_of_its_address: AddressGuard,
}

/// How many connections there may be.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// In all; further ones wait.
    pub connections: usize,
    /// Of one address; further ones are closed.
    pub per_address: usize,
}

/// Accepts until `stop`. `enter` must not wait: it starts what serves the connection. `refused`: an address has as many as it may.
pub async fn accept(
    tcp: &TcpListener,
    room: Room,
    stop: &CancellationToken,
    enter: impl Fn(TcpStream, SocketAddr, Place),
    refused: impl Fn(),
) {
    let connections = Arc::new(Semaphore::new(room.connections));
    let addresses = Addresses::new(room.per_address);
    loop {
        let permit = tokio::select! {
            () = stop.cancelled() => return,
            // Never closed.
            permit = connections.clone().acquire_owned() => match permit { Ok(permit) => permit, Err(_) => return },
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = tcp.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => match addresses.enter(peer.ip()) {
                // An IPv4 peer of a socket for both is known by its own address.
                Some(guard) => enter(
                    stream,
                    (peer.ip().to_canonical(), peer.port()).into(),
                    Place { _one_of_all: permit, _one_of_its_address: guard },
                ),
                None => refused(),
            },
            Err(error) => {
                // Out of file descriptors, mostly: those who have a connection go on.
                tracing::error!(%error, "a connection can't be accepted");
                tokio::time::sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
}
