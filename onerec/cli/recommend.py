"""`onerec recommend`: sessions of items for the users of the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.verb import stage_verb
from onerec.pipeline.recommend import EXAMPLES, FILE


def examples_table(examples: list[dict[str, Any]]) -> Table:
    """A user's last items beside the session recommended to them."""
    table = Table("user", "took last", "recommended next", box=box.SIMPLE, show_lines=True)
    for example in examples:
        table.add_row(
            escape(str(example["user_id"])),
            "\n".join(escape(_line(item)) for item in example["history"]),
            "\n".join(escape(_line(item)) for item in example["recommended"]),
        )
    return table


def _line(item: dict[str, Any], width: int = 58) -> str:
    text = " ".join(item["text"].split()) or f"item {item['item_id']}"
    return text if len(text) <= width else text[: width - 3] + "..."


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Prints the examples and where the file is."""
    examples = json.loads((folder / EXAMPLES).read_text(encoding="utf-8"))
    if examples:
        console.stdout().print(examples_table(examples))
    users, everybody = summary["users"], summary["users_of_log"]
    hint = "" if users == everybody else " (--recommend.users null for all)"
    console.stdout().print(
        f"recommendations  {escape(str(folder / FILE))}: {summary['rows']:,} rows for {users:,} "
        f"of {everybody:,} users{hint}"
    )
    if summary["users_without_items"]:
        way = " (--recommend.exclude_history false)" if summary["exclude_history"] else ""
        console.say(f"recommend: {summary['users_without_items']:,} users have no item left{way}")


def main(argv: list[str]) -> None:
    stage_verb(
        "recommend",
        "Writes sessions of items for the users of the log, in OUT/recommend.",
        argv,
        ["recommend"],
        show=show,
    )
