//! Finds the route of a request or connection, and the destination it takes.
//!
//! Regular expressions are compiled once, when a VirtualService arrives; matching itself allocates
//! nothing but what looking up a header does. No clock and no I/O; random numbers are passed in.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use rand::{Rng, RngExt as _};
use regex::{Regex, RegexBuilder};

use super::{
    ConnectionMatch, HttpMatch, HttpRoute, StringMatch, TcpRoute, TlsRoute, VirtualService, WeightedDestination,
};
use crate::service::{Labels, selects_all};
use crate::{Host, Namespace};

/// Largest compiled regular expression in bytes: `[a-z]{1,63}` takes 10 KB, classes of Unicode letters
/// some 100 KB; what is larger (`(\w{1,100}){1,100}`) would let one route take a sidecar's memory.
pub const REGEX_SIZE_MAX: usize = 1 << 20;

/// Who calls.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Labels of the calling workload.
    pub labels: &'a Labels,
    /// Its namespace.
    pub namespace: &'a Namespace,
}

/// What is known of a request when it is routed.
#[derive(Clone, Copy)]
pub struct RequestFacts<'a> {
    /// The method, as sent.
    pub method: &'a str,
    /// The path with its query (`/a/b?c=d`).
    pub path: &'a str,
    /// The authority, as sent; with its port if the caller sent one.
    pub authority: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// Value of a header by its lower-case name; several values joined by commas.
    pub headers: &'a dyn Fn(&str) -> Option<Cow<'a, str>>,
    /// The port of the destination.
    pub port: u16,
    /// Who calls.
    pub source: Source<'a>,
}

/// What is known of a connection when it is routed.
#[derive(Debug, Clone, Copy)]
pub struct ConnectionFacts<'a> {
    /// The port of the destination.
    pub port: u16,
    /// The address that the caller dialled, if known.
    pub address: Option<IpAddr>,
    /// Who calls.
    pub source: Source<'a>,
}

/// Why a VirtualService cannot be compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {pattern:?} is not an RE2 expression of at most {REGEX_SIZE_MAX} bytes compiled: {reason}")]
pub struct RegexError {
    /// Where it stands: `http[0].match[1].uri.regex`.
    pub path: String,
    /// The expression.
    pub pattern: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A VirtualService, ready to route.
#[derive(Debug, Clone)]
pub struct Routes {
    source: Arc<VirtualService>,
    http: Vec<Vec<Compiled>>,
}

impl Routes {
    /// Compiles all expressions of `source`.
    ///
    /// # Errors
    /// [`RegexError`] for the first expression that is not RE2, or too large.
    pub fn compile(source: Arc<VirtualService>) -> Result<Self, RegexError> {
        let mut http = Vec::with_capacity(source.http.len());
        for (r, route) in source.http.iter().enumerate() {
            let matches = route.matches.iter().enumerate();
            let compiled = matches.map(|(m, one)| Compiled::new(one, &format!("http[{r}].match[{m}]")));
            http.push(compiled.collect::<Result<Vec<_>, _>>()?);
        }
        Ok(Self { source, http })
    }

    /// What was compiled.
    pub fn source(&self) -> &Arc<VirtualService> {
        &self.source
    }

    /// The first HTTP route that matches; `None` means that no route wants the request (404 in Istio).
    ///
    /// A VirtualService without any HTTP route does not route HTTP: ask [`Routes::routes_http`] first.
    pub fn http(&self, request: &RequestFacts<'_>) -> Option<&HttpRoute> {
        let routes = self.source.http.iter().zip(&self.http);
        let mut hit = routes.filter(|(_, any)| any.is_empty() || any.iter().any(|one| one.matches(request)));
        hit.next().map(|(route, _)| route)
    }

    /// Whether it says anything of HTTP requests.
    pub fn routes_http(&self) -> bool {
        !self.source.http.is_empty()
    }

    /// The first TLS route that matches.
    pub fn tls(&self, sni: &Host, connection: &ConnectionFacts<'_>) -> Option<&TlsRoute> {
        self.source.tls.iter().find(|route| {
            let mut any = route.matches.iter();
            any.any(|one| one.sni_hosts.iter().any(|host| host.covers(sni)) && holds(&one.connection, connection))
        })
    }

