"""HTTP/1.1 load by fortio, and the application that it calls (fortio's echo server).

Latencies at a fixed rate are exact: taken from fortio's log of every request, not from its histogram.
"""

import dataclasses
import json
import math
import resource

from process import Failed, Process, output, wait_for

APP_PORT = 8080
CONNECTIONS = 64
BODY_BYTES = 1024
PATH = f"/?size={BODY_BYTES}"
# The client and the application share a CPU; the proxies have the other.
LOAD_CPU, PROXY_CPU = 1, 0
# Above what a stuck connection may take; fortio ends by itself well before.
GRACE_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Load:
    """What one run of the load generator saw."""

    requests: int
    failed: int
    seconds: float
    p50_ms: float
    p99_ms: float
    # CPU that the generator itself used.
    cpu_seconds: float

    @property
    def rate(self):
        """Requests answered with 200, a second."""
        return (self.requests - self.failed) / self.seconds


@dataclasses.dataclass(frozen=True)
class Target:
    """Where requests go, and which host they name."""

    namespace: str
    address: str
    port: int
    host: str

    @property
    def url(self):
        """What fortio is given."""
        return f"http://{self.address}:{self.port}{PATH}"


class Generator:
    """fortio as a client."""

    def __init__(self, fortio, folder):
        self._fortio = fortio
        self._folder = folder

    def command(self, target, *options):
        """A `fortio load` with a JSON report on standard output."""
        return [self._fortio, "load", "-quiet", "-json", "-", "-p", "50,99", "-r", "0.00001",
                "-H", f"Host: {target.host}", *options, target.url]

    def probe(self, target):
        """One request; true if it was answered with 200."""
        said = output(self.command(target, "-n", "1", "-c", "1", "-qps", "0"), namespace=target.namespace)
        return json.loads(said)["RetCodes"].get("200") == 1

    def wait(self, target, alive):
        """Until `target` answers."""
        wait_for(f"the answer of {target.url}", lambda: self.probe(target), alive=alive)

    def full(self, target, seconds, meanwhile=lambda: None, before_end=0.7):
        """As fast as `CONNECTIONS` connections go; calls `meanwhile` so many seconds before the end."""
        options = ["-qps", "0", "-c", str(CONNECTIONS), "-t", f"{seconds}s"]
        report, cpu = self._run(target, options, seconds - before_end, meanwhile)
        entries = report["DurationHistogram"]["Percentiles"]
        percentiles = {entry["Percentile"]: entry["Value"] * 1000 for entry in entries}
        return _load(report, cpu, percentiles[50], percentiles[99])

    def at_rate(self, target, seconds, rate):
        """`rate` requests a second, spread evenly over the connections."""
        log = self._folder / "requests.json"
        log.unlink(missing_ok=True)
        options = ["-qps", str(rate), "-c", str(CONNECTIONS), "-t", f"{seconds}s", "-uniform", "-nocatchup",
                   "-access-log-file", log]
        report, cpu = self._run(target, options, seconds, lambda: None)
        latencies = sorted(json.loads(line)["latency"] * 1000 for line in log.read_text().splitlines())
        return _load(report, cpu, percentile(latencies, 50), percentile(latencies, 99))

    def _run(self, target, options, pause, meanwhile):
        before = _children_seconds()
        out, log = self._folder / "fortio.json", self._folder / "fortio.log"
        out.unlink(missing_ok=True)
        command = self.command(target, *options)
        command[command.index("-json") + 1] = out
        client = Process("fortio", command, namespace=target.namespace, cpu=LOAD_CPU, log=log)
        try:
            client.wait(max(pause, 0.1))
            meanwhile()
            if not client.wait(GRACE_SECONDS):
                raise Failed(f"fortio did not end {GRACE_SECONDS} s after its time; see {log}")
        finally:
            client.kill()
        if not out.is_file():
            raise Failed(f"fortio wrote no report: {log.read_text(errors='replace')[-1500:]}")
        return json.loads(out.read_text()), _children_seconds() - before


def app(fortio, namespace, log):
    """The application: answers with as many bytes as asked for. On every address: `direct` has no proxy beside it."""
    command = [fortio, "server", "-quiet", "-http-port", f"0.0.0.0:{APP_PORT}", "-grpc-port", "disabled",
               "-redirect-port", "disabled", "-tcp-port", "disabled", "-udp-port", "disabled", "-ui-path", ""]
    return Process("app", command, namespace=namespace, cpu=LOAD_CPU, log=log)


def percentile(ordered, percent):
    """By nearest rank; of a sorted list."""
    if not ordered:
        raise Failed("no request was logged")
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def _load(report, cpu, p50_ms, p99_ms):
    codes = report["RetCodes"]
    requests = sum(codes.values())
    if requests == 0:
        raise Failed("fortio made no request")
    return Load(
        requests=requests,
        failed=requests - codes.get("200", 0),
        seconds=report["ActualDuration"] / 1e9,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        cpu_seconds=cpu,
    )


def _children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
