//! Devices, addresses and routes of a [`Netns`], by netlink.
//!
//! Blocking: every call opens a netlink socket on a thread inside the namespace, asks, and waits
//! for the kernel's answer (about a millisecond). Needs no `ip` command.

use std::{future::Future, net::IpAddr};

use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::link::{BridgePortState, InfoBridgePort, InfoPortData, LinkAttribute, LinkInfo, LinkMessage},
};

use crate::{LabError, Netns};

impl Netns {
    /// Brings an interface up.
    ///
    /// # Errors
    /// [`LabError::NoInterface`] or [`LabError::Netlink`].
    pub fn up(&self, interface: &str) -> Result<(), LabError> {
        self.ask(format!("bring {interface} up"), async move |handle, look| {
            let index = look.index(&handle, interface).await?;
            look.done(handle.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await)
        })
    }

    /// Takes an interface down, as a pulled cable.
    ///
    /// # Errors
    /// [`LabError::NoInterface`] or [`LabError::Netlink`].
    pub fn down(&self, interface: &str) -> Result<(), LabError> {
        self.ask(format!("take {interface} down"), async move |handle, look| {
            let index = look.index(&handle, interface).await?;
            look.done(handle.link().set(LinkUnspec::new_with_index(index).down().build()).execute().await)
        })
    }

    /// Sets the MTU of an interface.
    ///
    /// # Errors
    /// [`LabError::NoInterface`] or [`LabError::Netlink`].
    pub fn mtu(&self, interface: &str, mtu: u32) -> Result<(), LabError> {
        self.ask(format!("set the MTU of {interface} to {mtu}"), async move |handle, look| {
            let index = look.index(&handle, interface).await?;
            look.done(handle.link().set(LinkUnspec::new_with_index(index).mtu(mtu).build()).execute().await)
        })
    }

    /// Sets how many packets an interface keeps for a slow reader.
    ///
    /// # Errors
    /// [`LabError::NoInterface`] or [`LabError::Netlink`].
    pub fn queue_len(&self, interface: &str, packets: u32) -> Result<(), LabError> {
        self.ask(format!("let {interface} keep {packets} packets"), async move |handle, look| {
            let index = look.index(&handle, interface).await?;
            look.done(handle.link().set(LinkUnspec::new_with_index(index).txqueuelen(packets).build()).execute().await)
        })
    }

    /// Makes a bridge, up.
    ///
    /// # Errors
    /// [`LabError::Netlink`].
    pub fn bridge(&self, name: &str) -> Result<(), LabError> {
        self.ask(format!("make the bridge {name}"), async move |handle, look| {
            look.done(handle.link().add(LinkBridge::new(name).build()).execute().await)
        })
    }

    /// Plugs `host` into a bridge of this namespace: a veth pair, `interface` there and `port` here.
    ///
    /// # Errors
    /// [`LabError::NoInterface`] or [`LabError::Netlink`].
    pub fn plug(&self, bridge: &str, port: &str, host: &Netns, interface: &str) -> Result<(), LabError> {
        let there = host.raw_fd();
        // The pair is made with a passing name: `interface` may exist here too.
        let passing = format!("{port}-x");
        self.ask(format!("plug {} into {bridge}", host.name()), async move |handle, look| {
            let bridge = look.index(&handle, bridge).await?;
            look.done(handle.link().add(LinkVeth::new(port, &passing).build()).execute().await)?;
            let far = look.index(&handle, &passing).await?;
            let rename = LinkUnspec::new_with_index(far).name(interface).setns_by_fd(there).build();
            look.done(handle.link().set(rename).execute().await)?;
            let near = look.index(&handle, port).await?;
            let attach = LinkUnspec::new_with_index(near).controller(bridge).up().build();
            look.done(handle.link().set(attach).execute().await)
        })?;
        host.up(interface)?;
        self.wait_forwarding(port)
    }

    /// Waits until a bridge forwards to a port: the kernel enables one a while (20 ms, under load
    /// more) after its carrier is there, and an ARP question lost before costs its asker a second.
    fn wait_forwarding(&self, port: &str) -> Result<(), LabError> {
        self.ask(format!("wait for the bridge port {port}"), async move |handle, look| {
            for _ in 0..FORWARDING_POLLS {
                let found = handle.link().get().match_name(port).execute().try_next().await;
                let link = found.map_err(LabError::netlink(look.what.clone()))?;
                if link.is_some_and(|link| is_forwarding(&link)) {
                    break;
                }
                // Blocking is fine: this thread has nothing else to do.
                std::thread::sleep(FORWARDING_POLL);
            }
            Ok(())
        })
    }

