//! The packet filter's rules as text for `nft -f -`. Pure.

use std::fmt::{self, Write};
use std::net::IpAddr;

use ipnet::IpNet;

/// The table that is ours: nothing outside it is ever touched.
pub const TABLE: &str = "isthmus_proxy";
/// The group of the sidecar's own sockets, as in Istio.
pub const GROUP: u32 = 1337;

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest.
    pub last: u16,
}

impl From<u16> for PortRange {
    fn from(port: u16) -> Self {
        Self { first: port, last: port }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { self.first.fmt(f) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

/// Where captured connections go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redirect {
    /// The sidecar's address. If it is unspecified, packets go to the address of the interface
    /// that they come in on (127.0.0.1 or ::1 for the workload's own).
    pub listen: IpAddr,
    /// Port of the workload's connections (15001).
    pub outbound: u16,
    /// Port of captured plaintext to the workload (15006).
    pub inbound: u16,
    /// Port of the DNS server (15053) on 127.0.0.1 and ::1; `None` leaves DNS alone.
    pub dns: Option<u16>,
}

/// What is captured in this network namespace, and what is not.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Where to.
    pub redirect: Redirect,
    /// The group of the sidecar's sockets; usually [`GROUP`].
    pub own_group: u32,
    /// A user whose packets pass too: the sidecar's, where it runs as a user of its own.
    pub own_user: Option<u32>,
    /// Only questions to these name servers are captured; empty means all of port 53. A resolver
    /// on this machine asks its own upstream: captured as well, it would be asked again in a circle.
    pub name_servers: Vec<IpAddr>,
    /// The sidecar's own ports that others reach directly (15008, 15020, 15021).
    pub own_ports: Vec<u16>,
    /// Ports of destinations that are not captured.
    pub exclude_outbound_ports: Vec<PortRange>,
    /// Destinations that are not captured.
    pub exclude_outbound_ranges: Vec<IpNet>,
    /// The workload's ports that are not captured.
    pub exclude_inbound_ports: Vec<PortRange>,
}

impl Rules {
    /// Captures everything but the sidecar's own packets and `own_ports`.
    pub fn new(redirect: Redirect, own_ports: Vec<u16>) -> Self {
        Self {
            redirect,
            own_group: GROUP,
            own_user: None,
            name_servers: Vec::new(),
            own_ports,
            exclude_outbound_ports: Vec::new(),
            exclude_outbound_ranges: Vec::new(),
            exclude_inbound_ports: Vec::new(),
        }
    }

    /// The rules in one transaction that replaces what an earlier run left behind.
    pub fn text(&self) -> String {
        let mut text = Self::removal();
        let mut line = |line: fmt::Arguments<'_>| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{line}");
        };
        line(format_args!("table inet {TABLE} {{"));
        line(format_args!("  chain output {{"));
        line(format_args!("    type nat hook output priority -100; policy accept;"));
        self.output(&mut line);
        line(format_args!("  }}"));
        line(format_args!("  chain prerouting {{"));
        line(format_args!("    type nat hook prerouting priority -100; policy accept;"));
        self.prerouting(&mut line);
        line(format_args!("  }}"));
        line(format_args!("}}"));
        text
    }

    /// Takes the table away, whether it is there or not, in one transaction.
    pub fn removal() -> String {
        // Naming the table first makes it exist: `delete` alone fails where there is none.
        format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
    }

