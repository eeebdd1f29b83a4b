//! Ports for programs that are told theirs, and can't say which one the kernel gave them.

use anyhow::Context;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// Below those that connections get (`ip_local_port_range` in ip(7)): one that nobody has now stays free until a program comes to bind it.
const PORTS: Range<u32> = 10_000..32_000;
/// From one process's first port to that of the next one, which so doesn't get the same.
const STRIDE: u32 = 97;

/// One that nobody has, and that this process is given once.
///
/// # Errors
/// All are taken.
pub fn free() -> anyhow::Result<u16> {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(STRIDE);
    for _ in PORTS {
        let number = first.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(PORTS.start + number % (PORTS.end - PORTS.start))?;
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return Ok(port);
        }
    }
    None.context("each of the ports for tests is taken")
}

/// The same at this address. In another namespace than ours ports are as free as here.
///
/// # Errors
/// All are taken.
pub fn free_at(address: impl Into<IpAddr>) -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::new(address.into(), free()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_is_free_and_given_once() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, free().unwrap() + 1)).ok();
        let given: BTreeSet<u16> = (0..50).map(|_| free().unwrap()).collect();
        assert_eq!(given.len(), 50);
        assert!(taken.is_none_or(|taken| !given.contains(&taken.local_addr().unwrap().port())));
    }
}
