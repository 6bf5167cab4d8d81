"""The choice of counting baselines, and their figures on real logs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.data import SessionConfig, SessionSet, build_sessions, open_log
from onerec.evaluation import metrics as m
from onerec.evaluation.counting import count_evidence, fit_counts, train_sequences
from onerec.model.counting import CountRanker, co_consumption, popularity, transition

DAY = 86_400_000


def written(folder: Path, rows: list[list[int]], start: int = 1_600_000_000_000) -> Path:
    """A log of sequences, an hour between two items and a day between two users' beginnings."""
    folder.mkdir()
    pq.write_table(
        pa.table(
            {
                "user_id": [u for u, row in enumerate(rows) for _ in row],
                "item_id": [i for row in rows for i in row],
                "timestamp": [
                    start + u * DAY + at * DAY // 24
                    for u, row in enumerate(rows)
                    for at in range(len(row))
                ],
            }
        ),
        folder / "interactions.parquet",
    )
    return folder


def sessions(
    tmp_path: Path, rows: list[list[int]], *, split: str = "last", length: int = 1
) -> SessionSet:
    log = open_log(written(tmp_path / "log", rows))
    config = SessionConfig(rule="next", length=length, split=split, embedding_dim=4)
    return build_sessions(log, config, tmp_path / "sessions")


def walks(users: int = 120, n_items: int = 50, seed: int = 0) -> list[list[int]]:
    """Each user goes on to the next item or the one after the next, rarely anywhere."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(users):
        row = [int(rng.integers(n_items))]
        for _ in range(rng.integers(4, 20)):
            step = rng.integers(n_items) if rng.random() < 0.2 else rng.integers(1, 3)
            row.append(int((row[-1] + step) % n_items))
        rows.append(row)
    return rows


@pytest.mark.parametrize("split", ["last", "time"])
def test_train_sequences_are_what_training_counts(tmp_path: Path, split: str) -> None:
    rows = [*walks(), [1, 2]]  # the last user has nothing held out by "last"
    data = sessions(tmp_path, rows, split=split)
    items, offsets = train_sequences(data)
    counts = np.bincount(items, minlength=data.n_items)
    np.testing.assert_array_equal(counts, data.items["train_count"].to_numpy())
    assert offsets[-1] == len(items)
    whole = data.sequences["items"].to_pylist()
    held = {}
    for name in ("valid", "test"):
        samples = data.samples(name)
        for row, begin, end in zip(
            samples.user_row, samples.history_begin, samples.history_end, strict=True
        ):
            held[row] = min(held.get(row, 1 << 60), end - begin)
    assert held
    for user, row in enumerate(whole):
        seen = items[offsets[user] : offsets[user + 1]].tolist()
        assert seen == row[: len(seen)]
        assert len(seen) <= held.get(user, len(row))


@pytest.mark.parametrize(("masked", "length"), [(True, 1), (True, 3), (False, 1)])
def test_the_choice_is_the_best_on_valid(tmp_path: Path, masked: bool, length: int) -> None:
    """The NDCG that chose is the metrics' own, and no part alone has a greater one."""
    data = sessions(tmp_path, walks(), length=length)
    history = "masked" if masked else "unmasked"
    found = fit_counts(data, [history])[history]
    valid = data.samples("valid")
    histories = [valid.history(i) for i in range(len(valid))]
    targets = m.pad_rows([np.unique(valid.target(i)) for i in range(len(valid))])

    def gain(ranker: CountRanker) -> float:
        best = ranker.candidates(histories, 10, histories if masked else None)[0]
        hidden = m.pad_rows(histories) if masked else None
        return float(m.ndcg(m.target_ranks(best, targets, exclude=hidden), 10).mean())

    gains = {name: gain(ranker) for name, ranker in found.rankers.items()}
    for name, options in found.chosen.items():
        assert gains[name] == pytest.approx(options["ndcg@10"])
    assert gains["count ranker"] == max(gains.values())
    assert gains["transition"] > 0.3  # a step of one or two is what the log is made of
    assert ("personal frequency" in gains) == (not masked)