    fn output(&self, line: &mut impl FnMut(fmt::Arguments<'_>)) {
        line(format_args!("    meta skgid {} return", self.own_group));
        if let Some(user) = self.own_user {
            line(format_args!("    meta skuid {user} return"));
        }
        // Before the loopback rule: the name server may be 127.0.0.53.
        if let Some(port) = self.redirect.dns {
            self.dns(port, line);
        }
        // Istio also sends the sidecar's own calls to its pod's address through the inbound port; ours
        // go to 15008 or to the workload itself, and passed above. The workload's calls to itself are its own.
        line(format_args!("    oif \"lo\" return"));
        if let Some(ports) = set(&self.exclude_outbound_ports) {
            line(format_args!("    tcp dport {ports} return"));
        }
        for range in &self.exclude_outbound_ranges {
            let family = if matches!(range, IpNet::V4(_)) { "ip" } else { "ip6" };
            line(format_args!("    {family} daddr {} return", range.trunc()));
        }
        self.redirect_tcp(self.redirect.outbound, line);
    }

    fn dns(&self, port: u16, line: &mut impl FnMut(fmt::Arguments<'_>)) {
        if self.name_servers.is_empty() {
            line(format_args!("    udp dport 53 redirect to :{port}"));
            line(format_args!("    tcp dport 53 redirect to :{port}"));
        }
        for server in &self.name_servers {
            let family = if server.is_ipv4() { "ip" } else { "ip6" };
            line(format_args!("    {family} daddr {server} udp dport 53 redirect to :{port}"));
            line(format_args!("    {family} daddr {server} tcp dport 53 redirect to :{port}"));
        }
    }

    fn prerouting(&self, line: &mut impl FnMut(fmt::Arguments<'_>)) {
        line(format_args!("    iif \"lo\" return"));
        // What is only routed through this namespace is somebody else's.
        line(format_args!("    fib daddr type != local return"));
        let own: Vec<PortRange> = self.own_ports.iter().copied().map(PortRange::from).collect();
        if let Some(ports) = set(&own) {
            line(format_args!("    tcp dport {ports} return"));
        }
        if let Some(ports) = set(&self.exclude_inbound_ports) {
            line(format_args!("    tcp dport {ports} return"));
        }
        self.redirect_tcp(self.redirect.inbound, line);
    }

    fn redirect_tcp(&self, port: u16, line: &mut impl FnMut(fmt::Arguments<'_>)) {
        match self.redirect.listen {
            listen if listen.is_unspecified() => line(format_args!("    meta l4proto tcp redirect to :{port}")),
            IpAddr::V4(listen) => {
                line(format_args!("    meta nfproto ipv4 meta l4proto tcp dnat ip to {listen}:{port}"));
                // Nobody listens there for the other family: refused, never passed on in plaintext.
                line(format_args!("    meta nfproto ipv6 meta l4proto tcp redirect to :{port}"));
            }
            IpAddr::V6(listen) => {
                line(format_args!("    meta nfproto ipv6 meta l4proto tcp dnat ip6 to [{listen}]:{port}"));
                line(format_args!("    meta nfproto ipv4 meta l4proto tcp redirect to :{port}"));
            }
        }
    }
}

/// `{ 22, 6000-6063 }`; `None` for no port.
fn set(ranges: &[PortRange]) -> Option<String> {
    let mut ranges: Vec<PortRange> = ranges.iter().copied().filter(|range| range.first <= range.last).collect();
    ranges.sort_by_key(|range| range.first);
    // nft refuses a set whose intervals overlap.
    ranges.dedup_by(|next, kept| {
        let overlaps = next.first <= kept.last;
        if overlaps {
            kept.last = kept.last.max(next.last);
        }
        overlaps
    });
    let words: Vec<String> = ranges.iter().map(ToString::to_string).collect();
    (!words.is_empty()).then(|| format!("{{ {} }}", words.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redirect(listen: &str) -> Redirect {
        Redirect { listen: listen.parse().unwrap(), outbound: 15001, inbound: 15006, dns: Some(15053) }
    }

    #[test]
    fn the_default_rules_are_these() {
        let rules = Rules::new(redirect("0.0.0.0"), vec![15008, 15020, 15021]);
        let expected = "\
table inet isthmus_proxy
delete table inet isthmus_proxy
table inet isthmus_proxy {
  chain output {
    type nat hook output priority -100; policy accept;
    meta skgid 1337 return
    udp dport 53 redirect to :15053
    tcp dport 53 redirect to :15053
    oif \"lo\" return
    meta l4proto tcp redirect to :15001
  }
  chain prerouting {
    type nat hook prerouting priority -100; policy accept;
    iif \"lo\" return
    fib daddr type != local return
    tcp dport { 15008, 15020, 15021 } return
    meta l4proto tcp redirect to :15006
  }
}
";
        assert_eq!(rules.text(), expected);
    }

    #[test]
    fn exclusions_stand_before_what_they_exclude_from() {
        let mut rules = Rules::new(redirect("10.1.0.2"), vec![15008]);
        rules.own_user = Some(1337);
        rules.name_servers = vec!["127.0.0.53".parse().unwrap(), "fd00::53".parse().unwrap()];
        rules.exclude_outbound_ports =
            vec![22.into(), PortRange { first: 6000, last: 6063 }, PortRange { first: 6010, last: 7000 }];
        rules.exclude_outbound_ranges = vec!["169.254.169.254/16".parse().unwrap(), "fe80::/10".parse().unwrap()];
        rules.exclude_inbound_ports = vec![9100.into()];
        let text = rules.text();
        let at = |line: &str| text.find(line).unwrap_or_else(|| panic!("{line} is missing in {text}"));
        let outbound = at("meta nfproto ipv4 meta l4proto tcp dnat ip to 10.1.0.2:15001");
        for line in [
            "meta skuid 1337 return",
            "ip daddr 127.0.0.53 udp dport 53 redirect to :15053",
            "ip6 daddr fd00::53 tcp dport 53 redirect to :15053",
            "tcp dport { 22, 6000-7000 } return",
            "ip daddr 169.254.0.0/16 return",
            "ip6 daddr fe80::/10 return",
        ] {
            assert!(at(line) < outbound, "{line}");
        }
        assert!(at("tcp dport { 9100 } return") < at("dnat ip to 10.1.0.2:15006"));
        assert!(!text.contains("    udp dport 53"), "only questions to the named servers");
    }
}
