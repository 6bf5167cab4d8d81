"""What the stages after `tokenize` read, checked against each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onerec.cli.config import Settings
from onerec.cli.stage import StageRecord, read_record, require
from onerec.errors import DataError

if TYPE_CHECKING:
    from onerec.data import SessionSet
    from onerec.tokenizer import Catalog


def has_feedback(directory: Path) -> bool:
    """Whether the log of a run has what a reward model needs."""
    return (directory / "sessions" / "exposed.parquet").is_file()


def _made_from(directory: Path, name: str, source: str) -> StageRecord | None:
    """The stage `name` if it was made from the present stage `source`; no file is looked at."""
    made, present = (read_record(directory / stage) for stage in (name, source))
    if made is None or present is None or made.inputs.get(source) != present.fingerprint:
        return None
    return made


def reward_model(directory: Path) -> StageRecord | None:
    """The stage `reward` if it belongs to `sessions`; its files are not looked at."""
    return _made_from(directory, "reward", "sessions")


def alignment(directory: Path, settings: Settings) -> StageRecord | None:
    """The stage `align` if it belongs to `pretrain`; its files are not looked at.

    Args:
        directory: The run's directory.
        settings: With `align.iterations` of 0 there is none in any case.
    """
    if settings.align.iterations == 0:
        return None
    return _made_from(directory, "align", "pretrain")


def served_model(directory: Path, settings: Settings) -> StageRecord:
    """The stage whose model is measured and served: `align` if the run has one that changed it.

    Where alignment took no iteration its model is the pretrained one: the run is then like one
    without alignment, and nothing compares the model with itself.

    Raises:
        OneRecError: There is no trained model, or the stage is damaged.
    """
    pretrain = require(directory, "pretrain")
    aligned = alignment(directory, settings)
    if aligned is None or aligned.summary.get("chosen") == 0:
        return pretrain
    return require(directory, "align")


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
