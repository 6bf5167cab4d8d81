"""The tables of `onerec evaluate`."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from onerec.cli.evaluate import lead_table, metric_table

SUMMARY = {
    "split": "test",
    "history": "masked",
    "measures": {
        "recall@5": {"model": [0.05, 0.04, 0.06], "popularity": [0.03, 0.02, 0.04]},
        "recall@10": {
            "popularity": [0.05, 0.04, 0.06],
            "model": [0.1, 0.09, 0.11],
            "count ranker": [0.125, 0.12, 0.13],
            "transition": [0.0, 0.0, 0.0],
            "model - popularity": [0.05, 0.04, 0.06],
            "model - count ranker": [-0.025, -0.03, -0.02],
            "model - transition": [0.1, 0.09, 0.11],
        },
        "ndcg@10": {"model": [0.07, 0.06, 0.08], "count ranker": [0.06, 0.05, 0.07]},
        "coverage@10": {"model": [0.2, None, None], "count ranker": [0.9, None, None]},
    },
}


def drawn(table: Table) -> tuple[dict[str, str], str]:
    """Plain lines by their first words, and the text with its ANSI codes."""
    found = []
    for colors in (None, "standard"):
        out = io.StringIO()
        Console(file=out, width=80, force_terminal=colors is not None, color_system=colors).print(
            table
        )
        found.append(out.getvalue())
    return {" ".join(line.split()): line for line in found[0].splitlines()}, found[1]


def test_leads_in_per_cent_with_intervals() -> None:
    lines, _ = drawn(lead_table(SUMMARY))
    assert "model 0.1000 0.0700" in lines
    assert "count ranker 0.1250 0.0600 -20.0% -0.0250 (-0.0300 .. -0.0200)" in lines
    assert "popularity 0.0500 +100.0% +0.0500 (+0.0400 .. +0.0600)" in lines
    # A share of nothing is not a number.
    assert "transition 0.0000 +0.1000 (+0.0900 .. +0.1100)" in lines
    order = [name.split(" ")[0] for name in lines if name[:1].isalpha()]
    assert order[-4:] == ["model", "count", "transition", "popularity"]


def test_the_best_is_bold_whoever_it_is() -> None:
    for table in (lead_table(SUMMARY), metric_table(SUMMARY)):
        text = drawn(table)[1]
        assert "\x1b[1m0.1250\x1b[0m" in text
        assert "\x1b[1m0.0700\x1b[0m" in text
        assert "\x1b[1m0.1000" not in text
        assert "\x1b[1m0.9000" not in text, "more coverage is not better"
