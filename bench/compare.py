"""`bench/run compare`: the same load through each chain, some times over, medians side by side."""

import dataclasses
import statistics

import table
from chains import MAKERS
from load import BODY_BYTES, CONNECTIONS
from machine import Clock, wait_until_idle
from tools import say

RATE = 1000
WARM_UP_SECONDS = 1
# Less than this of its CPU used by the proxies: then it was not they who limited the rate.
SATURATED = 0.9


@dataclasses.dataclass(frozen=True)
class Sample:
    """One chain in one round. Proxies' figures are sums over the chain."""

    rps: float
    cpu_s_10k: float
    # Share of the proxies' CPU that they used.
    busy: float
    full_p50_ms: float
    full_p99_ms: float
    p50_ms: float
    p99_ms: float
    rate_cpu_s_10k: float
    rate_rps: float
    rss_mib: float
    anonymous_mib: float
    failed: int
    # CPUs used by others, in both parts.
    others: float
    # CPU microseconds a request at full rate, by process.
    processes_us: dict


def run(maker, names, seconds, repeats, wait_seconds):
    """All rounds: for each chain its samples. Chains alternate, so that a slow minute hits them all.

    Before each it waits for an idle machine, at most `wait_seconds`; then it measures all the same, and says so.
    """
    samples = {name: [] for name in names}
    for number in range(1, repeats + 1):
        for name in names:
            if wait_seconds and not wait_until_idle(wait_seconds):
                say(f"the machine was not idle within {wait_seconds} s: {name} is measured beside other load")
            with maker.chain(name) as chain:
                sample = measure(maker.generator, chain, seconds)
            samples[name].append(sample)
            say(f"round {number} of {repeats}: {name:12} {sample.rps:8.0f} requests/s, "
                f"{sample.cpu_s_10k:.3f} CPU s/10k; at {RATE}/s p50 {sample.p50_ms:.3f} ms, "
                f"p99 {sample.p99_ms:.3f} ms; {sample.failed} failed, others used {sample.others:.2f} CPUs")
    return samples


def measure(generator, chain, seconds):
    """One round of one chain."""
    generator.full(chain.target, WARM_UP_SECONDS)
    memory = []

    def look():
        memory.append(chain.memory())

    clock, app_before = Clock(), chain.app.cpu_seconds()
    full, each = _with_cpu(chain, lambda: generator.full(chain.target, seconds, meanwhile=look))
    rate, rate_each = _with_cpu(chain, lambda: generator.at_rate(chain.target, seconds, RATE))
    app = chain.app.cpu_seconds() - app_before
    full_cpu, rate_cpu = sum(each.values()), sum(rate_each.values())
    loaded = memory[0]
    return Sample(
        rps=full.rate,
        cpu_s_10k=full_cpu / full.requests * 10_000,
        busy=full_cpu / full.seconds,
        full_p50_ms=full.p50_ms,
        full_p99_ms=full.p99_ms,
        p50_ms=rate.p50_ms,
        p99_ms=rate.p99_ms,
        rate_cpu_s_10k=rate_cpu / rate.requests * 10_000,
        rate_rps=rate.rate,
        rss_mib=loaded.rss / 1024 if loaded else 0,
        anonymous_mib=loaded.anonymous / 1024 if loaded else 0,
        failed=full.failed + rate.failed,
        others=clock.others(full_cpu + rate_cpu + app + full.cpu_seconds + rate.cpu_seconds),
        processes_us={name: used / full.requests * 1e6 for name, used in each.items()},
    )


def medians(samples):
    """For each chain the median of each figure, except failures: their sum."""
    found = {}
    for name, rounds in samples.items():
        of = {field.name: statistics.median(getattr(one, field.name) for one in rounds)
              for field in dataclasses.fields(Sample) if field.name != "processes_us"}
        of["processes_us"] = {process: statistics.median(one.processes_us[process] for one in rounds)
                              for process in rounds[0].processes_us}
        of["failed"] = sum(one.failed for one in rounds)
        found[name] = of
    direct = found.get("direct")
    for of in found.values():
        of["added_p50_ms"] = of["p50_ms"] - direct["p50_ms"] if direct else None
        of["added_p99_ms"] = of["p99_ms"] - direct["p99_ms"] if direct else None
    return found


def show(samples, seconds):
    """The table, and what to think of it."""
    found = medians(samples)
    repeats = len(next(iter(samples.values())))
    columns = ["chain", "requests/s", "(spread)", "CPU s/10k", f"p50 / p99 ms at {RATE}/s", "added p50 / p99",
               f"CPU s/10k at {RATE}/s", "RSS MiB", "anonymous MiB", "failed"]
    rows = []
    for name, of in found.items():
        proxied = name != "direct"
        rates = [sample.rps for sample in samples[name]]
        added = proxied and of["added_p50_ms"] is not None
        rows.append([
            name + ("" if of["busy"] >= SATURATED or not proxied else " *"),
            f"{of['rps']:,.0f}",
            f"{min(rates):,.0f}-{max(rates):,.0f}",
            f"{of['cpu_s_10k']:.3f}" if proxied else "-",
            f"{of['p50_ms']:.3f} / {of['p99_ms']:.3f}",
            f"{of['added_p50_ms']:.3f} / {of['added_p99_ms']:.3f}" if added else "-",
            f"{of['rate_cpu_s_10k']:.2f}" if proxied else "-",
            f"{of['rss_mib']:.1f}" if proxied else "-",
            f"{of['anonymous_mib']:.1f}" if proxied else "-",
            of["failed"],
        ])
    lines = [f"HTTP/1.1, {BODY_BYTES} bytes, {CONNECTIONS} connections, {seconds} s, median of {repeats}; "
             "figures of proxies are sums over a chain.", "", *table.markdown(columns, rows)]
    lines += ["", "CPU microseconds a request at full rate, by process:", ""]
    lines += table.markdown(["chain", "processes"], [
        [name, ", ".join(f"{process} {us:.0f}" for process, us in of["processes_us"].items())]
        for name, of in found.items() if of["processes_us"]])
    lines += ["", *_remarks(found, samples)]
    return "\n".join(lines)


def _remarks(found, samples):
    unsaturated = [f"{name} ({of['busy']:.0%})" for name, of in found.items()
                   if name != "direct" and of["busy"] < SATURATED]
    if unsaturated:
        yield ("\\* The proxies did not get their whole CPU used: client, application or others limited the rate: "
               + ", ".join(unsaturated) + ".")
    others = [sample.others for rounds in samples.values() for sample in rounds]
    yield (f"CPUs used by others meanwhile (upper bound, with interrupts), per chain and round: "
           f"median {statistics.median(others):.2f}, most {max(others):.2f}.")


def chosen(text):
    """Names of chains, from a list with commas."""
    names = text.split(",") if text else list(MAKERS)
    unknown = [name for name in names if name not in MAKERS]
    if unknown:
        raise ValueError(f"no chain {', '.join(unknown)}; there are {', '.join(MAKERS)}")
    return names


def _with_cpu(chain, work):
    before = chain.cpu_seconds()
    result = work()
    return result, {name: used - before[name] for name, used in chain.cpu_seconds().items()}
