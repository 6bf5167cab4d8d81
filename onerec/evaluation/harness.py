"""The harness: one recommender beside baselines, under one honest protocol.

The rules: the whole catalogue is ranked; a hit is the item itself, with expected credit when items
share an id or a score; a place that the beam leaves empty is a miss; targets that never occur in
training stay in; whole users are resampled for the intervals, and differences are paired.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from onerec._version import __version__
from onerec.data.session_set import Samples, SessionSet, list_values
from onerec.evaluation import metrics as m
from onerec.evaluation.adapters import (
    RecommenderRanker,
    SessionJudge,
    SessionRecommender,
    TrueWatchTime,
    WorldRows,
    judged,
)
from onerec.evaluation.baselines import Popularity, Random, Ranker
from onerec.evaluation.config import EvaluationConfig
from onerec.evaluation.counting import CountBaselines, fit_counts
from onerec.evaluation.metrics import FloatArray, IntArray
from onerec.evaluation.result import EvalResult, Measure
from onerec.progress import Progress

_WARM_UP = 3


def evaluate(
    recommender: SessionRecommender,
    session_set: SessionSet,
    config: EvaluationConfig | None = None,
    *,
    world: TrueWatchTime | None = None,
    pretrained: SessionRecommender | None = None,
    judge: SessionJudge | None = None,
    others: Mapping[str, Ranker] | None = None,
    exclude_history: bool = True,
    progress: Progress | None = None,
) -> EvalResult:
    """Measures a recommender on the held-out sessions.

    For each session the history before it is given, the next items are ranked (Recall@k, NDCG@k
    and hit rate against all items of the session), and a whole session is generated.

    Args:
        recommender: Trained model with its catalogue. The generator of one that ranks by a
            mixture is measured beside it as "generator".
        session_set: Items, histories and held-out sessions.
        config: Options; the defaults of `EvaluationConfig` when None.
        world: The simulated world behind the log; adds the true expected watch time of generated
            sessions, and the oracle.
        pretrained: The same model before its alignment; measured beside it as "pretrained", with
            the history masked.
        judge: A reward model that took no part in the alignment; adds the reward that it gives to
            every system's sessions.
        others: More rankers by name, measured beside the model.
        exclude_history: Whether recommendations leave the history out: which of the measures are
            told first.
        progress: Called as `progress(done, total, note)` with sessions measured.

    Returns:
        The measures; `save` writes evaluation.json.

    Raises:
        ValueError: No split has sessions, the catalogue lacks items of the session set, or
            `config.sasrec` is set and `others` has no "SASRec".
    """
    config = config or EvaluationConfig()
    if config.sasrec and "SASRec" not in (others or {}):
        raise ValueError("sasrec: wanted the trained ranker as others['SASRec'], got none")
    items = _Items.of(session_set)
    width = config.beam_width
    ranker = RecommenderRanker(recommender, items.ids, beam_width=width)
    if getattr(recommender, "mixture", None) is not None:
        generator = RecommenderRanker(recommender, items.ids, beam_width=width, dense_weight=0.0)
        others = {"generator": generator, **(others or {})}
    rng = np.random.default_rng(config.seed)
    parts = {}
    for name in config.splits:
        samples, users = _sample_users(session_set.samples(name), config, rng)
        if len(samples):
            parts[name] = (samples, users)
    if not parts:
        raise ValueError(f"splits: none of {', '.join(config.splits)} has any session")

    total = sum(len(samples) for samples, _ in parts.values())
    done = 0

    def advance(count: int, note: str) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total, note)

    advance(0, "counting")
    histories = ("masked", "unmasked") if config.unmasked else ("masked",)
    counts = fit_counts(session_set, histories, seed=config.seed)
    protocol = _protocol(config, items, parts)
    protocol["served"] = "masked" if exclude_history or not config.unmasked else "unmasked"
    protocol["counting"] = {history: found.chosen for history, found in counts.items()}
    result = EvalResult(protocol=protocol, versions=_versions())
    before = None
    if pretrained is not None:
        before = RecommenderRanker(pretrained, items.ids, beam_width=config.beam_width)
    rows = []
    times, _ = list_values(session_set.sequences["timestamps"])
    users_of_world = None
    if world is not None:
        users_of_world = WorldRows(world, session_set.sequences["user_id"].to_pylist(), items.ids)
    for name, (samples, _) in parts.items():
        split = _SplitRun(
            name,
            samples,
            items,
            ranker,
            config,
            counts,
            others or {},
            _same_time(samples, times),
            users_of_world,
            before,
            judge,
        )
        split.measure(advance)
        split.report(result)
        rows.append(split.rows(session_set.sequences["user_id"]))
    result.rows = pa.concat_tables(rows)
    last, (samples, _) = next(reversed(parts.items()))
    serving = _Serving(recommender, ranker, config, protocol["served"] == "masked")
    protocol["ranks_items"] = serving.ranks
    result.latency = _latency(serving, samples)
    result.samples = _examples(serving, samples, session_set, items, last)
    return result


def _same_time(samples: Samples, times: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether a session begins at the very time of the item before it, bool [n]."""
    before = times[np.maximum(samples.history_end - 1, 0)]
    same: npt.NDArray[np.bool_] = samples.timestamp == before
    return same & (samples.history_end > samples.history_begin)


