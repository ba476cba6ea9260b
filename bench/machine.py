"""What the figures depend on: kernel, CPU, versions; and who else used the CPUs meanwhile. Only reads."""

import os
import pathlib
import platform
import re
import time

from process import TICKS_A_SECOND, output

# A machine counts as idle if it used less than this for so long.
IDLE_CPUS_MAX, IDLE_SECONDS = 0.15, 1


def facts(tools, network):
    """Lines of a report's head, by name."""
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "kernel": platform.release(),
        "cpu": f"{len(os.sched_getaffinity(0))} x {model.group(1) if model else platform.machine()}",
        "congestion control": network.congestion_control(),
        "isthmus": output([tools.isthmus, "version"]).splitlines()[0],
    }
    if tools.envoy:
        found["envoy"] = re.search(r"version: [0-9a-f]+/([^/]+)/", output([tools.envoy, "--version"])).group(1)
    if tools.fortio:
        found["fortio"] = output([tools.fortio, "version"]).strip()
    return found


class Clock:
    """CPU time of the whole machine, to tell how much of it others had."""

    def __init__(self):
        self._busy, self._at = _busy_seconds(), time.monotonic()

    def others(self, ours_seconds):
        """CPUs used since, on average, by what is not ours. Interrupts count as others', so this is an upper bound."""
        seconds = time.monotonic() - self._at
        return max(_busy_seconds() - self._busy - ours_seconds, 0) / seconds


def wait_until_idle(seconds_max):
    """Waits until others leave the CPUs alone, at most so long; whether they did."""
    deadline = time.monotonic() + seconds_max
    while True:
        clock = Clock()
        time.sleep(IDLE_SECONDS)
        if clock.others(0) <= IDLE_CPUS_MAX:
            return True
        if time.monotonic() > deadline:
            return False


def _busy_seconds():
    # user, nice, system, idle, iowait, irq, softirq, steal
    fields = [int(field) for field in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / TICKS_A_SECOND
