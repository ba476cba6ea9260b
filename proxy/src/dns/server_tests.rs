//! The server over real sockets: a view that is told, an upstream that is scripted.

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use isthmus_model::service::{Location, Resolution};
use isthmus_model::view::{ServiceView, View};
use prometheus::Registry;

use super::*;

const WAIT: Duration = Duration::from_secs(5);
const CART: &str = "cart.shop.svc.clusterset.local.";

fn view() -> View {
    let service = ServiceView {
        host: CART.parse().unwrap(),
        addresses: vec![IpAddr::from([240, 240, 0, 7])],
        ports: vec![],
        location: Location::MeshInternal,
        resolution: Resolution::Static,
        backends: vec![],
    };
    let mut view = View::default();
    view.services.insert(service.host.clone(), Arc::new(service));
    view
}

struct Running {
    address: SocketAddr,
    registry: Registry,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

async fn start(mesh: Mesh, upstream: &[SocketAddr]) -> Running {
    let registry = Registry::new();
    let address = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = DnsServer::bind(&[address], upstream, mesh, Metrics::new(&registry)).await.unwrap();
    let address = server.local_addrs()[0];
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(server.run(shutdown.clone()));
    Running { address, registry, shutdown, task }
}

impl Running {
    async fn stop(self) {
        self.shutdown.cancel();
        timeout(WAIT, self.task).await.expect("ends").unwrap();
    }
}

fn question(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(77, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.queries = vec![Query::query(Name::from_ascii(name).unwrap(), kind)];
    message
}

async fn ask_udp(server: SocketAddr, message: &Message) -> Message {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(&message.to_vec().unwrap()).await.unwrap();
    let mut buffer = [0; 4096];
    let length = timeout(WAIT, socket.recv(&mut buffer)).await.expect("answered").unwrap();
    Message::from_vec(&buffer[..length]).unwrap()
}

async fn ask_tcp(stream: &mut TcpStream, message: &Message) -> Message {
    let packet = message.to_vec().unwrap();
    stream.write_u16(packet.len() as u16).await.unwrap();
    stream.write_all(&packet).await.unwrap();
    let mut answer = vec![0; usize::from(timeout(WAIT, stream.read_u16()).await.expect("answered").unwrap())];
    stream.read_exact(&mut answer).await.unwrap();
    Message::from_vec(&answer).unwrap()
}

/// An upstream on UDP that answers `answer(question)`, or says nothing; counts what it was asked.
async fn upstream(
    answer: impl Fn(&Message) -> Option<Message> + Send + 'static,
) -> (SocketAddr, Arc<std::sync::atomic::AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    // Ends with the test's runtime.
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let question = Message::from_vec(&buffer[..length]).unwrap();
            // A forged answer first: it guessed the number wrong.
            if let Some(mut forged) = answer(&question) {
                forged.metadata.id = question.metadata.id.wrapping_add(1);
                forged.answers.clear();
                socket.send_to(&forged.to_vec().unwrap(), from).await.unwrap();
            }
            if let Some(message) = answer(&question) {
                socket.send_to(&message.to_vec().unwrap(), from).await.unwrap();
            }
        }
    });
    (address, asked)
}

fn answered(question: &Message, code: ResponseCode, answers: usize) -> Message {
    let mut message = Message::response(question.metadata.id, OpCode::Query);
    message.metadata.response_code = code;
    message.queries = question.queries.clone();
    let name = question.queries[0].name().clone();
    message.answers = vec![Record::from_rdata(name, 60, RData::A(A::new(192, 0, 2, 1))); answers];
    message
}

#[tokio::test]
async fn the_meshs_names_are_answered_by_udp_and_tcp() {
    let server = start(Mesh::with_view(view()), &[]).await;
    let answer = ask_udp(server.address, &question(CART, RecordType::A)).await;
    assert_eq!((answer.metadata.id, answer.metadata.response_code), (77, ResponseCode::NoError));
    assert_eq!(answer.answers[0].data, RData::A(A::new(240, 240, 0, 7)));
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for kind in [RecordType::A, RecordType::AAAA] {
        let answer = ask_tcp(&mut stream, &question(CART, kind)).await;
        assert_eq!(answer.answers.len(), usize::from(kind == RecordType::A), "one connection, two questions");
    }
    let text = isthmus_runtime::metrics::text(&server.registry);
    assert!(text.contains("isthmus_dns_queries_total{rcode=\"NOERROR\",zone=\"mesh\"} 3"), "{text}");
    server.stop().await;
}

