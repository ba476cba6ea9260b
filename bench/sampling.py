"""`bench/run profile`: a chain at full rate, sampled by perf on the CPU's clock; what its processes spend it on.

Hardware counters are not needed. Symbols are those of the binaries: names without lines, and whatever was inlined
counts for the function it went into.
"""

import re

import table
from process import Failed, output
from tools import perf

FREQUENCY_HZ = 999
SYMBOLS = 15
# The load goes on for a second before and after.
MARGIN_SECONDS = 1


def run(maker, name, seconds):
    """Samples chain `name`; returns shares by symbol and by process."""
    perf_path = perf()
    if perf_path is None:
        raise Failed("perf does not work here: install linux-perf, or allow it (kernel.perf_event_paranoid)")
    data = maker.folder / "perf.data"
    with maker.chain(name) as chain:
        pids = ",".join(str(proxy.pid) for proxy in chain.proxies)
        record = [perf_path, "record", "-q", "-e", "cpu-clock", "-F", FREQUENCY_HZ, "-p", pids, "-o", data,
                  "--", "sleep", seconds]

        def sample():
            output(record, seconds_max=seconds + 30)

        maker.generator.full(chain.target, MARGIN_SECONDS)
        before = chain.cpu_seconds()
        load = maker.generator.full(chain.target, seconds + 2 * MARGIN_SECONDS, meanwhile=sample,
                                    before_end=seconds + MARGIN_SECONDS)
        after = chain.cpu_seconds()
    cpu = {process: (after[process] - before[process]) / load.requests * 1e6 for process in after}
    report = [perf_path, "report", "-i", data, "--stdio", "--no-children", "-g", "none", "--percent-limit", "0.3"]
    by_binary = output([*report, "--sort", "dso"], seconds_max=300)
    symbols = [(float(share), binary, symbol)
               for share, binary, symbol in _lines(output([*report, "--sort", "dso,symbol"], seconds_max=300),
                                                   r"\s*([\d.]+)%\s+(\S+)\s+\[[.k]\]\s+(.*?)(?:\s{2,}.*)?")]
    binaries = [(float(share), binary)
                for share, binary in _lines(by_binary, r"\s*([\d.]+)%\s+(\S+)\s*")]
    return {"chain": name, "rps": load.rate, "seconds": seconds, "us_a_request": cpu,
            "binaries": binaries, "symbols": symbols}


def show(found):
    """Three small tables."""
    lines = [f"{found['chain']} at full rate: {found['rps']:,.0f} requests/s, {found['seconds']} s sampled at "
             f"{FREQUENCY_HZ} Hz.", ""]
    rows = [[name, f"{us:.1f}"] for name, us in found["us_a_request"].items()]
    lines += table.markdown(["process", "CPU us a request"], rows)
    rows = [[where, f"{share:.1f} %"] for share, where in found["binaries"]]
    lines += ["", *table.markdown(["where", "share"], rows)]
    rows = [[f"`{_short(symbol)}`", where, f"{share:.1f} %"] for share, where, symbol in found["symbols"][:SYMBOLS]]
    lines += ["", *table.markdown(["symbol", "where", "share"], rows)]
    return "\n".join(lines)


def _lines(text, pattern):
    matches = (re.fullmatch(pattern, line.rstrip()) for line in text.splitlines())
    return [match.groups() for match in matches if match]


def _short(symbol, length_max=90):
    # The hash of a mangled name says nothing to a reader.
    symbol = re.sub(r"::h[0-9a-f]{16}\b", "", symbol).strip()
    return symbol if len(symbol) <= length_max else symbol[:length_max - 1] + "…"
