"""Processes that a benchmark starts: pinned to a CPU, in a namespace, measured from /proc, ended by their own pid.

Never ends a process by name, and leaves none behind: children die with this program even if it is killed.
Where they run is in `network`.
"""

import ctypes
import dataclasses
import os
import pathlib
import signal
import subprocess
import time

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
# Longer than a gateway's drain when nothing is open; then SIGKILL.
STOP_SECONDS_MAX = 5
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """Something did not come up or answered wrongly; the text says what to look at."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """What /proc/PID/smaps_rollup says, in KiB. File pages shared by several processes count in each one's `rss`."""

    rss: int
    anonymous: int

    def __add__(self, other):
        return Memory(self.rss + other.rss, self.anonymous + other.anonymous)


class Process:
    """One process that runs until `stop`."""

    def __init__(self, name, command, *, namespace=None, cpu=None, log, environment=None):
        self.name = name
        self.log = pathlib.Path(log)
        with open(self.log, "ab") as out:
            # Both wrappers exec, so the pid is the program's own.
            self._child = subprocess.Popen(
                wrapped(command, namespace, cpu),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(environment or {})},
                preexec_fn=_die_with_parent,
                start_new_session=True,
            )
        self.pid = self._child.pid

    def check(self):
        """Raises `Failed` if it has ended."""
        if self._child.poll() is not None:
            said = self.log.read_text(errors="replace")[-1500:]
            raise Failed(f"{self.name} ended with code {self._child.returncode}; it said:\n{said}")

    def wait(self, seconds):
        """Waits for its end at most `seconds`; whether it came."""
        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def cpu_seconds(self):
        """CPU time of all its threads so far, in user and kernel mode."""
        # The name in brackets may hold spaces: count fields after it.
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND

    def memory(self):
        """Its memory now."""
        sizes = {}
        for line in pathlib.Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0])
        return Memory(rss=sizes["Rss"], anonymous=sizes["Anonymous"])

    def stop(self):
        """Asks it to end, then makes it."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            try:
                self._child.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self._child.kill()
        self._child.wait()

    def kill(self):
        """Ends it at once: for what holds nothing worth keeping."""
        self._child.kill()
        self._child.wait()


def wrapped(command, namespace=None, cpu=None):
    """`command` in a network namespace and on a CPU."""
    command = [str(part) for part in command]
    if cpu is not None:
        command = ["taskset", "-c", str(cpu), *command]
    if namespace is not None:
        command = ["ip", "netns", "exec", namespace, *command]
    return command


def output(command, *, namespace=None, cpu=None, seconds_max=60, environment=None, stderr=False):
    """What a command that must succeed writes to standard output, and with `stderr` to standard error too."""
    full = wrapped(command, namespace, cpu)
    try:
        done = subprocess.run(
            full,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds_max,
            env={**os.environ, **(environment or {})},
            preexec_fn=_die_with_parent,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"`{command[0]}` took more than {seconds_max} s") from None
    if done.returncode != 0:
        said = done.stderr.strip()[-1500:]
        raise Failed(f"`{pathlib.Path(command[0]).name} ...` failed with code {done.returncode}: {said}")
    return done.stdout + done.stderr if stderr else done.stdout


def wait_for(what, attempt, *, seconds_max=30, pause=0.1, alive=()):
    """Calls `attempt` until it returns something true; `alive` are processes that must not end meanwhile."""
    deadline = time.monotonic() + seconds_max
    why = "no answer"
    while time.monotonic() < deadline:
        for process in alive:
            process.check()
        try:
            if found := attempt():
                return found
        except Failed as failed:
            why = str(failed)
        time.sleep(pause)
    raise Failed(f"{what} did not come within {seconds_max} s: {why}")


def _die_with_parent():
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
