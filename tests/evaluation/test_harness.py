"""The harness on a recommender whose every answer is known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from onerec.data.session_set import SessionSet
from onerec.errors import DataError
from onerec.evaluation.baselines import Popularity
from onerec.evaluation.config import EvaluationConfig
from onerec.evaluation.harness import evaluate
from onerec.evaluation.result import EvalResult, best_systems, in_order

N_ITEMS = 40
N_USERS = 60
SESSION = 3


def session_set(targets_of: dict[str, int], *, item_names: bool = True) -> SessionSet:
    """Users walk through the catalogue in steps of one: user u starts at item u.

    Args:
        targets_of: Items in each session of a split; users have one session a split.
        item_names: String item ids instead of integers.
    """
    length = 6 + sum(targets_of.values())
    walks = [[(u + step) % N_ITEMS for step in range(length)] for u in range(N_USERS)]
    sessions: dict[str, list[Any]] = {"user_row": [], "start": [], "split": [], "target": []}
    for user, walk in enumerate(walks):
        at = 6
        for split, size in targets_of.items():
            sessions["user_row"].append(user)
            sessions["start"].append(at)
            sessions["split"].append(split)
            sessions["target"].append(walk[at : at + size])
            at += size
    n = len(sessions["user_row"])
    ids = [f"item-{i:03d}" for i in range(N_ITEMS)] if item_names else list(range(100, 140))
    return SessionSet(
        items=pa.table(
            {
                "item_index": pa.array(range(N_ITEMS), pa.int32()),
                "item_id": ids,
                "text": [f"Video number {i} & friends" for i in range(N_ITEMS)],
                "tags": [["even" if i % 2 == 0 else "odd"] for i in range(N_ITEMS)],
                "duration_ms": pa.array([None] * N_ITEMS, pa.int64()),
                "train_count": pa.array([i % 30 for i in range(N_ITEMS)], pa.int64()),
            }
        ),
        sequences=pa.table(
            {
                "user_row": pa.array(range(N_USERS), pa.int32()),
                "user_id": [1000 + u for u in range(N_USERS)],
                "items": pa.array(walks, pa.list_(pa.int32())),
                "timestamps": pa.array([list(range(length))] * N_USERS, pa.list_(pa.int64())),
            }
        ),
        sessions=pa.table(
            {
                "user_row": pa.array(sessions["user_row"], pa.int32()),
                "start": pa.array(sessions["start"], pa.int32()),
                "split": sessions["split"],
                "timestamp": pa.array(range(n), pa.int64()),
                "target": pa.array(sessions["target"], pa.list_(pa.int32())),
                "watch_time_ms": pa.array([None] * n, pa.int64()),
                "watched": pa.array([0] * n, pa.int32()),
                "interactions": pa.array([0] * n, pa.int32()),
            }
        ),
        embeddings=np.zeros((N_ITEMS, 4), dtype=np.float32),
        funnel={},
    )


class FakeTrie:
    """Knows the ids [leaf // 8, leaf % 8]."""

    def __init__(self, n_leaves: int) -> None:
        self.n_leaves = n_leaves

    def lookup(self, sids: np.ndarray) -> np.ndarray:
        leaf = sids[:, 0].astype(np.int64) * 8 + sids[:, 1]
        return np.where(leaf < self.n_leaves, leaf, -1)


class FakeCatalog:
    """`share` neighbouring items have one semantic id."""

    def __init__(self, item_ids: list[Any], share: int) -> None:
        # The rows are in another order than the items table, as a catalogue's may be.
        self.item_ids = np.array(item_ids[::-1], dtype=object)
        self.leaf_of_item = np.arange(len(item_ids))[::-1] // share
        self.trie = FakeTrie(-(-len(item_ids) // share))
        self._row = {item: row for row, item in enumerate(self.item_ids)}

    def index_of(self, ids: list[Any]) -> np.ndarray:
        return np.array([self._row[i] for i in ids])


@dataclass
class FakeRecommendation:
    item_ids: list[list[Any]]
    scores: list[float]
    sids: np.ndarray


class Walker:
    """Recommends the items that follow the last one of the history in the catalogue.

    Args:
        wrong: For users with an even last item it recommends what lies before instead.
        limit: At most so many items in a ranking (a short beam).
    """

    def __init__(
        self, item_ids: list[Any], *, share: int = 1, wrong: bool = False, limit: int = 99
    ) -> None:
        self.ids = list(item_ids)
        self.catalog = FakeCatalog(self.ids, share)
        self.wrong, self.limit, self.share = wrong, limit, share
        self.beam_widths: set[int | None] = set()
        self.batches: list[int] = []

    def rank(
        self,
        histories: list[list[Any]],
        k: int,
        *,
        beam_width: int | None = None,
        exclude: list[list[Any]] | None = None,
        exclude_history: bool = True,
    ) -> list[list[Any]]:
        self.beam_widths.add(beam_width)
        self.batches.append(len(histories))
        rows = []
        for number, history in enumerate(histories):
            last = self.ids.index(history[-1]) if history else -1
            step = -1 if self.wrong and last % 2 == 0 else 1
            hidden = set(exclude[number]) if exclude else set()
            hidden |= set(history) if exclude_history else set()
            n = len(self.ids)
            walk = [self.ids[(last + step * (1 + j)) % n] for j in range(n)]
            if self.share > 1:  # whole groups, in the order of their first item
                groups = dict.fromkeys(self.ids.index(i) // self.share for i in walk)
                walk = [
                    self.ids[i]
                    for g in groups
                    for i in range(g * self.share, min((g + 1) * self.share, n))
                ]
            rows.append([item for item in walk if item not in hidden][: min(k, self.limit)])
        return rows

    def recommend(
        self, histories: list[list[Any]], *, beam_width: int, exclude_history: bool = True
    ) -> list[FakeRecommendation]:
        out = []
        for row in self.rank(histories, SESSION, exclude_history=exclude_history):
            leaves = [self.ids.index(item) // self.share for item in row]
            sids = np.array([[leaf // 8, leaf % 8] for leaf in leaves], dtype=np.int32)
            out.append(FakeRecommendation([row], [0.0], sids[None]))
        return out


class FreeWalker(Walker):
    """Half of its unconstrained ids are not in the catalogue."""

    unconstrained = True

    def generate_unconstrained(self, histories: list[list[Any]]) -> np.ndarray:
        return np.tile(np.array([[0, 1], [77, 0]], dtype=np.int32), (len(histories), 1, 1))


class LinearWorld:
    """User u watches item i for `10 + i` seconds; its rows are in another order than the log's."""

    user_ids = np.array([1000 + u for u in range(N_USERS)][::-1])

    def __init__(self, item_ids: list[Any]) -> None:
        self.item_ids = np.array(item_ids)[::-1]

    def expected_watch_time(self, user_rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        return np.broadcast_arrays(10.0 + (N_ITEMS - 1 - items), user_rows)[0]

    def session_value(self, user_row: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The first item counts whole, each later one half."""
        seconds = np.where(items >= 0, self.expected_watch_time(user_row[:, None], items), 0.0)
        return seconds[:, 0] + 0.5 * seconds[:, 1:].sum(axis=1)


@pytest.fixture
def sessions() -> SessionSet:
    return session_set({"valid": 1, "test": SESSION})


QUICK = EvaluationConfig(ks=(2, 5), resamples=200, latency_requests=5, batch_size=16)


def ids(sessions: SessionSet) -> list[str]:
    return sessions.items["item_id"].to_pylist()


def test_known_answers(sessions: SessionSet) -> None:
    model = FreeWalker(ids(sessions))
    result = evaluate(model, sessions, QUICK)
    for split, recall_at_2 in (("valid", 1.0), ("test", 2 / 3)):
        got = result.value("recall@2", split=split)
        assert got.value == pytest.approx(recall_at_2)
        assert (got.low, got.high) == pytest.approx((recall_at_2, recall_at_2))
        assert got.n == N_USERS
        assert result.value("ndcg@5", split=split).value == pytest.approx(1.0)
        assert result.value("session_recall", split=split).value == pytest.approx(1.0)
        assert result.value("legality", split=split).value == 1.0
        assert result.value("unconstrained_legality", split=split).value == 0.5
        assert result.value("session_duplicates", split=split).value == 0.0
        assert result.value("session_length", split=split).value == 3.0
    # 6 (valid) items of history are hidden, the random order is over the other 34.
    random = result.value("recall@5", system="random", split="valid")
    assert random.value == pytest.approx(5 / 34)
    unmasked = result.value("recall@5", system="random", split="valid", history="unmasked")
    assert unmasked.value == pytest.approx(5 / N_ITEMS)
    assert model.beam_widths == {20, None}
    assert max(model.batches) == 16
    assert result.latency["requests"] == 5


def test_popularity_against_a_plain_count(sessions: SessionSet) -> None:
    result = evaluate(Walker(ids(sessions)), sessions, QUICK)
    counts = [i % 30 for i in range(N_ITEMS)]
    hits = 0
    for user in range(N_USERS):
        walk = [(user + step) % N_ITEMS for step in range(7)]
        free = [i for i in range(N_ITEMS) if i not in walk[:6]]
        hits += walk[6] in sorted(free, key=lambda i: -counts[i])[:5]
    # Items i and i + 30 have one count; no tie falls on the cut, where the count is above 9.
    expected = hits / N_USERS
    assert result.value("recall@5", system="popularity", split="valid").value == expected
    difference = result.value("recall@5", system="model - popularity", split="valid")
    assert difference.value == pytest.approx(1.0 - expected)
    assert difference.low > 0.5


def test_counting_baselines_are_always_there(sessions: SessionSet) -> None:
    """Everybody walks on in steps of one: what follows the last item is known to a count."""
    result = evaluate(Walker(ids(sessions)), sessions, QUICK)
    chain = result.value("recall@5", system="transition", split="valid")
    assert (chain.value, chain.low, chain.high) == (1.0, 1.0, 1.0)
    for history in ("masked", "unmasked"):
        measured = {m.system for m in result.measures if m.history == history}
        assert measured >= {"transition", "co-consumption", "count ranker", "popularity", "random"}
        assert ("personal frequency" in measured) == (history == "unmasked")
        for other in ("transition", "count ranker"):
            lead = result.value("recall@5", system=f"model - {other}", split="valid")
            model = result.value("recall@5", split="valid").value
            base = result.value("recall@5", system=other, split="valid").value
            assert lead.value == pytest.approx(model - base)
        assert result.protocol["counting"][history]["count ranker"]["ndcg@10"] > 0.5
    assert result.value("session_hit", system="count ranker", split="valid").value == 1.0
    assert result.baselines()[:2] == ["count ranker", "co-consumption"]


def test_other_rankers_are_measured_beside_the_model(sessions: SessionSet) -> None:
    backwards = Popularity(np.arange(N_ITEMS))
    result = evaluate(Walker(ids(sessions)), sessions, QUICK, others={"by index": backwards})
    mine = result.value("recall@5", system="by index", split="valid").value
    hits = [(u + 6) % N_ITEMS >= N_ITEMS - 5 for u in range(N_USERS)]  # no tie, none in a history
    assert mine == pytest.approx(np.mean(hits))
    assert result.value("recall@5", system="model - by index", split="valid").value == 1 - mine
    assert result.baselines()[-1] == "by index"


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("recall@10", {"model": 0.1, "popularity": 0.2}, {"popularity"}),
        ("ndcg@5", {"model": 0.2, "random": 0.2, "transition": 0.1}, {"model", "random"}),
        ("watch_seconds", {"model": 3.0, "random": 2.0, "oracle": 9.0}, {"model"}),
        ("hit@10", {"model": 0.1, "SASRec": None, "random": math.nan}, set()),
        ("gini@10", {"model": 0.1, "popularity": 0.2}, set()),
        ("recall@10[1-5]", {"model": 0.1, "count ranker": 0.2}, {"count ranker"}),
    ],
)
def test_who_is_best(metric: str, values: dict[str, float | None], best: set[str]) -> None:
    assert best_systems(metric, values) == best


def test_the_order_of_systems() -> None:
    found = ["oracle", "mine", "random", "model - random", "count ranker", "model", "random"]
    assert in_order(found) == ["model", "count ranker", "random", "mine"]


def test_a_half_wrong_model_and_its_interval(sessions: SessionSet) -> None:
    result = evaluate(Walker(ids(sessions), wrong=True), sessions, QUICK)
    got = result.value("recall@5", split="valid")
    last_is_odd = np.mean([(u + 5) % N_ITEMS % 2 for u in range(N_USERS)])
    assert got.value == pytest.approx(last_is_odd)
    half = 1.96 * math.sqrt(0.25 / N_USERS)
    assert got.high - got.low == pytest.approx(2 * half, rel=0.25)


def test_shared_ids_get_expected_credit(sessions: SessionSet) -> None:
    result = evaluate(Walker(ids(sessions), share=4), sessions, QUICK)
    expected, by_id = [], []
    for user in range(N_USERS):
        history = [(user + step) % N_ITEMS for step in range(6)]
        target = (user + 6) % N_ITEMS
        walk = [(history[-1] + 1 + j) % N_ITEMS for j in range(N_ITEMS)]
        blocks = []
        for group in dict.fromkeys(i // 4 for i in walk):
            block = [i for i in range(group * 4, group * 4 + 4) if i not in history]
            blocks.append(block)
        before = 0
        for block in blocks:
            if target in block:
                expected.append(min(max(2 - before, 0), len(block)) / len(block))
                by_id.append(float(before < 2))
            before += len(block)
    assert len(expected) == N_USERS
    assert result.value("recall@2", split="valid").value == pytest.approx(np.mean(expected))
    assert result.value("id_recall@2", split="valid").value == pytest.approx(np.mean(by_id))
    assert np.mean(by_id) > np.mean(expected)


def test_short_beam_is_a_miss(sessions: SessionSet) -> None:
    result = evaluate(Walker(ids(sessions), limit=1), sessions, QUICK)
    assert result.value("recall@5", split="test").value == pytest.approx(1 / 3)
    assert result.value("recall@5", split="valid").value == 1.0


def test_integer_item_ids_and_one_split() -> None:
    sessions = session_set({"test": 2}, item_names=False)
    result = evaluate(Walker(ids(sessions)), sessions, QUICK)
    assert result.protocol["splits_without_sessions"] == ["valid"]
    assert {m.split for m in result.measures} == {"test"}
    assert result.value("recall@5").value == 1.0
    assert result.samples[0]["recommended"][0]["item"].isdigit()


def test_buckets_follow_the_train_count(sessions: SessionSet) -> None:
    config = EvaluationConfig(ks=(5,), buckets=(0, 5, 20), resamples=50, latency_requests=0)
    result = evaluate(Walker(ids(sessions)), sessions, config)
    counts = [(u + 6) % N_ITEMS % 30 for u in range(N_USERS)]
    numbers = {
        "0": sum(c == 0 for c in counts),
        "1-5": sum(1 <= c <= 5 for c in counts),
        "6-20": sum(6 <= c <= 20 for c in counts),
        ">20": sum(c > 20 for c in counts),
    }
    for name, number in numbers.items():
        got = result.value(f"recall@5[{name}]", split="valid")
        assert (got.value, got.n) == (1.0, number)
    parts = [result.value(f"recall@5[{b}]", system="popularity", split="test") for b in numbers]
    weighted = sum(p.value * p.n for p in parts) / sum(p.n for p in parts)
    whole = result.value("recall@5", system="popularity", split="test").value
    assert weighted == pytest.approx(whole)  # every session has three targets
    assert result.latency == {}


def test_targets_at_the_time_of_the_item_before_are_told_apart(sessions: SessionSet) -> None:
    # The sessions of valid begin at 6 and those of test at 9, one behind the item before them.
    table = sessions.sessions
    split = np.array(table["split"].to_pylist())
    rows = table["user_row"].to_numpy()
    begun = np.where(split == "valid", 6 - (rows < 3), 9)
    tied = replace(
        sessions,
        sessions=table.set_column(
            table.schema.get_field_index("timestamp"), "timestamp", pa.array(begun, pa.int64())
        ),
    )
    result = evaluate(Walker(ids(tied)), tied, QUICK)
    assert result.value("recall@5[same time]", split="valid").n == 3
    assert result.value("recall@5[later]", split="valid").n == N_USERS - 3
    names = {m.metric for m in result.measures if m.split == "test"}
    assert "recall@5[1-5]" in names
    assert "recall@5[later]" not in names  # no target of test is tied


def test_true_watch_time(sessions: SessionSet) -> None:
    result = evaluate(Walker(ids(sessions)), sessions, QUICK, world=LinearWorld(ids(sessions)))
    model, best, alone = [], [], []
    for user in range(N_USERS):
        history = [(user + step) % N_ITEMS for step in range(6)]
        a, b, c = (10 + (history[-1] + 1 + j) % N_ITEMS for j in range(3))
        model.append(a + 0.5 * (b + c))
        alone.append((a + b + c) / 3)
        a, b, c = (10 + i for i in sorted(set(range(N_ITEMS)) - set(history))[:-4:-1])
        best.append(a + 0.5 * (b + c))
    value = result.value("watch_seconds", split="valid")
    assert value.value == pytest.approx(np.mean(model))
    oracle = result.value("watch_seconds", split="valid", system="oracle")
    assert oracle.value == pytest.approx(np.mean(best))
    per_item = result.value("item_watch_seconds", split="valid")
    assert per_item.value == pytest.approx(np.mean(alone))
    gap = result.value("watch_seconds", split="valid", system="model - oracle")
    assert gap.value == pytest.approx(np.mean(model) - np.mean(best))
    # On the test split the model generates exactly what was watched.
    logged = result.value("watch_seconds", system="logged")
    assert logged.value == pytest.approx(result.value("watch_seconds").value)


def test_a_world_without_the_items_is_refused(sessions: SessionSet) -> None:
    with pytest.raises(ValueError, match="item 'item-000' is not in it"):
        evaluate(
            Walker(ids(sessions)), sessions, QUICK, world=LinearWorld([f"x{i}" for i in range(40)])
        )


def test_samples_of_users_are_seeded_and_said(sessions: SessionSet) -> None:
    config = EvaluationConfig(ks=(5,), max_users=7, resamples=20, latency_requests=0)
    first = evaluate(Walker(ids(sessions), wrong=True), sessions, config)
    again = evaluate(Walker(ids(sessions), wrong=True), sessions, config)
    assert first.measures == again.measures
    assert first.value("recall@5", split="valid").n == 7
    assert first.protocol["split_sizes"]["test"]["users"] == 7
    assert first.protocol["split_sizes"]["test"]["users_in_split"] == N_USERS
    few = replace(config, max_users=None, max_sessions=5)  # of one session a user
    bounded = evaluate(Walker(ids(sessions), wrong=True), sessions, few)
    assert bounded.protocol["split_sizes"]["test"]["users"] == 5


def test_samples_show_what_was_hit(sessions: SessionSet) -> None:
    config = EvaluationConfig(ks=(5,), resamples=20, latency_requests=0, sample_sessions=60)
    result = evaluate(Walker(ids(sessions), wrong=True), sessions, config)
    assert len({s["user"] for s in result.samples}) == N_USERS
    for sample in result.samples:
        watched = {item["item"] for item in sample["watched"]}
        assert [r["hit"] for r in sample["recommended"]] == [
            r["item"] in watched for r in sample["recommended"]
        ]
        assert len(sample["history"]) == 7
        assert sample["watched"][0]["tags"] in (["even"], ["odd"])


def test_lists_are_timed_and_shown_where_lists_are_served(sessions: SessionSet) -> None:
    class Ranking(Walker):
        mixture = SimpleNamespace()

        def rank(self, histories: Any, k: int, **options: Any) -> Any:
            options.pop("dense_weight", None)
            return super().rank(histories, k, **options)

    result = evaluate(Ranking(ids(sessions)), sessions, QUICK)
    assert result.protocol["ranks_items"] is True
    assert "a list of 5 items" in result.latency["setting"]
    assert {len(sample["recommended"]) for sample in result.samples} == {5}
    result = evaluate(Walker(ids(sessions)), sessions, QUICK)
    assert result.protocol["ranks_items"] is False
    assert "a session" in result.latency["setting"]
    assert {len(sample["recommended"]) for sample in result.samples} == {SESSION}


def test_progress_reaches_the_end(sessions: SessionSet) -> None:
    calls: list[tuple[int, int]] = []
    evaluate(
        Walker(ids(sessions)),
        sessions,
        QUICK,
        progress=lambda done, total, note: calls.append((done, total)),
    )
    assert calls[0] == (0, 2 * N_USERS)
    assert calls[-1] == (2 * N_USERS, 2 * N_USERS)
    assert [d for d, _ in calls] == sorted(d for d, _ in calls)


def test_rows_hold_the_values_that_the_measures_are_means_of(sessions: SessionSet) -> None:
    result = evaluate(Walker(ids(sessions), wrong=True), sessions, QUICK)
    rows = result.rows
    assert rows is not None
    assert rows.num_rows == 2 * N_USERS
    test = rows.filter(pc.equal(rows["split"], "test"))
    assert test["user_id"].to_pylist() == [1000 + u for u in range(N_USERS)]
    for metric in ("recall@5", "ndcg@5", "hit@2"):
        for history in ("masked", "unmasked"):
            mean = pc.mean(test[f"{metric}, {history}"]).as_py()
            assert mean == pytest.approx(result.value(metric, history=history).value)


def test_result_survives_the_file(sessions: SessionSet, tmp_path: Path) -> None:
    result = evaluate(Walker(ids(sessions)), sessions, QUICK)
    path = tmp_path / "evaluate" / "evaluation.json"
    result.save(path)
    loaded = EvalResult.load(path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert len(loaded.measures) == len(result.measures)
    for a, b in zip(loaded.measures, result.measures, strict=True):
        assert a == b or math.isnan(b.value)
    assert loaded.samples == result.samples
    assert loaded.protocol == result.protocol
    path.write_text("{}")
    with pytest.raises(DataError, match="not an evaluation"):
        EvalResult.load(path)
    with pytest.raises(KeyError, match="recall@3"):
        result.value("recall@3")


@pytest.mark.parametrize(
    "options",
    [
        {"ks": ()},
        {"ks": (0,)},
        {"beam_width": 0},
        {"max_users": 0},
        {"max_sessions": 0},
        {"buckets": (5, 2)},
        {"splits": ()},
        {"popular_top": 0.0},
        {"latency_requests": -1},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EvaluationConfig(**options)  # type: ignore[arg-type]


def test_no_sessions_at_all(sessions: SessionSet) -> None:
    config = EvaluationConfig(splits=("train",))
    with pytest.raises(ValueError, match="none of train has any session"):
        evaluate(Walker(ids(sessions)), sessions, config)


class Judge:
    """Rewards a session with its mean item index over the length of the history it saw."""

    config = SimpleNamespace(history_length=4)

    def score(self, history: torch.Tensor, sessions: torch.Tensor) -> torch.Tensor:
        assert history.shape[1] <= 4
        assert sessions.shape[1] == 1
        real = sessions >= 0
        mean = torch.where(real, sessions, 0).sum(-1) / real.sum(-1).clamp(min=1)
        return mean / (history >= 0).sum(-1, keepdim=True)


def test_the_model_before_its_alignment_stands_beside_it() -> None:
    data = session_set({"valid": 2, "test": 3})
    ids = data.items["item_id"].to_pylist()
    options = EvaluationConfig(resamples=50, latency_requests=1)
    result = evaluate(
        Walker(ids), data, options, pretrained=FreeWalker(ids, wrong=True), judge=Judge()
    )
    assert result.value("recall@5").value == 1
    assert result.value("recall@5", system="pretrained").value == pytest.approx(0.5)
    gap = result.value("recall@5", system="model - pretrained")
    assert gap.value == pytest.approx(0.5)
    assert 0 < gap.low <= gap.value <= gap.high < 1
    assert result.value("unconstrained_legality", system="pretrained").value == 0.5
    assert result.value("legality", system="pretrained").value == 1
    with pytest.raises(KeyError):
        result.value("recall@5", system="pretrained", history="unmasked")
    starts = data.sessions.filter(pc.equal(data.sessions["split"], "test"))["start"].to_pylist()
    rows = [[(u + start + j) % N_ITEMS for j in range(SESSION)] for u, start in enumerate(starts)]
    judged = result.value("judged_reward").value
    assert judged == pytest.approx(np.mean([np.mean(row) / 4 for row in rows]))
    assert result.value("judged_reward", system="logged").value == pytest.approx(judged)
