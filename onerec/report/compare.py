"""Two runs side by side, as one HTML file: what was set otherwise, what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from onerec.errors import DataError
from onerec.evaluation.metrics import bootstrap
from onerec.evaluation.result import EvalResult, Measure
from onerec.report.read import Missing, duration, evaluation, find, flatten, held_out, label, noted
from onerec.report.read import stage_record as record
from onerec.report.render import write_page

_KEYS = ("split", "user_id", "start", "target")
_FIGURES = (
    ("sessions", ("users", "items", "train_sessions", "rule", "session_length")),
    ("tokenize", ("levels", "codebook_size", "distinct_ids")),
    ("pretrain", ("parameters", "steps", "selected_step", "valid_loss", "valid_ndcg@10")),
)


def render_comparison(first: str | Path, second: str | Path, out: str | Path) -> Path:
    """Writes the comparison of two evaluated runs.

    Differences are paired over the held-out sessions that both runs measured (the same user,
    history length and target), with a bootstrap over their users.

    Args:
        first: Directory of a run.
        second: Directory of the run that is compared with it; differences are second - first.
        out: The file to write.

    Returns:
        The path written.

    Raises:
        DataError: One of them is no directory, has not been evaluated, or its files are damaged.
    """
    runs = [Path(first), Path(second)]
    for run in runs:
        if not run.is_dir():
            raise DataError(f"{run}: no such run directory")
    try:
        results = [evaluation(run) for run in runs]
        splits = _splits(runs, results)
        contents = [("metrics", "Measures"), ("settings", "Settings"), ("figures", "Figures")]
        names = [run.resolve().name for run in runs]
        if names[0] == names[1]:
            names = [str(run) for run in runs]
        write_page(
            Path(out),
            "compare.html",
            f"{names[0]} and {names[1]}",
            contents,
            names=names,
            splits=splits,
            verdict=_verdict(names, results[1], splits),
            confidence=results[1].protocol["confidence"],
            settings=_different(*(_settings(run) for run in runs)),
            figures=_different(*(_figures(run) for run in runs), equal=True),
        )
    except Missing as error:
        at = next(run for run in runs if not (run / error.path).is_file())
        raise DataError(f"{at / error.path}: there is no such file (onerec evaluate)") from None
    return Path(out)


def _splits(runs: list[Path], results: list[EvalResult]) -> list[dict[str, Any]]:
    """What is shown of each split and history that both runs measured."""
    rows = _common_rows(runs)
    shown = []
    for split in held_out(results[1]):
        if split not in results[0].protocol["splits"]:
            continue
        mine = None if rows is None else rows.filter(pc.equal(rows["split"], split))
        for history in ("masked", "unmasked"):
            table = [
                _row(metric, split, history, results, mine)
                for metric in _metrics(results, split, history)
            ]
            if table:
                common = 0 if mine is None else len(mine)
                sizes = [r.protocol["split_sizes"][split]["sessions"] for r in results]
                shown.append(
                    {
                        "split": split,
                        "history": history,
                        "rows": table,
                        "common": common,
                        "sizes": sizes,
                    }
                )
    return shown


def _verdict(names: list[str], result: EvalResult, splits: list[dict[str, Any]]) -> str:
    """One sentence on the measure that the summary of a report begins with."""
    metric = f"recall@{max(result.protocol['ks'])}"
    served = [part for part in splits if part["history"] == result.protocol["served"]]
    row = next((r for part in served[:1] for r in part["rows"] if r["metric"] == metric), None)
    if row is None or row["gap"] is None:
        return "No held-out session was measured in both runs, so no difference is shown."
    where = f"{label(metric)} on the {served[0]['split']} split, paired"
    if row["gap"].low > 0:
        return f"{names[1]} is better than {names[0]} beyond the interval ({where})."
    if row["gap"].high < 0:
        return f"{names[1]} is worse than {names[0]} beyond the interval ({where})."
    return f"The interval includes zero: no difference is shown ({where})."


def _metrics(results: list[EvalResult], split: str, history: str) -> list[str]:
    wanted = ("model", split, history)
    both = [
        {m.metric for m in r.measures if (m.system, m.split, m.history) == wanted} for r in results
    ]
    order = dict.fromkeys(m.metric for m in results[1].measures)
    return [m for m in order if m in both[0] & both[1] and not m.endswith("]")]


def _row(
    metric: str, split: str, history: str, results: list[EvalResult], rows: pa.Table | None
) -> dict[str, Any]:
    values = [find(r.measures, metric, "model", split, history) for r in results]
    gap = None
    column = f"{metric}, {history}"
    if rows is not None and len(rows) and {column, f"{column} (1)"} <= set(rows.column_names):
        before, after = (rows[name].to_numpy() for name in (column, f"{column} (1)"))
        users = np.unique(rows["user_id"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
        protocol = results[1].protocol
        (found,) = bootstrap(
            after - before,
            clusters=users,
            resamples=protocol["resamples"],
            confidence=protocol["confidence"],
            seed=protocol["seed"],
        )
        name = "second - first"
        gap = Measure(
            split, history, name, metric, found.value, found.low, found.high, int(found.n)
        )
    base = values[0].value
    share = 100.0 * (values[1].value / base - 1.0) if base else None
    return {"metric": metric, "values": values, "gap": gap, "lift": share}


def _common_rows(runs: list[Path]) -> pa.Table | None:
    """The sessions that both runs measured, with the values of both; None where one kept none."""
    files = [run / "evaluate" / "rows.parquet" for run in runs]
    if not all(file.is_file() for file in files):
        return None
    first, second = (pq.read_table(file) for file in files)
    if first.schema.field("user_id").type != second.schema.field("user_id").type:
        return None
    return first.join(
        second, keys=list(_KEYS), join_type="inner", right_suffix=" (1)", coalesce_keys=True
    )


def _settings(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return dict(flatten(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not whole YAML: {error}") from error


def _figures(run: Path) -> dict[str, Any]:
    """What the stages said of themselves, and how long they took."""
    found: dict[str, Any] = {}
    for stage, names in _FIGURES:
        said = noted(run, stage)
        found |= {name.replace("_", " "): said[name] for name in names if name in said}
        seconds = record(run, stage).get("seconds")
        if seconds is not None:
            found[f"{stage}, time"] = duration(seconds)
    return found


def _different(
    first: dict[str, Any], second: dict[str, Any], *, equal: bool = False
) -> list[tuple[str, Any, Any]]:
    """Name and both values, where they differ or (with `equal`) everywhere."""
    names = dict.fromkeys([*first, *second])
    return [
        (name, first.get(name, "none"), second.get(name, "none"))
        for name in names
        if equal or first.get(name) != second.get(name)
    ]
