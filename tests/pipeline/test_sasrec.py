"""SASRec as a baseline of a run: what it is trained on, and that it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.data import SessionConfig, SessionSet, build_sessions, open_log
from onerec.evaluation.config import EvaluationConfig
from onerec.evaluation.counting import train_sequences
from onerec.evaluation.harness import evaluate
from onerec.pipeline import sasrec

N_ITEMS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SessionSet:
    """Users walk on by 7 items, or rarely jump; sessions have two items."""
    folder = tmp_path_factory.mktemp("walks")
    rng = np.random.default_rng(0)
    users, items, times = [], [], []
    for user in range(150):
        item = int(rng.integers(N_ITEMS))
        for at in range(12):
            users.append(user)
            items.append(item)
            times.append(1_600_000_000_000 + (user * 100 + at) * 3_600_000)
            item = int(rng.integers(N_ITEMS) if rng.random() < 0.1 else (item + 7) % N_ITEMS)
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    pq.write_table(table, folder / "interactions.parquet")
    config = SessionConfig(rule="next", length=2, split="last", embedding_dim=4)
    return build_sessions(open_log(folder), config, folder / "sessions")


def test_every_item_of_train_but_the_first_is_a_target(data: SessionSet) -> None:
    samples = sasrec.next_item_samples(data)
    items, offsets = train_sequences(data)
    found: dict[int, list[int]] = {}
    for i in range(len(samples)):
        user = int(samples.user_row[i])
        history = samples.history(i).tolist()
        assert history == items[offsets[user] : offsets[user] + len(history)].tolist()
        assert len(history) >= 1
        found.setdefault(user, history).append(int(samples.target(i)[0]))
    for user, whole in found.items():
        assert whole == items[offsets[user] : offsets[user + 1]].tolist()
    held = data.samples("valid")
    for i in range(len(held)):  # nothing of valid or test is among them
        assert len(found[int(held.user_row[i])]) <= len(held.history(i))


def test_it_learns_the_walk_and_goes_on_in_its_folder(
    data: SessionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sasrec, "_MIN_STEPS", 1)
    monkeypatch.setattr(sasrec, "RECIPE", {**sasrec.RECIPE, "epochs": 40, "lr": 5e-3})
    ranker = sasrec.sasrec_ranker(data, tmp_path / "sasrec", device="cpu", num_threads=1)
    assert sorted(p.name for p in (tmp_path / "sasrec").iterdir()) == ["metrics.jsonl", "model"]
    starts = np.arange(N_ITEMS)
    index = {item: row for row, item in enumerate(data.items["item_id"].to_pylist())}
    histories = [[index[(s - 14) % N_ITEMS], index[(s - 7) % N_ITEMS]] for s in starts.tolist()]
    first = ranker.rank(histories, 1, histories)[:, 0]
    hits = [index[s] == found for s, found in zip(starts.tolist(), first, strict=True)]
    assert np.mean(hits) > 0.9


def test_the_harness_wants_the_ranker_that_its_config_names(data: SessionSet) -> None:
    with pytest.raises(ValueError, match=r"sasrec: wanted .* others\['SASRec'\], got none"):
        evaluate(None, data, EvaluationConfig(sasrec=True))  # type: ignore[arg-type]
