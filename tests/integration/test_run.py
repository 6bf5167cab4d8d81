"""The main job from a simulated world to the report, whole: what it tells and leaves."""

from __future__ import annotations

import html
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from onerec import pipeline
from onerec.cli.main import main
from onerec.data import SessionSet
from onerec.report.summary import advice

Start = Callable[..., "subprocess.CompletedProcess[str]"]
Finished = tuple[Path, dict[str, Any]]
STAGES = [name for name in pipeline.STAGES if name != "mixture"]  # of a run of sessions


def test_summary_tells_every_stage(finished: Finished) -> None:
    out, summary = finished
    assert list(summary["stages"]) == STAGES
    assert not any(stage["skipped"] for stage in summary["stages"].values())
    assert summary["stages"]["world"]["users"] == 240
    assert summary["stages"]["pretrain"]["steps"] == 40
    assert summary["next"] == advice(out)
    assert Path(summary["report"]).read_text().lstrip().lower().startswith("<!doctype html")
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["tokenize"]["codebook_size"] == 16
    assert settings["train"]["beta1"] == 0.9, "defaults are written too"


def test_metrics_have_baselines_and_intervals(finished: Finished) -> None:
    measures = finished[1]["stages"]["evaluate"]["measures"]
    for system in ("model", "popularity", "random"):
        value, low, high = measures["recall@10"][system]
        assert 0 <= low <= value <= high <= 1
    for metric, other in (("recall@10", "popularity"), ("watch_seconds", "pretrained")):
        lead, low, high = measures[metric][f"model - {other}"]
        assert low <= lead <= high
    for system in ("model", "pretrained", "popularity", "logged"):
        assert measures["judged_reward"][system][0] > 0
    assert measures["legality"]["model"][0] == measures["legality"]["pretrained"][0] == 1


def test_alignment_leaves_its_snapshots_and_pairs(finished: Finished) -> None:
    out, summary = finished
    stage = summary["stages"]["align"]
    assert stage["iterations"] == 2
    assert all(one["groups"] > 0 for one in stage["rounds"])
    for number in (1, 2):
        assert (out / "align" / "snapshots" / f"iteration_{number:02d}" / "config.json").is_file()
        assert (out / "align" / "pairs" / f"iteration_{number:02d}.parquet").is_file()
    page = (out / "report" / "report.html").read_text()
    for words in ("Winners and losers", "win rate over the seed", "logistic regression"):
        assert words in page


def test_recommendations_are_legal(finished: Finished) -> None:
    out, summary = finished
    data = SessionSet.load(out / "sessions")
    table = pq.read_table(out / "recommend" / "recommendations.parquet")
    rows = table.to_pylist()
    known = set(data.items["item_id"].to_pylist())
    ids = data.items["item_id"].to_pylist()
    users = data.sequences["user_id"].to_pylist()[:50]
    histories = {
        user: {ids[i] for i in items}
        for user, items in zip(users, data.sequences["items"].to_pylist()[:50], strict=True)
    }
    by_user: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_user.setdefault(row["user_id"], []).append(row)
    assert list(by_user) == users
    for user, mine in by_user.items():
        items = [row["item_id"] for row in mine]
        assert len(items) == 3, "whole sessions"
        assert len(set(items)) == 3, "no item twice"
        assert set(items) <= known
        assert not set(items) & histories[user], "what was taken is not recommended again"
        assert [row["rank"] for row in mine] == [0, 1, 2]
        assert [row["position"] for row in mine] == [0, 1, 2]
        assert np.isfinite([row["score"] for row in mine]).all()
        assert all(row["text"] for row in mine)
    assert summary["stages"]["recommend"]["rows"] == len(rows) == 150


