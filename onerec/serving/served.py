"""The log of what was served: one JSON line for every item shown."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from pathlib import Path
from typing import IO, Any

from onerec.serving.answer import Entry

log = logging.getLogger("onerec.serving")


class ServedLog:
    """Writes what was shown to whom, so that it can be joined with what came of it.

    A line is an exposure in the names of docs/data.md (`user_id`, `item_id`, `timestamp`,
    `request_id`) with `session` (0 is the best), `position`, `score`, `history_length`, `version`,
    `export` and `policy`. `onerec.data.read_exposures` reads a folder of them.

    A thread writes, so that no request waits for the disk. A file has the name `.served-...jsonl`
    while it is written and `served-...jsonl` when it is whole; one that a killed process left
    behind gets its name when the next one starts.

    Args:
        folder: Where to; made if missing.
        max_bytes: A file is ended when it is larger.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 64 << 20) -> None:
        self._folder, self._max_bytes = Path(folder), max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(".served-*.jsonl"):
            left.replace(self._folder / left.name[1:])
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._file: IO[str] | None = None
        self._path = Path()
        self._files = 0
        self._thread = threading.Thread(target=self._work, name="onerec-served", daemon=True)
        self._thread.start()

    def note(self, entry: Entry) -> None:
        """Takes an answered request."""
        self._entries.put(entry)

    def stop(self, seconds: float | None = None) -> None:
        """Writes what is left and ends the file.

        Args:
            seconds: Longest wait for that; None: any.
        """
        self._entries.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (entry := self._entries.get()) is not None:
            try:
                self._write(entry)
            except OSError as error:
                fields = {"folder": str(self._folder), "error": str(error)}
                log.error("the served log cannot be written", extra={"fields": fields})
                self._file = None
        if self._file is not None:
            self._end()

    def _write(self, entry: Entry) -> None:
        if self._file is None:
            self._files += 1
            stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(entry.ended))
            self._path = self._folder / f"served-{stamp}-{os.getpid()}-{self._files}.jsonl"
            hidden = self._path.with_name(f".{self._path.name}")
            self._file = hidden.open("a", encoding="utf-8")
        self._file.write("".join(json.dumps(row) + "\n" for row in rows(entry)))
        if self._entries.empty():
            self._file.flush()
        if self._file.tell() >= self._max_bytes:
            self._end()

    def _end(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        self._path.with_name(f".{self._path.name}").replace(self._path)


def rows(entry: Entry) -> list[dict[str, Any]]:
    """The lines of an answered request."""
    made = []
    for answer, (user, history_length) in zip(entry.answers, entry.users, strict=True):
        found, version = answer.recommendation, answer.version
        for session, items in enumerate(found.item_ids):
            for position, item in enumerate(items):
                made.append(
                    {
                        "user_id": user,
                        "item_id": item,
                        "timestamp": int(1000 * entry.ended),
                        "request_id": entry.request_id,
                        "session": session,
                        "position": position,
                        "score": found.scores[session] if found.scores else None,
                        "history_length": history_length,
                        "version": version.number,
                        "export": version.recommender.lineage.export,
                        "policy": version.arm,
                    }
                )
    return made
