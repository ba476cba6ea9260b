"""A mesh of isthmus, made by the commands of README.md's section "By hand", in one or two namespaces.

Settings that differ from the defaults, and why: `log.access: false` and log level `warn` (no peer logs either), and
one router thread a gateway (a chain has one CPU).
"""

import json
import re

from load import APP_PORT, PROXY_CPU
from process import Process, output, wait_for

SERVICE_HOST = "cart.shop.svc.clusterset.local"
OUTBOUND_PORT = 15001
_QUIET = {"ISTHMUS_LOG": "warn"}


class Cluster:
    """One cluster: its gateway's process, its operator socket."""

    def __init__(self, isthmus, folder, name, namespace, address):
        self.name, self.namespace, self.address = name, namespace, address
        self.state = folder / name
        self.gateway = None
        self._isthmus, self._folder = isthmus, folder
        self.fingerprint = None

    def found(self, keep):
        """`isthmus init`, and the gateway; `keep` takes the process as soon as it runs."""
        # The fingerprint is told to people, on standard error.
        said = self._plain("init", "--mesh", "bench", "--cluster", self.name, "--state", self.state, "--operator-dir",
                           self._folder / "operator", "--listen", self.address, "--advertise", f"{self.address}:15443",
                           stderr=True)
        self.fingerprint = re.search("sha256:[0-9a-f]{64}", said).group()
        self._start(keep)

    def join(self, other, keep):
        """`isthmus token create` in `other`, `isthmus join` here, and the gateway."""
        token = other.command("token", "create", self.name).strip()
        self._plain("join", token, "--state", self.state, "--listen", self.address,
                    "--advertise", f"{self.address}:15443")
        self.fingerprint = other.fingerprint
        self._start(keep)

    def command(self, *arguments):
        """An operator's command, said to this cluster's gateway."""
        return output([self._isthmus, "--gateway", f"unix:{self.state}/gateway.sock", *arguments],
                      namespace=self.namespace)

    def apply(self, yaml):
        """`isthmus apply`."""
        path = self._folder / "objects.yaml"
        path.write_text(yaml)
        self.command("apply", "-f", path)

    def sidecar(self, name, address, workload, admin_port=15000):
        """`isthmus token create --workload` and `isthmus proxy`; returns the process."""
        token = self._folder / f"{name}.token"
        token.write_text(self.command("token", "create", "--workload", f"ns/shop/sa/{name}"))
        config = self._folder / f"{name}.yaml"
        # JSON is YAML.
        config.write_text(json.dumps({
            "state": str(self._folder / name),
            "gateways": [self.address],
            "root_fingerprint": self.fingerprint,
            "token_file": str(token),
            "listen": address,
            "capture": "explicit",
            "ports": {"admin": admin_port},
            "dns": {"enabled": False},
            "log": {"level": "warn", "access": False},
            "workload": {"namespace": "shop", "name": f"{name}-1", "service_account": name, "address": workload,
                         "labels": {"app": name}},
        }))
        return Process(f"proxy {name}", [self._isthmus, "proxy", "--config", config], namespace=self.namespace,
                       cpu=PROXY_CPU, log=self._folder / f"{name}.log")

    def _start(self, keep):
        config = self.state / "gateway.yaml"
        config.write_text(config.read_text() + "workers: 1\n")
        command = [self._isthmus, "gateway", "--config", config]
        self.gateway = keep(Process(f"gateway {self.name}", command, namespace=self.namespace, cpu=PROXY_CPU,
                                    log=self._folder / f"{self.name}.log", environment=_QUIET))
        wait_for(f"the gateway of {self.name}", lambda: self.command("status", "--wait"), alive=[self.gateway])

    def _plain(self, *arguments, stderr=False):
        return output([self._isthmus, *arguments], namespace=self.namespace, stderr=stderr)


def service_yaml(name, app=None, exported=False):
    """A Service that selects workloads labelled `app: APP` (by default its own name), and its export."""
    documents = [_object("v1", "Service", name, {
        "selector": {"app": app or name},
        "ports": [{"name": "http", "port": 80, "targetPort": APP_PORT}],
    })]
    if exported:
        documents.append(_object("multicluster.x-k8s.io/v1alpha1", "ServiceExport", name))
    # JSON is YAML.
    return "".join(f"---\n{json.dumps(document)}\n" for document in documents)


def _object(version, kind, name, spec=None):
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {"name": name, "namespace": "shop"},
        **({"spec": spec} if spec else {}),
    }
