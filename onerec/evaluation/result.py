"""What an evaluation found, and its file evaluation.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from onerec.errors import DataError
from onerec.evaluation.metrics import Interval
from onerec.files import atomic_write

FORMAT = 2

# Baselines that only count, the mixture of the others first.
COUNTS = (
    "count ranker",
    "co-consumption",
    "transition",
    "personal frequency",
    "recent popularity",
    "popularity",
)
# In the order of tables; rankers of other names come after these.
SYSTEMS = ("model", "pretrained", "generator", "SASRec", *COUNTS, "random")
_OWN = ("model", "pretrained", "generator")
UPPER_BOUNDS = ("oracle", "logged")  # know what no recommender can
_GREATER_IS_BETTER = (
    "recall@",
    "ndcg@",
    "hit@",
    "session_hit",
    "session_recall",
    "watch_seconds",
    "item_watch_seconds",
    "judged_reward",
)


def in_order(systems: Iterable[str]) -> list[str]:
    """The systems of a table, without "oracle", "logged" and differences."""
    found = [s for s in dict.fromkeys(systems) if s not in UPPER_BOUNDS and " - " not in s]
    return sorted(found, key=lambda s: SYSTEMS.index(s) if s in SYSTEMS else len(SYSTEMS))


def best_systems(metric: str, values: Mapping[str, float | None]) -> set[str]:
    """Who has the greatest value: what a table shows bold.

    Args:
        metric: Its name; where greater is not better nobody is best.
        values: Of each system; None or NaN where it was not measured. "oracle" and "logged" take
            no part.

    Returns:
        The best systems, all of them where several are equal; empty for fewer than two systems.
    """
    taking_part = {
        system: value
        for system, value in values.items()
        if system not in UPPER_BOUNDS and value is not None and not math.isnan(value)
    }
    if len(taking_part) < 2 or not metric.startswith(_GREATER_IS_BETTER):
        return set()
    greatest = max(taking_part.values())
    return {system for system, value in taking_part.items() if value == greatest}


@dataclass(frozen=True)
class Measure:
    """One number of the table.

    Attributes:
        split: "valid" or "test".
        history: "masked" (the user's history cannot be recommended) or "unmasked".
        system: "model", "pretrained" (it before its alignment), "popularity", "random",
            "transition", "co-consumption", "personal frequency" (unmasked only),
            "recent popularity", "count ranker"
            (their mixture), the name of another ranker such as "SASRec", "oracle" (greatest true
            watch time) or "logged" (what the user really watched next); for a
            difference, "a - b".
        metric: "recall@10", "ndcg@10", "hit@10" (with "[1-5]" behind it: targets of that many
            train exposures); "id_recall@10" (any item with the target's id counts);
            "session_hit", "session_recall", "session_length", "session_duplicates", "legality",
            "unconstrained_legality", "watch_seconds" (true expectation of a whole session),
            "item_watch_seconds" (of an item shown alone), "judged_reward" (of a reward model that
            took no part in the alignment; 1 is the log's average); "coverage@10",
            "popular_share@10", "gini@10", "entropy_bits@10", and the same as "session_coverage".
        value: Mean over the rows.
        low: Lower end of the interval; None for a statistic that has none (coverage).
        high: Upper end.
        n: Rows that counted.
    """

    split: str
    history: str
    system: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int


@dataclass
class EvalResult:
    """The measures of one recommender.

    Attributes:
        protocol: What was measured and how: "splits" (names in order), "split_sizes" (sessions,
            users, targets of each), "items", "ks", "beam_width", "max_users",
            "max_sessions", "seed", "resamples", "confidence", "notes", "counting" (what valid
            chose for the counting baselines) ...
        measures: The table of means.
        differences: Paired differences between systems on the same rows.
        latency: {"requests", "times_ms", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "setting"},
            or empty.
        samples: Example sessions: {"user", "split", "history", "recommended", "watched"}, lists
            of {"item", "text", "tags", "hit"}.
        versions: onerec, python, numpy, torch, platform.
        rows: A row a held-out session: split, user_id, start, target (item ids as words), and the
            model's value of each ranking metric, such as "recall@10, masked"; None for a result
            that was read from evaluation.json, which does not hold it.
    """

    protocol: dict[str, Any]
    measures: list[Measure] = field(default_factory=list)
    differences: list[Measure] = field(default_factory=list)
    latency: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    rows: pa.Table | None = None

    def value(
        self,
        metric: str,
        *,
        system: str = "model",
        split: str = "test",
        history: str = "masked",
    ) -> Interval:
        """One measure, or one difference for a system such as "model - popularity".

        Raises:
            KeyError: There is no such measure.
        """
        for m in (*self.measures, *self.differences):
            if (m.metric, m.system, m.split, m.history) == (metric, system, split, history):
                nan = float("nan")
                return Interval(
                    m.value, nan if m.low is None else m.low, nan if m.high is None else m.high, m.n
                )
        raise KeyError(f"no measure {metric} of {system} on {split}, {history}")

    def baselines(self) -> list[str]:
        """What the model is compared with, in the order of tables.

        Its own parts, the model before alignment and the generator of a mixture, are no baselines.
        """
        return [s for s in in_order(m.system for m in self.measures) if s not in _OWN]

    def save(self, path: str | Path) -> None:
        """Writes evaluation.json (NaN as null), without `rows`."""
        document = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(self, rows=None))}
        del document["rows"]
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(_finite(document), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Reads evaluation.json.

        Raises:
            DataError: The file is damaged or of another format.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            if document.pop("format") != FORMAT:
                raise ValueError(f"wanted format {FORMAT}")
            for name in ("measures", "differences"):
                document[name] = [
                    Measure(**{**row, "value": math.nan if row["value"] is None else row["value"]})
                    for row in document[name]
                ]
            return cls(**document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not an evaluation.json of this version: {error}") from error


def _finite(value: Any) -> Any:
    """The same value with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
