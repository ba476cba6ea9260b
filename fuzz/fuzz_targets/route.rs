//! The router: any datagram from anywhere gets a decision, and none that is not authentic is let in.
#![no_main]

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};

use isthmus_model::ClusterId;
use isthmus_tunnel::cid::{CidKeys, EndpointName};
use isthmus_tunnel::probe::ProbeKey;
use isthmus_tunnel::route::{Decision, FlowSocket, Hop, LinkTable, LocalTable, Source, Visibility, route};
use isthmus_tunnel::ticket::{TicketMasters, TicketTime};
use libfuzzer_sys::fuzz_target;

static TABLES: LazyLock<(LocalTable, LinkTable, [SocketAddr; 3])> = LazyLock::new(|| {
    let addresses = [1, 2, 3].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let name = EndpointName { handle: 7, incarnation: 1 };
    let masters = TicketMasters::new(ClusterId(1), [3; 32]);
    let local = LocalTable {
        cluster: ClusterId(1),
        replica: 0,
        keys: Arc::new(CidKeys::new(ClusterId(1), 0, [1; 16])),
        endpoints: [(name, addresses[0])].into_iter().collect(),
        registered: [addresses[0]].into_iter().collect(),
        exports: [(7, Visibility::All)].into_iter().collect(),
        sources: vec![Source {
            tickets: masters.keys_for(ClusterId(2)),
            probes: vec![ProbeKey::new(0, masters.probe_key_for(ClusterId(2), 0).expect("lives"))],
        }],
        siblings: Default::default(),
        draining: false,
    };
    let hop = Hop { address: addresses[1], socket: FlowSocket::Public, id: 1 };
    let links = LinkTable {
        peers: [(ClusterId(2), vec![hop])].into_iter().collect(),
        addresses: [(addresses[1], ClusterId(2))].into_iter().collect(),
        probes_out: Default::default(),
    };
    (local, links, addresses)
});

fuzz_target!(|input: (u8, u16, &[u8])| {
    let (from, now, datagram) = input;
    let (local, links, addresses) = &*TABLES;
    let from = addresses[usize::from(from) % 3];
    match route(local, links, from, datagram, TicketTime(now)) {
        // A fuzzer without the keys passes the 32-bit check once in 4 x 10^9 blocks.
        Decision::Local(_) | Decision::Reflect { .. } | Decision::Answered(_) | Decision::Refuse(..) => {
            panic!("an unauthentic datagram was let in")
        }
        Decision::Link(_) => assert_eq!(from, addresses[0], "only a registered address sends outward"),
        Decision::Control | Decision::Drop(_) => {}
    }
});
