"""The command line of the benchmarks: reads options, makes the network, runs one of them, prints what it found."""

import argparse
import json
import pathlib
import signal
import sys
import tempfile
import types

import compare
import machine
import memory
import sampling
import tools
import warm
from chains import MAKERS, Maker
from load import Generator
from network import Network
from process import Failed


def main():
    """Runs `bench/run`; returns its exit code."""
    options = _parser().parse_args()
    # A terminated run cleans up as one that was interrupted.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        return options.work(options)
    except Failed as failed:
        tools.say(f"error: {failed}")
        return 1
    except KeyboardInterrupt:
        tools.say("interrupted: processes ended, namespaces removed")
        return 130


def _compare(options):
    names = compare.chosen(options.chains)
    with _prepared(options, peers=any(name.startswith("envoy") for name in names)) as (maker, facts):
        samples = compare.run(maker, names, options.seconds, options.repeats, options.wait)
    found = {"machine": facts, "seconds": options.seconds, "median": compare.medians(samples),
             "rounds": {name: [vars(sample) for sample in rounds] for name, rounds in samples.items()}}
    _finish(options, facts, compare.show(samples, options.seconds), found)
    return 0 if all(of["failed"] == 0 for of in found["median"].values()) else 1


def _memory(options):
    with _prepared(options) as (maker, facts):
        found = memory.run(maker, options.services, options.seconds)
    _finish(options, facts, memory.show(found), {"machine": facts, **found})
    return 0 if memory.held(found) else 1


def _warm(options):
    with _prepared(options) as (maker, facts):
        found = warm.run(maker.tools.isthmus)
    _finish(options, facts, warm.show(found), {"machine": facts, **found})
    return 0 if found["held"] else 1


def _profile(options):
    with _prepared(options, peers=options.chain.startswith("envoy")) as (maker, facts):
        found = sampling.run(maker, options.chain, options.seconds)
    _finish(options, facts, sampling.show(found), {"machine": facts, **found})
    return 0


def _install(_options):
    tools.check_system()
    for path in (tools.envoy(), tools.fortio()):
        print(path)
    return 0


class _prepared:
    """A context: tools, namespaces and a folder for one run; gives a `Maker` and facts of the machine."""

    def __init__(self, options, peers=False):
        self._options, self._peers = options, peers

    def __enter__(self):
        tools.check_system()
        envoy, fortio = tools.envoy() if self._peers else None, tools.fortio()
        # Short: a path of a unix socket has at most 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="ismb-", ignore_cleanup_errors=True)
        folder = pathlib.Path(self._folder.name)
        isthmus = tools.isthmus(self._options.isthmus, folder)
        self._network = Network()
        network = self._network.__enter__()
        found = types.SimpleNamespace(envoy=envoy, fortio=fortio, isthmus=isthmus)
        return Maker(network, found, Generator(fortio, folder), folder), machine.facts(found, network)

    def __exit__(self, *reason):
        self._network.__exit__()
        if reason[0] is not None and self._options.keep_logs:
            self._folder._finalizer.detach()
            tools.say(f"logs and configurations are in {self._folder.name}")
        else:
            self._folder.cleanup()


def _finish(options, facts, text, found):
    print("\n".join(f"{name}: {value}" for name, value in facts.items()) + "\n\n" + text)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


def _parser():
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--isthmus", metavar="PATH", help="the binary to measure (default: the release build)")
    common.add_argument("--json", metavar="FILE", help="write every figure here")
    common.add_argument("--keep-logs", action="store_true", help="if it fails, leave logs and configurations")
    parser = argparse.ArgumentParser(prog="bench/run", description="Measures isthmus beside its peers. Needs root.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, work, about):
        added = commands.add_parser(name, parents=[common], help=about, description=about)
        added.set_defaults(work=work)
        return added

    one = command("compare", _compare, "requests/s, CPU, latency and memory of each chain")
    one.add_argument("--seconds", type=_positive, default=5, help="of each measurement (default 5)")
    one.add_argument("--repeats", type=_positive, default=3, help="rounds, of which the median counts (default 3)")
    one.add_argument("--wait", type=int, default=30, metavar="SECONDS",
                     help="longest wait for an idle machine before each chain (default 30)")
    one.add_argument("--chains", default="", metavar="NAME,...", help=f"some of {', '.join(MAKERS)}")
    one = command("memory", _memory, "an idle sidecar and its gateway in a cluster of many services")
    one.add_argument("--services", type=_positive, default=1000, help="how many (default 1000)")
    one.add_argument("--seconds", type=_positive, default=20, help="after which memory is read (default 20)")
    command("warm", _warm, "calls over a WAN with delay: the project's own demo, and what it timed")
    one = command("profile", _profile, "where a chain at full rate spends its CPU, by perf")
    one.add_argument("--seconds", type=_positive, default=5, help="of sampling (default 5)")
    one.add_argument("--chain", default="isthmus", choices=[name for name in MAKERS if name != "direct"])
    command("install", _install, "fetch what the others need, and nothing else")
    return parser


def _positive(text):
    if not 1 <= (number := int(text)) <= 10_000:
        raise argparse.ArgumentTypeError("must be from 1 to 10000")
    return number


if __name__ == "__main__":
    # Without a command: the comparison, with its defaults or the options given.
    if len(sys.argv) == 1 or sys.argv[1].startswith("-") and sys.argv[1] not in ("-h", "--help"):
        sys.argv.insert(1, "compare")
    sys.exit(main())
