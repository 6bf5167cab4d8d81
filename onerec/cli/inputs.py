"""What the stages after `tokenize` read, checked against each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onerec.errors import DataError

if TYPE_CHECKING:
    from onerec.data import SessionSet
    from onerec.tokenizer import Catalog


def load_data(directory: Path) -> tuple[SessionSet, Catalog]:
    """The sessions and the catalogue of a run.

    Raises:
        DataError: A file is damaged, or the catalogue is not about the items of the sessions.
    """
    from onerec.data import SessionSet
    from onerec.tokenizer import Catalog

    data = SessionSet.load(directory / "sessions")
    catalog = Catalog.load(directory / "tokenize")
    path = directory / "tokenize" / "catalog.parquet"
    wanted = np.asarray(data.items["item_id"].to_pylist(), dtype=catalog.item_ids.dtype)
    if len(wanted) != len(catalog):
        raise DataError(
            f"{path}: wanted the {len(wanted)} items of the sessions, got {len(catalog)}"
        )
    differ = np.flatnonzero(wanted != catalog.item_ids)
    if len(differ):
        row = int(differ[0])
        ours, theirs = (
            wanted[row : row + 1].tolist()[0],
            catalog.item_ids[row : row + 1].tolist()[0],
        )
        raise DataError(
            f"{path}, column 'item_id', row {row}: wanted item {ours!r} of the sessions, "
            f"got {theirs!r}"
        )
    return data, catalog
