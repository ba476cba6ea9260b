//! Virtual addresses: one IPv4 and one IPv6 address per host that has none of its own.
//!
//! Deterministic, so that replicas that start from the same stored map agree: a host's place follows
//! from its name, with the next free place taken on a collision. Never gives an address to another
//! host within [`REST`], since callers cache what DNS told them. Reads no clock; who stores the map
//! does so before handing an address out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::Host;

/// How long an address rests before another host may have it.
pub const REST: Duration = Duration::from_secs(24 * 3600);

/// Places in 240.240.0.0/12, without its first and last address.
const PLACES: u32 = (1 << 20) - 2;
const V4_BASE: u32 = u32::from_be_bytes([240, 240, 0, 0]);

/// Which host has which addresses, and which addresses rest. Serialised as it must be stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Addresses {
    prefix: Ipv6Net,
    by_host: BTreeMap<Host, Vec<IpAddr>>,
    by_place: BTreeMap<u32, Host>,
    resting: BTreeMap<u32, Resting>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Resting {
    host: Host,
    since_unix_s: u64,
}

/// All places are in use or rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "all {PLACES} virtual addresses are in use or rest for 24 h; give some hosts addresses of their own (ServiceEntry spec.addresses)"
)]
pub struct Exhausted;

impl Addresses {
    /// No host has an address yet. The IPv6 range is a ULA /64 that follows from the mesh's name (RFC 4193).
    pub fn new(mesh: &str) -> Self {
        let id = xxh3_64(mesh.as_bytes()).to_be_bytes();
        let prefix = Ipv6Addr::from([0xfd, id[0], id[1], id[2], id[3], id[4], id[5], id[6], 0, 0, 0, 0, 0, 0, 0, 0]);
        let prefix = Ipv6Net::new_assert(prefix, 64);
        Self { prefix, by_host: BTreeMap::new(), by_place: BTreeMap::new(), resting: BTreeMap::new() }
    }

    /// Both ranges: an address inside that no host has is refused, never passed on.
    pub fn ranges(&self) -> [IpNet; 2] {
        [IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from(V4_BASE), 12)), IpNet::V6(self.prefix)]
    }

    /// Addresses by host: IPv4 first, then IPv6.
    pub fn by_host(&self) -> &BTreeMap<Host, Vec<IpAddr>> {
        &self.by_host
    }

    /// The host that has `address` now.
    pub fn host_of(&self, address: IpAddr) -> Option<&Host> {
        self.by_place.get(&self.place_of(address)?)
    }

    /// Gives every host of `hosts` that has none an address; says whether anything changed.
    ///
    /// A host that returns while its old address rests gets it back. Hosts that are not named keep theirs:
    /// see [`Addresses::release`].
    ///
    /// # Errors
    /// [`Exhausted`]; hosts before the one that found no place have theirs.
    pub fn allocate<'a>(
        &mut self,
        hosts: impl IntoIterator<Item = &'a Host>,
        now_unix_s: u64,
    ) -> Result<bool, Exhausted> {
        // Sorted, so that two replicas that see the same hosts in another order resolve collisions alike.
        let new: BTreeSet<&Host> = hosts.into_iter().filter(|host| !self.by_host.contains_key(*host)).collect();
        for host in &new {
            let place = self.place_for(host, now_unix_s).ok_or(Exhausted)?;
            self.resting.remove(&place);
            self.put((*host).clone(), place);
        }
        Ok(!new.is_empty())
    }

    /// Takes a host's addresses away: they rest. For hosts that their owner deleted, not for silent ones.
    pub fn release(&mut self, host: &Host, now_unix_s: u64) -> bool {
        let Some(addresses) = self.by_host.remove(host) else { return false };
        let place = addresses.first().and_then(|address| self.place_of(*address));
        if let Some(place) = place {
            self.by_place.remove(&place);
            self.resting.insert(place, Resting { host: host.clone(), since_unix_s: now_unix_s });
        }
        true
    }

    /// Forgets what has rested long enough; says whether anything changed.
    pub fn forget_rested(&mut self, now_unix_s: u64) -> bool {
        let before = self.resting.len();
        self.resting.retain(|_, rest| !rested(rest, now_unix_s));
        before != self.resting.len()
    }

    fn put(&mut self, host: Host, place: u32) {
        let v6 = u128::from(self.prefix.network()) | u128::from(place);
        let addresses = vec![IpAddr::V4(Ipv4Addr::from(V4_BASE + place)), IpAddr::V6(Ipv6Addr::from(v6))];
        self.by_place.insert(place, host.clone());
        self.by_host.insert(host, addresses);
    }

    fn place_for(&self, host: &Host, now_unix_s: u64) -> Option<u32> {
        let start = u32::try_from(xxh3_64(host.as_str().as_bytes()) % u64::from(PLACES)).ok()?;
        let own = |place: &u32| self.resting.get(place).is_some_and(|rest| rest.host == *host);
        let free = |place: &u32| {
            !self.by_place.contains_key(place)
                && self.resting.get(place).is_none_or(|rest| rest.host == *host || rested(rest, now_unix_s))
        };
        // Places are probed from the name's own place on; 1..=PLACES leaves out the range's ends.
        let probed = || (0..PLACES).map(|step| (start + step) % PLACES + 1);
        let old = if self.resting.is_empty() { None } else { self.resting.keys().copied().find(own) };
        old.or_else(|| probed().find(free))
    }

    fn place_of(&self, address: IpAddr) -> Option<u32> {
        let place = match address {
            IpAddr::V4(v4) => u32::from(v4).checked_sub(V4_BASE)?,
            IpAddr::V6(v6) if self.prefix.contains(&v6) => {
                u32::try_from(u128::from(v6) - u128::from(self.prefix.network())).ok()?
            }
            IpAddr::V6(_) => return None,
        };
        (1..=PLACES).contains(&place).then_some(place)
    }
}

