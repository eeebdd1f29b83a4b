//! Addresses from the network interfaces, and why each was taken or left out.

use crate::host::HostError;
use getifaddrs::InterfaceFlags;
use onboarding_core::registration::{ConnectedOver, HostAddress};
use regex_lite::Regex;
use std::net::IpAddr;

/// `hostinfo.basic`.
#[derive(Debug)]
pub struct Basic {
    /// `None`: all but the known bridges.
    include: Option<Patterns>,
    exclude: Patterns,
}

/// Any of these.
#[derive(Debug)]
struct Patterns(Vec<Regex>);

/// One address of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub ip: IpAddr,
    pub up: bool,
    /// The default route goes through this interface.
    pub default_route: bool,
}

/// An address, and what was thought of it.
pub type Reason = (Interface, &'static str);

/// Interfaces of container runtimes and hypervisors: nobody reaches this host by them.
const BRIDGES: &[&str] =
    &[r"^docker[0-9]*$", r"^br-", r"^virbr", r"^cni", r"^veth", r"^lxc", r"^podman", r"^cali", r"^flannel"];

impl Patterns {
    fn new<T: AsRef<str>>(patterns: &[T]) -> Result<Self, regex_lite::Error> {
        patterns.iter().map(|pattern| Regex::new(pattern.as_ref())).collect::<Result<_, _>>().map(Self)
    }

    fn is_match(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| pattern.is_match(name))
    }
}

impl Basic {
    /// Errors: a pattern that isn't a regular expression.
    pub fn new(include: &[String], exclude: &[String]) -> Result<Self, HostError> {
        Ok(Self {
            include: if include.is_empty() { None } else { Some(Patterns::new(include)?) },
            exclude: Patterns::new(exclude)?,
        })
    }

    /// Of this host, now.
    pub fn addresses(&self) -> Result<Vec<HostAddress>, HostError> {
        let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
        let default = default_interface(&routes);
        let interfaces = getifaddrs::getifaddrs().map_err(HostError::Interfaces)?.filter_map(|interface| {
            Some(Interface {
                ip: interface.address.ip_addr()?,
                up: interface.flags.contains(InterfaceFlags::UP),
                default_route: default.as_deref() == Some(interface.name.as_str()),
                name: interface.name,
            })
        });
        let chosen = self.choose(interfaces.collect());
        match chosen {
            Ok((addresses, reasons)) => {
                for (interface, why) in reasons {
                    tracing::info!(interface = interface.name, address = %interface.ip, why, "looked at an address of this host");
                }
                Ok(addresses)
            }
            Err(error) => Err(error),
        }
    }

    /// Those that are taken, the one for the mesh first (the default route's interface, then IPv4), and what was thought of each.
    pub fn choose(&self, mut interfaces: Vec<Interface>) -> Result<(Vec<HostAddress>, Vec<Reason>), HostError> {
        interfaces.sort_by_key(|interface| (!interface.default_route, !interface.ip.is_ipv4()));
        let bridges = Patterns::new(BRIDGES)?;
        let reasons: Vec<_> = interfaces
            .into_iter()
            .map(|interface| {
                let verdict = self.verdict(&bridges, &interface);
                (interface, verdict)
            })
            .collect();
        let taken: Vec<_> = reasons
            .iter()
            .filter(|(_, verdict)| verdict.is_ok())
            .flat_map(|(interface, _)| {
                let address = |kind| HostAddress { ip: interface.ip, kind };
                // An address that the internet routes is also how the network around it reaches this host.
                let public = is_public(interface.ip).then(|| address(ConnectedOver::Internet));
                std::iter::once(address(ConnectedOver::Vpc)).chain(public)
            })
            .collect();
        let reasons: Vec<_> =
            reasons.into_iter().map(|(interface, verdict)| (interface, verdict.unwrap_or_else(|why| why))).collect();
        if taken.is_empty() {
            let considered: Vec<_> =
                reasons.iter().map(|(interface, why)| format!("{} {} {why}", interface.name, interface.ip)).collect();
            return Err(HostError::NoAddress { considered: considered.join("; ") });
        }
        Ok((taken, reasons))
    }

    fn verdict(&self, bridges: &Patterns, interface: &Interface) -> Result<&'static str, &'static str> {
        if !interface.up {
            return Err("left out: the interface is down");
        }
        if interface.ip.is_unspecified() || interface.ip.is_multicast() {
            return Err("left out: not an address of one host");
        }
        if self.exclude.is_match(&interface.name) {
            return Err("left out: networkInterfaces.exclude matches");
        }
        if let Some(include) = &self.include {
            // What somebody names, they get.
            return if include.is_match(&interface.name) {
                Ok("taken: networkInterfaces.include matches")
            } else {
                Err("left out: networkInterfaces.include does not match")
            };
        }
        if interface.ip.is_loopback() {
            return Err("left out: loopback");
        }
        if is_link_local(interface.ip) {
            return Err("left out: link-local");
        }
        if bridges.is_match(&interface.name) {
            return Err("left out: a bridge of containers or virtual machines");
        }
        Ok(if interface.default_route { "taken: the default route's interface" } else { "taken" })
    }
}

