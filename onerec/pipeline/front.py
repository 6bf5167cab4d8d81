"""The main job for a table in memory: `onerec.fit`, and what it gives.

`fit` is `onerec.pipeline.run` on the table written as Parquet; the folder that it leaves is that of
`onerec run`, and every verb takes it.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.files import atomic_directory
from onerec.pipeline.inputs import Inputs
from onerec.pipeline.job import run
from onerec.pipeline.recommend import recommendation_rows
from onerec.pipeline.settings import SECTIONS, Settings
from onerec.progress import SILENT, Listener

if TYPE_CHECKING:
    from onerec.evaluation import EvalResult

Frame = Any  # a pandas or polars DataFrame, or a pyarrow Table


def fit(
    data: Frame | str | Path,
    *,
    items: Frame | None = None,
    embeddings: npt.ArrayLike | None = None,
    out: str | Path | None = None,
    preset: str = "items",
    listener: Listener = SILENT,
    **sections: Mapping[str, Any],
) -> Fitted:
    """Runs the main job on a log: semantic ids, training, evaluation, recommendations, report.

    Args:
        data: Rows of interactions (user_id, item_id, timestamp in ms or as a time, and what else
            docs/data.md names): a pandas or polars DataFrame or a pyarrow Table; or the path of a
            log, as `onerec run --data` takes it.
        items: Rows of items (item_id, and text, tags ...), a frame of any of these kinds.
        embeddings: Floats [len(items), d], a vector for each row of `items`.
        out: Folder of the run, kept, and gone on from when the same call is made again; None for
            one that lives as long as the result and is kept by `Fitted.save`.
        preset: One of `onerec.pipeline.settings.PRESETS`.
        listener: Told of the work.
        **sections: Settings by section, such as `train={"epochs": 4}` or `sessions={"rule":
            "next"}`; the names are those of `onerec run`.

    Returns:
        The finished run, which recommends.

    Raises:
        TypeError: `data` or `items` is no table, or a section or a setting is unknown.
        ValueError: A setting is out of range, or `items` or `embeddings` come without what they
            belong to.
        DataError: The log is not what docs/data.md asks for.
    """
    settings = _settings(preset, sections)
    path = isinstance(data, str | Path)
    if path and (items is not None or embeddings is not None):
        raise ValueError("items, embeddings: wanted none beside a path, whose log has its own")
    files = {} if path else _files(data, items, embeddings)
    folder = Path(tempfile.mkdtemp(prefix="onerec-") if out is None else out)
    try:
        settings.data = str(data if path else folder / "log")
        if files:
            _write_log(folder / "log", files)
        run(settings, folder, listener)
        return Fitted(folder, kind=_kind(data), temporary=out is None)
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def load(folder: str | Path) -> Fitted:
    """The finished run in a folder of `onerec run` or `Fitted.save`; gives pyarrow Tables.

    Raises:
        OneRecError: A stage is missing or damaged; the message says what to run.
    """
    return Fitted(Path(folder), kind="arrow")


class Fitted:
    """A finished run of the main job.

    Attributes:
        directory: Its folder.
        settings: What it was made with.
    """

    def __init__(self, directory: Path, *, kind: str, temporary: bool = False) -> None:
        self.directory, self._kind = directory, kind
        if temporary:
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.settings = Settings.load(directory / "config.yaml")
        inputs = Inputs(directory)
        self._data, self._catalog = inputs.load()
        served = inputs.served_model(self.settings)
        self._recommender = inputs.recommender(
            served.stage, self._catalog, inputs.mixture(self.settings, whole=True)
        )
        self._row = {user: n for n, user in enumerate(self._data.sequences["user_id"].to_pylist())}

    def recommend(
        self,
        *,
        user_ids: Sequence[Any] | None = None,
        histories: Sequence[Sequence[Any]] | None = None,
        k: int = 10,
        exclude_history: bool | None = None,
    ) -> Frame:
        """The best items of each user or history.

        Args:
            user_ids: Users of the log, whose whole histories are read.
            histories: Item ids of anybody, oldest first; ids that the catalogue lacks are left out.
                Exactly one of the two is given.
            k: Items for each; in a run of sessions the best session's, at most its length.
            exclude_history: Leave out what the history has; None: as the log's repeats decided.

        Returns:
            A frame of the kind that `fit` was given, best first: user_id (or, for histories, their
            place `request`), rank from 0, item_id, score.

        Raises:
            ValueError: Neither or both of the two are given, or k is below 1.
            KeyError: A user is not in the log.
        """
        if (user_ids is None) == (histories is None):
            raise ValueError("recommend: wanted either user_ids or histories")
        if k < 1:
            raise ValueError(f"k: wanted 1 or more, got {k}")
        if user_ids is None:
            keys, name = list(range(len(histories or []))), "request"
            known: list[list[Any]] = [list(history) for history in histories or []]
        else:
            keys, name = list(user_ids), "user_id"
            unknown = [user for user in keys if user not in self._row]
            if unknown:
                raise KeyError(f"user_ids: {unknown[0]!r} is not in the log")
            sequences = self._data.sequences["items"]
            ids = self._catalog.item_ids
            known = [ids[np.asarray(sequences[self._row[u]].as_py(), int)].tolist() for u in keys]
        exclude = self._data.exclude_history if exclude_history is None else exclude_history
        config = replace(self.settings.recommend, items=k, num_sessions=1)
        found = recommendation_rows(self._recommender, known, config, exclude)
        rows = [
            {name: key, "rank": rank, "item_id": row["item_id"], "score": row["score"]}
            for key, mine in zip(keys, found, strict=True)
            for rank, row in enumerate(mine[:k])
        ]
        types = self._data.sequences.schema.field("user_id").type, self._data.items.schema
        schema = pa.schema(
            [
                (name, types[0] if name == "user_id" else pa.int64()),
                ("rank", pa.int64()),
                ("item_id", types[1].field("item_id").type),
                ("score", pa.float64()),
            ]
        )
        return _frame(pa.Table.from_pylist(rows, schema=schema), self._kind)

    def evaluate(self) -> Frame:
        """The measures of the run on its held-out users.

        Returns:
            A frame: split, history, system, metric, value, low, high; paired differences are
            systems such as "model - popularity".
        """
        from onerec.evaluation import EvalResult

        result: EvalResult = EvalResult.load(self.directory / "evaluate" / "evaluation.json")
        names = ("split", "history", "system", "metric", "value", "low", "high")
        rows = [
            {name: getattr(one, name) for name in names}
            for one in (*result.measures, *result.differences)
        ]
        return _frame(pa.Table.from_pylist(rows), self._kind)

    def save(self, folder: str | Path) -> None:
        """Copies the run into a folder, whole or not at all; `onerec.load` reads it.

        Raises:
            OSError: It cannot be written.
        """
        with atomic_directory(Path(folder)) as temporary:
            shutil.copytree(self.directory, temporary, dirs_exist_ok=True)


def _kind(data: Any) -> str:
    """ "pandas", "polars" or "arrow", the kind of frames to give."""
    root = type(data).__module__.split(".")[0]
    return root if root in ("pandas", "polars") else "arrow"


def _table(frame: Any, name: str) -> pa.Table:
    if isinstance(frame, pa.Table):
        return frame
    root = type(frame).__module__.split(".")[0]
    if root == "pandas" and hasattr(frame, "columns"):
        return pa.Table.from_pandas(frame, preserve_index=False)
    if root == "polars" and hasattr(frame, "to_arrow"):
        return frame.to_arrow()
    raise TypeError(
        f"{name}: wanted a pandas or polars DataFrame, a pyarrow Table or a path, "
        f"got {type(frame).__name__}"
    )


def _frame(table: pa.Table, kind: str) -> Frame:
    if kind == "pandas":
        return table.to_pandas()
    if kind == "polars":
        return importlib.import_module("polars").from_arrow(table)
    return table


def _settings(preset: str, sections: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The settings of a preset with what was chosen."""
    settings = Settings.of_preset(preset)
    for name, chosen in sections.items():
        if name not in SECTIONS:
            raise TypeError(f"fit: wanted a section of {', '.join(SECTIONS)}, got {name!r}")
        before = getattr(settings, name)
        known = before if name == "model" else asdict(before)
        if unknown := sorted(set(chosen) - set(known)):
            raise TypeError(f"{name}: unknown settings {unknown}")
        changed = {**before, **chosen} if name == "model" else replace(before, **chosen)
        setattr(settings, name, changed)
    return settings


def _files(data: Any, items: Any | None, embeddings: npt.ArrayLike | None) -> dict[str, Any]:
    """Name of each file of a log of one's own -> its table or array."""
    files: dict[str, Any] = {"interactions": _table(data, "data")}
    if items is not None:
        files["items"] = _table(items, "items")
    if embeddings is not None:
        if items is None:
            raise ValueError("embeddings: wanted items beside them, whose rows they belong to")
        vectors = np.asarray(embeddings, dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(files["items"]):
            raise ValueError(
                f"embeddings: wanted [{len(files['items'])}, d], got {list(vectors.shape)}"
            )
        files["embeddings"] = vectors
    return files


def _write_log(folder: Path, files: Mapping[str, Any]) -> None:
    with atomic_directory(folder) as temporary:
        for name, content in files.items():
            if isinstance(content, pa.Table):
                pq.write_table(content, temporary / f"{name}.parquet")
            else:
                np.save(temporary / f"{name}.npy", content)