    /// The first TCP route that matches.
    pub fn tcp(&self, connection: &ConnectionFacts<'_>) -> Option<&TcpRoute> {
        let wants =
            |route: &&TcpRoute| route.matches.is_empty() || route.matches.iter().any(|one| holds(one, connection));
        self.source.tcp.iter().find(wants)
    }
}

/// One destination by weight; `None` only if there is none. A single destination needs no weight.
pub fn pick<'a, R: Rng + ?Sized>(
    destinations: &'a [WeightedDestination],
    rng: &mut R,
) -> Option<&'a WeightedDestination> {
    if let [only] = destinations {
        return Some(only);
    }
    let total: u64 = destinations.iter().map(|one| u64::from(one.weight)).sum();
    if total == 0 {
        return destinations.first();
    }
    let mut point = rng.random_range(0..total);
    destinations.iter().find(|one| match point.checked_sub(one.weight.into()) {
        Some(rest) => {
            point = rest;
            false
        }
        None => true,
    })
}

fn holds(wanted: &ConnectionMatch, facts: &ConnectionFacts<'_>) -> bool {
    let subnets = &wanted.destination_subnets;
    wanted.port.is_none_or(|port| port == facts.port)
        && (subnets.is_empty() || facts.address.is_some_and(|address| subnets.iter().any(|net| net.contains(&address))))
        && wanted.source_namespace.as_ref().is_none_or(|namespace| namespace == facts.source.namespace)
        && selects_all(&wanted.source_labels, facts.source.labels)
}

/// An [`HttpMatch`] with its expressions compiled.
#[derive(Debug, Clone)]
struct Compiled {
    uri: Option<Text>,
    method: Option<Text>,
    authority: Option<Text>,
    scheme: Option<Text>,
    headers: Vec<(String, Text)>,
    without_headers: Vec<(String, Text)>,
    query_params: Vec<(String, Text)>,
    port: Option<u16>,
    source_labels: Labels,
    source_namespace: Option<Namespace>,
}

impl Compiled {
    fn new(raw: &HttpMatch, path: &str) -> Result<Self, RegexError> {
        let one = |text: &Option<StringMatch>, field: &str, fold: bool| {
            text.as_ref().map(|text| Text::new(text, fold, &|| format!("{path}.{field}.regex"))).transpose()
        };
        let all = |list: &[(String, StringMatch)], field: &str, lower: bool| {
            let named = list.iter().map(|(name, text)| {
                let text = Text::new(text, false, &|| format!("{path}.{field}.{name}.regex"))?;
                Ok((if lower { name.to_ascii_lowercase() } else { name.clone() }, text))
            });
            named.collect::<Result<Vec<_>, RegexError>>()
        };
        Ok(Self {
            uri: one(&raw.uri, "uri", raw.ignore_uri_case)?,
            method: one(&raw.method, "method", false)?,
            authority: one(&raw.authority, "authority", false)?,
            scheme: one(&raw.scheme, "scheme", false)?,
            headers: all(&raw.headers, "headers", true)?,
            without_headers: all(&raw.without_headers, "withoutHeaders", true)?,
            query_params: all(&raw.query_params, "queryParams", false)?,
            port: raw.port,
            source_labels: raw.source_labels.clone(),
            source_namespace: raw.source_namespace.clone(),
        })
    }

    fn matches(&self, request: &RequestFacts<'_>) -> bool {
        let (path, query) = request.path.split_once('?').unwrap_or((request.path, ""));
        let is = |wanted: &Option<Text>, value: &str| wanted.as_ref().is_none_or(|wanted| wanted.matches(value));
        let header =
            |(name, wanted): &(String, Text)| (request.headers)(name).is_some_and(|value| wanted.matches(&value));
        let parameter =
            |(name, wanted): &(String, Text)| parameter(query, name).is_some_and(|value| wanted.matches(value));
        self.port.is_none_or(|port| port == request.port)
            && is(&self.uri, path)
            && is(&self.method, request.method)
            && is(&self.authority, request.authority)
            && is(&self.scheme, request.scheme)
            && self.source_namespace.as_ref().is_none_or(|namespace| namespace == request.source.namespace)
            && selects_all(&self.source_labels, request.source.labels)
            && self.headers.iter().all(header)
            && !self.without_headers.iter().any(header)
            && self.query_params.iter().all(parameter)
    }
}

