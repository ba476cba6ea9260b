"""Two network namespaces joined by one pair of interfaces, made for one run and removed with it.

    a: client, its proxy [, gateway A]        b: [gateway B,] the app's proxy, app
       10.77.0.1/30  <----- veth, MTU 1500 ----->  10.77.0.2/30
       10.77.1.0/24 on lo                          10.77.2.0/24 on lo

Inside a cluster packets take the loopback, between clusters the pair. No delay, no loss.
"""

import os
import pathlib
import subprocess

from process import output

PREFIX = "ismb-"
GATEWAY_A, GATEWAY_B = "10.77.0.1", "10.77.0.2"
# A cluster's pods reach each other, never those of the other cluster: there is no route between these.
PROXY_A, WORKLOAD_A = "10.77.1.2", "10.77.1.20"
# A second workload of cluster a.
PROXY_MANY, WORKLOAD_MANY = "10.77.1.3", "10.77.1.30"
PROXY_B, WORKLOAD_B = "10.77.2.2", "10.77.2.20"


class Network:
    """A context: the namespaces exist inside of it."""

    def __init__(self):
        self.a = f"{PREFIX}{os.getpid()}-a"
        self.b = f"{PREFIX}{os.getpid()}-b"

    def __enter__(self):
        remove_stale()
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for namespace in (self.a, self.b):
            _remove(namespace)

    def _make(self):
        ends = {self.a: f"ismb{os.getpid()}a", self.b: f"ismb{os.getpid()}b"}
        for namespace in ends:
            output(["ip", "netns", "add", namespace])
        output(["ip", "link", "add", ends[self.a], "netns", self.a, "type", "veth",
                "peer", "name", ends[self.b], "netns", self.b])
        for namespace, outside, inside in (
            (self.a, GATEWAY_A, (PROXY_A, WORKLOAD_A, PROXY_MANY, WORKLOAD_MANY)),
            (self.b, GATEWAY_B, (PROXY_B, WORKLOAD_B)),
        ):
            ip = ["ip", "-n", namespace]
            output([*ip, "link", "set", "lo", "up"])
            output([*ip, "address", "add", f"{outside}/30", "dev", ends[namespace]])
            output([*ip, "link", "set", ends[namespace], "up"])
            for address in inside:
                output([*ip, "address", "add", f"{address}/32", "dev", "lo"])

    def congestion_control(self):
        """TCP's, in the namespaces."""
        path = "/proc/sys/net/ipv4/tcp_congestion_control"
        return output(["cat", path], namespace=self.a).strip()


def remove_stale():
    """Removes what a run left that was killed with SIGKILL; runs that live keep theirs."""
    for line in output(["ip", "netns", "list"]).splitlines():
        name = line.split()[0] if line.split() else ""
        owner = name.removeprefix(PREFIX).rpartition("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not pathlib.Path(f"/proc/{owner}").exists():
            _remove(name)


def _remove(namespace):
    # Interfaces go with their namespace. Nothing to remove is no failure.
    subprocess.run(["ip", "netns", "delete", namespace], stderr=subprocess.DEVNULL, check=False)
