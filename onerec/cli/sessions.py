"""`onerec sessions`: a log as items, histories and good sessions."""

from __future__ import annotations

from onerec.cli.verb import stage_verb


def main(argv: list[str]) -> None:
    stage_verb(
        "sessions",
        "Reads a log, keeps the good sessions, splits them by time, and makes item vectors, "
        "in OUT/sessions.",
        argv,
        ["sessions"],
        data=True,
    )