/// The first value of a query parameter, as written (Envoy does not decode escapes here either).
fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// A [`StringMatch`], compiled.
#[derive(Debug, Clone)]
enum Text {
    Exact(String),
    Prefix(String),
    Suffix(String),
    ExactFolded(String),
    PrefixFolded(String),
    SuffixFolded(String),
    Regex(Regex),
    Present,
}

impl Text {
    fn new(raw: &StringMatch, fold: bool, path: &dyn Fn() -> String) -> Result<Self, RegexError> {
        Ok(match raw {
            StringMatch::Exact(text) if fold => Self::ExactFolded(text.clone()),
            StringMatch::Prefix(text) if fold => Self::PrefixFolded(text.clone()),
            StringMatch::Suffix(text) if fold => Self::SuffixFolded(text.clone()),
            StringMatch::Suffix(text) => Self::Suffix(text.clone()),
            StringMatch::Exact(text) => Self::Exact(text.clone()),
            StringMatch::Prefix(text) => Self::Prefix(text.clone()),
            StringMatch::Present => Self::Present,
            StringMatch::Regex(pattern) => Self::Regex(compile(pattern).map_err(|reason| RegexError {
                path: path(),
                pattern: pattern.clone(),
                reason,
            })?),
        })
    }

    fn matches(&self, value: &str) -> bool {
        match self {
            Self::Exact(text) => value == text,
            Self::Prefix(text) => value.starts_with(text.as_str()),
            Self::Suffix(text) => value.ends_with(text.as_str()),
            Self::ExactFolded(text) => value.eq_ignore_ascii_case(text),
            Self::PrefixFolded(text) => value.get(..text.len()).is_some_and(|start| start.eq_ignore_ascii_case(text)),
            Self::SuffixFolded(text) => {
                let start = value.len().checked_sub(text.len());
                start.and_then(|start| value.get(start..)).is_some_and(|end| end.eq_ignore_ascii_case(text))
            }
            Self::Regex(regex) => regex.is_match(value),
            Self::Present => true,
        }
    }
}

