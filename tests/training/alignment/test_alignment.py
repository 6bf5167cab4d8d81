"""Alignment: what is chosen, what is computed once, what stops it, and that it goes on."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from onerec.errors import OneRecError
from onerec.model import OneRec, OneRecConfig
from onerec.model.trie_mask import TrieMask
from onerec.training import AlignmentConfig, TrainingInterrupted, read_metrics
from onerec.training.alignment import loop as alignment
from onerec.training.alignment.candidates import Candidates, Found, _serve
from onerec.training.alignment.config import METHODS
from onerec.training.alignment.preferences import Groups, choose, preference_loss

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
    result = job.run(tmp_path, lr=1e-2, gradient_share=3.0, candidates=30)
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


@pytest.mark.parametrize("nodes", [False, True])
def test_a_network_that_knows_its_items_is_aligned_too(
    nodes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def knowing(dropout: float) -> OneRec:
        torch.manual_seed(0)
        fields = {"encoder": "bidirectional", "item_negatives": 0, "vector_dropout": 0.0}
        config = OneRecConfig.preset(
            "items",
            **fields,
            node_outputs=nodes,
            decoder_start="state" if nodes else "learned",
            n_items=job.job.ITEMS,
            codebook_size=job.job.CODES,
            levels=job.job.LEVELS,
            session_length=4,
            history_length=10,
            d_model=16,
            d_ff=16,
            dropout=dropout,
        )
        model = OneRec(config)
        model.set_catalog(job.job.make_sids())
        return model

    monkeypatch.setattr(job.job, "make_model", knowing)
    record = job.run(tmp_path, lr=1e-2, gradient_share=3.0, candidates=30).record
    rewards = [record["seed"]["reward_best"]] + [r["reward_best"] for r in record["iterations"]]
    assert rewards[2] > rewards[0] + 0.05
    assert record["seed"]["drift_seed"] == pytest.approx(0, abs=1e-6)
    assert 0 < record["iterations"][0]["drift_seed"] < 50


class Direct:
    """What `Ahead` does, in this process and when it is asked for."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self.iteration: int | None = None

    def start(self, snapshot: Path, rows: np.ndarray, iteration: int) -> None:
        self.iteration = iteration
        self.job = OneRec.from_pretrained(snapshot).eval(), rows, iteration

    def result(self, check: Callable[[], None]) -> Found:
        return self.candidates.generate(*self.job, lambda done: check())

    def close(self) -> None:
        self.iteration = None


@pytest.mark.parametrize(
    ("normalize", "asynchronous"), [("legal", False), ("full", False), ("legal", True)]
)
def test_pairs_are_judged_right_and_referenced_to_their_snapshot(
    normalize: str, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "Ahead", Direct)
    job.run(
        tmp_path,
        normalize=normalize,
        asynchronous=asynchronous,
        exclude_history=True,
        steps=4,
        rate=0.3,
        weight=1.0,
        checkpoint_every=0,
    )
    catalog, taste, train = job.catalog(), job.Taste(), job.job.make_samples(200, 1)
    groups = Groups.load(tmp_path / "pairs" / "iteration_02.parquet", 4, 3)
    assert len(groups) > 5
    assert len(np.unique(groups.samples)) == len(groups)
    writer = "iteration_00" if asynchronous else "iteration_01"
    snapshot = OneRec.from_pretrained(tmp_path / "snapshots" / writer)
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
    extra = {"format_samples": 5} if method == "gbpo" else {}
    result = job.run(tmp_path, method=method, steps=3, iterations=1, weight=1.0, **extra)
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
    result = job.run(tmp_path, **{"steps": 6, "weight": 1.0, **bound})
    if words == "divergence from the seed":
        assert result.stopped is not None
        assert words in result.stopped
    assert result.chosen == (2 if result.stopped is None else result.iterations - 1)
    if result.chosen == 0:
        final = load_file(tmp_path / "model" / "model.safetensors")
        assert all(torch.equal(final[name], value) for name, value in seed_weights().items())


