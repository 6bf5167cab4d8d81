"""What the verbs of single stages share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.command import parse_command
from onerec.pipeline import make_stage


def stage_verb(
    verb: str,
    description: str,
    argv: list[str],
    sections: Sequence[str],
    *,
    stage: str | None = None,
    data: bool = False,
    show: Callable[[Path, dict[str, Any]], None] | None = None,
) -> None:
    """Makes one stage of a run's directory and prints what it reports.

    Args:
        verb: Name after `onerec`.
        description: For its help.
        argv: Its arguments.
        sections: Settings that it has flags for.
        stage: Name of the stage; `verb` when not given.
        data: Whether it reads a log.
        show: Prints the stage's folder and summary; a plain table when not given.
    """
    command = parse_command(verb, description, argv, sections, data=data)
    result = make_stage(stage or verb, command.settings, command.out, console.LISTENER, verb=verb)
    folder = command.out / result.record.stage
    if command.json:
        console.print_json(
            {**asdict(result.record), "folder": str(folder), "skipped": result.skipped}
        )
    else:
        (show or print_summary)(folder, result.record.summary)


def print_summary(folder: Path, summary: dict[str, Any]) -> None:
    """The figures of a stage, and where its files are."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in summary.items():
        text = f"{value:,}" if isinstance(value, int) else value
        text = f"{value:.4g}" if isinstance(value, float) else text
        table.add_row(key.replace("_", " "), escape(str(text)))
    table.add_row("folder", escape(str(folder)))
    console.stdout().print(table)
