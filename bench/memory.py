"""`bench/run memory`: one cluster with many exported services; what an idle sidecar and its gateway hold."""

import contextlib
import json
import time

import table
from mesh import Cluster, service_yaml
from network import GATEWAY_A, PROXY_A, PROXY_MANY, WORKLOAD_A, WORKLOAD_MANY
from process import wait_for
from tools import say

# MiB: the project's goals with 1,000 services.
GOALS = {"sidecar": {"anonymous": 8, "rss": 15}, "gateway": {"rss": 60}}
# Objects a file: well below what one `apply` may hold.
BATCH = 250
EXPORT_SECONDS_MAX = 180


def run(maker, services, seconds):
    """Makes the mesh, waits, reads; nothing is called meanwhile."""
    folder = maker.folder / "memory"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        def keep(process):
            stack.callback(process.kill)
            return process

        cluster = Cluster(maker.tools.isthmus, folder, "aws-eu", maker.network.a, GATEWAY_A)
        cluster.found(keep)
        # Only a workload with a sidecar makes an export real. Not the one that is measured: that stays idle.
        keep(cluster.sidecar("many", PROXY_MANY, WORKLOAD_MANY, admin_port=15100))
        started = time.monotonic()
        _apply(cluster, services)
        applied = time.monotonic() - started
        say(f"applied {services} services in {applied:.1f} s; waiting until all of them are exported")
        # They are written to the log one after the other.
        wait_for(f"the export of {services} services", lambda: _listed(cluster, "exports") >= services,
                 seconds_max=EXPORT_SECONDS_MAX, pause=0.5, alive=[cluster.gateway])
        exported = time.monotonic() - started
        say(f"exported after {exported:.1f} s; reading memory in {seconds} s")
        sidecar = keep(cluster.sidecar("web", PROXY_A, WORKLOAD_A))
        time.sleep(seconds)
        sizes = {}
        for name, process in (("sidecar", sidecar), ("gateway", cluster.gateway)):
            process.check()
            read = process.memory()
            sizes[name] = {"anonymous": read.anonymous / 1024, "rss": read.rss / 1024}
        return {"services": services, "listed": _listed(cluster, "services"), "seconds": seconds,
                "apply_seconds": applied, "export_seconds": exported, "mib": sizes}


def _apply(cluster, services):
    """Services that all select the one workload `many`, and their exports."""
    made = [service_yaml(f"svc-{number:04}", app="many", exported=True) for number in range(services)]
    for first in range(0, services, BATCH):
        cluster.apply("".join(made[first:first + BATCH]))


def _listed(cluster, what):
    return len(json.loads(cluster.command("get", what, "-o", "json"))["items"])


def held(found):
    """Whether all goals were met."""
    return all(found["mib"][name][size] <= limit for name, limits in GOALS.items() for size, limit in limits.items())


def show(found):
    """The table."""
    rows = []
    for name, sizes in found["mib"].items():
        row = [name]
        file_pages = sizes["rss"] - sizes["anonymous"]
        for size in ("anonymous", "rss"):
            limit = GOALS[name].get(size)
            verdict = "" if limit is None else f" (goal {limit}: {'held' if sizes[size] <= limit else 'MISSED'})"
            row.append(f"{sizes[size]:.1f}{verdict}")
        rows.append([*row, f"{file_pages:.1f}"])
    head = (f"{found['services']} services in one cluster, exported, applied in "
            f"{found['apply_seconds']:.1f} s, all exported after {found['export_seconds']:.1f} s (`get services` lists "
            f"{found['listed']}); one idle sidecar, read after {found['seconds']} s.")
    return "\n".join([head, "", *table.markdown(["process", "anonymous MiB", "RSS MiB", "of it file pages"], rows)])