    /// Gives an interface an address.
    ///
    /// # Errors
    /// [`LabError::NoInterface`] or [`LabError::Netlink`].
    pub fn address(&self, interface: &str, address: IpAddr, prefix_len: u8) -> Result<(), LabError> {
        self.ask(format!("give {interface} {address}/{prefix_len}"), async move |handle, look| {
            let index = look.index(&handle, interface).await?;
            look.done(handle.address().add(index, address, prefix_len).execute().await)
        })
    }

    /// Routes a prefix by a next hop.
    ///
    /// # Errors
    /// [`LabError::Netlink`].
    pub fn route_via(&self, to: (IpAddr, u8), via: IpAddr) -> Result<(), LabError> {
        self.ask(format!("route {}/{} via {via}", to.0, to.1), async move |handle, look| {
            let route = match (to.0, via) {
                (IpAddr::V4(to4), IpAddr::V4(via)) => {
                    RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(to4, to.1).gateway(via).build()
                }
                (IpAddr::V6(to6), IpAddr::V6(via)) => {
                    RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(to6, to.1).gateway(via).build()
                }
                _ => return Err(look.mixed()),
            };
            look.done(handle.route().add(route).execute().await)
        })
    }

    /// Routes a prefix into a device.
    ///
    /// # Errors
    /// [`LabError::NoInterface`] or [`LabError::Netlink`].
    pub fn route_dev(&self, to: (IpAddr, u8), interface: &str) -> Result<(), LabError> {
        self.ask(format!("route {}/{} into {interface}", to.0, to.1), async move |handle, look| {
            let index = look.index(&handle, interface).await?;
            let route = match to.0 {
                IpAddr::V4(to4) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                    .destination_prefix(to4, to.1)
                    .output_interface(index)
                    .build(),
                IpAddr::V6(to6) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                    .destination_prefix(to6, to.1)
                    .output_interface(index)
                    .build(),
            };
            look.done(handle.route().add(route).execute().await)
        })
    }

    /// Writes a setting below `/proc/sys/net` of this namespace, as `ipv4/ip_forward`.
    ///
    /// # Errors
    /// [`LabError::Kernel`].
    pub fn sysctl(&self, name: &str, value: &str) -> Result<(), LabError> {
        let path = format!("/proc/sys/net/{name}");
        // /proc/sys/net shows the namespace of the thread that opens it.
        self.run(|| std::fs::write(&path, value))?.map_err(LabError::kernel(format!("set {name} to {value}")))
    }

    fn ask<F, Fut>(&self, what: String, request: F) -> Result<(), LabError>
    where
        F: FnOnce(Handle, Look) -> Fut + Send,
        Fut: Future<Output = Result<(), LabError>>,
    {
        let look = Look { what, netns: self.name().to_owned() };
        self.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()
                .map_err(LabError::io("start a netlink runtime"))?;
            runtime.block_on(async move {
                let (connection, handle, _) =
                    rtnetlink::new_connection().map_err(LabError::kernel("open a netlink socket"))?;
                let asked = request(handle, look);
                // The connection ends by itself when the last handle is gone.
                let (_, answer) = futures_util::future::join(connection, asked).await;
                answer
            })
        })?
    }
}

fn is_forwarding(link: &LinkMessage) -> bool {
    let infos = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    infos.flatten().any(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(facts)) => {
            facts.contains(&InfoBridgePort::State(BridgePortState::Forwarding))
        }
        _ => false,
    })
}

/// Two seconds in all: beyond it the first packets are lost, which a network may do.
const FORWARDING_POLLS: u32 = 1_000;
const FORWARDING_POLL: std::time::Duration = std::time::Duration::from_millis(2);

/// What is being asked, for messages.
struct Look {
    what: String,
    netns: String,
}

impl Look {
    async fn index(&self, handle: &Handle, interface: &str) -> Result<u32, LabError> {
        let found = handle.link().get().match_name(interface).execute().try_next().await;
        match found {
            Ok(Some(link)) => Ok(link.header.index),
            Ok(None) | Err(rtnetlink::Error::NetlinkError(_)) => {
                Err(LabError::NoInterface { name: interface.to_owned(), netns: self.netns.clone() })
            }
            Err(error) => Err(LabError::netlink(self.what.clone())(error)),
        }
    }

    fn done(&self, answer: Result<(), rtnetlink::Error>) -> Result<(), LabError> {
        answer.map_err(LabError::netlink(format!("{} in {}", self.what, self.netns)))
    }

    fn mixed(&self) -> LabError {
        let mixed = std::io::Error::new(std::io::ErrorKind::InvalidInput, "IPv4 and IPv6 in one route");
        LabError::Kernel { what: self.what.clone(), source: mixed }
    }
}
