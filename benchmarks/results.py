"""Runs the benchmarks, keeps their records and renders docs/benchmarks.md from them.

python benchmarks/results.py run [SUITE ...]    # on the CPU -> benchmarks/results/<device>.json
python benchmarks/results.py render [--check]   # -> docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plot_moe

from onerec.cli import bench
from onerec.errors import OneRecError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
ABLATIONS = IMAGES / "alignment-ablations.svg"
LOAD = IMAGES / "serving-load.svg"

INTRODUCTION = """\
# Benchmarks

Rendered by `make docs` from the records in `benchmarks/results/`; no figure is typed by hand.
`make bench` (CPU) and `make gpu-check` (one CUDA device) write a record.

How it is measured: every provider's result is checked against the reference in the same run before
anything is timed; the providers of one line are timed in turn, one call of each a round, so that a
change of the machine's load meets all of them; a figure is the median over the rounds with its 20th
and 80th percentile, and its 99th where there were a hundred rounds. `x` is a provider's median over
the first one's. Memory that can be reused
between calls is made outside the timing.
"""


class Headline(NamedTuple):
    """A line of the table that opens the page.

    Attributes:
        suite: Suite of the benchmark.
        name: Its name.
        operation: What is done, in words.
        size: On what, in words.
        ours: Our provider.
        peers: Providers of others that do the same; the fastest that was measured is shown.
        floor: A provider, or a fact in the unit of its name, that no implementation can be below.
    """

    suite: str
    name: str
    operation: str
    size: str
    ours: str
    peers: tuple[str, ...]
    floor: str = ""


_MASKS = ("dense mask", "dictionary (transformers)")
_GENERATE = ("transformers, mask", "transformers, callback")
_EXPERTS = ("F.grouped_mm", "loop")
HEADLINES = (
    Headline("beam", "peers[wide-1-1thread]", "beam step, one thread",
             "128 beams, 8,192 codes, 1M items", "onerec", _MASKS),
    Headline("beam", "peers[narrow-1-1thread]", "beam step, one thread",
             "128 beams, 256 codes, 1M items", "onerec", _MASKS),
    Headline("beam", "step[1thread-wide-1]", "beam step beside reading the logits",
             "128 beams, 8,192 codes, 1M items", "onerec", (), "logits read once"),
    Headline("trie", "build[wide-100k-random]", "trie, built", "100,000 items", "onerec",
             ("dictionary",)),
    Headline("trie", "lookup[wide]", "trie, looked up", "100,000 of 1M items", "onerec",
             ("dictionary",)),
    Headline("engine", "session[tiny-S150-B1-m1]", "session of 1 item, bfloat16",
             "`tiny`, 50 items seen", "native bfloat16", _GENERATE, "floor ms bfloat16"),
    Headline("engine", "session[tiny-S150-B1-m5]", "session of 5 items, bfloat16",
             "`tiny`, 50 items seen", "native bfloat16", _GENERATE, "floor ms bfloat16"),
    Headline("engine", "session[small-S150-B1-m1]", "session of 1 item, bfloat16",
             "`small`, 50 items seen", "native bfloat16", _GENERATE, "floor ms bfloat16"),
    Headline("moe", "forward[small-1-fp32]", "experts, forward, float32",
             "24 experts of 512 x 2,048, 1 token", "onerec", _EXPERTS, "floor_s"),
    Headline("moe", "forward[small-128-fp32]", "experts, forward, float32",
             "24 experts of 512 x 2,048, 128 tokens", "onerec", _EXPERTS, "floor_s"),
    Headline("moe", "forward[small-128-bf16]", "experts, forward, bfloat16",
             "24 experts of 512 x 2,048, 128 tokens", "onerec", _EXPERTS, "floor_s"),
    Headline("moe", "training_step[small-2048-fp32]", "experts, training step, float32",
             "24 experts of 512 x 2,048, 2,048 tokens", "onerec", _EXPERTS, "floor_s"),
    Headline("kmeans", "fit[10k-64]", "balanced k-means, 2 steps", "10,240 x 64, 64 clusters",
             "priced", ("k-means-constrained",)),
    Headline("kmeans", "fit[10k-64]", "the same, peers without balance",
             "10,240 x 64, 64 clusters", "priced", ("faiss", "scikit-learn")),
    Headline("kmeans", "fit[200k-1024]", "balanced k-means, 10 steps, peer without balance",
             "200,000 x 128, 1,024 clusters", "priced", ("faiss",)),
)  # fmt: skip


def device(record: dict[str, Any]) -> str:
    """The machine of a record in words: its GPU if the benchmarks ran there, else its processor."""
    environment = record["environment"]
    if any(entry["device"] == "cuda" for entry in record["benchmarks"]):
        return str(environment["gpus"][0]["name"])
    cpu = environment["cpu"]
    return f"{cpu['name'].strip()}, {cpu['usable_cores']} cores, {environment['native']['isa']}"


def store(record: dict[str, Any], suites: Sequence[str] = ()) -> Path:
    """Writes `record` to benchmarks/results/<device>.json; an older one of that device goes.

    A record of named suites alone has their names behind the device's and replaces only its like.
    """
    path = RESULTS / f"{'-'.join([name_of(record), *suites])}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def suites_of(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(entry["suite"] for entry in record["benchmarks"]))


def section(record: dict[str, Any]) -> str:
    """The part of the page about one record."""
    environment, commit = record["environment"], record["commit"]
    packages = environment["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "numpy", "triton") if packages.get(name)
    )
    changed = " with uncommitted changes" if commit["dirty"] else ""
    suites = suites_of(record)
    lines = [
        f"\n{device(record)}. onerec {environment['onerec']} at commit "
        f"`{commit['id'][:10]}`{changed}, {record['datetime'][:10]}; "
        f"Python {environment['python']}, {versions}, {environment['torch']['threads']} threads.",
    ]
    for suite in suites:
        lines.append(f"\n### {suite}\n" if len(suites) > 1 else "")
        if suite == "alignment":
            lines += worlds([e for e in record["benchmarks"] if e["suite"] == suite])
            continue
        lines += [
            "| benchmark | provider | median | p20 .. p80 | x | figures |",
            "|---|---|---:|---:|---:|---|",
        ]
        drawn = scaling(record).get(suite, [])
        if suite == "moe":
            image = f"images/{suite}-{name_of(record)}.svg"
            lines[-2:-2] = [f"![Time against tokens, with the floor]({image})\n"]
        if drawn:
            image = f"images/{suite}-{name_of(record)}.svg"
            lines[-2:-2] = [f"![Time of a call, one number varied]({image})\n"]
        for entry in record["benchmarks"]:
            if entry["suite"] != suite or entry in drawn:
                continue
            ours = next(iter(entry["providers"].values()))["median_s"]
            for place, (provider, times) in enumerate(entry["providers"].items()):
                figures = [f"{rate:.3g} {unit}" for unit, rate in times["rates"].items()]
                if entry["rounds"] >= 100:  # fewer do not show the slowest of a hundred
                    figures.append(f"p99 {bench.duration(times['p99_s'])}")
                if place == 0:
                    figures += [f"{key} {value}" for key, value in entry["facts"].items()]
                cells = (
                    entry["name"] if place == 0 else "",
                    provider,
                    bench.duration(times["median_s"]),
                    f"{bench.duration(times['p20_s'])} .. {bench.duration(times['p80_s'])}",
                    f"{times['median_s'] / ours:.2f}",
                    ", ".join(figures),
                )
                lines.append(row(cells))
            for provider, message in entry.get("wrong", {}).items():
                lines.append(row(("", provider, "wrong", "", "", message)))
        lines += [
            f"\n{failed['name']} {failed['outcome']}: {failed['message']}"
            for failed in record.get("failed", [])
            if failed["suite"] == suite
        ]
    return "\n".join(lines) + "\n"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def worlds(entries: list[dict[str, Any]]) -> list[str]:
    """A table a benchmark of what policies do to the users of simulated worlds."""
    lines = [
        "Seconds watched, likes and follows of a session of five are the world's own expectation; "
        "`over NTP` is the paired difference to session-wise next-token training with a 95% "
        "bootstrap interval over worlds and users, and the difference in each world; `reward` is "
        "the reward model's for the session shown, and of its beam the mean and the greatest; "
        "`seconds` is the time of training and measuring it, a world.\n",
    ]
    if any(entry["name"].startswith("ablation[") for entry in entries):
        lines.append(f"![What IPA gains by its settings](images/{ABLATIONS.name})\n")
    for entry in entries:
        facts = [f"{key} {value}" for key, value in entry["facts"].items()]
        lines.append(f"**{entry['name']}**: {', '.join(facts)}.\n")
        rows = [
            ("policy", "watched", "over NTP", "in each world", "likes", "likes over NTP", "follows",
             "follows over NTP", "repetition", "reward", "of the beam", "legality", "coverage",
             "drift", "seconds")
        ]  # fmt: skip
        for policy, times in entry["providers"].items():
            rates = times["rates"]

            def lead(unit: str, digits: str, rates: dict[str, float] = rates) -> str:
                middle, low, high = (
                    rates[f"{unit} over NTP{end}"] for end in ("", " low", " high")
                )
                return "" if low == high else f"{middle:{digits}} [{low:{digits}}, {high:{digits}}]"

            each = [v for k, v in rates.items() if k.startswith("s over NTP in world")]
            beam = [f"{rates[k]:.2f}" for k in ("reward mean", "reward max") if k in rates]
            cells = (
                policy,
                f"{rates['s watched']:.1f}",
                lead("s", "+.1f"),
                ", ".join(f"{v:+.1f}" for v in each) if any(each) else "",
                f"{rates['likes']:.4f}",
                lead("likes", "+.4f"),
                f"{rates['follows']:.5f}",
                lead("follows", "+.5f"),
                f"{rates['repetition']:.2f}",
                f"{rates['reward']:.2f}",
                ", ".join(beam),
                f"{rates['legality']:.3f}" if "legality" in rates else "",
                f"{rates['coverage']:.2f}",
                f"{rates['drift']:.3f}" if rates["drift"] else "",
                f"{times['median_s']:.0f}",
            )
            rows.append(cells)
        told = [n for n in range(len(rows[0])) if any(row[n] for row in rows[1:])]
        table = [f"| {' | '.join(row[n] for n in told)} |" for row in rows]
        lines += [table[0], "|---|" + "---:|" * (len(told) - 1), *table[1:], ""]
    return lines


def name_of(record: dict[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device(record).lower()).strip("-")


def scaling(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Suite -> its entries that vary one number, `facts["axis"]`, to the value `facts["value"]`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for entry in record["benchmarks"]:
        if "axis" in entry["facts"]:
            found.setdefault(entry["suite"], []).append(entry)
    return found


def plot(record: dict[str, Any]) -> None:
    """Draws each suite's scaling: one panel an axis, a line a provider, both scales logarithmic."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "onerec", "svg.fonttype": "none"})
    for suite, entries in scaling(record).items():
        axes = list(dict.fromkeys(entry["facts"]["axis"] for entry in entries))
        figure = Figure(figsize=(3.2 * len(axes), 2.8), layout="constrained")
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, axis in zip(panels, axes, strict=True):
            mine = [entry for entry in entries if entry["facts"]["axis"] == axis]
            for provider in mine[0]["providers"]:
                panel.plot(
                    [entry["facts"]["value"] for entry in mine],
                    [entry["providers"][provider]["median_s"] * 1e3 for entry in mine],
                    marker="o",
                    label=provider,
                )
            panel.set(xscale="log", yscale="log", xlabel=axis)
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("ms")
        panels[0].legend(fontsize="small")
        IMAGES.mkdir(exist_ok=True)
        path = IMAGES / f"{suite}-{name_of(record)}.svg"
        figure.savefig(path, metadata={"Date": None})


