"""Settings tried one after another: what is proposed, resumed, written; never test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("optuna", reason='needs the extra "sweep"')

from onerec.cli.main import main
from onerec.errors import OneRecError
from onerec.evaluation.result import EvalResult, Measure
from onerec.pipeline import Settings
from onerec.pipeline import sweep as swept
from onerec.pipeline.sweep import Choice, changed, sweep

CHOICES = [Choice.parse("train.lr=1e-4..1e-2:log"), Choice.parse("model.d_model=16,32")]


@pytest.fixture
def settings() -> Settings:
    return Settings.of_preset("items")


def fake_run(value: Callable[[Settings], float]) -> Any:
    """A main job whose model has this value on valid, and what it was called with."""
    calls: list[dict[str, Any]] = []

    def run(settings: Settings, out: Path, listener: Any, *, until: str) -> None:
        assert until == "evaluate"
        assert settings.evaluate.splits == ("valid",), "test takes no part"
        calls.append({"lr": settings.train.lr, "d_model": settings.model["d_model"]})
        got = value(settings)
        (out / "sessions").mkdir(parents=True, exist_ok=True)
        (out / "evaluate").mkdir(exist_ok=True)
        measure = Measure("valid", "masked", "model", "ndcg@10", got, got - 0.01, got + 0.01, 9)
        protocol = {"served": "masked"}
        EvalResult(protocol, [measure]).save(out / "evaluate" / "evaluation.json")

    run.calls = calls  # type: ignore[attr-defined]
    return run


def rate_matters(settings: Settings) -> float:
    """Best at a learning rate of 2e-3."""
    return 0.5 - abs(float(np.log10(settings.train.lr / 2e-3))) / 10


def test_the_best_is_found_and_written(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(rate_matters)
    monkeypatch.setattr(swept, "run", run)
    told = sweep(settings, CHOICES, tmp_path, trials=12)
    values = [row["value"] for row in told["trials"]]
    assert len(values) == len(run.calls) == 12
    assert told["best"] == 1 + int(np.argmax(values))
    assert max(values) > 0.48, "within a factor of 1.6 of the best rate"
    assert all(1e-4 <= call["lr"] <= 1e-2 and call["d_model"] in (16, 32) for call in run.calls)
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(told))
    best = Settings.load(tmp_path / "best.yaml")
    assert best.train.lr == told["trials"][told["best"] - 1]["settings"]["train.lr"]
    assert list(best.evaluate.splits) == ["valid", "test"], "the best is measured as usual"
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<svg") == 3
    assert f"trial {told['best']}: {max(values):.4g}" in page
    # The first stages of a trial are those of an earlier one, linked.
    folders = {row["folder"] for row in told["trials"]}
    assert len(folders) == 12
    assert all((tmp_path / folder / "sessions").is_dir() for folder in folders)


def test_a_sweep_goes_on(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(settings: Settings) -> float:
        if len(run.calls) == 3:
            raise KeyboardInterrupt
        return 0.1

    run = fake_run(interrupted)
    monkeypatch.setattr(swept, "run", run)
    with pytest.raises(KeyboardInterrupt):
        sweep(settings, CHOICES, tmp_path, trials=5)
    told = sweep(settings, CHOICES, tmp_path, trials=5)
    assert len(run.calls) == 6, "two, the interrupted one twice, two more"
    assert run.calls[3] == run.calls[2]
    assert [row["number"] for row in told["trials"]] == [1, 2, 3, 4, 5]
    assert sweep(settings, CHOICES, tmp_path, trials=5) == told
    assert len(run.calls) == 6, "nothing is left to do"
    assert len(sweep(settings, CHOICES, tmp_path, trials=6)["trials"]) == 6
    other = changed(settings, {"train.seed": 1})
    with pytest.raises(OneRecError, match="holds a sweep with other settings"):
        sweep(other, CHOICES, tmp_path, trials=6)


def test_a_trial_may_fail_but_not_all(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sometimes(settings: Settings) -> float:
        if settings.model["d_model"] == 32:
            raise ValueError("32 is too wide")
        return 0.2

    monkeypatch.setattr(swept, "run", fake_run(sometimes))
    told = sweep(settings, CHOICES, tmp_path / "some", trials=8)
    failed = [row for row in told["trials"] if row["value"] is None]
    assert 0 < len(failed) < 8
    assert {row["error"] for row in failed} == {"32 is too wide"}
    assert "failed: 32 is too wide" in (tmp_path / "some" / "sweep.html").read_text()
    wide = [Choice.parse("train.lr=1e-4..1e-2:log")]
    with pytest.raises(OneRecError, match="every trial failed, the last one: 32 is too wide"):
        sweep(changed(settings, {"model.d_model": 32}), wide, tmp_path / "none", trials=8)


def test_choices() -> None:
    assert Choice.parse("train.lr=1e-4..1e-2:log") == Choice("train.lr", (), 1e-4, 1e-2, True)
    whole = Choice.parse("model.d_model=32..128")
    assert (whole.low, whole.high, type(whole.low)) == (32, 128, int)
    assert Choice.parse("model.dropout=0,0.1").values == (0, 0.1)
    assert Choice.parse("sessions.rule=gap,next").values == ("gap", "next")
    assert Choice.parse("train.max_steps=null,300").values == (None, 300)
    for wrong in ("lr=1..2", "train.lr", "train.lr=", "train.lr=5", "train.lr=a..b"):
        with pytest.raises(ValueError, match=r"^try: "):
            Choice.parse(wrong)
    for wrong in ("train.lr=2..1", "train.lr=0..1:log"):
        with pytest.raises(ValueError, match="LOW < HIGH"):
            Choice.parse(wrong)


def test_wrong_settings_are_told_before_anything_runs(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.rate: there is no such setting"):
        sweep(settings, [Choice.parse("train.rate=1,2")], tmp_path)
    with pytest.raises(ValueError, match=r"train\.lr"):
        sweep(settings, [Choice.parse("train.lr=-1..1")], tmp_path)
    with pytest.raises(ValueError, match="metric: wanted one of recall@5, recall@10"):
        sweep(settings, CHOICES, tmp_path, metric="ndcg@7")
    assert not list(tmp_path.iterdir())


def test_the_command_on_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, rows = np.random.default_rng(0), []
    for user in range(40):
        walk = (rng.integers(30) + np.cumsum(rng.integers(1, 3, 8))) % 30
        rows += [(f"u{user}", f"i{i}", 10**12 + 86_400_000 * n) for n, i in enumerate(walk)]
    users, items, times = map(list, zip(*rows, strict=True))
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    pq.write_table(table, tmp_path / "log.parquet")
    out = tmp_path / "sweep"
    command = ["sweep", "--data", tmp_path / "log.parquet", "--out", out, "--trials", "2"]
    command += ["--try", "train.lr=1e-3,1e-2", "--metric", "recall@10"]
    command += ["--model.d_model", "16", "--model.d_ff", "32", "--model.item_negatives", "0"]
    command += ["--train.steps", "4", "--train.eval_every", "0", "--train.num_threads", "1"]
    command += ["--evaluate.resamples", "5", "--evaluate.unmasked", "false"]
    assert main(list(map(str, command))) == 0
    shown = capsys.readouterr()
    assert "recall@10, valid" in shown.out
    assert str(out / "best.yaml") in shown.out
    told = json.loads((out / "sweep.json").read_text())
    assert [row["state"] for row in told["trials"]] == ["done", "done"]
    for row in told["trials"]:
        result = EvalResult.load(out / row["folder"] / "evaluate" / "evaluation.json")
        assert result.protocol["splits"] == ["valid"]
        assert result.value("recall@10", split="valid").value == row["value"]