def test_repeats_are_found_where_the_history_may_be_recommended(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    own = rng.integers(60, size=(150, 3))
    rows = [own[u][rng.integers(3, size=12)].tolist() for u in range(150)]
    found = fit_counts(sessions(tmp_path, rows))["unmasked"]
    assert "personal" in found.chosen["count ranker"]
    assert found.chosen["count ranker"]["ndcg@10"] > 0.5
    assert found.chosen["co-consumption"]["ndcg@10"] < found.chosen["count ranker"]["ndcg@10"]


def test_what_is_popular_now_is_found_where_tastes_move(tmp_path: Path) -> None:
    """Each ten of 40 days have ten items of their own; few are taken from all fifty."""
    rng, folder = np.random.default_rng(4), tmp_path / "log"
    folder.mkdir()
    day = rng.integers(40, size=6000)
    usual = rng.random(6000) < 0.2
    items = np.where(
        usual, rng.integers(50, size=6000), day // 10 * 10 + rng.integers(10, size=6000)
    )
    times = 1_600_000_000_000 + day * DAY + rng.integers(DAY, size=6000)
    columns = {"user_id": rng.integers(300, size=6000), "item_id": items, "timestamp": times}
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    config = SessionConfig(rule="next", length=1, split="time", embedding_dim=4)
    data = build_sessions(open_log(folder), config, tmp_path / "sessions")
    names = data.items["item_id"].to_numpy()
    for whole in (False, True):  # the third ten days, or the last, make what is popular now
        evidence = count_evidence(data, whole=whole)
        assert (evidence.counts.sum() == 6000) == whole
        lately = evidence.parts[7].constant
        assert lately is not None
        assert sorted(names[lately[0][:10]]) == [*range(30, 40)]
    found = fit_counts(data)["masked"]
    assert found.chosen["recent popularity"]["recent_share"] < 0.1
    assert "recent" in found.chosen["count ranker"]
    recall = {name: measured(r, data, "test")[0].mean() for name, r in found.rankers.items()}
    popular = measured(
        CountRanker([popularity(data.items["train_count"])], data.items["train_count"]),
        data,
        "test",
    )
    assert recall["count ranker"] > 1.2 * max(recall["co-consumption"], popular[0].mean())
    assert recall["recent popularity"] > 1.5 * popular[0].mean()
    # Places that stand for times have no trend.
    columns["timestamp"] = 1_600_000_000_000 + np.arange(6000)
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    data = build_sessions(open_log(folder), config, tmp_path / "places")
    assert "recent popularity" not in fit_counts(data)["masked"].rankers


def test_the_choice_is_repeatable_and_bounded(tmp_path: Path) -> None:
    data = sessions(tmp_path, walks())
    first, again, other = (fit_counts(data, sessions=20, seed=s)["masked"] for s in (0, 0, 1))
    assert first.chosen == again.chosen
    assert other.chosen["count ranker"]["ndcg@10"] != first.chosen["count ranker"]["ndcg@10"]


def measured(ranker: CountRanker, data: SessionSet, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Recall@10 with the history masked, and the train count of the target, of every session."""
    samples = data.samples(split)
    histories = [samples.history(i) for i in range(len(samples))]
    targets = m.pad_rows([samples.target(i) for i in range(len(samples))])
    ranked = ranker.rank(histories, 10, histories)
    ranks = m.target_ranks(ranked, targets, exclude=m.pad_rows(histories))
    return m.recall(ranks, 10), data.items["train_count"].to_numpy()[targets[:, 0]]


@pytest.mark.data
def test_figures_on_movielens(data_dir: Path, tmp_path: Path) -> None:
    log = open_log(data_dir / "ml_100k")
    config = SessionConfig(rule="next", length=1, split="last", embedding_dim=4)
    data = build_sessions(log, config, tmp_path / "sessions")
    found = fit_counts(data)["masked"]
    recall = {name: measured(r, data, "test")[0].mean() for name, r in found.rankers.items()}
    # Counted apart with dense matrices: .2004 for a Markov chain of window 5 and the last 5 items,
    # .2174 for the cosine of the whole history with decay .8.
    assert recall["transition"] == pytest.approx(0.2004, abs=0.0011)
    assert recall["co-consumption"] == pytest.approx(0.2174, abs=0.003)
    assert recall["count ranker"] > 0.207


@pytest.mark.data
@pytest.mark.slow
def test_figures_on_beauty(data_dir: Path, tmp_path: Path) -> None:
    log = open_log(data_dir / "amazon2014_beauty")
    config = SessionConfig(rule="next", length=1, embeddings="sasrec32")
    data = build_sessions(log, config, tmp_path / "sessions")
    items, offsets = train_sequences(data)
    ranker = CountRanker(
        [
            co_consumption(items, offsets, data.n_items, exponent=0.3),
            transition(items, offsets, data.n_items, window=1, last=1, shrink=0.0),
        ],
        data.items["train_count"].to_numpy(),
        [1.0, 0.3],
    )
    recall, count = measured(ranker, data, "test")
    # Counted apart with dense matrices and z-scores: .0830 in all.
    assert recall.mean() == pytest.approx(0.0830, abs=0.0005)
    buckets = [recall[(count > low) & (count <= high)].mean() for low, high in ((0, 5), (5, 20))]
    assert buckets == pytest.approx([0.0419, 0.0580], abs=0.003)