@dataclass(frozen=True)
class _Items:
    """The items table as arrays."""

    ids: list[Any]
    train_count: IntArray
    texts: list[str | None]
    tags: list[list[str] | None]

    @classmethod
    def of(cls, session_set: SessionSet) -> _Items:
        table = session_set.items
        counts = table["train_count"].to_numpy().astype(np.int64)
        return cls(
            table["item_id"].to_pylist(),
            counts,
            table["text"].to_pylist(),
            table["tags"].to_pylist(),
        )

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self, index: int, hit: bool) -> dict[str, Any]:
        return {
            "item": str(self.ids[index]),
            "text": self.texts[index] or "",
            "tags": list(self.tags[index] or []),
            "hit": hit,
        }


@dataclass
class _SplitRun:
    """Measures one split: values a session for every system, then intervals over all of them."""

    name: str
    samples: Samples
    items: _Items
    model: RecommenderRanker
    config: EvaluationConfig
    counts: dict[str, CountBaselines]  # of each history
    others: Mapping[str, Ranker]
    same_time: npt.NDArray[np.bool_]
    world: WorldRows | None
    pretrained: RecommenderRanker | None = None
    judge: SessionJudge | None = None
    # (history, system, metric) -> values and weights, one entry a batch
    values: dict[tuple[str, str, str], list[FloatArray]] = field(default_factory=dict)
    weights: dict[tuple[str, str, str], list[FloatArray]] = field(default_factory=dict)
    exposures: dict[tuple[str, str], IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seed = self.config.seed
        common: dict[str, Ranker] = {
            "model": self.model,
            **self.others,
            "popularity": Popularity(self.items.train_count, seed=seed),
            "random": Random(len(self.items), seed=seed),
        }
        self.rankers = {
            history: {**common, **found.rankers} for history, found in self.counts.items()
        }
        if self.pretrained is not None:
            self.rankers["masked"]["pretrained"] = self.pretrained
        self.systems = dict.fromkeys([s for r in self.rankers.values() for s in r] + ["oracle"])
        self.bucket_names = m.bucket_names(self.config.buckets)

    def measure(self, advance: Callable[[int, str], None]) -> None:
        for begin in range(0, len(self.samples), self.config.batch_size):
            rows = range(begin, min(begin + self.config.batch_size, len(self.samples)))
            histories = [self.samples.history(i) for i in rows]
            targets = m.pad_rows([list(dict.fromkeys(self.samples.target(i))) for i in rows])
            hidden = m.pad_rows(histories)
            for history, rankers in self.rankers.items():
                masked = history == "masked"
                for system, ranker in rankers.items():
                    ranked = ranker.rank(
                        histories, max(self.config.ks), histories if masked else None
                    )
                    ranks = m.target_ranks(
                        ranked,
                        targets,
                        groups=ranker.groups,
                        exclude=hidden if masked else None,
                    )
                    self._rank_metrics(history, system, ranks)
                    self._expose(history, system, ranked)
                    same_time = self.same_time[rows.start : rows.stop]
                    self._buckets(history, system, ranks, targets, same_time)
                    if masked and system == "model" and self.model.shared_ids:
                        self._id_level(ranks)
            self._sessions(
                histories,
                hidden,
                targets,
                self.samples.user_row[rows.start : rows.stop].astype(np.int64),
            )
            advance(len(rows), self.name)

    def _add(
        self, history: str, system: str, metric: str, value: FloatArray, weight: FloatArray | None
    ) -> None:
        key = (history, system, metric)
        self.values.setdefault(key, []).append(value)
        self.weights.setdefault(key, []).append(np.ones(len(value)) if weight is None else weight)

    def _expose(self, key: str, system: str, recommended: IntArray) -> None:
        counts = m.exposure_counts(recommended, len(self.items))
        before = self.exposures.get((key, system))
        self.exposures[key, system] = counts if before is None else before + counts

    def _rank_metrics(self, history: str, system: str, ranks: m.TargetRanks) -> None:
        for k in self.config.ks:
            self._add(history, system, f"recall@{k}", m.recall(ranks, k), None)
            self._add(history, system, f"ndcg@{k}", m.ndcg(ranks, k), None)
            self._add(history, system, f"hit@{k}", m.hit_rate(ranks, k), None)

    def _id_level(self, ranks: m.TargetRanks) -> None:
        """Counts any item with the target's id as a hit, as some papers do: an inflated number."""
        shared = m.TargetRanks(
            ranks.first, np.ones_like(ranks.size), np.zeros_like(ranks.ordinal), ranks.valid
        )
        for k in self.config.ks:
            self._add("masked", "model", f"id_recall@{k}", m.recall(shared, k), None)

    def _buckets(
        self,
        history: str,
        system: str,
        ranks: m.TargetRanks,
        targets: IntArray,
        same_time: npt.NDArray[np.bool_],
    ) -> None:
        """Recall and discount of the targets in each bucket of train counts, and of those that the
        log puts at the time of the item before them: nothing but the order of its rows tells
        which of the two came first."""
        k = max(self.config.ks)
        counts = self.items.train_count[np.maximum(targets, 0)]
        bucket = np.searchsorted(self.config.buckets, counts, side="left")
        buckets = {name: bucket == number for number, name in enumerate(self.bucket_names)}
        if self.same_time.any():
            buckets |= zip(m.TIMES, (same_time[:, None], ~same_time[:, None]), strict=True)
        for metric, credit in (
            (f"recall@{k}", m.target_hits(ranks, k)),
            (f"ndcg@{k}", m.target_gains(ranks, k)),
        ):
            for name, members in buckets.items():
                inside = members & ranks.valid
                weight = inside.sum(axis=1).astype(np.float64)
                value = (credit * inside).sum(axis=1) / np.maximum(weight, 1.0)
                self._add(history, system, f"{metric}[{name}]", value, weight)

    def _sessions(
        self, histories: list[Any], hidden: IntArray, targets: IntArray, user_rows: IntArray
    ) -> None:
        """The model's sessions, and lists of the same lengths from the other systems."""
        best = self._generated("model", self.model, histories)
        width = max(1, *(len(items) for items in best))
        sessions = {"model": self.model.indices(best, width)}
        lengths = m.session_lengths(sessions["model"])
        if self.pretrained is not None:
            earlier = self._generated("pretrained", self.pretrained, histories)
            sessions["pretrained"] = self.model.indices([e[:width] for e in earlier], width)
        for system in (*self.others, "count ranker", "popularity", "random"):
            sessions[system] = self.rankers["masked"][system].rank(histories, width, histories)
        if self.world is not None:
            sessions["oracle"] = self.world.oracle(user_rows, width, hidden)
        for system, rows in sessions.items():
            rows[np.arange(width) >= lengths[:, None]] = -1
            if system == "oracle":
                continue
            self._add("masked", system, "session_hit", m.session_hits(rows, targets), None)
            self._add("masked", system, "session_recall", m.session_recall(rows, targets), None)
        if self.world is not None:
            for system, rows in (*sessions.items(), ("logged", targets)):
                self._watch_time(self.world, system, user_rows, rows)
        if self.judge is not None:
            past = m.pad_rows([h[-self.judge.config.history_length :] for h in histories])
            for system, rows in (*sessions.items(), ("logged", targets[:, :width])):
                reward = judged(self.judge, past, rows)
                self._add("masked", system, "judged_reward", reward, None)
        for system in ("model", "pretrained") if self.pretrained is not None else ("model",):
            rows = sessions[system]
            self._add("masked", system, "session_length", m.session_lengths(rows), None)
            self._add("masked", system, "session_duplicates", m.session_duplicates(rows), None)
            self._expose("session", system, rows)

    def _generated(
        self, system: str, ranker: RecommenderRanker, histories: list[Any]
    ) -> list[list[Any]]:
        """The best session of each user, as item ids; adds how legal the model is."""
        recommender = ranker.recommender
        made = recommender.recommend(
            ranker.ids(histories), beam_width=self.config.beam_width, exclude_history=True
        )
        trie = recommender.catalog.trie
        codes = [np.asarray(r.sids[0]) if len(r.sids) else np.empty((0, 0)) for r in made]
        self._add("masked", system, "legality", _legal(trie, codes), None)
        free_too = getattr(recommender, "unconstrained", False)
        if free_too and hasattr(recommender, "generate_unconstrained"):
            free = recommender.generate_unconstrained(ranker.ids(histories))
            legal = _legal(trie, list(np.asarray(free)))
            self._add("masked", system, "unconstrained_legality", legal, None)
        return [r.item_ids[0] if len(r.item_ids) else [] for r in made]

    def _watch_time(
        self, world: WorldRows, system: str, user_rows: IntArray, rows: IntArray
    ) -> None:
        self._add("masked", system, "watch_seconds", world.session_seconds(user_rows, rows), None)
        each = world.item_seconds(user_rows, rows)
        self._add("masked", system, "item_watch_seconds", each, m.session_lengths(rows))

    def report(self, result: EvalResult) -> None:
        """Adds this split's measures and paired differences."""
        keys = list(self.values)
        columns = {key: np.concatenate(self.values[key]) for key in keys}
        weights = {key: np.concatenate(self.weights[key]) for key in keys}
        pairs = [
            (key, (key[0], other, key[2]))
            for key in keys
            for other in self.systems
            if key[1] == "model" != other and (key[0], other, key[2]) in columns
        ]
        table = [columns[key] for key in keys] + [columns[a] - columns[b] for a, b in pairs]
        weight = [weights[key] for key in keys] + [weights[a] for a, _ in pairs]
        intervals = m.bootstrap(
            np.stack(table, axis=1),
            weights=np.stack(weight, axis=1),
            clusters=self.samples.user_row,
            resamples=self.config.resamples,
            confidence=self.config.confidence,
            seed=self.config.seed,
        )
        entries = [(result.measures, key) for key in keys]
        entries += [(result.differences, (a[0], f"{a[1]} - {b[1]}", a[2])) for a, b in pairs]
        for (where, (history, system, metric)), got in zip(entries, intervals, strict=True):
            if got.n > 0:  # an empty bucket has no measure
                n = int(got.n)
                where.append(
                    Measure(self.name, history, system, metric, got.value, got.low, got.high, n)
                )
        self._report_exposures(result)

    def rows(self, user_ids: pa.ChunkedArray) -> pa.Table:
        """The model's values of each session, as `EvalResult.rows` describes them."""
        samples = self.samples
        columns: dict[str, Any] = {
            "split": [self.name] * len(samples),
            "user_id": user_ids.take(pa.array(samples.user_row)),
            "start": samples.history_end - samples.history_begin,
            "target": [
                " ".join(str(self.items.ids[item]) for item in samples.target(row))
                for row in range(len(samples))
            ],
        }
        for (history, system, metric), values in self.values.items():
            whole = metric.startswith(("recall@", "ndcg@", "hit@")) and not metric.endswith("]")
            if system == "model" and whole:
                columns[f"{metric}, {history}"] = np.concatenate(values)
        return pa.table(columns)

    def _report_exposures(self, result: EvalResult) -> None:
        k = max(self.config.ks)
        for (history, system), counts in self.exposures.items():
            prefix, suffix = ("session_", "") if history == "session" else ("", f"@{k}")
            popular = m.popular_share(counts, self.items.train_count, top=self.config.popular_top)
            numbers = {
                f"{prefix}coverage{suffix}": m.coverage(counts),
                f"{prefix}popular_share{suffix}": popular,
                f"{prefix}gini{suffix}": m.gini(counts),
                f"{prefix}entropy_bits{suffix}": m.entropy(counts),
            }
            where = "masked" if history == "session" else history
            result.measures += [
                Measure(self.name, where, system, metric, value, None, None, int(counts.sum()))
                for metric, value in numbers.items()
            ]


def _legal(trie: Any, codes: list[npt.NDArray[Any]]) -> FloatArray:
    """Share of each session's semantic ids that the trie knows, float64 [B]."""
    return np.array(
        [
            (np.asarray(trie.lookup(c.astype(np.int32))) >= 0).mean() if len(c) else np.nan
            for c in codes
        ]
    )


def _sample_users(
    samples: Samples, config: EvaluationConfig, rng: np.random.Generator
) -> tuple[Samples, int]:
    """All sessions of users drawn at random, as many as the config wants, and how many users there
    were."""
    users, sessions = np.unique(samples.user_row, return_counts=True)
    most = len(users) if config.max_users is None else config.max_users
    total = len(samples) if config.max_sessions is None else config.max_sessions
    if len(users) <= most and len(samples) <= total:
        return samples, len(users)
    order = rng.permutation(len(users))[:most]
    kept = max(1, int(np.searchsorted(np.cumsum(sessions[order]), total, side="right")))
    chosen = users[order[:kept]]
    return samples.take(np.flatnonzero(np.isin(samples.user_row, chosen))), len(users)


def _protocol(
    config: EvaluationConfig, items: _Items, parts: dict[str, tuple[Samples, int]]
) -> dict[str, Any]:
    sizes = {}
    for name, (samples, users) in parts.items():
        seen = repeated = 0
        for i in range(len(samples)):
            target = samples.target(i)
            repeated += int(np.isin(target, samples.history(i)).sum())
            seen += int((items.train_count[target] > 0).sum())
        n_targets = int(samples.target_offsets[-1] - samples.target_offsets[0])
        sizes[name] = {
            "sessions": len(samples),
            "users": len(np.unique(samples.user_row)),
            "users_in_split": users,
            "targets": n_targets,
            "targets_in_history": repeated,
            "targets_not_in_train": n_targets - seen,
            "empty_histories": int((samples.history_end == samples.history_begin).sum()),
        }
    return {
        "items": len(items),
        "splits": list(parts),
        "split_sizes": sizes,
        "splits_without_sessions": [s for s in config.splits if s not in parts],
        "ks": list(config.ks),
        "beam_width": config.beam_width,
        "max_users": config.max_users,
        "max_sessions": config.max_sessions,
        "seed": config.seed,
        "resamples": config.resamples,
        "confidence": config.confidence,
        "popular_top": config.popular_top,
        "notes": [
            "The whole catalogue is ranked; nothing is sampled.",
            "A hit is the item itself. Items that share a semantic id, or a score, are credited "
            "with the mean over their orders.",
            "Places that the beam leaves empty are misses.",
            "Intervals: percentile bootstrap over users; differences are paired.",
            "Masked: the user's history cannot be recommended. Unmasked: it can.",
        ],
    }


@dataclass(frozen=True)
class _Serving:
    """The recommender as it is served: lists by its mixture where it has one, else sessions."""

    recommender: SessionRecommender
    ranker: RecommenderRanker
    config: EvaluationConfig
    exclude_history: bool

    @property
    def ranks(self) -> bool:
        return getattr(self.recommender, "mixture", None) is not None

    def __call__(self, histories: list[list[Any]]) -> list[list[Any]]:
        """The item ids of each history's list, or of its best session."""
        width, exclude = self.config.beam_width, self.exclude_history
        if self.ranks:
            return self.recommender.rank(
                histories, max(self.config.ks), beam_width=width, exclude_history=exclude
            )
        made = self.recommender.recommend(histories, beam_width=width, exclude_history=True)
        return [one.item_ids[0] if len(one.item_ids) else [] for one in made]


def _latency(serving: _Serving, samples: Samples) -> dict[str, Any]:
    """Single requests, one after another, each a whole list or session."""
    config = serving.config
    if config.latency_requests == 0:
        return {}
    rng = np.random.default_rng(config.seed)
    chosen = rng.choice(len(samples), size=config.latency_requests + _WARM_UP, replace=True)
    times = []
    for row in chosen:
        history = serving.ranker.ids([samples.history(int(row))])
        begin = time.perf_counter()
        serving(history)
        times.append((time.perf_counter() - begin) * 1000.0)
    kept = np.array(times[_WARM_UP:])
    p50, p90, p99 = np.percentile(kept, [50, 90, 99])
    what = f"a list of {max(config.ks)} items" if serving.ranks else "a session"
    return {
        "requests": len(kept),
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "mean_ms": float(kept.mean()),
        "times_ms": [round(float(t), 4) for t in kept],
        "setting": f"one request for {what} at a time, {config.beam_width} beams, {_threads()}",
    }


def _threads() -> str:
    import torch

    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def _examples(
    serving: _Serving, samples: Samples, session_set: SessionSet, items: _Items, split: str
) -> list[dict[str, Any]]:
    """A few lists or sessions of different users for people to read."""
    rng = np.random.default_rng(serving.config.seed)
    order = rng.permutation(len(samples))
    one_a_user = order[np.unique(samples.user_row[order], return_index=True)[1]]
    rows = rng.permutation(one_a_user)[: serving.config.sample_sessions]
    if not len(rows):
        return []
    histories = [samples.history(int(row)) for row in rows]
    made = serving(serving.ranker.ids(histories))
    users = session_set.sequences["user_id"]
    examples = []
    for row, history, best in zip(rows, histories, made, strict=True):
        target = samples.target(int(row)).tolist()
        session = serving.ranker.indices([best], len(best))[0].tolist()
        examples.append(
            {
                "user": str(users[int(samples.user_row[row])].as_py()),
                "split": split,
                "history_length": len(history),
                "history": [items.describe(i, False) for i in history[-8:].tolist()],
                "recommended": [items.describe(i, i in target) for i in session],
                "watched": [items.describe(i, i in session) for i in target],
            }
        )
    return examples


def _versions() -> dict[str, str]:
    return {
        "onerec": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": importlib.metadata.version("torch"),
        "platform": platform.platform(),
    }
