"""`onerec recommend`: lists or sessions of items for the users of the log, or of a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.command import parse_command
from onerec.cli.options import Parser
from onerec.cli.verb import stage_verb
from onerec.pipeline import Inputs
from onerec.pipeline.recommend import EXAMPLES, FILE
from onerec.pipeline.requests import recommend_users


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
    if any(word.split("=")[0] == "--users" for word in argv):
        _for_file(argv)
        return
    stage_verb(
        "recommend",
        "Writes lists or sessions of items for the users of the log, in OUT/recommend. `onerec "
        "recommend --out DIR --users FILE [--to FILE]` recommends to the users or histories of a "
        "file instead: Parquet, CSV or JSON lines with user_id, history (item ids, oldest first) "
        "or both; --to ends in .parquet or .jsonl, and without it JSON lines go to stdout.",
        argv,
        ["recommend"],
        show=show,
    )


def _for_file(argv: list[str]) -> None:
    def more(parser: Parser) -> None:
        parser.add_argument("--users", type=str, required=True, help="file of users or histories")
        parser.add_argument("--to", type=str, default=None, help="file to write; stdout without it")

    command = parse_command(
        "recommend",
        "Recommends to the users or histories of a file.",
        argv,
        ["recommend"],
        more=more,
    )
    users, to = Path(command.more["users"]), command.more["to"]
    if users.name.isdecimal() and not users.exists():
        Parser("recommend", "").error(
            f"--users: wanted a file, got {users} (did you mean --recommend.users?)"
        )
    if to is None and command.json:
        raise ValueError("--json: wanted --to FILE beside it, stdout has the recommendations")
    told = recommend_users(
        command.settings,
        Inputs(command.out),
        users,
        sys.stdout if to is None else Path(to),
        console.LISTENER,
    )
    if told["without_items"]:
        console.say(f"recommend: {told['without_items']:,} of {told['requests']:,} got no item")
    if command.json:
        console.print_json({"recommendations": to, **told})
    elif to is not None:
        console.stdout().print(
            f"recommendations  {escape(to)}: {told['rows']:,} rows for {told['requests']:,} users"
        )
