"""The comparison of recommenders: seeds, intervals, paired differences, one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onerec.evaluation import metrics as m
from onerec.evaluation.metrics import FloatArray, IntArray
from onerec.files import atomic_write

METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
DEPTH = 10
CASES = (("valid", "masked"), ("test", "masked"), ("valid", "unmasked"), ("test", "unmasked"))


def session_scores(
    ranked: npt.ArrayLike,
    targets: npt.ArrayLike,
    *,
    groups: IntArray | None = None,
    exclude: npt.ArrayLike | None = None,
) -> FloatArray:
    """The METRICS of each session, float64 [n, 4]; arguments as for `metrics.target_ranks`."""
    ranks = m.target_ranks(ranked, targets, groups=groups, exclude=exclude)
    columns = [f(ranks, k) for k in (5, 10) for f in (m.recall, m.ndcg)]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Run:
    """One row of the table for one seed.

    Attributes:
        row: Name of the row.
        system: Name of the network behind it; several rows may share one.
        seed: Of the training.
        scores: (split, "masked" or "unmasked") of CASES -> float64 [sessions, 4], METRICS.
        facts: "parameters", "train_seconds" and so on.
    """

    row: str
    system: str
    seed: int
    scores: dict[tuple[str, str], FloatArray]
    facts: dict[str, Any] = field(default_factory=dict)


def save_runs(folder: Path, runs: Sequence[Run]) -> None:
    """Writes the rows of one training as scores.npz and facts.json."""
    arrays = {
        f"{run.row}|{case[0]}|{case[1]}": values.astype(np.float32)
        for run in runs
        for case, values in run.scores.items()
    }
    with atomic_write(folder / "scores.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    with atomic_write(folder / "facts.json") as temporary:
        temporary.write_text(
            json.dumps([{"row": r.row, **r.facts} for r in runs], indent=1), encoding="utf-8"
        )


def load_runs(folder: Path, system: str, seed: int) -> list[Run]:
    """What `save_runs` wrote."""
    runs = []
    with np.load(folder / "scores.npz") as scores:
        for facts in json.loads((folder / "facts.json").read_text(encoding="utf-8")):
            row = facts.pop("row")
            by_case = {
                case: scores[f"{row}|{case[0]}|{case[1]}"].astype(np.float64) for case in CASES
            }
            runs.append(Run(row, system, seed, by_case, facts))
    return runs


def compare(
    runs: Sequence[Run],
    *,
    reference: str | None,
    users: dict[str, IntArray],
    train_counts: IntArray,
    edges: Sequence[int] = (0, 5, 20),
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The rows of the table, as JSON values.

    A row's value is the mean over seeds of the mean over sessions. Its interval resamples users,
    each with the mean of its seeds, and `sd` is the spread of the seeds' means. The difference from
    the reference row is paired: the same users in both.

    Args:
        runs: All rows and seeds.
        reference: Row that the others are compared with; None for no differences.
        users: For each split int64 [sessions], the user of each session.
        train_counts: int64 [test sessions], how often each test target occurs in training.
        edges: Upper ends of the buckets of train counts.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        ValueError: There is no such row.
    """
    names = list(dict.fromkeys(run.row for run in runs))
    if reference is not None and reference not in names:
        raise ValueError(f"reference: wanted one of {', '.join(names)}, got {reference!r}")
    means = {
        (name, case): np.mean([run.scores[case] for run in runs if run.row == name], axis=0)
        for name in names
        for case in CASES
    }
    rows = []
    for name in names:
        mine = [run for run in runs if run.row == name]
        values = []
        for case in CASES:
            options: dict[str, Any] = {
                "clusters": users[case[0]],
                "resamples": resamples,
                "seed": seed,
            }
            intervals = m.bootstrap(means[name, case], **options)
            against = None
            if reference not in (None, name):
                against = m.paired_bootstrap(means[name, case], means[reference, case], **options)
            by_seed = np.stack([run.scores[case].mean(axis=0) for run in mine])
            for place, metric in enumerate(METRICS):
                found = intervals[place]
                other = None if against is None else against[place]
                values.append(
                    {
                        "split": case[0],
                        "history": case[1],
                        "metric": metric,
                        "value": found.value,
                        "low": found.low,
                        "high": found.high,
                        "sd": float(by_seed[:, place].std(ddof=1)) if len(mine) > 1 else None,
                        "difference": other and [other.value, other.low, other.high],
                    }
                )
        bucket = np.searchsorted(np.asarray(edges), train_counts, side="left")
        masked = means[name, ("test", "masked")][:, METRICS.index("recall@10")]
        numbers = (
            "parameters",
            "active_parameters",
            "flops",
            "train_seconds",
            "evaluate_seconds",
        )
        rows.append(
            {
                "row": name,
                "system": mine[0].system,
                "seeds": [run.seed for run in mine],
                "values": values,
                "rare": {
                    label: {
                        "recall@10": float(masked[bucket == number].mean()),
                        "sessions": int((bucket == number).sum()),
                    }
                    for number, label in enumerate(m.bucket_names(edges))
                    if (bucket == number).any()
                },
                "cost": {
                    key: float(np.mean([run.facts[key] for run in mine]))
                    for key in numbers
                    if key in mine[0].facts
                },
                "facts": [{k: v for k, v in run.facts.items() if k not in numbers} for run in mine],
            }
        )
    return rows


def cell(row: dict[str, Any], split: str, history: str, metric: str) -> dict[str, Any]:
    """One value of a row of `compare`."""
    wanted = (split, history, metric)
    found: dict[str, Any] = next(
        v for v in row["values"] if (v["split"], v["history"], v["metric"]) == wanted
    )
    return found
