"""`onerec mixture`: weights of generator, dense head and counts, fitted on valid."""

from __future__ import annotations

from onerec.cli.verb import stage_verb


def main(argv: list[str]) -> None:
    stage_verb(
        "mixture",
        "Fits how generator, dense head and counts are weighed in a ranking of items, on the users "
        "of valid, in OUT/mixture.",
        argv,
        [],
    )