def test_stages_one_by_one_give_the_same(
    finished: Finished, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    verbs = ["simulate", *STAGES[1:]]
    for verb in verbs:
        flags = ["--config", str(settings)] if verb == "simulate" else []
        assert main([verb, "--out", str(out), "--json", *flags]) == 0
        json.loads(capsys.readouterr().out)
    for stage in STAGES:
        one, other = (
            json.loads((place / stage / "stage.json").read_text()) for place in (out, finished[0])
        )
        assert one["fingerprint"] == other["fingerprint"], stage
    for name in (
        "pretrain/model/model.safetensors",
        "align/model/model.safetensors",
        "recommend/recommendations.parquet",
        "tokenize/catalog.parquet",
    ):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes(), name


def test_a_log_without_sessions_is_learned_item_by_item(
    tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users who walk on a circle of 60 items: the default network, lists by a mixture."""
    rng, rows = np.random.default_rng(0), []
    for user in range(150):
        steps = rng.integers(1, 3, rng.integers(6, 14))
        walk = (rng.integers(60) + np.cumsum(steps)) % 60
        rows += [(f"u{user}", f"i{item}", 86_400_000 * n) for n, item in enumerate(walk)]
    names = ("user_id", "item_id", "timestamp")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    columns["timestamp"] = [1_600_000_000_000 + t for t in columns["timestamp"]]
    (tmp_path / "log").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "log" / "interactions.parquet")
    out = tmp_path / "out"
    small = ["--model.d_model", "32", "--model.item_negatives", "0", "--train.min_steps", "150"]
    ended = start("run", "--data", tmp_path / "log", "--out", out, "--json", *small)
    assert ended.returncode == 0, ended.stderr
    stages = json.loads(ended.stdout)["stages"]
    assert list(stages) == [
        name for name in pipeline.STAGES if name not in ("world", "reward", "align")
    ]
    assert (stages["tokenize"]["levels"], stages["tokenize"]["codebook_size"]) == (2, 16)
    recall = stages["evaluate"]["measures"]["recall@5"]
    assert recall["model"][0] > 0.8, "one of the next two items"
    assert recall["generator"][0] > 0.6
    assert recall["popularity"][0] < 0.2
    rows = pq.read_table(out / "recommend" / "recommendations.parquet").to_pylist()
    assert [row["position"] for row in rows[:10]] == [*range(10)]
    assert len({row["item_id"] for row in rows[:10]}) == 10
    scores = [row["score"] for row in rows[:10]]
    assert scores == sorted(scores, reverse=True)
    assert len(rows) == 10 * 150


def test_a_run_of_sessions_has_no_mixture(
    run_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mixture", "--out", str(run_copy)]) == 1
    assert "sessions have up to 3 items" in capsys.readouterr().err


def test_a_log_without_preferences_gets_its_report(
    run_copy: Path, settings: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--out", run_copy, "--config", settings]
    ended = start(*command, "--align.min_gap", "100")
    assert ended.returncode == 0, ended.stderr
    stage = json.loads((run_copy / "align" / "stage.json").read_text())["summary"]
    assert (stage["iterations"], stage["chosen"], stage["rounds"]) == (0, 0, [])
    why = stage["stopped"]
    assert "0 have sessions whose rewards differ by min_gap 100" in why
    assert "lower --align.min_gap" in why
    assert f"ended early with the model before alignment: {why}" in ended.stderr
    assert f"ended early      {why}" in ended.stdout
    assert "the pretrained model as it was" in ended.stdout
    page = html.unescape((run_copy / "report" / "report.html").read_text())
    assert why in page
    assert "there is no aligned one to compare it with" in page
    assert "cannot be read" not in page
    before, after = (run_copy / name / "model/model.safetensors" for name in ("pretrain", "align"))
    assert before.read_bytes() == after.read_bytes()
    evaluation = (run_copy / "evaluate" / "evaluation.json").read_text()
    assert '"model - popularity"' in evaluation
    assert '"pretrained"' not in evaluation, "the model is not compared with itself"

    # Without alignment the same is measured and recommended.
    assert main([*map(str, command), "--align.iterations", "0"]) == 0
    said = capsys.readouterr().err
    for name in ("evaluate", "recommend"):
        assert f"{name}: unchanged, skipped" in said
    page = html.unescape((run_copy / "report" / "report.html").read_text())
    assert "Reward model" in page
    assert "Preference alignment" not in page, "that was an earlier run's"


def test_a_log_that_trains_no_reward_model_says_what_to_do(
    run_copy: Path, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--out", str(run_copy), "--config", str(settings)]
    few = ["--reward.min_positives", "1000000"]
    assert main([*command, *few]) == 1
    said = capsys.readouterr().err
    assert "no reward model: targets: none can be trained" in said
    assert "--align.iterations 0" in said
    assert main([*command, *few, "--align.iterations", "0"]) == 0


def test_terminal_shows_texts_beside_histories(
    run_copy: Path, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--out", str(run_copy), "--config", str(settings)]) == 0
    shown = capsys.readouterr()
    examples = json.loads((run_copy / "recommend" / "examples.json").read_text())
    assert len(examples) == 2
    for example in examples:
        for item in (*example["history"], *example["recommended"]):
            assert item["text"][:30] in shown.out
    assert str(run_copy / "report" / "report.html") in shown.out
    assert "recall@10" in shown.out
    assert "unchanged, skipped" in shown.err
