//! A load balancer of connections: what comes in on one address goes on to another.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Forwards until it is dropped; connections that were made by then go on.
pub struct Forward {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
}

impl Forward {
    /// `to` is asked for each connection; without an answer it is closed.
    pub fn start(
        listener: TcpListener,
        to: impl Fn() -> Option<SocketAddr> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let to = Arc::new(to);
        std::thread::Builder::new().name(format!("forward {address}")).spawn(move || {
            for client in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (Ok(client), to) = (client, Arc::clone(&to)) else { continue };
                // A connection that can't be served is closed, as the client sees.
                let _ = std::thread::Builder::new().name(format!("forward {address}")).spawn(move || {
                    let _ = to().map(|to| connect(client, to));
                });
            }
        })?;
        Ok(Self { address, stop })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It waits for a connection.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

fn connect(client: TcpStream, to: SocketAddr) -> io::Result<()> {
    let server = TcpStream::connect_timeout(&to, Duration::from_secs(3))?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let (from, into) = (client.try_clone()?, server.try_clone()?);
    let up = std::thread::Builder::new().name("forward: up".to_owned()).spawn(move || copy(from, into))?;
    copy(server, client);
    let _ = up.join();
    Ok(())
}

/// To the end of `from`; then the other side is told of it. A side that fails ends both.
fn copy(mut from: TcpStream, mut into: TcpStream) {
    let how = match io::copy(&mut from, &mut into) {
        Ok(_) => Shutdown::Write,
        Err(_) => Shutdown::Both,
    };
    let _ = into.shutdown(how);
    if how == Shutdown::Both {
        let _ = from.shutdown(Shutdown::Both);
    }
}
