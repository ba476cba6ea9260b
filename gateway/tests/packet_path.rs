//! Sidecar, gateway, gateway, sidecar: the whole packet path on real sockets.

#[allow(dead_code, clippy::unwrap_used)]
mod bed;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bed::{Bed, Gateway, HOST, PATIENCE, Sidecar, body, free_address, post, target, until};
use bytes::Bytes;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use isthmus_tunnel::carrier::{Answer, BoxError, Carrier, CarrierErrorKind};
use isthmus_tunnel::endpoint::CloseReason;
use isthmus_tunnel::route::DropReason;
use isthmus_tunnel::{DialError, EndpointName, ResetCode, StreamHeader, StreamKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn dropped(gateway: &Gateway, reason: DropReason) -> u64 {
    gateway.router.stats().dropped.iter().find(|(of, _)| *of == reason).map_or(0, |(_, count)| *count)
}

#[tokio::test]
async fn a_request_arrives_with_the_callers_identity_and_comes_back_whole() {
    let bed = Bed::start().await;
    let tunnel = bed.tunnel().await;
    assert_eq!(tunnel.peer().spiffe.to_string(), "spiffe://corp.example/ns/shop/sa/cart");
    let sent = Bytes::from((0..1_000_000u32).flat_map(u32::to_be_bytes).collect::<Vec<u8>>());
    let (status, caller, received) = post(&tunnel, sent.clone()).await.expect("answered");
    assert_eq!((status, caller.as_str()), (200, "spiffe://corp.example/ns/shop/sa/web of alpha"));
    assert!(received == sent, "4 MB as sent");
    let many = (0..200).map(|_| post(&tunnel, Bytes::from_static(b"small")));
    for answer in futures_util::future::join_all(many).await {
        assert_eq!(answer.expect("answered").2, "small");
    }
    until("all streams are counted as closed", || tunnel.streams() == 0).await;
}

#[tokio::test]
async fn trailers_early_hints_and_upgrades_pass() {
    let bed = Bed::start().await;
    let tunnel = bed.tunnel().await;
    let trailers =
        http::HeaderMap::from_iter([("grpc-status".parse().expect("a name"), "0".parse().expect("a value"))]);
    let frames = [Frame::data(Bytes::from_static(b"message")), Frame::trailers(trailers)].map(Ok::<_, BoxError>);
    let request = http::Request::post(format!("http://{HOST}/rpc"))
        .header("expect", "hints")
        .body(StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync())
        .expect("valid");
    let mut hints = Vec::new();
    let answer = tunnel.send(&target(80), request, &mut |hint| hints.push(hint.status().as_u16())).await;
    let Ok(Answer::Response(response)) = answer else { panic!("no response") };
    let collected = response.into_body().collect().await.expect("whole");
    assert_eq!(hints, [103]);
    assert_eq!(collected.trailers().expect("came back")["grpc-status"], "0");

    let request = http::Request::get(format!("http://{HOST}/ws"))
        .header("upgrade", "echo")
        .header("connection", "upgrade")
        .body(body(""))
        .expect("valid");
    let Ok(Answer::Upgraded(head, mut stream)) = tunnel.send(&target(80), request, &mut |_| {}).await else {
        panic!("no upgrade")
    };
    assert_eq!(head.status(), 101);
    stream.write_all(b"ping").await.expect("sent");
    let mut pong = [0; 4];
    stream.read_exact(&mut pong).await.expect("received");
    assert_eq!(&pong, b"ping");
}

#[tokio::test]
async fn a_tcp_stream_half_closes_and_an_unexported_port_is_told() {
    let bed = Bed::start().await;
    let tunnel = bed.tunnel().await;
    let mut stream = Carrier::open(&tunnel, &target(5432)).await.expect("opened");
    stream.write_all(&[7; 100_000]).await.expect("sent");
    stream.shutdown().await.expect("FIN");
    let mut echoed = Vec::new();
    stream.read_to_end(&mut echoed).await.expect("reading goes on after our FIN");
    assert_eq!(echoed.len(), 100_000);

    let request = http::Request::get(format!("http://{HOST}:15000/config")).body(body("")).expect("valid");
    let Err(error) = tunnel.send(&target(15000), request, &mut |_| {}).await else { panic!("the admin port") };
    assert!(matches!(error.kind, CarrierErrorKind::Reset(ResetCode::NotExported)), "{error}");
    assert!(error.not_processed);
}

#[tokio::test]
async fn a_ticket_opens_one_tunnel_and_an_endpoint_id_none() {
    let bed = Bed::start().await;
    let ticket = bed.ticket();
    let first = bed.client.dial(&bed.beta, bed.server.name, ticket).await.expect("a tunnel");
    post(&first, Bytes::new()).await.expect("answered");
    first.close(CloseReason::Done);
    let other = Sidecar::start(&bed.alpha, "ns/shop/sa/web", 10, vec![bed.gateway_a.address]);
    bed.gateway_a.register(&other, false);
    let again = other.dial(&bed.beta, bed.server.name, ticket).await;
    assert!(matches!(again, Err(DialError::TimedOut)), "{:?}", again.err());
    // The first endpoint's ID as an attacker sees it on the wire: the gateways let it pass, the sidecar must not.
    let replayed = bed.beta.keys.mint_endpoint(bed.server.name, [1; 6]);
    let opened = other.dial(&bed.beta, bed.server.name, replayed).await;
    assert!(matches!(opened, Err(DialError::TimedOut)), "{:?}", opened.err());
    let counters = bed.server.endpoint.counters();
    assert!(counters.tickets_replayed.load(Ordering::Relaxed) > 0);
    assert!(counters.ticketless.load(Ordering::Relaxed) > 0);
    assert_eq!(counters.accepted.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_refused_dial_ends_at_once_with_its_reason() {
    let mut bed = Bed::start().await;
    let private = Sidecar::start(&bed.beta, "ns/shop/sa/cart", 8, vec![bed.gateway_b.address]);
    bed.gateway_b.register(&private, false);
    let ticket = bed.alpha.ticket_to(&bed.beta, private.name);
    let start = Instant::now();
    let dial = bed.client.dial(&bed.beta, private.name, ticket);
    let tell = async {
        let refused = tokio::time::timeout(PATIENCE, bed.gateway_a.refused.recv()).await.expect("in time");
        bed.client.endpoint.refused(&refused.expect("a notice"), "not_exported");
        std::future::pending::<()>().await
    };
    let result = tokio::select! { result = dial => result, () = tell => unreachable!() };
    assert!(matches!(&result, Err(DialError::Refused(reason)) if reason == "not_exported"), "{:?}", result.err());
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(dropped(&bed.gateway_b, DropReason::NotExported) > 0);
}

#[tokio::test]
async fn garbage_and_forgeries_pass_no_gateway() {
    let bed = Bed::start().await;
    let tunnel = bed.tunnel().await;
    let stranger = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let send = |bytes: &[u8]| stranger.send_to(bytes, bed.gateway_b.address).map(drop).expect("sent");
    for length in [0, 1, 20, 21, 64, 1200, 1452] {
        send(&vec![0xff; length]);
        send(&vec![0x40; length]);
    }
    let mut forged = vec![0x40];
    forged.extend(
        isthmus_tunnel::CidKeys::new(bed.beta.id, 0, [99; 16]).mint_endpoint(bed.server.name, [0; 6]).as_bytes(),
    );
    forged.extend([0; 40]);
    send(&forged);
    let mut outward = vec![0x40];
    outward.extend(bed.alpha.keys.mint_endpoint(bed.client.name, [0; 6]).as_bytes());
    send(&outward);
    until("all are counted", || {
        dropped(&bed.gateway_b, DropReason::Malformed) >= 4
            && dropped(&bed.gateway_b, DropReason::BadBlock) >= 1
            && dropped(&bed.gateway_b, DropReason::NotRegistered) >= 1
    })
    .await;
    // Past the gateway, straight at the sidecar: only its gateways are heard.
    let foreign = bed.server.endpoint.socket().foreign_datagrams();
    stranger.send_to(&forged, bed.server.address).expect("sent");
    until("the sidecar dropped it", || bed.server.endpoint.socket().foreign_datagrams() > foreign).await;
    assert_eq!(post(&tunnel, Bytes::from_static(b"still here")).await.expect("answered").2, "still here");
}

/// 200 requests a second for `span`; the failures and the longest wait.
async fn load(tunnel: &isthmus_tunnel::Tunnel<isthmus_identity::PeerIdentity>, span: Duration) -> (usize, Duration) {
    let mut tasks = tokio::task::JoinSet::new();
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    let start = Instant::now();
    while start.elapsed() < span {
        tick.tick().await;
        let tunnel = tunnel.clone();
        tasks.spawn(async move {
            let start = Instant::now();
            let answer = tokio::time::timeout(PATIENCE, post(&tunnel, Bytes::from_static(&[0; 1024]))).await;
            let ok = matches!(answer, Ok(Ok((200, _, _))));
            if !ok {
                println!("after {:?}: {answer:?}", start.elapsed());
            }
            (ok, start.elapsed())
        });
    }
    let mut worst = (0, Duration::ZERO);
    while let Some(done) = tasks.join_next().await {
        let (ok, took) = done.expect("no panic");
        worst = (worst.0 + usize::from(!ok), worst.1.max(took));
    }
    worst
}

/// Kills `gateway` under load and starts it again after 300 ms with what its disk would give it: links and flows
/// it must find again by itself.
async fn outage(
    cluster: &bed::Cluster,
    gateway: Gateway,
    peers: Vec<std::net::SocketAddr>,
    tunnel: &isthmus_tunnel::Tunnel<isthmus_identity::PeerIdentity>,
) -> Gateway {
    let restart = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (address, table) = (gateway.address, (*gateway.router.local()).clone());
        gateway.kill().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        Gateway::start(cluster, table, address, peers)
    };
    let ((failed, slowest), gateway) = tokio::join!(load(tunnel, Duration::from_secs(2)), restart);
    println!("gateway of {} away for 300 ms: {failed} failed, slowest {slowest:?}", cluster.name);
    assert_eq!(failed, 0);
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    gateway
}

#[tokio::test]
async fn a_killed_gateway_that_comes_back_costs_no_request() {
    let Bed { alpha, beta, gateway_a, gateway_b, client, server } = Bed::start().await;
    let tunnel = client.dial(&beta, server.name, alpha.ticket_to(&beta, server.name)).await.expect("a tunnel");
    let at_b = gateway_b.address;
    let _gateway_b = outage(&beta, gateway_b, vec![], &tunnel).await;
    let _gateway_a = outage(&alpha, gateway_a, vec![at_b], &tunnel).await;
}

#[tokio::test]
async fn a_tcp_stream_outlives_an_outage_and_goes_on_soon_after_it() {
    let Bed { alpha, beta, gateway_a: _gateway_a, gateway_b, client, server } = Bed::start().await;
    let tunnel = client.dial(&beta, server.name, alpha.ticket_to(&beta, server.name)).await.expect("a tunnel");
    let mut stream = Carrier::open(&tunnel, &target(5432)).await.expect("opened");
    stream.write_all(b"a").await.expect("sent");
    assert_eq!(stream.read_u8().await.expect("echoed"), b'a');
    let (address, table) = (gateway_b.address, (*gateway_b.router.local()).clone());
    gateway_b.kill().await;
    stream.write_all(b"b").await.expect("queued");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(tunnel.is_suspect(), "its data went unacknowledged");
    let _gateway_b = Gateway::start(&beta, table, address, vec![]);
    let start = Instant::now();
    assert_eq!(stream.read_u8().await.expect("echoed"), b'b');
    println!("5 s without a gateway: the stream went on {:?} after its return", start.elapsed());
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    until("it is trusted again", || !tunnel.is_suspect()).await;
}

#[tokio::test]
async fn with_two_replicas_a_dead_one_is_left_within_the_probes_patience() {
    let bed = Bed::start().await;
    let second = Gateway::start(&bed.alpha, bed.alpha.table(1), free_address(), vec![bed.gateway_b.address]);
    second.register(&bed.client, false);
    second.linked().await;
    let gateways = vec![bed.gateway_a.address, second.address];
    bed.client.endpoint.set_gateways(gateways);
    let tunnel = bed.tunnel().await;
    let before = bed.gateway_a.router.stats().to_links;
    assert_eq!(load(&tunnel, Duration::from_millis(200)).await.0, 0);
    let Bed { gateway_a: first, .. } = bed;
    // Which one carries the tunnel is a matter of its connection ID.
    let (carrier, _other) = if first.router.stats().to_links > before + 20 { (first, second) } else { (second, first) };
    let kill = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        carrier.kill().await;
    };
    let ((failed, slowest), ()) = tokio::join!(load(&tunnel, Duration::from_secs(2)), kill);
    println!("the one of two gateways that carried the tunnel killed: {failed} failed, slowest {slowest:?}");
    assert_eq!(failed, 0);
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}

#[tokio::test]
async fn a_process_known_to_be_gone_closes_its_tunnels_at_once() {
    let bed = Bed::start().await;
    let tunnel = bed.tunnel().await;
    let stays = StreamHeader { kind: StreamKind::Tcp, host: HOST.parse().expect("valid"), port: 5432 };
    let mut stream = tunnel.open(&stays).await.expect("opened");
    bed.server.stop();
    bed.client.endpoint.gone(bed.beta.id, EndpointName { incarnation: 2, ..bed.server.name });
    assert!(!tunnel.is_closed() || tunnel.closed().await.1 != Some(CloseReason::Gone), "another incarnation");
    bed.client.endpoint.gone(bed.beta.id, bed.server.name);
    assert!(tunnel.is_closed());
    assert!(stream.read_u8().await.is_err());
}
