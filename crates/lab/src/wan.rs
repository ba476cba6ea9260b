//! The WAN's settings: which path does what to packets, changeable while traffic flows.
//!
//! A [`Wan`] is a handle; clones share one network. Every ordered pair of clusters has its own
//! [`Shaper`] and its own seed, so that one path's dice do not depend on another's traffic.
//! The packets themselves are moved by [`crate::tun`] or [`crate::relay`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    LabError, PathConfig, Shaper,
    shaper::{Fate, PathStats},
};

/// A cluster's number within one lab, from 1.
pub type ClusterNumber = u8;

/// The paths between the clusters of a lab.
#[derive(Debug, Clone)]
pub struct Wan {
    shared: Arc<Mutex<Paths>>,
    epoch: Instant,
}

#[derive(Debug)]
struct Paths {
    seed: u64,
    clusters: Vec<String>,
    shapers: HashMap<(ClusterNumber, ClusterNumber), Shaper>,
    default: PathConfig,
}

impl Wan {
    /// A WAN without clusters, whose paths start as perfect wires.
    pub fn new(seed: u64) -> Self {
        let paths = Paths { seed, clusters: Vec::new(), shapers: HashMap::new(), default: PathConfig::default() };
        Self { shared: Arc::new(Mutex::new(paths)), epoch: Instant::now() }
    }

    /// What paths are that nobody has set; set it before the clusters talk.
    pub fn set_default(&self, config: PathConfig) {
        self.paths().default = config;
    }

    /// Adds a cluster and gives its number.
    ///
    /// # Errors
    /// [`LabError::Full`] beyond [`CLUSTERS_MAX`].
    pub fn add_cluster(&self, name: &str) -> Result<ClusterNumber, LabError> {
        let mut paths = self.paths();
        if paths.clusters.len() >= CLUSTERS_MAX {
            return Err(LabError::Full { what: "clusters", max: CLUSTERS_MAX });
        }
        paths.clusters.push(name.to_owned());
        Ok(paths.clusters.len() as ClusterNumber)
    }

    /// Sets one direction.
    ///
    /// # Errors
    /// [`LabError::NoCluster`].
    pub fn set_one_way(&self, from: &str, to: &str, config: PathConfig) -> Result<(), LabError> {
        self.change(from, to, |old| *old = config)
    }

    /// Sets both directions alike.
    ///
    /// # Errors
    /// [`LabError::NoCluster`].
    pub fn set(&self, a: &str, b: &str, config: PathConfig) -> Result<(), LabError> {
        self.set_one_way(a, b, config.clone())?;
        self.set_one_way(b, a, config)
    }

    /// Changes one direction in place, as `wan.change("a", "b", |path| path.loss = 0.01)`.
    ///
    /// # Errors
    /// [`LabError::NoCluster`].
    pub fn change(&self, from: &str, to: &str, edit: impl FnOnce(&mut PathConfig)) -> Result<(), LabError> {
        let mut paths = self.paths();
        let pair = (paths.number(from)?, paths.number(to)?);
        let shaper = paths.shaper(pair);
        let mut config = shaper.config().clone();
        edit(&mut config);
        shaper.reconfigure(config);
        Ok(())
    }

    /// Lets nothing pass from `from` to `to`; the other direction stays as it is.
    ///
    /// # Errors
    /// [`LabError::NoCluster`].
    pub fn block(&self, from: &str, to: &str) -> Result<(), LabError> {
        self.change(from, to, |path| path.blocked = true)
    }

    /// Cuts a cluster off from all others, both ways.
    ///
    /// # Errors
    /// [`LabError::NoCluster`].
    pub fn isolate(&self, cluster: &str) -> Result<(), LabError> {
        self.around(cluster, true)
    }

    /// Ends what [`Wan::block`] and [`Wan::isolate`] did to a cluster's paths.
    ///
    /// # Errors
    /// [`LabError::NoCluster`].
    pub fn heal(&self, cluster: &str) -> Result<(), LabError> {
        self.around(cluster, false)
    }

    /// What one direction did so far.
    ///
    /// # Errors
    /// [`LabError::NoCluster`].
    pub fn stats(&self, from: &str, to: &str) -> Result<PathStats, LabError> {
        let mut paths = self.paths();
        let pair = (paths.number(from)?, paths.number(to)?);
        Ok(paths.shaper(pair).stats())
    }

    /// Time since this WAN began: what its shapers call `now`.
    pub fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Offers a packet to the path between two clusters.
    pub(crate) fn offer(&self, from: ClusterNumber, to: ClusterNumber, now: Duration, len: usize, udp: bool) -> Fate {
        self.paths().shaper((from, to)).offer(now, len, udp)
    }

    fn around(&self, cluster: &str, blocked: bool) -> Result<(), LabError> {
        let others: Vec<String> = self.paths().clusters.iter().filter(|name| *name != cluster).cloned().collect();
        for other in &others {
            self.change(cluster, other, |path| path.blocked = blocked)?;
            self.change(other, cluster, |path| path.blocked = blocked)?;
        }
        Ok(())
    }

    fn paths(&self) -> MutexGuard<'_, Paths> {
        // A panic elsewhere leaves plain numbers behind; the lab goes on to report the panic.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Paths {
    fn number(&self, name: &str) -> Result<ClusterNumber, LabError> {
        let position = self.clusters.iter().position(|known| known == name);
        position.map(|index| (index + 1) as ClusterNumber).ok_or_else(|| LabError::NoCluster(name.to_owned()))
    }

    fn shaper(&mut self, pair: (ClusterNumber, ClusterNumber)) -> &mut Shaper {
        let seed = self.seed ^ (u64::from(pair.0) << 32 | u64::from(pair.1));
        self.shapers.entry(pair).or_insert_with(|| Shaper::new(self.default.clone(), seed))
    }
}

/// One octet of an address names the cluster, in loopback mode twice (real and relay): 1..=99.
pub const CLUSTERS_MAX: usize = 99;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shaper::DropReason;

    #[test]
    fn a_one_way_block_leaves_the_other_way_open_and_heals() {
        let wan = Wan::new(1);
        let (a, b) = (wan.add_cluster("a").unwrap(), wan.add_cluster("b").unwrap());
        wan.set("a", "b", PathConfig::delay(Duration::from_millis(5))).unwrap();
        wan.block("a", "b").unwrap();
        let offer = |from, to| wan.offer(from, to, Duration::ZERO, 100, true);
        assert_eq!(offer(a, b), Fate::Drop(DropReason::Blocked));
        assert_eq!(offer(b, a), Fate::Deliver(Duration::from_millis(5)));
        wan.heal("b").unwrap();
        assert_eq!(offer(a, b), Fate::Deliver(Duration::from_millis(5)), "its delay is kept");
    }

    #[test]
    fn an_unknown_cluster_is_named() {
        let error = Wan::new(1).block("here", "there").unwrap_err();
        assert_eq!(error.to_string(), "the lab has no cluster here");
    }
}