def draw_moe(record: dict[str, Any]) -> None:
    """Draws the roofline of a record that has the suite `moe`."""
    if any(entry["suite"] == "moe" for entry in record["benchmarks"]):
        plot_moe.draw(record, IMAGES / f"moe-{name_of(record)}.svg")


def draw_ablations() -> None:
    """A panel an ablation of the alignment: true watch time over next-token training."""
    from matplotlib.figure import Figure

    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    found = {
        entry["name"][entry["name"].index("[") + 1 : -1]: entry["providers"]
        for record in records
        for entry in record["benchmarks"]
        if entry["suite"] == "alignment" and entry["name"].startswith("ablation[")
    }
    if not found:
        return
    figure = Figure(figsize=(2.6 * len(found), 2.8), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (kind, providers) in zip(panels, found.items(), strict=True):
        numbers = sorted((float(re.sub(r"[^0-9.]", "", name)), name) for name in providers)
        rates = [providers[name]["rates"] for _, name in numbers]
        middle = [r["s over NTP"] for r in rates]
        errors = [
            [m - r["s over NTP low"] for m, r in zip(middle, rates, strict=True)],
            [r["s over NTP high"] - m for m, r in zip(middle, rates, strict=True)],
        ]
        axes.errorbar(range(len(numbers)), middle, yerr=errors, marker="o", capsize=3)
        axes.set_xticks(range(len(numbers)), [name.split("= ")[-1] for _, name in numbers])
        axes.set_title(kind)
        axes.axhline(0, color="#8a929c", lw=0.8)
    panels[0].set_ylabel("true watch seconds over NTP")
    ABLATIONS.parent.mkdir(exist_ok=True)
    figure.savefig(ABLATIONS, metadata={"Date": None})


def headlines(records: Sequence[dict[str, Any]]) -> str:
    """The table that opens the page: each operation on each machine that has measured it."""
    found = {
        (entry["suite"], entry["name"], device(record)): entry
        for record in records
        for entry in record["benchmarks"]
    }
    rows = []
    for line in HEADLINES:
        for (suite, name, machine), entry in found.items():
            if (suite, name) != (line.suite, line.name):
                continue
            medians = {who: times["median_s"] for who, times in entry["providers"].items()}
            ours = medians[line.ours]
            best = min(
                (peer for peer in line.peers if peer in medians), key=medians.get, default=""
            )
            peer = ratio = ""
            if best:
                times = medians[best] / ours
                peer = f"{best}, {bench.duration(medians[best])}"
                ratio = f"{times:.0f}" if times >= 10 else f"{times:.2g}"
            floor = medians.get(line.floor) or entry["facts"].get(line.floor, 0.0)
            floor *= 1e-3 if line.floor.startswith("floor ms") else 1.0
            cells = (line.operation, line.size, machine, bench.duration(ours), peer, ratio)
            rows.append(row((*cells, f"{ours / floor:.1f}" if floor else "")))
    if not rows:
        return ""
    return "\n".join(
        [
            "\n## In one table\n",
            "Ratio: how many times as long the best peer takes; below 1 the peer is faster. Floor: "
            "our time over that of reading the data once, or of the arithmetic at the machine's "
            "measured rate.\n",
            "| operation | size | machine | ours | best peer | ratio | times the floor |",
            "|---|---|---|---:|---|---:|---:|",
            *rows,
            "",
        ]
    )


def page() -> str:
    """The whole page, from every record in benchmarks/results/: times first, then policies."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    policies = [r for r in records if {e["suite"] for e in r["benchmarks"]} == {"alignment"}]
    times = [record for record in records if record not in policies]
    return INTRODUCTION + headlines(times) + sections(times) + serving() + sections(policies)


def sections(records: list[dict[str, Any]]) -> str:
    """The parts about some records, those of the same suites under one heading."""

    def title(record: dict[str, Any]) -> str:
        return ", ".join(suites_of(record))

    groups = itertools.groupby(sorted(records, key=title), key=title)
    return "".join(f"\n## {name}\n" + "".join(map(section, found)) for name, found in groups)


def serving() -> str:
    """What `benchmarks/load_serving.py` measured: overhead, load and memory of the server."""
    paths = sorted((RESULTS / "serving").glob("*.json"))
    lines = ["\n## Server\n"] if paths else []
    for path in paths:
        record = json.loads(path.read_text())
        where = record["environment"]
        what = (
            f"`python benchmarks/load_serving.py {path.stem}`, {record['date']}, {where['cpu']} "
            f"with {where['cores']} cores for clients and server together, engine of one thread; "
            f"network `tiny`, {record['items']:,} items, beam {record['beam_width']}, sessions of "
            f"{record['session_length']}."
        )
        if path.stem == "steady":
            memory = record["memory_mib"]
            lines += [
                "### Memory\n",
                what,
                f"\n{record['minutes']:g} minutes at {record['per_second']:g} requests a second, a "
                f"sample every half minute: {memory[0]:.1f} MiB at first, {min(memory):.1f} to "
                f"{max(memory):.1f} MiB, {memory[-1]:.1f} MiB at the end.\n",
            ]
            continue
        alone, one, bare = record["engine alone"], record["closed"][0], record["bare"]
        inside, besides = one["engine"], one["besides the engine"]
        lines += [
            "### Load\n",
            what,
            f"\nOne client waits {besides['p50_ms']} ms (p50; p99 {besides['p99_ms']} ms) besides "
            f"the engine's call, its own work included; the same client waits {bare['p50_ms']} ms "
            f"(p99 {bare['p99_ms']} ms) for a bare uvicorn that answers at once. The engine's call "
            f"takes {inside['p50_ms']} ms in the server, where it rests between requests, and "
            f"{alone['p50_ms']} ms called again and again.\n",
            f"![Latency against answers a second](images/{LOAD.name})\n",
            "| | answered a second | p50 ms | p99 ms | p99.9 ms | failed | refused |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in [*record["closed"], *record["open"]]:
            name = (
                f"closed, {row['clients']} clients"
                if "clients" in row
                else f"open, {row['offered_per_second']} offered a second"
            )
            times = " | ".join(str(row[f"p{p}_ms"]) for p in (50, 99, 99.9))
            refused = row.get("refused", 0)
            lines.append(
                f"| {name} | {row['per_second']} | {times} | {row['failed']} | {refused} |"
            )
        lines.append("")
    return "\n".join(lines)


def draw_load() -> None:
    """Latency against throughput, closed and open loops."""
    from matplotlib.figure import Figure

    path = RESULTS / "serving" / "load.json"
    if not path.is_file():
        return
    record = json.loads(path.read_text())
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("closed", "open"), strict=True):
        for p in (50, 99, 99.9):
            rows = [(row["per_second"], row[f"p{p}_ms"]) for row in record[kind]]
            axes.plot(*zip(*sorted(rows), strict=True), marker="o", label=f"p{p}")
        axes.set(yscale="log", xlabel="answers a second", title=f"{kind} loop")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(fontsize="small")
    LOAD.parent.mkdir(exist_ok=True)
    figure.savefig(LOAD, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="measure and keep the record of this device")
    run.add_argument("suites", nargs="*", help="names of bench_NAME.py; all by default")
    render = verbs.add_parser("render", help="write docs/benchmarks.md")
    render.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args()
    if options.verb == "run":
        known = bench.suites()
        if unknown := set(options.suites) - set(known):
            parser.error(f"no suite {min(unknown)!r}; one of: {', '.join(known)}")
        files = [known[name] for name in options.suites or bench.quick(known)]
        try:
            record = bench.measure(files, gpu=False)
            print(store(record, options.suites).relative_to(ROOT))
        except OneRecError as error:
            sys.exit(str(error))
    elif not options.check:
        PAGE.write_text(page())
        for path in RESULTS.glob("*.json"):
            record = json.loads(path.read_text())
            plot(record)
            draw_moe(record)
        draw_ablations()
        draw_load()
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(f"{PAGE.relative_to(ROOT)} is not what benchmarks/results/ gives: run `make docs`")


if __name__ == "__main__":
    main()
