"""Alignment: what is chosen, what is computed once, what stops it, and that it goes on."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from onerec.model import OneRec
from onerec.model.trie_mask import TrieMask
from onerec.training import AlignmentConfig, read_metrics
from onerec.training.alignment_config import METHODS
from onerec.training.preferences import Groups, choose, preference_loss

JOB = Path(__file__).with_name("align_job.py")
_spec = importlib.util.spec_from_file_location("align_job", JOB)
assert _spec is not None
assert _spec.loader is not None
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)


ITEMS = np.array([[1, 2], [2, 1], [3, 4], [5, 6], [7, 8]])
REWARDS = np.array([0.5, 0.9, 0.1, 1.0, 0.3], dtype=np.float32)


def test_winner_and_loser_are_the_extremes_of_distinct_sets() -> None:
    rng = np.random.default_rng(0)
    chosen, _ = choose(ITEMS, REWARDS, AlignmentConfig(), rng)
    assert chosen.tolist() == [3, 2]
    # [1, 2] and [2, 1] are one set, which the generator's own favourite stands for.
    chosen, _ = choose(ITEMS, REWARDS, AlignmentConfig(method="softmax_dpo", losers=9), rng)
    assert chosen.tolist() == [3, 2, 4, 0]
    chosen, _ = choose(ITEMS, REWARDS, AlignmentConfig(method="cem", elite=0.5), rng)
    assert chosen.tolist() == [3, 0]
    chosen, advantage = choose(ITEMS, REWARDS, AlignmentConfig(method="gbpo"), rng)
    assert chosen.tolist() == [0, 2, 3, 4]
    assert advantage.sum() == pytest.approx(0, abs=1e-6)
    assert np.argsort(advantage).tolist() == np.argsort(REWARDS[chosen]).tolist()


def test_samples_without_a_preference_are_left_out() -> None:
    rng = np.random.default_rng(0)
    for method in METHODS[:-1]:
        config = AlignmentConfig(method=method, min_gap=0.95)  # type: ignore[arg-type]
        assert choose(ITEMS, REWARDS, config, rng) is None
        assert choose(ITEMS[:2], REWARDS[:2], config, rng) is None, "one set of items"
        assert choose(ITEMS[:0], REWARDS[:0], config, rng) is None


def test_groups_round_trip(tmp_path: Path) -> None:
    found = [
        (4, np.array([[1, 2], [3, 4]]), np.array([1.0, 0.5]), np.array([1.0, 1.0])),
        (9, np.array([[5, 6]]), np.array([np.nan]), np.array([-2.0])),
    ]
    groups = Groups.of(found, 2, 3)
    groups.reference[:] = np.arange(groups.reference.size).reshape(groups.reference.shape)
    groups.reference[1, 1] = 0
    groups.save(tmp_path / "a.parquet")
    again = Groups.load(tmp_path / "a.parquet", 2, 3)
    for name, value in vars(groups).items():
        np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "ntp"])
def test_every_loss_prefers_the_better_session(method: str) -> None:
    torch.manual_seed(0)
    reference = -torch.rand(3, 4, 6) - 0.5
    policy = (reference + 0.05 * torch.randn(3, 4, 6)).requires_grad_(True)
    real = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    advantages = torch.tensor([1.0, -0.5, -0.3, -0.2]).expand(3, 4)
    scores = torch.rand(3, 4, 6)
    config = AlignmentConfig(method=method, winner_nll=0.1)  # type: ignore[arg-type]
    loss = preference_loss(policy, reference, real, advantages, scores, config)
    assert loss.shape == (3,)
    loss.sum().backward()
    gradient = policy.grad.sum(dim=-1)
    assert (gradient[:, 0] < 0).all(), "the winner rises"
    if method != "cem":
        assert (gradient[:, 1] > 0).all(), "the loser falls"
    if method in ("softmax_dpo", "cem", "ecpo", "gbpo"):
        assert (gradient[~real] == 0).all(), "a place without a session has no say"
    else:
        assert (gradient[:, 2:] == 0).all()


def test_reward_rises_and_everything_is_kept(tmp_path: Path) -> None:
    result = job.run(tmp_path, steps=16, lr=1e-2, gradient_share=3.0, candidates=30, rate=0.6)
    record = result.record
    assert (result.iterations, result.chosen, result.stopped) == (2, 2, None)
    rewards = [record["seed"]["reward_best"]] + [r["reward_best"] for r in record["iterations"]]
    assert rewards[2] > rewards[0] + 0.05
    assert record["iterations"][1]["win_rate"] > 0.6
    assert record["seed"]["drift_seed"] == pytest.approx(0, abs=1e-6)
    assert record["iterations"][0]["drift_seed"] > 0
    assert record["weight"] > 0
    assert all(r["candidates"] >= 12 * r["groups"] for r in record["iterations"])
    assert all(r["candidates_per_s"] > 0 for r in record["iterations"])
    kinds = [r["kind"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert kinds.count("iteration") == 2
    trained = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "pair_accuracy" in r]
    assert trained[-1]["pair_accuracy"] > 0.5
    last = load_file(tmp_path / "snapshots" / "iteration_02" / "model.safetensors")
    final = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in last.items())


@pytest.mark.parametrize("normalize", ["legal", "full"])
def test_pairs_are_judged_right_and_referenced_to_their_snapshot(
    normalize: str, tmp_path: Path
) -> None:
    job.run(tmp_path, normalize=normalize, exclude_history=True)
    catalog, taste, train = job.catalog(), job.Taste(), job.job.make_samples(200, 1)
    groups = Groups.load(tmp_path / "pairs" / "iteration_02.parquet", 4, 3)
    assert len(groups) > 5
    assert len(np.unique(groups.samples)) == len(groups)
    snapshot = OneRec.from_pretrained(tmp_path / "snapshots" / "iteration_01")
    legal = TrieMask(torch.tensor(catalog.sids), catalog.codebook_size)
    for row in range(len(groups)):
        history = train.history(int(groups.samples[row]))
        for member in range(2):
            items = groups.items[row, member]
            assert len(set(items.tolist())) == 4
            assert not np.isin(items, history).any()
            value = taste.score(torch.zeros(1, 1), torch.from_numpy(items)[None, None])
            assert groups.rewards[row, member] == pytest.approx(float(value), rel=1e-5)
        assert groups.rewards[row, 0] - groups.rewards[row, 1] >= 0.05
        codes = torch.from_numpy(catalog.sids[groups.items[row]].astype(np.int64))
        past = torch.from_numpy(catalog.sids[history[-10:]].astype(np.int64))
        with torch.inference_mode():
            logits = snapshot.session_logits(past.expand(2, -1, -1), codes)
        if normalize == "legal":
            logits = logits.masked_fill(~legal.mask(codes), float("-inf"))
        wanted = logits.log_softmax(-1).gather(-1, codes[..., None]).flatten(1)
        np.testing.assert_allclose(groups.reference[row], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["softmax_dpo", "critical_dpo", "cem", "ecpo", "gbpo", "ntp"])
def test_other_methods_run(method: str, tmp_path: Path) -> None:
    result = job.run(tmp_path, method=method, steps=6, iterations=1)
    record = result.record["iterations"][0]
    assert record["drift_seed"] > 0
    assert ("candidates" in record) == (method != "ntp")
    if method == "critical_dpo":
        groups = Groups.load(tmp_path / "pairs" / "iteration_01.parquet", 4, 3)
        scores = groups.token_scores[:, 1]
        assert ((scores > 0) & (scores <= 1)).all()
        assert scores.std() > 0.01
        assert not groups.token_scores[:, 0].any()


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"max_drift": 0.0}, "divergence from the seed"),
        ({"max_winner_drop": 0.0, "weight": 300.0, "lr": 0.05}, "winners lost"),
        ({"max_legality_drop": 0.0, "weight": 300.0, "lr": 0.05}, "legality fell"),
    ],
    ids=["drift", "winner", "legality"],
)
def test_a_broken_bound_gives_the_snapshot_before(
    bound: dict[str, float], words: str, tmp_path: Path
) -> None:
    result = job.run(tmp_path, steps=8, **bound)
    if words == "divergence from the seed":
        assert result.stopped is not None
        assert words in result.stopped
    assert result.chosen == (2 if result.stopped is None else result.iterations - 1)
    if result.chosen == 0:
        seed = job.job.make_model(0.1).state_dict()
        final = load_file(tmp_path / "model" / "model.safetensors")
        assert all(torch.equal(final[name], value) for name, value in seed.items())


def spawn(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_and_run_again_is_the_same(tmp_path: Path) -> None:
    job.run(tmp_path / "whole")
    ended = spawn(str(JOB), str(tmp_path / "cut"), "{}", "kill=17")
    assert ended.returncode == -9, ended.stderr
    assert not (tmp_path / "cut" / "model").exists()
    job.run(tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    one, two = (
        json.loads((tmp_path / name / "alignment.json").read_text()) for name in ("whole", "cut")
    )
    for a, b in zip(one["iterations"], two["iterations"], strict=True):
        assert {k: v for k, v in a.items() if k != "candidates_per_s"} == {
            k: v for k, v in b.items() if k != "candidates_per_s"
        }


@pytest.mark.slow
def test_two_processes_align_as_one(tmp_path: Path) -> None:
    overrides = {"steps": 6, "checkpoint_every": 0, "weight": 1.0}
    one = job.run(tmp_path / "one", **overrides)
    ended = spawn(
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
        *(str(JOB), str(tmp_path / "two"), json.dumps(overrides)),
    )
    assert ended.returncode == 0, ended.stderr
    two = json.loads((tmp_path / "two" / "alignment.json").read_text())
    first, other = one.record["iterations"][0], two["iterations"][0]
    assert (first["groups"], first["candidates"]) == (other["groups"], other["candidates"])
    a, b = (
        Groups.load(tmp_path / name / "pairs" / "iteration_01.parquet", 4, 3)
        for name in ("one", "two")
    )
    np.testing.assert_array_equal(a.items, b.items)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "cdpo"}, "method must be one of"),
        ({"rate": 0.0}, "rate must be in"),
        ({"candidates": 1}, "candidates must be at least 2"),
        ({"weight": -1.0}, "weight must be null"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
    ],
)
def test_wrong_settings(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AlignmentConfig(**wrong)  # type: ignore[arg-type]
