"""Draws the time of the experts against the number of tokens, with the floor and the peers.

    onerec bench moe --json > moe.json && python benchmarks/plot_moe.py moe.json moe.svg

The floor is the larger of the work over the measured matrix-product rate and the bytes over the
measured reading rate, as the record holds them.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def series(record: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title of a panel -> provider -> (tokens, seconds), of a record of `onerec bench --json`."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for entry in record["benchmarks"]:
        if entry["suite"] != "moe":
            continue
        name, inside = entry["name"].rstrip("]").split("[")
        tokens = next(int(part) for part in re.split("-", inside) if part.isdigit())
        rest = "-".join(part for part in inside.split("-") if not part.isdigit())
        panel = panels[f"{name.replace('_', ' ')}, {rest}"]
        for provider, times in entry["providers"].items():
            panel[provider].append((tokens, times["median_s"]))
        panel["floor"].append((tokens, entry["facts"]["floor_s"]))
    return panels


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "onerec", "svg.fonttype": "none"})
    every = series(record)
    panels = {title: lines for title, lines in every.items() if len(lines["floor"]) > 1} or every
    if not panels:
        sys.exit("the record has no suite 'moe'")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for provider, points in lines.items():
            style = (
                {"color": "black", "linestyle": "--"} if provider == "floor" else {"marker": "o"}
            )
            tokens, seconds = zip(*sorted(points), strict=True)
            axis.loglog(tokens, [1e3 * s for s in seconds], label=provider, **style)
        axis.set(title=title, xlabel="tokens", ylabel="ms")
        axis.set_xticks(tokens, [str(t) for t in tokens], minor=False)
        axis.minorticks_off()
        axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
