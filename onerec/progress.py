"""What long work tells: how far it is, and lines for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, note)`."""


def _no_line(message: str) -> None:
    pass


@contextmanager
def _no_bar(title: str) -> Iterator[Progress]:
    def ignore(done: int, total: int, note: str) -> None:
        pass

    yield ignore


@dataclass(frozen=True)
class Listener:
    """Whom a job tells of its work; without arguments nobody.

    Attributes:
        say: Takes one line for the user.
        progress: Opens a bar with a title and gives the `Progress` that moves it. A job that works
            in several processes sends both to them, so they are functions of a module.
    """

    say: Callable[[str], None] = _no_line
    progress: Callable[[str], AbstractContextManager[Progress]] = _no_bar


SILENT = Listener()
