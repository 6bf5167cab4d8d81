"""`onerec bench quality` from a small log to its table, and again from what it kept."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.cli.main import main
from onerec.experiments.compare import CASES, Run, cell, compare
from onerec.experiments.experiment import Experiment, training_flops
from onerec.experiments.presets import PRESETS, REFERENCE, System
from onerec.model import SASRec, SASRecConfig


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log") / "world"
    size = ["--world.n_users", "90", "--world.n_items", "80", "--world.requests_per_user", "6"]
    assert main(["simulate", "--out", str(folder.parent), *size]) == 0
    return folder


@pytest.fixture(scope="module")
def amazon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another data set, in the layout of the Amazon ones: no times, a split, two vector files."""
    folder = tmp_path_factory.mktemp("toys")
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 12, 60)
    items = [rng.permutation(70)[:n] for n in lengths]
    splits = [["train"] * (n - 2) + ["valid", "test"] for n in lengths]
    columns = {
        "user_id": np.repeat(np.arange(60), lengths),
        "item_id": np.concatenate(items),
        "position": np.concatenate([np.arange(n) for n in lengths]),
        "split": np.concatenate(splits),
    }
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    pq.write_table(pa.table({"item_id": np.arange(70)}), folder / "items.parquet")
    vectors = rng.standard_normal((70, 12)).astype(np.float32)
    np.save(folder / "item_embeddings_minilm.npy", vectors)
    return folder


def small(preset: str) -> tuple[System, ...]:
    """The preset with networks of a few units."""
    width = {"sasrec": {"d_model": 8}, "onerec": {"d_model": 16, "d_ff": 16, "n_heads": 2}}
    systems = []
    for system in PRESETS[preset]:
        model = {**system.model, **width.get(system.network, {})}
        train = {**system.train, "batch_size": 32, "grad_accumulation": 1} if system.train else {}
        systems.append(dataclasses.replace(system, model=model, train=train, seeds=1))
    return tuple(systems)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "data"), [("cpu", "log"), ("gpu", "amazon")])
def test_every_system_of_a_preset_runs_an_epoch(
    preset: str,
    data: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(PRESETS, preset, small(preset))
    monkeypatch.setattr("onerec.experiments.ids.RQVAE_EPOCHS", 2)
    folder = request.getfixturevalue(data)
    capsys.readouterr()
    command = ["bench", "quality", "--data", str(folder), "--out", str(tmp_path / "out"), "--json"]
    command += ["--preset", preset, "--epochs", "1", "--max_users", "40", "--device", "cpu"]
    command += ["--codebook_size", "16", "--beam_width", "12"]
    assert main(command) == 0, capsys.readouterr().err
    record = json.loads(capsys.readouterr().out)
    rows = {row["row"]: row for row in record["rows"]}
    assert {"popularity", REFERENCE, "OneRec, fused", "TIGER"} <= set(rows)
    for row in rows.values():
        for value in row["values"]:
            assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1
            assert (value["difference"] is None) == (row["row"] == REFERENCE)
        assert (row["cost"]["flops"] > 0) == (row["row"] != "popularity")
        rare = [part["sessions"] for part in row["rare"].values()]
        assert sum(rare) == record["data"]["sessions"]["test"]
    fused = rows["OneRec, fused"]["facts"][0]
    assert 0 <= fused["dense_weight"] <= 1
    # The dense head alone is one of the weights that are tried on valid.
    values = [
        cell(rows[f"OneRec, {part}"], "valid", "masked", "ndcg@10")["value"]
        for part in ("fused", "dense head")
    ]
    assert values[0] >= values[1]
    assert rows["TIGER"]["facts"][0]["ids"]["tokenizer"] == "rqvae"

    # Nothing is trained again, and the figures are the same.
    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Experiment, "train", refuse)
    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "measure", refuse)
        assert main(command) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["rows"] == record["rows"]
    # What was trained can be measured again, with what is known of its ids.
    for folder in (tmp_path / "out").glob("*/scores-*"):
        shutil.rmtree(folder)
    assert main([*command, "--seeds", "2", "--kept"]) == 0
    again = json.loads(capsys.readouterr().out)["rows"]
    for row in (*again, *record["rows"]):
        row["cost"].pop("evaluate_seconds", None)
    assert again == record["rows"]
    assert main([*command, "--beam_width", "10", "--kept"]) == 1
    assert "--kept trains nothing" in capsys.readouterr().err


