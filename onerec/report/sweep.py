"""The page of a sweep: its trials in a table, and what each setting did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from onerec.report import plots
from onerec.report.read import duration, label
from onerec.report.render import write_page


def render_sweep(told: dict[str, Any], out: Path) -> None:
    """Writes the page.

    Args:
        told: What sweep.json holds (`onerec.pipeline.sweep.sweep`).
        out: The file to write.
    """
    done = [row for row in told["trials"] if row["value"] is not None]
    best = next(row for row in done if row["number"] == told["best"])
    names = [choice["name"] for choice in told["space"]]
    logs = {choice["name"] for choice in told["space"] if choice["log"]}
    rows = [
        {**row, "time": None if row["seconds"] is None else duration(row["seconds"])}
        for row in sorted(
            told["trials"], key=lambda row: (row["value"] is None, -(row["value"] or 0.0))
        )
    ]
    figure = plots.sweep(
        [row["number"] for row in done],
        [float(row["value"]) for row in done],
        {name: [row["settings"].get(name) for row in done] for name in names},
        logs,
        label(told["metric"]),
    )
    write_page(
        out,
        "sweep.html",
        "sweep",
        [("best", "Best"), ("settings", "What each setting did"), ("trials", "Trials")],
        metric=told["metric"],
        names=names,
        rows=rows,
        best=best,
        done=len(done),
        figure=Markup(figure),
    )