/// Compiles `pattern` so that it must match the whole text, as RE2's full match does.
///
/// # Errors
/// What is wrong with the pattern, on one line.
pub fn compile(pattern: &str) -> Result<Regex, String> {
    let build = |text: &str| {
        let built = RegexBuilder::new(text).size_limit(REGEX_SIZE_MAX).build();
        built.map_err(|error| error.to_string().lines().last().unwrap_or_default().trim().to_owned())
    };
    // Alone first: `a)|(b` must not become valid by the brackets put around it.
    build(pattern)?;
    build(&format!(r"\A(?:{pattern})\z"))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;
    use rand::rngs::StdRng;

    use super::*;

    fn destination(host: &str, weight: u32) -> WeightedDestination {
        WeightedDestination { host: host.parse().expect("valid"), subset: None, port: None, weight }
    }

    fn routes(matches: Vec<HttpMatch>) -> Routes {
        let route = HttpRoute {
            name: None,
            matches,
            destinations: vec![destination("cart.shop.svc.cluster.local", 1)],
            timeout: None,
            retries: None,
        };
        Routes::compile(Arc::new(service(vec![route]))).expect("valid")
    }

    fn service(http: Vec<HttpRoute>) -> VirtualService {
        VirtualService {
            namespace: "shop".parse().expect("valid"),
            name: "cart".parse().expect("valid"),
            hosts: vec!["cart.shop.svc.cluster.local".parse().expect("valid")],
            http,
            tls: Vec::new(),
            tcp: Vec::new(),
            export_to: Vec::new(),
        }
    }

    /// Whether `GET /a/B?v=1&v=2&flag` from `app=web` in `shop` matches.
    fn hits(wanted: HttpMatch) -> bool {
        let labels = Labels::from([("app".into(), "web".into())]);
        let namespace = "shop".parse().expect("valid");
        let header = |name: &str| match name {
            "end-user" => Some(Cow::Borrowed("jason")),
            "accept" => Some(Cow::Borrowed("text/html,*/*")),
            _ => None,
        };
        let request = RequestFacts {
            method: "GET",
            path: "/a/B?v=1&v=2&flag",
            authority: "cart.shop:8080",
            scheme: "http",
            headers: &header,
            port: 80,
            source: Source { labels: &labels, namespace: &namespace },
        };
        routes(vec![wanted]).http(&request).is_some()
    }

    #[test]
    fn every_condition_of_an_http_match() {
        let exact = |text: &str| Some(StringMatch::Exact(text.into()));
        let prefix = |text: &str| Some(StringMatch::Prefix(text.into()));
        let suffix = |text: &str| Some(StringMatch::Suffix(text.into()));
        let regex = |text: &str| Some(StringMatch::Regex(text.into()));
        let named =
            |name: &str, text: Option<StringMatch>| vec![(name.to_owned(), text.unwrap_or(StringMatch::Present))];
        let label = |value: &str| Labels::from([("app".into(), value.into())]);
        let none = HttpMatch::default;
        let cases = [
            (true, "nothing asked", none()),
            (true, "uri without its query", HttpMatch { uri: exact("/a/B"), ..none() }),
            (false, "uri in another case", HttpMatch { uri: exact("/a/b"), ..none() }),
            (true, "uri folded", HttpMatch { uri: exact("/A/b"), ignore_uri_case: true, ..none() }),
            (true, "uri prefix", HttpMatch { uri: prefix("/a/"), ..none() }),
            (true, "uri prefix folded", HttpMatch { uri: prefix("/A/"), ignore_uri_case: true, ..none() }),
            (false, "prefix longer than the uri", HttpMatch { uri: prefix("/a/B/c"), ignore_uri_case: true, ..none() }),
            (true, "uri suffix", HttpMatch { uri: suffix("/B"), ..none() }),
            (false, "uri suffix in another case", HttpMatch { uri: suffix("/b"), ..none() }),
            (true, "uri suffix folded", HttpMatch { uri: suffix("/b"), ignore_uri_case: true, ..none() }),
            (false, "suffix longer than the uri", HttpMatch { uri: suffix("x/a/B"), ignore_uri_case: true, ..none() }),
            (true, "regex of the whole uri", HttpMatch { uri: regex("/a/[A-Z]"), ..none() }),
            (false, "regex of a part of the uri", HttpMatch { uri: regex("/a"), ..none() }),
            (false, "alternatives match as a whole too", HttpMatch { uri: regex("/a|/b"), ..none() }),
            (true, "method", HttpMatch { method: exact("GET"), ..none() }),
            (false, "other method", HttpMatch { method: exact("POST"), ..none() }),
            (true, "authority", HttpMatch { authority: prefix("cart.shop"), ..none() }),
            (false, "authority without the port sent", HttpMatch { authority: exact("cart.shop"), ..none() }),
            (true, "scheme", HttpMatch { scheme: exact("http"), ..none() }),
            (false, "other scheme", HttpMatch { scheme: exact("https"), ..none() }),
            (true, "header in any case", HttpMatch { headers: named("End-User", exact("jason")), ..none() }),
            (true, "header present", HttpMatch { headers: named("accept", None), ..none() }),
            (false, "header absent", HttpMatch { headers: named("x", None), ..none() }),
            (false, "without a header that is there", HttpMatch { without_headers: named("accept", None), ..none() }),
            (true, "without a value", HttpMatch { without_headers: named("end-user", exact("eve")), ..none() }),
            (true, "first value of a parameter", HttpMatch { query_params: named("v", exact("1")), ..none() }),
            (false, "second value of a parameter", HttpMatch { query_params: named("v", exact("2")), ..none() }),
            (true, "parameter without a value", HttpMatch { query_params: named("flag", exact("")), ..none() }),
            (false, "parameter absent", HttpMatch { query_params: named("w", None), ..none() }),
            (true, "port", HttpMatch { port: Some(80), ..none() }),
            (false, "other port", HttpMatch { port: Some(81), ..none() }),
            (true, "source label", HttpMatch { source_labels: label("web"), ..none() }),
            (false, "other source label", HttpMatch { source_labels: label("till"), ..none() }),
            (true, "source namespace", HttpMatch { source_namespace: "shop".parse().ok(), ..none() }),
            (false, "other namespace", HttpMatch { source_namespace: "bank".parse().ok(), ..none() }),
            (false, "one of two fails", HttpMatch { method: exact("GET"), port: Some(81), ..none() }),
        ];
        for (expected, what, wanted) in cases {
            assert_eq!(hits(wanted), expected, "{what}");
        }
    }

    #[test]
    fn the_first_route_that_matches_wins_and_none_may() {
        let labels = Labels::new();
        let namespace = "shop".parse().expect("valid");
        let request = |method| RequestFacts {
            method,
            path: "/",
            authority: "cart",
            scheme: "http",
            headers: &|_| None,
            port: 80,
            source: Source { labels: &labels, namespace: &namespace },
        };
        let route = |name: &str, method: &str| HttpRoute {
            name: Some(name.into()),
            matches: vec![HttpMatch { method: Some(StringMatch::Exact(method.into())), ..HttpMatch::default() }],
            destinations: vec![destination("a.b", 1)],
            timeout: None,
            retries: None,
        };
        let all = Routes::compile(Arc::new(service(vec![route("a", "GET"), route("b", "GET"), route("c", "PUT")])));
        let all = all.expect("valid");
        let name = |method| all.http(&request(method)).and_then(|route| route.name.as_deref());
        assert_eq!((name("GET"), name("PUT"), name("POST")), (Some("a"), Some("c"), None));
    }

    #[test]
    fn a_bad_expression_is_named_by_its_path() {
        for bad in ["a(", "a)|(b", r"(\w{1,200}){1,200}", r"(?=x)"] {
            let wanted = HttpMatch { uri: Some(StringMatch::Regex(bad.into())), ..HttpMatch::default() };
            let mut route = service(vec![]);
            let any = HttpRoute {
                name: None,
                matches: vec![HttpMatch::default(), wanted],
                destinations: vec![],
                timeout: None,
                retries: None,
            };
            route.http.push(any);
            let error = Routes::compile(Arc::new(route)).expect_err(bad);
            assert_eq!((error.path.as_str(), error.pattern.as_str()), ("http[0].match[1].uri.regex", bad));
        }
    }

    #[test]
    fn connections_go_by_name_port_and_subnet() {
        let mut all = service(vec![]);
        let connection = |port, subnet: &str| ConnectionMatch {
            port: Some(port),
            destination_subnets: vec![subnet.parse().expect("valid")],
            ..ConnectionMatch::default()
        };
        let sni = |host: &str| vec![host.parse().expect("valid")];
        let by_name =
            super::super::TlsMatch { sni_hosts: sni("*.corp.example"), connection: ConnectionMatch::default() };
        all.tls.push(TlsRoute { matches: vec![by_name], destinations: vec![destination("tls.a", 1)] });
        all.tcp.push(TcpRoute {
            matches: vec![connection(27017, "10.0.0.0/8")],
            destinations: vec![destination("mongo.a", 1)],
        });
        all.tcp.push(TcpRoute { matches: vec![], destinations: vec![destination("rest.a", 1)] });
        let all = Routes::compile(Arc::new(all)).expect("valid");
        let labels = Labels::new();
        let namespace: Namespace = "shop".parse().expect("valid");
        let facts = |port, address: &str| ConnectionFacts {
            port,
            address: address.parse().ok(),
            source: Source { labels: &labels, namespace: &namespace },
        };
        let tcp = |port, address| all.tcp(&facts(port, address)).map(|route| route.destinations[0].host.to_string());
        assert_eq!(tcp(27017, "10.1.1.1").as_deref(), Some("mongo.a"));
        assert_eq!(tcp(27017, "11.1.1.1").as_deref(), Some("rest.a"));
        assert_eq!(tcp(27017, "unknown").as_deref(), Some("rest.a"), "an unknown address lies in no subnet");
        let tls = |sni: &str| all.tls(&sni.parse().expect("valid"), &facts(443, "")).is_some();
        assert!(tls("a.corp.example") && !tls("corp.example"));
    }

    #[test]
    fn destinations_get_their_shares() {
        let all = [destination("a.b", 75), destination("c.d", 0), destination("e.f", 25)];
        let mut rng = StdRng::seed_from_u64(1);
        let mut counts = [0_u32; 3];
        for _ in 0..10_000 {
            let picked = pick(&all, &mut rng).expect("some");
            counts[all.iter().position(|one| one == picked).expect("one of them")] += 1;
        }
        assert_eq!(counts[1], 0, "weight 0 gets nothing");
        // Three standard deviations of 10,000 draws at 1/4 are 130.
        assert!(counts[2].abs_diff(2_500) <= 130, "{counts:?}");
        assert_eq!(pick(&all[1..2], &mut rng), Some(&all[1]), "a single one needs no weight");
        assert_eq!(pick(&[], &mut rng), None);
    }
}