def test_trainings_side_by_side_are_those_made_alone(
    log: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "quality", "--data", str(log), "--json", "--device", "cpu"]
    command += ["--systems", "popularity", "sasrec-ce", "--seeds", "2", "--epochs", "1"]
    rows = []
    for jobs in ("1", "2"):
        out = str(tmp_path / jobs)
        capfd.readouterr()
        assert main([*command, "--out", out, "--jobs", jobs]) == 0, capfd.readouterr().err
        rows.append(json.loads(capfd.readouterr().out)["rows"])
    for row in (*rows[0], *rows[1]):
        row.pop("cost"), row.pop("facts")
    assert rows[0] == rows[1]
    assert [row["seeds"] for row in rows[0]] == [[0], [0, 1]]


def test_a_killed_training_is_told(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two side by side dies as the kernel kills for want of memory."""
    monkeypatch.setattr("onerec.experiments.quality._made_beside_others", _die)
    command = ["bench", "quality", "--data", str(log), "--out", str(tmp_path), "--jobs", "2"]
    assert main([*command, "--systems", "popularity", "sasrec-ce", "--seeds", "1"]) == 1
    assert "process was killed" in capsys.readouterr().err


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_wrong_usage_is_told(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "quality", "--data", str(log), "--out", str(tmp_path)]
    assert main([*command, "--systems", "bert"]) == 1
    assert "no system 'bert'" in capsys.readouterr().err
    assert main(["bench", "quality", "--data", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--seeds", "0"])
    assert main([*command, "--kept"]) == 1
    assert "no training of the preset is finished" in capsys.readouterr().err


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = (rng.random((400, 1)) < 0.1).astype(float)

    def run(row: str, seed: int, gain: float) -> Run:
        better = (rng.random((400, 1)) < gain).astype(float)
        scores = {case: np.repeat(np.maximum(hard, better), 4, axis=1) for case in CASES}
        return Run(row, row, seed, scores, {"parameters": 3})

    runs = [run("a", 0, 0.0), run("b", 0, 0.02), run("b", 1, 0.02)]
    users = {"valid": np.arange(400), "test": np.arange(400)}
    counts = rng.integers(0, 30, 400)
    rows = {
        row["row"]: row
        for row in compare(runs, reference="a", users=users, train_counts=counts, resamples=300)
    }
    main_ = cell(rows["b"], "test", "masked", "recall@10")
    difference, low, high = main_["difference"]
    ours = np.mean([r.scores[CASES[1]] for r in runs[1:]]) - runs[0].scores[CASES[1]].mean()
    assert difference == pytest.approx(ours)
    assert 0 <= low <= difference <= high
    # Pairing leaves out what is hard for both.
    assert high - low < main_["high"] - main_["low"]
    assert main_["sd"] is not None
    assert cell(rows["a"], "test", "masked", "ndcg@5")["sd"] is None
    assert sum(part["sessions"] for part in rows["a"]["rare"].values()) == 400


def test_flops_are_those_of_the_products(log: Path, tmp_path: Path) -> None:
    from onerec.data import SessionConfig, build_sessions, open_log

    with open_log(log) as source:
        data = build_sessions(source, SessionConfig(rule="next", length=1), tmp_path / "sessions")
    train = data.samples("train")
    width, layers = 8, 2
    model = SASRec(SASRecConfig(data.n_items, d_model=width, n_layers=layers, dropout=0.0))
    batch_size = len(np.unique(train.user_row))
    found = training_flops(model, train, np.arange(data.n_items)[:, None], batch_size)
    # Forward and twice backward: six weights of width^2 a layer for each position, padding
    # included, and the catalogue for each target; attention is counted beside them.
    longest = min(50, int(np.bincount(train.user_row).max()))
    positions = batch_size * longest
    weights = 6 * width**2 * layers * positions * 6
    catalogue = data.n_items * width * 6 * len(train)
    attention = 2 * longest * width * layers * positions * 6
    assert found * len(train) == pytest.approx(weights + catalogue + attention, rel=0.05)