fn rested(rest: &Resting, now_unix_s: u64) -> bool {
    // A clock that ran backwards makes addresses rest longer, never shorter.
    now_unix_s.saturating_sub(rest.since_unix_s) >= REST.as_secs()
}

/// What lies on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    prefix: Ipv6Net,
    places: BTreeMap<Host, u32>,
    resting: BTreeMap<u32, Resting>,
}

impl From<Addresses> for Stored {
    fn from(addresses: Addresses) -> Self {
        let places = addresses.by_place.into_iter().map(|(place, host)| (host, place)).collect();
        Self { prefix: addresses.prefix, places, resting: addresses.resting }
    }
}

impl TryFrom<Stored> for Addresses {
    type Error = String;
    fn try_from(stored: Stored) -> Result<Self, String> {
        if stored.prefix.prefix_len() != 64 {
            return Err(format!("{} is not a /64", stored.prefix));
        }
        let mut addresses = Self {
            prefix: stored.prefix.trunc(),
            by_host: BTreeMap::new(),
            by_place: BTreeMap::new(),
            resting: stored.resting,
        };
        for (host, place) in stored.places {
            if !(1..=PLACES).contains(&place) || addresses.by_place.contains_key(&place) {
                return Err(format!("place {place} of {host} is out of range or given twice"));
            }
            addresses.put(host, place);
        }
        Ok(addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(names: impl IntoIterator<Item = u32>) -> Vec<Host> {
        names.into_iter().map(|n| format!("s{n}.shop.svc.clusterset.local").parse().expect("valid")).collect()
    }

    #[test]
    fn order_of_arrival_does_not_matter_and_all_addresses_differ() {
        let mut names = hosts(0..5_000);
        let mut one = Addresses::new("demo");
        assert_eq!(one.allocate(&names, 0), Ok(true));
        names.reverse();
        let mut two = Addresses::new("demo");
        assert_eq!(two.allocate(&names, 9), Ok(true));
        assert_eq!(one, two);
        let all: BTreeSet<_> = one.by_host().values().flatten().collect();
        assert_eq!(all.len(), 10_000);
        assert!(all.iter().all(|address| one.ranges().iter().any(|range| range.contains(*address))));
        assert!(names.iter().all(|name| one.by_host()[name].iter().all(|address| one.host_of(*address) == Some(name))));
        assert_eq!(one.allocate(&names, 10), Ok(false), "nothing new");
    }

    #[test]
    fn a_released_address_rests_a_day_but_returns_to_its_own_host() {
        let (owner, rival) = two_hosts_of_one_place();
        let mut addresses = Addresses::new("demo");
        addresses.allocate([&owner], 0).expect("room");
        let had = addresses.by_host()[&owner].clone();
        assert!(addresses.release(&owner, 100));
        assert_eq!(addresses.host_of(had[0]), None);

        let day = REST.as_secs();
        let mut early = addresses.clone();
        early.allocate([&rival], 100 + day - 1).expect("room");
        assert_ne!(early.by_host()[&rival], had, "it still rests");
        let mut late = addresses.clone();
        late.allocate([&rival], 100 + day).expect("room");
        assert_eq!(late.by_host()[&rival], had);

        addresses.allocate([&owner], 200).expect("room");
        assert_eq!(addresses.by_host()[&owner], had, "back to its own host at once");
    }

    /// Among 10,000 names in a million places some fifty pairs fall together.
    fn two_hosts_of_one_place() -> (Host, Host) {
        let empty = Addresses::new("demo");
        let mut seen = BTreeMap::new();
        let pair = hosts(0..10_000).into_iter().find_map(|host| {
            let place = empty.place_for(&host, 0).expect("room");
            seen.insert(place, host.clone()).map(|other| (other, host))
        });
        pair.expect("two names fall on one place")
    }

    #[test]
    fn the_stored_map_comes_back_and_a_broken_one_is_refused() {
        let names = hosts(0..50);
        let mut addresses = Addresses::new("demo");
        addresses.allocate(&names, 0).expect("room");
        addresses.release(&names[3], 7);
        let json = serde_json::to_string(&addresses).expect("plain data");
        assert_eq!(serde_json::from_str::<Addresses>(&json).expect("same"), addresses);

        let broken = r#"{"prefix":"fd00::/64","places":{"a.b":7,"c.d":7},"resting":{}}"#;
        assert!(serde_json::from_str::<Addresses>(broken).is_err());
        let outside = r#"{"prefix":"fd00::/64","places":{"a.b":1048575},"resting":{}}"#;
        assert!(serde_json::from_str::<Addresses>(outside).is_err());
    }
}
