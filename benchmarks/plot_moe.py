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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {title: lines for title, lines in series(record).items() if len(lines["floor"]) > 1}
    if not panels:
        sys.exit("the record has no suite 'moe' with two numbers of tokens")
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for provider, points in lines.items():
            style = (
                {"color": "black", "linestyle": "--"} if provider == "floor" else {"marker": "o"}
            )
            tokens, seconds = zip(*sorted(points), strict=True)
            axis.loglog(tokens, [1e3 * s for s in seconds], label=provider, **style)
        axis.set(title=title, xlabel="tokens", ylabel="ms")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
