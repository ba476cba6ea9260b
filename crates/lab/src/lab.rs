//! A small internet: clusters with gateways and workloads, and a WAN between them.
//!
//! With namespaces, every machine has one of its own, on its cluster's bridge. All clusters use the
//! *same* private range (10.0.0.0/16): what works here needs no address plan. Only gateways have a
//! public address (198.18.N.0/24), and the WAN carries nothing else.
//!
//! On loopback, cluster N is 127.N.0.0/16, and other clusters reach its gateways by their relays
//! in 127.(100+N).0.0/16, which delay and drop as the WAN would.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use crate::{
    Host, LabError, Netns, Wan, netns,
    relay::{Relay, relay_address},
    rundir::RunDir,
    tun::{DEVICE, PUBLIC, TunWan, public_address},
    wan::ClusterNumber,
};

/// What a lab is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Network namespaces and TUN devices; needs root.
    Namespaces,
    /// Ranges of 127.0.0.0/8 and relays; needs nothing.
    Loopback,
}

impl Mode {
    /// The best mode that this process may use; with loopback, the reason why not namespaces.
    pub fn detect() -> (Self, Option<String>) {
        let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        match netns::permitted() {
            Err(error) => (Self::Loopback, Some(format!("network namespaces are refused ({error}); root has them"))),
            Ok(()) => match tun {
                Err(error) => (Self::Loopback, Some(format!("/dev/net/tun cannot be opened ({error})"))),
                Ok(_) => (Self::Namespaces, None),
            },
        }
    }
}

/// The network. Dropping it takes everything down; processes on its hosts are owned by the caller.
#[derive(Debug)]
pub struct Lab {
    wan: Wan,
    carrier: Carrier,
    clusters: BTreeMap<String, Cluster>,
    dir: RunDir,
}

#[derive(Debug)]
enum Carrier {
    Tun(TunWan),
    Relay(Relay),
}

#[derive(Debug)]
struct Cluster {
    number: ClusterNumber,
    /// The namespace of the bridge; none on loopback.
    hub: Option<Netns>,
    gateways: u8,
    workloads: u16,
}

impl Lab {
    /// An empty network; `seed` throws the WAN's dice.
    ///
    /// # Errors
    /// [`LabError::Kernel`] or [`LabError::Io`].
    pub fn new(mode: Mode, seed: u64) -> Result<Self, LabError> {
        Self::in_dir(mode, seed, &std::env::temp_dir())
    }

    /// The same, with its run directory below `base`.
    ///
    /// # Errors
    /// As [`Lab::new`].
    pub fn in_dir(mode: Mode, seed: u64, base: &Path) -> Result<Self, LabError> {
        let wan = Wan::new(seed);
        let carrier = match mode {
            Mode::Namespaces => Carrier::Tun(TunWan::start(wan.clone())?),
            Mode::Loopback => Carrier::Relay(Relay::start(wan.clone())?),
        };
        Ok(Self { wan, carrier, clusters: BTreeMap::new(), dir: RunDir::create(base)? })
    }

    /// What it is made of.
    pub fn mode(&self) -> Mode {
        match self.carrier {
            Carrier::Tun(_) => Mode::Namespaces,
            Carrier::Relay(_) => Mode::Loopback,
        }
    }

    /// The WAN, to set and to cut.
    pub fn wan(&self) -> &Wan {
        &self.wan
    }

    /// A directory for state and logs, removed with the lab.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Leaves [`Lab::dir`] behind, to be read after a failure.
    pub fn keep_dir(&mut self) {
        self.dir.keep();
    }

    /// Adds a cluster: its network, without machines.
    ///
    /// # Errors
    /// [`LabError::Full`], [`LabError::Kernel`] or [`LabError::Netlink`].
    pub fn add_cluster(&mut self, name: &str) -> Result<(), LabError> {
        let number = self.wan.add_cluster(name)?;
        let hub = match &self.carrier {
            Carrier::Relay(_) => None,
            Carrier::Tun(tun) => Some(build_hub(name, number, tun)?),
        };
        self.clusters.insert(name.to_owned(), Cluster { number, hub, gateways: 0, workloads: 0 });
        Ok(())
    }

