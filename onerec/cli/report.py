"""`onerec report`: one HTML file about the whole run."""

from __future__ import annotations

from onerec.cli.verb import stage_verb


def main(argv: list[str]) -> None:
    stage_verb("report", "Writes OUT/report/report.html about the stages in OUT.", argv, [])
