"""metrics.jsonl: one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from onerec.errors import DataError
from onerec.files import atomic_write

Record = dict[str, Any]


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl, in order; a last line cut short by a kill is left out.

    Raises:
        DataError: Where a line before the last is no JSON object.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError as problem:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: wanted a JSON object; {problem}") from None
        records.append(record)
    return records


class MetricsLog:
    """Appends records to metrics.jsonl, keeping those of earlier parts of the same run.

    Args:
        path: The file.
        up_to_step: Records past this step are dropped: a run resumed there writes them again.
    """

    def __init__(self, path: Path, up_to_step: int) -> None:
        kept = [r for r in read_metrics(path) if r["step"] <= up_to_step] if path.exists() else []
        with atomic_write(path) as temporary:
            temporary.write_text(
                "".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8"
            )
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Brings the records to the disk, before the checkpoint that relies on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
