"""`onerec simulate`: a short-video world and the log of its users."""

from __future__ import annotations

from onerec.cli.verb import stage_verb


def main(argv: list[str]) -> None:
    stage_verb(
        "simulate",
        "Makes a short-video world with known user interests, and the log of its users, "
        "in OUT/world.",
        argv,
        ["world"],
        stage="world",
    )