/// The interface of the default route with the smallest metric, of the text of `/proc/net/route`.
fn default_interface(routes: &str) -> Option<String> {
    routes
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            let (name, destination, mask) = (fields.first()?, fields.get(1)?, fields.get(7)?);
            let metric: u32 = fields.get(6)?.parse().ok()?;
            (*destination == "00000000" && *mask == "00000000").then(|| (metric, (*name).to_owned()))
        })
        .min_by_key(|(metric, _)| *metric)
        .map(|(_, name)| name)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// Routed in the internet: none of the private, shared, documentation, benchmarking and reserved ranges.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            let shared = a == 100 && (64..128).contains(&b);
            let benchmarking = a == 198 && (18..20).contains(&b);
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_documentation()
                || ip.is_multicast()
                || shared
                || benchmarking
                || a == 0
                || a >= 240)
        }
        IpAddr::V6(ip) => {
            let documentation = ip.segments()[0] == 0x2001 && ip.segments()[1] == 0x0db8;
            ip.segments()[0] & 0xe000 == 0x2000 && !documentation
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, ip: &str) -> Interface {
        Interface { name: name.to_owned(), ip: ip.parse().unwrap(), up: true, default_route: name == "ens5" }
    }

    fn host() -> Vec<Interface> {
        vec![
            interface("lo", "127.0.0.1"),
            interface("docker0", "172.17.0.1"),
            interface("br-0a1b", "172.18.0.1"),
            interface("veth12", "10.9.9.9"),
            interface("eth1", "10.1.0.4"),
            interface("ens5", "fe80::1"),
            interface("ens5", "10.0.0.4"),
            interface("ens6", "52.1.2.3"),
        ]
    }

    fn names(addresses: &[HostAddress]) -> Vec<String> {
        addresses.iter().map(|address| format!("{} {:?}", address.ip, address.kind)).collect()
    }

    #[test]
    fn by_default_what_nobody_reaches_is_left_out_and_the_default_route_comes_first() {
        let basic = Basic::new(&[], &[]).unwrap();
        let (addresses, reasons) = basic.choose(host()).unwrap();
        assert_eq!(names(&addresses), ["10.0.0.4 Vpc", "10.1.0.4 Vpc", "52.1.2.3 Vpc", "52.1.2.3 Internet"]);
        let why = |ip: &str| reasons.iter().find(|(i, _)| i.ip.to_string() == ip).unwrap().1;
        assert_eq!(why("127.0.0.1"), "left out: loopback");
        assert_eq!(why("172.17.0.1"), "left out: a bridge of containers or virtual machines");
        assert_eq!(why("fe80::1"), "left out: link-local");
        assert_eq!(why("10.0.0.4"), "taken: the default route's interface");
    }

    #[test]
    fn rules_win_over_defaults() {
        let basic = Basic::new(&["^docker0$".to_owned(), "^eth".to_owned()], &["^eth1$".to_owned()]).unwrap();
        let (addresses, _) = basic.choose(host()).unwrap();
        assert_eq!(names(&addresses), ["172.17.0.1 Vpc"]);
    }

    #[test]
    fn nothing_left_says_what_was_looked_at() {
        let basic = Basic::new(&["^nope$".to_owned()], &[]).unwrap();
        let error = basic.choose(host()).unwrap_err().to_string();
        assert!(error.contains("ens5 10.0.0.4 left out: networkInterfaces.include does not match"), "{error}");
        let mut down = interface("ens5", "10.0.0.4");
        down.up = false;
        let error = Basic::new(&[], &[]).unwrap().choose(vec![down]).unwrap_err().to_string();
        assert!(error.contains("the interface is down"), "{error}");
    }

    #[test]
    fn the_default_route_of_the_smallest_metric() {
        let text = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
            wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
            ens5\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
            ens6\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        assert_eq!(default_interface(text).as_deref(), Some("ens5"));
        assert_eq!(default_interface("garbage\nmore"), None);
    }

    #[test]
    fn public_means_routed_in_the_internet() {
        for ip in ["52.1.2.3", "2a00:1450::1"] {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
        for ip in
            ["10.0.0.1", "100.64.0.1", "169.254.1.1", "192.0.2.1", "198.18.0.1", "fd00::1", "2001:db8::1", "0.0.0.0"]
        {
            assert!(!is_public(ip.parse().unwrap()), "{ip}");
        }
    }
}
