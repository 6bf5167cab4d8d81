"""The users' histories in one SQLite file, for requests that name a user."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from onerec.errors import DataError
from onerec.files import atomic_write

_BUSY_SECONDS = 10.0  # that another process may keep the file
_USERS = 4096  # of a run that are read at once


class UserStore:
    """Item ids by user, oldest first; several processes may share the file.

    A user's id and its digits as text are one user, as for the A/B split.

    Args:
        path: The file; `UserStore.make` makes one.
        max_history: Latest items that are kept of a user.

    Raises:
        DataError: There is no such file, or it is another one.
    """

    def __init__(self, path: str | Path, max_history: int) -> None:
        if not Path(path).is_file():
            raise DataError(f"{path}: there is no such file")
        self._max_history = max_history
        self._lock = threading.Lock()
        self._file = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
        )
        try:
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("SELECT user, items FROM histories LIMIT 1")
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise DataError(f"{path}: wanted a file of users' histories ({error})") from None

    @classmethod
    def make(cls, path: str | Path, histories: Iterable[tuple[Any, list[Any]]]) -> None:
        """Writes a file, whole or not at all.

        Args:
            path: Where to; an earlier file is replaced.
            histories: Users and their item ids, oldest first.
        """
        with atomic_write(path) as temporary:
            file = sqlite3.connect(temporary)
            file.execute("CREATE TABLE histories (user TEXT PRIMARY KEY, items TEXT) WITHOUT ROWID")
            file.executemany(
                "INSERT INTO histories VALUES (?, ?)",
                ((str(user), json.dumps(items)) for user, items in histories),
            )
            file.commit()
            file.close()

    def history(self, user: Any) -> list[Any]:
        """The user's items, oldest first; none of a user who is not known."""
        with self._lock:
            return self._read(user)

    def add(self, user: Any, items: list[Any]) -> int:
        """Puts items at the end of a user's history; returns how many the history has now."""
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                kept = [*self._read(user), *items][-self._max_history :]
                self._file.execute(
                    "INSERT OR REPLACE INTO histories VALUES (?, ?)", (str(user), json.dumps(kept))
                )
                self._file.execute("COMMIT")
            except BaseException:
                self._file.execute("ROLLBACK")
                raise
        return len(kept)

    def forget(self, user: Any) -> bool:
        """Deletes a user; returns whether there was one."""
        with self._lock:
            found = self._file.execute("DELETE FROM histories WHERE user = ?", (str(user),))
            return found.rowcount > 0

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _read(self, user: Any) -> list[Any]:
        found = self._file.execute("SELECT items FROM histories WHERE user = ?", (str(user),))
        row = found.fetchone()
        return [] if row is None else list(json.loads(row[0]))


def histories_of_run(run: Path, max_history: int) -> Iterable[tuple[Any, list[Any]]]:
    """The users of a run and the latest items of each.

    Raises:
        DataError: The folder is not that of a run.
    """
    sequences, items = (run / "sessions" / f"{n}.parquet" for n in ("sequences", "items"))
    if not sequences.is_file():
        raise DataError(f"users: wanted the folder of a run with sessions, got {run}")
    ids = pq.read_table(items, columns=["item_id"])["item_id"].to_pylist()
    for batch in pq.ParquetFile(sequences).iter_batches(_USERS, columns=["user_id", "items"]):
        for user, taken in zip(batch["user_id"].to_pylist(), batch["items"], strict=True):
            yield user, [ids[item] for item in taken.as_py()[-max_history:]]
