"""Envoy's configurations, one function a proxy. Only text: starts nothing.

Left out on purpose, in the peer's favour: access logs, Istio's filters, tracing, statistics sinks, xDS.
"""

from certs import SERVER_NAME, identity

_TYPE = "type.googleapis.com/envoy"
_TLS = f"{_TYPE}.extensions.transport_sockets.tls.v3"
_QUIC = f"{_TYPE}.extensions.transport_sockets.quic.v3"
_HTTP = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def bootstrap(name, listener, cluster):
    """A whole configuration of one listener and one cluster, without an admin port."""
    return {
        "node": {"id": name, "cluster": "bench"},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


def plain_listener(address, port, cluster):
    """HTTP/1.1 from the workload."""
    chain = {"filters": [_http(cluster, "AUTO")]}
    return {"name": "plain", "address": _address(address, port), "filter_chains": [chain]}


def mtls_listener(address, port, cluster, files, peer):
    """HTTP/2 over mTLS from `peer`."""
    chain = {
        "filters": [_http(cluster, "HTTP2")],
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": _downstream(files, peer, "h2"),
        },
    }
    return {"name": "mtls", "address": _address(address, port), "filter_chains": [chain]}


def quic_listener(address, port, cluster, files, peer):
    """HTTP/3 over mTLS from `peer`."""
    chain = {
        "filters": [_http(cluster, "HTTP3")],
        "transport_socket": {
            "name": "envoy.transport_sockets.quic",
            "typed_config": {
                "@type": f"{_QUIC}.QuicDownstreamTransport",
                "downstream_tls_context": _downstream(files, peer, "h3", typed=False),
            },
        },
    }
    return {
        "name": "quic",
        "address": _address(address, port, "UDP"),
        "udp_listener_config": {"quic_options": {}, "downstream_socket_config": {"prefer_gro": True}},
        "filter_chains": [chain],
    }


def sni_listener(address, port):
    """TLS passed through, unread but for its server name: to the cluster of that name, as Istio's gateway does."""
    sni = f"{_TYPE}.extensions.filters.network.sni_cluster.v3.SniCluster"
    tcp = f"{_TYPE}.extensions.filters.network.tcp_proxy.v3.TcpProxy"
    inspector = f"{_TYPE}.extensions.filters.listener.tls_inspector.v3.TlsInspector"
    chain = {
        "filter_chain_match": {"server_names": ["*.clusterset.local"]},
        "filters": [
            {"name": "envoy.filters.network.sni_cluster", "typed_config": {"@type": sni}},
            {
                "name": "envoy.filters.network.tcp_proxy",
                "typed_config": {"@type": tcp, "stat_prefix": "sni", "cluster": "blackhole"},
            },
        ],
    }
    return {
        "name": "sni",
        "address": _address(address, port),
        "listener_filters": [
            {"name": "envoy.filters.listener.tls_inspector", "typed_config": {"@type": inspector}}
        ],
        "filter_chains": [chain],
    }


def plain_cluster(name, address, port, *, http=True):
    """HTTP/1.1 to the workload, or bytes."""
    cluster = _cluster(name, address, port)
    if http:
        _protocol(cluster, {"http_protocol_options": {}})
    return cluster


def mtls_cluster(name, address, port, files, peer):
    """HTTP/2 over mTLS to `peer`."""
    cluster = _cluster(name, address, port)
    _protocol(cluster, {"http2_protocol_options": {}})
    cluster["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": _upstream(files, peer, "h2"),
    }
    return cluster


def quic_cluster(name, address, port, files, peer):
    """HTTP/3 over mTLS to `peer`."""
    cluster = _cluster(name, address, port)
    _protocol(cluster, {"http3_protocol_options": {}})
    cluster["transport_socket"] = {
        "name": "envoy.transport_sockets.quic",
        "typed_config": {
            "@type": f"{_QUIC}.QuicUpstreamTransport",
            "upstream_tls_context": _upstream(files, peer, "h3", typed=False),
        },
    }
    return cluster


def _address(address, port, protocol="TCP"):
    return {"socket_address": {"protocol": protocol, "address": address, "port_value": port}}


def _cluster(name, address, port):
    endpoint = {"endpoint": {"address": _address(address, port)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        # The default of 1,024 requests is far above 64 connections; said so that a larger run fails no request.
        "circuit_breakers": {"thresholds": [{"max_requests": 100000, "max_connections": 100000}]},
    }


def _protocol(cluster, options):
    cluster["typed_extension_protocol_options"] = {
        _HTTP: {"@type": f"type.googleapis.com/{_HTTP}", "explicit_http_config": options}
    }


def _http(cluster, codec):
    manager = f"{_TYPE}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    router = f"{_TYPE}.extensions.filters.http.router.v3.Router"
    config = {
        "@type": manager,
        "stat_prefix": "http",
        "codec_type": codec,
        "route_config": {
            "virtual_hosts": [
                {"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}]}
            ]
        },
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": router}}],
    }
    if codec == "HTTP3":
        config["http3_protocol_options"] = {}
    return {"name": "envoy.filters.network.http_connection_manager", "typed_config": config}


def _tls(files, root, peer, alpn):
    certificate, key = files
    own = {"certificate_chain": {"filename": str(certificate)}, "private_key": {"filename": str(key)}}
    return {
        "alpn_protocols": [alpn],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [own],
        "validation_context": {
            "trusted_ca": {"filename": str(root)},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": identity(peer)}}],
        },
    }


def _downstream(files, peer, alpn, typed=True):
    context = {
        "require_client_certificate": True,
        "common_tls_context": _tls(files[:2], files[2], peer, alpn),
    }
    return {"@type": f"{_TLS}.DownstreamTlsContext", **context} if typed else context


def _upstream(files, peer, alpn, typed=True):
    context = {"sni": SERVER_NAME, "common_tls_context": _tls(files[:2], files[2], peer, alpn)}
    return {"@type": f"{_TLS}.UpstreamTlsContext", **context} if typed else context