#[tokio::test]
async fn with_no_gateway_a_name_of_the_mesh_is_a_failure_and_not_absent() {
    let server = start(Mesh::default(), &[]).await;
    let answer = ask_udp(server.address, &question(CART, RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    server.stop().await;
}

#[tokio::test]
async fn other_names_are_forwarded_and_kept() {
    let (address, asked) = upstream(|question| Some(answered(question, ResponseCode::NoError, 1))).await;
    let server = start(Mesh::default(), &[address]).await;
    for _ in 0..3 {
        let answer = ask_udp(server.address, &question("www.example.com.", RecordType::A)).await;
        assert_eq!(answer.answers.len(), 1, "not the forged one");
        assert!(!answer.metadata.authoritative && answer.metadata.recursion_available);
    }
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 1);
    server.stop().await;
}

#[tokio::test]
async fn a_dead_upstream_is_passed_over_and_then_not_asked_first() {
    let (dead, asked) = upstream(|_| None).await;
    let (alive, _) = upstream(|question| Some(answered(question, ResponseCode::NoError, 1))).await;
    let server = start(Mesh::default(), &[dead, alive]).await;
    for name in ["a.example.com.", "b.example.com."] {
        let answer = ask_udp(server.address, &question(name, RecordType::A)).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError, "{name}");
    }
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 1);
    server.stop().await;
}

#[tokio::test]
async fn an_upstreams_no_such_name_is_doubted_while_no_gateway_answers() {
    let (address, _) = upstream(|question| Some(answered(question, ResponseCode::NXDomain, 0))).await;
    let mesh = Mesh::default();
    let server = start(mesh.clone(), &[address]).await;
    let asked = question("maybe-a-service-entry.example.com.", RecordType::A);
    assert_eq!(ask_udp(server.address, &asked).await.metadata.response_code, ResponseCode::ServFail);
    mesh.replace(View::default(), mesh.wanted());
    assert_eq!(ask_udp(server.address, &asked).await.metadata.response_code, ResponseCode::NXDomain);
    server.stop().await;
}

#[tokio::test]
async fn a_flood_that_no_upstream_answers_leaves_room_for_the_meshs_names() {
    let (dead, asked) = upstream(|_| None).await;
    let server = start(Mesh::with_view(view()), &[dead]).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server.address).await.unwrap();
    for n in 0..400 {
        // Single labels are forwarded without asking the mesh.
        socket.send(&question(&format!("r{n}."), RecordType::A).to_vec().unwrap()).await.unwrap();
        tokio::task::yield_now().await;
    }
    let answer = ask_udp(server.address, &question(CART, RecordType::A)).await;
    assert_eq!(answer.answers.len(), 1);
    assert!(asked.load(std::sync::atomic::Ordering::Relaxed) <= 128, "bounded on the way to the upstream");
    server.stop().await;
}

#[tokio::test]
async fn garbage_gets_no_answer_and_hurts_nobody() {
    let server = start(Mesh::with_view(view()), &[]).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server.address).await.unwrap();
    let mut reflected = question(CART, RecordType::A);
    reflected.metadata.message_type = MessageType::Response;
    socket.send(&reflected.to_vec().unwrap()).await.unwrap();
    socket.send(b"").await.unwrap();
    socket.send(&[0; 11]).await.unwrap();
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(&[0xff; 64]).await.unwrap();
    assert_eq!(timeout(WAIT, stream.read(&mut [0; 16])).await.expect("closed").unwrap_or(0), 0);
    assert_eq!(ask_udp(server.address, &question(CART, RecordType::A)).await.answers.len(), 1);
    assert!(timeout(Duration::from_millis(100), socket.recv(&mut [0; 64])).await.is_err(), "no answer to an answer");
    server.stop().await;
}

#[test]
fn it_never_listens_where_others_could_use_it() {
    let text =
        |listen: &str| addresses(listen.parse().unwrap(), 15053).iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(text("0.0.0.0"), ["127.0.0.1:15053", "[::1]:15053"]);
    assert_eq!(text("10.1.0.2"), ["127.0.0.1:15053", "[::1]:15053"]);
    assert_eq!(text("127.1.0.5"), ["127.1.0.5:15053"]);
}
