"""Training of the reward model, its measures against brute force, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onerec.data import (
    SessionConfig,
    SessionSet,
    SimulatorConfig,
    build_sessions,
    open_log,
    simulate,
)
from onerec.model import RewardModel
from onerec.training.reward.config import RewardConfig
from onerec.training.reward.metrics import (
    LogisticRegression,
    auc,
    calibration,
    item_means,
    log_loss,
)
from onerec.training.reward.train import labels_of, save_reward, train_reward, watch_cap


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_auc_is_the_share_of_ordered_pairs(soft: bool) -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 6, 40).astype(float)
    labels = rng.random(40) if soft else (rng.random(40) < 0.3).astype(float)
    won = total = 0.0
    for a, y in zip(scores, labels, strict=True):
        for b, z in zip(scores, labels, strict=True):
            weight = y * (1 - z)
            total += weight
            won += weight * ((a > b) + 0.5 * (a == b))
    assert auc(scores, labels) == pytest.approx(won / total)
    assert np.isnan(auc(scores, np.ones(40)))


def test_log_loss_and_calibration() -> None:
    p, y = np.array([0.2, 0.2, 0.8, 0.8]), np.array([0.0, 1.0, 1.0, 1.0])
    assert log_loss(p, y) == pytest.approx(-np.log([0.8, 0.2, 0.8, 0.8]).mean())
    found = calibration(p, y, bins=2)
    assert found["bins"] == [pytest.approx([0.2, 0.5, 2]), pytest.approx([0.8, 1.0, 2])]
    assert found["error"] == pytest.approx(0.25)
    assert found["ratio"] == pytest.approx(0.5 / 0.75)


def test_item_means_shrink_to_the_base_rate() -> None:
    labels = np.array([[1.0], [1.0], [np.nan], [0.0]])
    means = item_means(np.array([0, 0, 0, 1]), labels, 3, np.array([0.5]), strength=2.0)
    assert means[:, 0].tolist() == pytest.approx([(2 + 1) / 4, 1 / 3, 0.5])


def test_logistic_regression_finds_the_odds() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((20_000, 2)).astype(np.float32)
    p = 1 / (1 + np.exp(-(1.5 * x[:, 0] - 2)))
    y = (rng.random(len(p)) < p).astype(np.float32)[:, None]
    y[::7] = np.nan
    found = LogisticRegression().fit(x, y).predict(x)[:, 0]
    assert np.abs(found - p).mean() < 0.02


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> SessionSet:
    folder = tmp_path_factory.mktemp("world")
    simulate(SimulatorConfig(n_users=250, n_items=80, n_creators=20, seed=4)).write(folder)
    with open_log(folder, threads=1) as log:
        return build_sessions(log, SessionConfig(), folder / "out")


def test_labels_are_shares_and_flags(sessions: SessionSet) -> None:
    train = sessions.exposed_sessions("train")
    cap = watch_cap(train)
    watch = train.feedback["watch_time_ms"]
    known = np.isfinite(watch)
    assert np.nanquantile(watch, 0.99) / 1000 == pytest.approx(cap)
    swt = labels_of(train, "swt", cap)
    assert swt is not None
    np.testing.assert_allclose(swt[known], np.minimum(watch[known] / 1000 / cap, 1), rtol=1e-5)
    vtr = labels_of(train, "vtr", cap)
    assert vtr is not None
    assert np.nanmax(vtr) == 1
    np.testing.assert_array_equal(np.isfinite(vtr), known)
    assert labels_of(train, "bought", cap) is None


@pytest.mark.parametrize("labels", ["item", "session"])
def test_it_learns_and_stays_calibrated(labels: str, sessions: SessionSet, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = RewardConfig(
        targets=("swt", "like", "follow", "bought"),
        weights=(1.0, 0.2, 0.1, 1.0),
        labels=labels,  # type: ignore[arg-type]
        max_steps=120,
        batch_size=128,
        d_model=32,
        min_positives=100,
        judge=labels == "item",
    )
    result = train_reward(sessions, config)
    metrics = result.metrics
    assert metrics["targets"] == ["swt", "like"]
    assert "positive labels in training, wanted 100" in metrics["skipped"]["follow"]
    assert metrics["skipped"]["bought"] == "the log has no column bought"
    assert result.model.config.weights == (1.0, 0.2)
    swt = metrics["splits"]["test"]["swt"]
    assert swt["model"]["auc"] > 0.6
    assert swt["model"]["log_loss"] < swt["item mean"]["log_loss"] + 0.01
    assert 0.8 < swt["model"]["calibration"]["ratio"] < 1.25
    # Likes are rare: their positives were weighted, and the rates come out right all the same.
    assert metrics["positive_weights"]["like"] > 5
    assert 0.5 < metrics["splits"]["test"]["like"]["model"]["calibration"]["ratio"] < 2
    assert (result.judge is not None) == ("judge" in swt) == (labels == "item")
    save_reward(result, tmp_path)
    again = RewardModel.from_pretrained(tmp_path / "model")
    history, shown = torch.tensor([[1, 2]]), torch.tensor([[[3, 4, 5]]])
    assert torch.equal(again.score(history, shown), result.model.score(history, shown))


def test_a_log_without_trainable_targets(sessions: SessionSet) -> None:
    with pytest.raises(ValueError, match=r"none can be trained .*no column bought"):
        train_reward(sessions, RewardConfig(targets=("bought",), weights=(1.0,)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"targets": ("like", "like"), "weights": (1.0, 1.0)}, "distinct"),
        ({"targets": ("like",)}, "weights: wanted a value for each of 1"),
        ({"max_positive_weight": 0.5}, "max_positive_weight"),
        ({"labels": "both"}, "labels"),
        ({"lr": 0.0}, "lr: wanted more than 0"),
    ],
)
def test_wrong_settings(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RewardConfig(**wrong)  # type: ignore[arg-type]