def seed_weights() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = job.job.make_model(0.1).state_dict()
    return found


@pytest.mark.parametrize("asynchronous", [False, True], ids=["one process", "asynchronous"])
def test_without_preferences_the_seed_is_the_result(
    asynchronous: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = job.run(tmp_path / "none", min_gap=9.0, asynchronous=asynchronous, steps=4)
    assert (result.iterations, result.chosen) == (0, 0)
    facts = result.record["generated"]["1"]
    assert facts["samples"] > 0
    assert facts["groups"] == 0
    assert result.stopped is not None
    assert f"of {facts['samples']} samples 0 have" in result.stopped
    assert "lower --align.min_gap; --align.iterations 0" in result.stopped
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warned == [f"alignment ended early with the model before alignment: {result.stopped}"]
    final = load_file(tmp_path / "none" / "model" / "model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in seed_weights().items())
    assert read_metrics(tmp_path / "none" / "metrics.jsonl") == []

    # The widest gap that is told is where preferences begin.
    widest = float(result.stopped.split("widest gap is ")[1].split(";")[0])
    settings: dict[str, Any] = {"steps": 4, "iterations": 1, "weight": 1.0}
    below = job.run(tmp_path / "below", min_gap=widest * 0.995, **settings)
    above = job.run(tmp_path / "above", min_gap=widest * 1.005, **settings)
    assert below.record["generated"]["1"]["groups"] >= 1
    assert above.record["generated"]["1"]["groups"] == 0


def test_histories_that_leave_no_session_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = job.catalog()
    monkeypatch.setattr(
        Candidates,
        "histories",
        lambda self, samples, rows: [catalog.item_ids.tolist() for _ in rows],
    )
    with pytest.raises(ValueError, match=r"whole catalogue; --align\.exclude_history"):
        job.run(tmp_path)


def test_no_sample_drawn_is_told_apart(tmp_path: Path) -> None:
    result = job.run(tmp_path, rate=1e-9, steps=1)
    assert result.chosen == 0
    assert result.stopped is not None
    assert result.stopped.startswith("iteration 1 drew no sample at rate 1e-09; raise --align.rate")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["one process", "asynchronous"])
def test_later_without_preferences_the_last_iteration_is_the_result(
    asynchronous: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    generate = Candidates.generate

    def only_at_first(self: Candidates, *arguments: Any) -> Found:
        found = generate(self, *arguments)
        return found if arguments[2] == 0 else found._replace(groups=[], widest=0.0123)

    monkeypatch.setattr(Candidates, "generate", only_at_first)
    monkeypatch.setattr(alignment, "Ahead", Direct)
    settings = {"steps": 5, "iterations": 3, "checkpoint_every": 3, "monitor": 8, "weight": 1.0}
    results = []
    for _ in range(2):  # the second goes on from step 3, as after a kill before the end
        results.append(job.run(tmp_path, asynchronous=asynchronous, **settings))
        assert (results[-1].iterations, results[-1].chosen) == (1, 1)
        last = load_file(tmp_path / "snapshots" / "iteration_01" / "model.safetensors")
        final = load_file(tmp_path / "model" / "model.safetensors")
        assert all(torch.equal(final[name], value) for name, value in last.items())
        assert any(not torch.equal(final[name], value) for name, value in seed_weights().items())
        trained = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "lr" in r]
        assert trained == [4, 5], "a record of the last steps too"
        assert not (tmp_path / "pairs" / "iteration_02.parquet").exists()
    assert results[0].stopped == results[1].stopped
    assert results[0].stopped is not None
    assert results[0].stopped.startswith("iteration 2 found nothing to prefer")
    assert "the widest gap is 0.0123" in results[0].stopped
    assert "ended early with the model of iteration 1: iteration 2 found" in caplog.text


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def rounds(folder: Path) -> list[dict[str, Any]]:
    """What alignment.json tells of the iterations, without times."""
    found = json.loads((folder / "alignment.json").read_text())["iterations"]
    return [
        {k: v for k, v in one.items() if k not in ("candidates_per_s", "waited_s")} for one in found
    ]


@pytest.mark.slow
def test_killed_and_run_again_is_the_same(tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoint_every": 3, "monitor": 8}
    job.run(tmp_path / "whole", **settings)
    # In the second iteration; the checkpoint is of the first.
    command = [sys.executable, str(JOB), str(tmp_path / "cut"), json.dumps(settings), "5"]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "cut" / "model").exists()
    job.run(tmp_path / "cut", **settings)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert rounds(tmp_path / "cut") == rounds(tmp_path / "whole")


@pytest.mark.slow
def test_asynchronous_is_the_same_however_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(JOB.parent))  # where the other process finds `Taste`
    monkeypatch.setitem(sys.modules, "align_job", job)

    def run(name: str, action: Callable[[int], None] = lambda step: None) -> None:
        job.run(
            tmp_path / name,
            asynchronous=True,
            iterations=3,
            steps=3,
            monitor=8,
            progress=lambda step, total, note: action(step),
        )

    with monkeypatch.context() as patched:
        patched.setattr(alignment, "Ahead", Direct)
        run("whole")
    assert [one["stale_steps"] for one in rounds(tmp_path / "whole")] == [0, 3, 3]

    def kill_the_other(step: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    def interrupt(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(OneRecError, match="ended with code -9"):
        run("cut", kill_the_other)
    with pytest.raises(TrainingInterrupted):
        run("cut", interrupt)
    assert not multiprocessing.active_children()
    run("cut")
    assert not multiprocessing.active_children()
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert rounds(tmp_path / "cut") == rounds(tmp_path / "whole")


def test_an_error_of_the_other_process_comes_with_its_traceback(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.send((tmp_path / "nothing", np.arange(3), 0))
    work = SimpleNamespace(device=torch.device("cpu"))
    _serve(theirs, pickle.dumps(work), torch.get_num_threads())
    told = ours.recv()
    assert told.startswith("Traceback")
    assert str(tmp_path / "nothing") in told


def in_two_processes(out_dir: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """What alignment.json tells of an alignment in two processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(JOB), str(out_dir), json.dumps(overrides)],
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "MASTER_ADDR": "localhost", "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    record: dict[str, Any] = json.loads((out_dir / "alignment.json").read_text())
    return record


@pytest.mark.slow
def test_two_processes_align_as_one(tmp_path: Path) -> None:
    overrides = {"steps": 5, "iterations": 1, "checkpoint_every": 0, "weight": 1.0}
    one = job.run(tmp_path / "one", **overrides)
    two = in_two_processes(tmp_path / "two", overrides)
    first, other = one.record["iterations"][0], two["iterations"][0]
    assert (first["groups"], first["candidates"]) == (other["groups"], other["candidates"])
    a, b = (
        Groups.load(tmp_path / name / "pairs" / "iteration_01.parquet", 4, 3)
        for name in ("one", "two")
    )
    np.testing.assert_array_equal(a.items, b.items)


@pytest.mark.slow
def test_two_processes_end_without_preferences_as_one(tmp_path: Path) -> None:
    overrides = {"steps": 5, "min_gap": 9.0}
    one = job.run(tmp_path / "one", **overrides)
    two = in_two_processes(tmp_path / "two", overrides)
    assert two["stopped"] == one.stopped
    assert two["stopped"].startswith("iteration 1 found nothing to prefer")
    assert two["generated"]["1"]["candidates"] == one.record["generated"]["1"]["candidates"]
    final = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert all(torch.equal(final[name], value) for name, value in seed_weights().items())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "cdpo"}, "method: wanted one of"),
        ({"rate": 0.0}, r"rate: wanted a value in \(0, 1\]"),
        ({"candidates": 1}, "candidates: wanted at least 2"),
        ({"weight": -1.0}, "weight: wanted at least 0 and finite"),
        ({"lr": 0.0}, "lr: wanted more than 0"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
    ],
)
def test_wrong_settings(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AlignmentConfig(**wrong)  # type: ignore[arg-type]
