"""`onerec env`: what is installed and what this machine can do."""

from __future__ import annotations

from typing import Any

from onerec.cli import console
from onerec.environment import collect


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items() if v not in (None, ""))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main(argv: list[str]) -> None:
    from onerec.cli.options import Parser

    parser = Parser("env", "Tells versions, the native build, instruction sets, CUDA and memory.")
    options = parser.parse(argv)
    found = collect()
    if options.json:
        console.print_json(found)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            value = "\n".join(
                f"{k}: {_in_words(v)}" for k, v in value.items() if v not in (None, "")
            )
        elif isinstance(value, list):
            value = "\n".join(str(v) for v in value) or "none"
        if value:
            table.add_row(name, escape(str(value)))

    for name, value in found.items():
        add(name, value)
    missing = [name for name, version in found["packages"].items() if version is None]
    add("not installed", ", ".join(missing))
    console.stdout().print(table)
