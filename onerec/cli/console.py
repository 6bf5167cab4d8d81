"""The terminal: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from onerec.progress import Listener, Progress

# Lines of a pipe or a file are not cut at the 80 columns that rich assumes there.
_PIPE_WIDTH = 160


def stdout() -> Console:
    """The console for results."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """The console for logs and progress."""
    return Console(
        stderr=True,
        width=None if sys.stderr.isatty() else _PIPE_WIDTH,
        highlight=False,
        soft_wrap=True,
    )


def say(message: str) -> None:
    """One line for the user, on stderr."""
    stderr().print(escape(message))


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


@contextmanager
def progress(title: str, every: float = 15.0) -> Iterator[Progress]:
    """A bar on a terminal that can draw; elsewhere one line at most every `every` seconds.

    Yields:
        A function `report(done, total, note)`.
    """
    console = stderr()
    if not console.is_terminal or console.is_dumb_terminal:
        last = time.monotonic()

        def line(done: int, total: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= every:
                last = now
                say(f"{title}: {done}/{total} {note}".rstrip())

        yield line
        return

    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(escape(title), total=None, note="")

        def draw(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=escape(note))

        yield draw


LISTENER = Listener(say, progress)
