//! Virtual addresses of hosts: given by the member, kept, the same in all replicas, not reused within a day.
//!
//! Pure: time comes in. 240.240.0.0/12 and a ULA /64 (DESIGN: never routed, so never anybody's real address).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use isthmus_model::Host;
use serde::{Deserialize, Serialize};

/// An address rests this long after its host is gone.
pub const ADDRESS_QUARANTINE_S: u64 = 24 * 3600;
/// Addresses of 240.240.0.0/12.
const COUNT: u32 = 1 << 20;
const BASE_V4: u32 = u32::from_be_bytes([240, 240, 0, 0]);
const BASE_V6: u128 = 0xfd97_1574_6d75_7300_0000_0000_0000_0000;

/// The ranges in which an unknown address is refused, never passed on.
pub fn mesh_ranges() -> Vec<IpNet> {
    let v4 = ipnet::Ipv4Net::new(Ipv4Addr::from(BASE_V4), 12).expect("a prefix of at most 32");
    let v6 = ipnet::Ipv6Net::new(Ipv6Addr::from(BASE_V6), 64).expect("a prefix of at most 128");
    vec![v4.into(), v6.into()]
}

/// Which host has which addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    #[serde(default)]
    numbers: BTreeMap<Host, u32>,
    /// Number -> since when its host is gone.
    #[serde(default)]
    resting: BTreeMap<u32, (Host, u64)>,
    #[serde(skip)]
    by_host: BTreeMap<Host, Vec<IpAddr>>,
}

impl Addresses {
    /// Rebuilds the index after reading from disk.
    pub fn restored(mut self) -> Self {
        self.by_host = self.numbers.iter().map(|(host, number)| (host.clone(), addresses(*number))).collect();
        self
    }

    /// The addresses of every host that has some.
    pub fn by_host(&self) -> &BTreeMap<Host, Vec<IpAddr>> {
        &self.by_host
    }

    /// Gives every one of `hosts` an address and lets those of others rest. A host that comes back within
    /// the day gets its old one. Wildcards and hosts beyond the range get none.
    pub fn allocate(&mut self, hosts: &[Host], now_unix_s: u64) {
        let gone: Vec<Host> = self.numbers.keys().filter(|host| !hosts.contains(host)).cloned().collect();
        for host in gone {
            if let Some(number) = self.numbers.remove(&host) {
                self.by_host.remove(&host);
                self.resting.insert(number, (host, now_unix_s));
            }
        }
        self.resting.retain(|_, (_, since)| now_unix_s.saturating_sub(*since) < ADDRESS_QUARANTINE_S);
        let mut taken: std::collections::BTreeSet<u32> = self.numbers.values().copied().collect();
        for host in hosts.iter().filter(|host| !host.is_wildcard()) {
            if self.numbers.contains_key(host) {
                continue;
            }
            let back = self.resting.iter().find(|(_, (old, _))| old == host).map(|(number, _)| *number);
            let fresh = || (1..COUNT - 1).find(|one| !taken.contains(one) && !self.resting.contains_key(one));
            let Some(number) = back.or_else(fresh) else { continue };
            self.resting.remove(&number);
            taken.insert(number);
            self.numbers.insert(host.clone(), number);
            self.by_host.insert(host.clone(), addresses(number));
        }
    }
}

fn addresses(number: u32) -> Vec<IpAddr> {
    vec![Ipv4Addr::from(BASE_V4 + number).into(), Ipv6Addr::from(BASE_V6 + u128::from(number)).into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> Host {
        text.parse().expect("valid")
    }

    #[test]
    fn addresses_are_stable_and_rest_a_day() {
        let mut all = Addresses::default();
        let (cart, web) = (host("cart.shop.svc.clusterset.local"), host("web.shop.svc.clusterset.local"));
        all.allocate(&[cart.clone(), web.clone()], 0);
        let first = all.by_host()[&cart].clone();
        assert_eq!(first[0].to_string(), "240.240.0.1");
        all.allocate(std::slice::from_ref(&web), 10);
        assert!(!all.by_host().contains_key(&cart));
        let new = host("new.shop.svc.clusterset.local");
        all.allocate(&[web.clone(), new.clone()], 20);
        assert_ne!(all.by_host()[&new], first, "cart's address rests");
        all.allocate(&[cart.clone(), web, new], 30);
        assert_eq!(all.by_host()[&cart], first, "and waits for cart");
    }

    #[test]
    fn what_is_kept_on_disk_gives_the_same_addresses() {
        let mut all = Addresses::default();
        all.allocate(&[host("cart.shop.svc.clusterset.local")], 0);
        let json = serde_json::to_string(&all).expect("plain values");
        let back: Addresses = serde_json::from_str(&json).expect("as written");
        assert_eq!(back.restored(), all);
    }
}
