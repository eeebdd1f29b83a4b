//! Where a server listens.

use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use tokio::net::TcpListener;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// Listens on a TCP address. `[::]` is every address of IPv6 and of IPv4, whatever `net.ipv6.bindv6only` says; on a machine that has no
/// IPv6 it is `0.0.0.0`. Peers of IPv4 are then told as `::ffff:a.b.c.d`: [`std::net::IpAddr::to_canonical`].
///
/// # Errors
/// As the system says: the address is taken, isn't this machine's, or may not be listened on.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match bind(address) {
        Err(error) if is_any_v6(address) && has_no_v6(&error) => {
            tracing::warn!(%error, "this machine has no IPv6: listening on 0.0.0.0 instead of [::]");
            bind((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        result => result,
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if is_any_v6(address) {
        socket.set_only_v6(false)?;
    }
    // As the standard library and tokio do: what a process before this one left behind keeps no port.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn is_any_v6(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}

fn has_no_v6(error: &io::Error) -> bool {
    // EAFNOSUPPORT (`ipv6.disable=1`), which has no kind of its own yet.
    const NO_SUCH_FAMILY: i32 = 97;
    error.raw_os_error() == Some(NO_SUCH_FAMILY) || error.kind() == io::ErrorKind::AddrNotAvailable
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;
    use tokio::net::TcpStream;

    #[tokio::test]
    async fn any_address_of_ipv6_is_any_of_ipv4_too() {
        let listener = listen((Ipv6Addr::UNSPECIFIED, 0).into()).unwrap();
        let port = listener.local_addr().unwrap().port();
        for address in [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))] {
            let (there, here) = tokio::join!(TcpStream::connect(address), listener.accept());
            assert_eq!(here.unwrap().1.ip().to_canonical(), there.unwrap().local_addr().unwrap().ip());
        }
    }

    #[tokio::test]
    async fn one_address_is_that_address() {
        let other = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let port = other.local_addr().unwrap().port();
        // Were it each address, it couldn't have the port.
        let _listener = listen((Ipv6Addr::LOCALHOST, port).into()).unwrap();
        let taken = listen((Ipv6Addr::LOCALHOST, port).into()).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn only_the_lack_of_ipv6_is_a_reason_to_do_without() {
        assert!(has_no_v6(&io::Error::from_raw_os_error(97)) && has_no_v6(&io::ErrorKind::AddrNotAvailable.into()));
        assert!(!has_no_v6(&io::ErrorKind::AddrInUse.into()) && !has_no_v6(&io::ErrorKind::PermissionDenied.into()));
    }
}
