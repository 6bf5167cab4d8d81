"""What the sections of the report share: files of a run, measures, words."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from onerec.errors import DataError
from onerec.evaluation.result import EvalResult, Measure

LABELS = {
    "watch_seconds": "expected watch seconds of a session",
    "item_watch_seconds": "expected watch seconds of an item, alone",
    "judged_reward": "reward by a judge that took no part",
    "session_hit": "session hit rate",
    "session_recall": "session recall",
    "session_length": "items in a session",
    "session_duplicates": "repeats within a session",
    "legality": "ids in the catalogue, constrained",
    "unconstrained_legality": "ids in the catalogue, unconstrained",
    "session_coverage": "coverage of the catalogue",
    "session_popular_share": "share that goes to the most popular items",
    "session_gini": "Gini of exposures",
    "session_entropy_bits": "entropy of exposures (bits)",
    "coverage": "coverage of the catalogue",
    "popular_share": "share that goes to the most popular items",
    "gini": "Gini of exposures",
    "entropy_bits": "entropy of exposures (bits)",
    "recall": "Recall",
    "ndcg": "NDCG",
    "hit": "hit rate",
    "id_recall": "Recall by id (inflated)",
}


class Missing(Exception):
    """A file that a section needs is not there."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


def file_of(run: Path, name: str) -> Path:
    path = run / name
    if not path.is_file():
        raise Missing(name)
    return path


def read_json(run: Path, name: str) -> Any:
    path = file_of(run, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not whole JSON: {error}") from error


def stage_record(run: Path, name: str) -> dict[str, Any]:
    """The record of a stage; empty without one."""
    path = run / name / "stage.json"
    return read_json(run, f"{name}/stage.json") if path.is_file() else {}


def noted(run: Path, name: str) -> dict[str, Any]:
    """What a stage said of itself in a few figures; empty where it was not made."""
    found: dict[str, Any] = stage_record(run, name).get("summary", {})
    return found


def evaluation(run: Path) -> EvalResult:
    return EvalResult.load(file_of(run, "evaluate/evaluation.json"))


def duration(seconds: float) -> str:
    """A time for people: 41 s, 13 min 5 s, 2 h 40 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def label(metric: str) -> str:
    """A metric's key in words."""
    name, at, k = metric.partition("@")
    return f"{LABELS.get(name, name.replace('_', ' '))}{'@' if at else ''}{k}"


def find(measures: list[Measure], metric: str, system: str, split: str, history: str) -> Any:
    for measure in measures:
        key = (measure.metric, measure.system, measure.split, measure.history)
        if key == (metric, system, split, history):
            return measure
    return None


def held_out(result: EvalResult) -> list[str]:
    """The splits with the one that counts, the last, first."""
    return list(reversed(result.protocol["splits"]))


def lift(gap: Measure | None, rival: Measure | None) -> float | None:
    """The difference in per cent of the other system's value; None for a value of 0."""
    if gap is None or rival is None or rival.value == 0:
        return None
    return 100.0 * gap.value / rival.value


def flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (name, value) rows."""
    if isinstance(value, dict):
        return [
            row
            for key, inner in value.items()
            for row in flatten(inner, f"{prefix}{str(key).replace('_', ' ')}, ")
        ]
    if isinstance(value, list):
        value = ", ".join(map(str, value)) or "none"
    name = prefix.removesuffix(", ")
    if name.endswith(("valid from", "test from")) and isinstance(value, int):
        value = f"{value} ({datetime.fromtimestamp(value / 1000, UTC):%Y-%m-%d %H:%M} UTC)"
    return [(name, value)]