    /// Adds a machine with a public address, for a gateway replica.
    ///
    /// # Errors
    /// [`LabError::NoCluster`], [`LabError::Full`], [`LabError::Kernel`] or [`LabError::Netlink`].
    pub fn add_gateway(&mut self, cluster: &str, name: &str) -> Result<Host, LabError> {
        let entry = self.clusters.get_mut(cluster).ok_or_else(|| LabError::NoCluster(cluster.to_owned()))?;
        if entry.gateways >= GATEWAYS_MAX {
            return Err(LabError::Full { what: "gateways a cluster", max: GATEWAYS_MAX.into() });
        }
        entry.gateways += 1;
        let octet = GATEWAY_OCTET + entry.gateways - 1;
        let number = entry.number;
        match (&entry.hub, &self.carrier) {
            (Some(hub), _) => {
                let public = public_address(number, octet);
                let local = Ipv4Addr::new(10, 0, 0, octet);
                let netns = plug_in(hub, name, &format!("g{}", entry.gateways), local)?;
                netns.address(INTERFACE, public.into(), 24)?;
                netns.route_via((PUBLIC.0.into(), PUBLIC.1), public_address(number, ROUTER_OCTET).into())?;
                Ok(Host::new(
                    cluster,
                    name,
                    local.into(),
                    Ipv4Addr::UNSPECIFIED.into(),
                    Some(public.into()),
                    Some(netns),
                ))
            }
            (None, Carrier::Relay(relay)) => {
                let local = Ipv4Addr::new(127, number, 0, octet);
                let public = relay_address(local);
                relay.add_gateway(number, local)?;
                Ok(Host::new(cluster, name, local.into(), local.into(), Some(public.into()), None))
            }
            (None, Carrier::Tun(_)) => Err(LabError::NoCluster(cluster.to_owned())),
        }
    }

    /// Adds a machine that only its own cluster reaches, for a workload and its sidecar.
    ///
    /// # Errors
    /// As [`Lab::add_gateway`].
    pub fn add_workload(&mut self, cluster: &str, name: &str) -> Result<Host, LabError> {
        let entry = self.clusters.get_mut(cluster).ok_or_else(|| LabError::NoCluster(cluster.to_owned()))?;
        if entry.workloads >= WORKLOADS_MAX {
            return Err(LabError::Full { what: "workloads a cluster", max: WORKLOADS_MAX.into() });
        }
        let index = entry.workloads;
        entry.workloads += 1;
        // 10.0.1.1 .. 10.0.1.250, 10.0.2.1 ...
        let (high, low) = ((1 + index / 250) as u8, (1 + index % 250) as u8);
        match &entry.hub {
            Some(hub) => {
                let local = Ipv4Addr::new(10, 0, high, low);
                let netns = plug_in(hub, name, &format!("w{index}"), local)?;
                Ok(Host::new(cluster, name, local.into(), Ipv4Addr::UNSPECIFIED.into(), None, Some(netns)))
            }
            None => {
                let local = Ipv4Addr::new(127, entry.number, high, low);
                Ok(Host::new(cluster, name, local.into(), local.into(), None, None))
            }
        }
    }

    /// Pulls a machine's cable, or puts it back. No effect on loopback.
    ///
    /// # Errors
    /// [`LabError::Netlink`].
    pub fn set_plugged(&self, host: &Host, plugged: bool) -> Result<(), LabError> {
        let Some(netns) = host.netns() else { return Ok(()) };
        if !plugged {
            return netns.down(INTERFACE);
        }
        netns.up(INTERFACE)?;
        // Taking an interface down removed its routes.
        netns.route_via(DEFAULT_ROUTE, ROUTER.into())?;
        match host.public() {
            Some(IpAddr::V4(public)) => {
                let [_, _, number, _] = public.octets();
                netns.route_via((PUBLIC.0.into(), PUBLIC.1), public_address(number, ROUTER_OCTET).into())
            }
            _ => Ok(()),
        }
    }
}

/// A cluster's namespace: the bridge with its router address, and the WAN's device.
fn build_hub(name: &str, number: ClusterNumber, tun: &TunWan) -> Result<Netns, LabError> {
    let hub = Netns::create(format!("{name}/router"))?;
    hub.up("lo")?;
    hub.bridge(BRIDGE)?;
    hub.address(BRIDGE, ROUTER.into(), PRIVATE_PREFIX_LEN)?;
    hub.address(BRIDGE, public_address(number, ROUTER_OCTET).into(), 24)?;
    hub.sysctl("ipv4/ip_forward", "1")?;
    tun.attach(number, &hub)?;
    hub.route_dev((PUBLIC.0.into(), PUBLIC.1), DEVICE)?;
    Ok(hub)
}

fn plug_in(hub: &Netns, name: &str, port: &str, local: Ipv4Addr) -> Result<Netns, LabError> {
    let netns = Netns::create(name)?;
    netns.up("lo")?;
    hub.plug(BRIDGE, port, &netns, INTERFACE)?;
    netns.address(INTERFACE, local.into(), PRIVATE_PREFIX_LEN)?;
    // Also what gives captured addresses (240.0.0.0/4, name servers) a route to be captured on.
    netns.route_via(DEFAULT_ROUTE, ROUTER.into())?;
    Ok(netns)
}

const BRIDGE: &str = "br0";
const INTERFACE: &str = "eth0";
const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const ROUTER_OCTET: u8 = 1;
const PRIVATE_PREFIX_LEN: u8 = 16;
const DEFAULT_ROUTE: (IpAddr, u8) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
/// Gateways are .10, .11, ...
const GATEWAY_OCTET: u8 = 10;
const GATEWAYS_MAX: u8 = 100;
/// A bridge holds 1,023 ports (BR_MAX_PORTS 1,024 less one), gateways included.
const WORKLOADS_MAX: u16 = 900;
