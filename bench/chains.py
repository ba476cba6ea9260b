"""The chains of proxies that are compared; each a context that holds running processes.

    direct        client                                                           app
    envoy-sni     client  sidecar =h2, mTLS=    | SNI gateway ======= sidecar      app
    envoy-l7-h3   client  sidecar =h3, mTLS=    | gateway =h2, mTLS= sidecar       app
    isthmus       client  sidecar =QUIC= gateway| gateway ===QUIC=== sidecar       app

`|` is the border of the clusters (a veth pair). All proxies of a chain share one CPU.
"""

import contextlib
import json

import envoy
from certs import SERVER_NAME, Authority
from load import APP_PORT, PROXY_CPU, Target, app
from mesh import OUTBOUND_PORT, SERVICE_HOST, Cluster, service_yaml
from network import GATEWAY_A, GATEWAY_B, PROXY_A, PROXY_B, WORKLOAD_A, WORKLOAD_B
from process import Process

_MTLS_PORT, _GATEWAY_PORT = 15008, 15443


class Chain:
    """Where to send requests, and which processes carry them."""

    def __init__(self, name, target, app_process, proxies):
        self.name, self.target, self.app, self.proxies = name, target, app_process, proxies

    def cpu_seconds(self):
        """CPU time of each proxy so far, by its name."""
        return {proxy.name: proxy.cpu_seconds() for proxy in self.proxies}

    def memory(self):
        """Memory of all proxies now."""
        sizes = [proxy.memory() for proxy in self.proxies]
        return sum(sizes[1:], sizes[0]) if sizes else None


class Maker:
    """Starts chains; `tools` has the paths `envoy`, `fortio` and `isthmus`."""

    def __init__(self, network, tools, generator, folder):
        self.network, self.tools, self.generator, self.folder = network, tools, generator, folder
        self._started = 0

    @contextlib.contextmanager
    def chain(self, name):
        """A chain that answers; ended on leaving."""
        self._started += 1
        folder = self.folder / f"{self._started}-{name}"
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            application = app(self.tools.fortio, self.network.b, folder / "app.log")
            stack.callback(application.kill)
            proxies = []

            def keep(process):
                # Not asked to drain: nothing of a chain is worth keeping.
                stack.callback(process.kill)
                proxies.append(process)
                return process

            target = MAKERS[name](self, folder, keep)
            self.generator.wait(target, [application, *proxies])
            yield Chain(name, target, application, proxies)

    def _envoy(self, folder, name, namespace, listener, cluster):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(envoy.bootstrap(name, listener, cluster), indent=1))
        command = [self.tools.envoy, "-c", path, "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]
        return Process(f"envoy {name}", command, namespace=namespace, cpu=PROXY_CPU, log=folder / f"{name}.log")

    def direct(self, _folder, _keep):
        return Target(self.network.a, GATEWAY_B, APP_PORT, GATEWAY_B)

    def envoy_sni(self, folder, keep):
        client, server = _files(folder, "web", "cart")
        keep(self._server_sidecar(folder, server, "web"))
        keep(self._envoy(folder, "gateway", self.network.b, envoy.sni_listener(GATEWAY_B, _GATEWAY_PORT),
                         envoy.plain_cluster(SERVER_NAME, PROXY_B, _MTLS_PORT, http=False)))
        keep(self._envoy(folder, "client", self.network.a, envoy.plain_listener(PROXY_A, OUTBOUND_PORT, "cart"),
                         envoy.mtls_cluster("cart", GATEWAY_B, _GATEWAY_PORT, client, "cart")))
        return Target(self.network.a, PROXY_A, OUTBOUND_PORT, SERVICE_HOST)

    def envoy_l7_h3(self, folder, keep):
        client, gateway, server = _files(folder, "web", "gateway", "cart")
        keep(self._server_sidecar(folder, server, "gateway"))
        keep(self._envoy(folder, "gateway", self.network.b,
                         envoy.quic_listener(GATEWAY_B, _GATEWAY_PORT, "cart", gateway, "web"),
                         envoy.mtls_cluster("cart", PROXY_B, _MTLS_PORT, gateway, "cart")))
        keep(self._envoy(folder, "client", self.network.a, envoy.plain_listener(PROXY_A, OUTBOUND_PORT, "cart"),
                         envoy.quic_cluster("cart", GATEWAY_B, _GATEWAY_PORT, client, "gateway")))
        return Target(self.network.a, PROXY_A, OUTBOUND_PORT, SERVICE_HOST)

    def isthmus(self, folder, keep):
        here = Cluster(self.tools.isthmus, folder, "aws-eu", self.network.a, GATEWAY_A)
        there = Cluster(self.tools.isthmus, folder, "gcp-us", self.network.b, GATEWAY_B)
        here.found(keep)
        there.join(here, keep)
        there.apply(service_yaml("cart", exported=True))
        keep(there.sidecar("cart", PROXY_B, WORKLOAD_B))
        keep(here.sidecar("web", PROXY_A, WORKLOAD_A))
        return Target(self.network.a, PROXY_A, OUTBOUND_PORT, SERVICE_HOST)

    def _server_sidecar(self, folder, files, peer):
        return self._envoy(folder, "server", self.network.b,
                           envoy.mtls_listener(PROXY_B, _MTLS_PORT, "app", files, peer),
                           envoy.plain_cluster("app", WORKLOAD_B, APP_PORT))


def _files(folder, *names):
    """For each name a certificate, its key, and the root of them all."""
    authority = Authority(folder / "certs")
    return [(*authority.leaf(name), authority.root) for name in names]


# In the order of the table.
MAKERS = {
    "direct": Maker.direct,
    "envoy-sni": Maker.envoy_sni,
    "envoy-l7-h3": Maker.envoy_l7_h3,
    "isthmus": Maker.isthmus,
}
