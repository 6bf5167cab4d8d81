"""`onerec bench ladder` on a small world, and again from what it kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onerec.cli.main import main
from onerec.experiments.ladder import RUNGS, Ladder


def test_rungs_meet_as_many_weights_with_experts_as_without() -> None:
    for dense, mixed in zip(RUNGS[::2], RUNGS[1::2], strict=True):
        assert (dense.size, dense.target) == (mixed.size, mixed.target)
        a, b = dense.config(32, 3), mixed.config(32, 3)
        assert b.experts_per_token * b.expert_d_ff == a.d_ff


def test_rungs_are_trained_once_and_valued_by_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "ladder", "--out", str(tmp_path), "--users", "40", "--epochs", "1"]
    command += ["--json", "--rungs"]
    names = ["small-dense-session", "small-moe-session", "small-dense-next", "medium-dense-next"]
    assert main([*command, *names]) == 0
    record = json.loads(capsys.readouterr().out)
    rows = record["rows"]
    assert len(rows) == 4
    for row in rows:
        value, low, high = row["watch_seconds"]
        assert 0 < low <= value <= high
        assert row["flops"] > 0
        assert row["active_parameters"] <= row["parameters"]
    # Experts cost what the dense layers cost, and their router.
    assert 1 < rows[1]["flops"] / rows[0]["flops"] < 1.2
    # Both targets are trained on as many items.
    assert rows[0]["train_items"] == pytest.approx(rows[2]["train_items"], rel=0.05)
    claims = {(p["claim"], p["first"], p["second"]) for p in record["pairs"]}
    assert claims == {
        ("experts", "small-moe-session", "small-dense-session"),
        ("sessions", "small-dense-session", "small-dense-next"),
        ("larger", "medium-dense-next", "small-dense-next"),
    }

    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Ladder, "climb", refuse)
    assert main([*command, *names]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert main([*command, "tall"]) == 1
    assert "no rung 'tall'" in capsys.readouterr().err
