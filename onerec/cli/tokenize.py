"""`onerec tokenize`: item vectors as semantic ids and their trie."""

from __future__ import annotations

from onerec.cli.verb import stage_verb


def main(argv: list[str]) -> None:
    stage_verb(
        "tokenize",
        "Turns item vectors into balanced semantic ids, a catalogue and a trie, in OUT/tokenize.",
        argv,
        ["tokenize"],
    )
