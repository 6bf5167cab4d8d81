"""The main job from a simulated world to the report, whole, again, changed, killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from onerec.cli.main import main
from onerec.data import SessionSet

Start = Callable[..., "subprocess.CompletedProcess[str]"]
Popen = Callable[..., "subprocess.Popen[str]"]
Contents = Callable[[Path], dict[str, str]]
Finished = tuple[Path, dict[str, Any]]

STAGES = [
    *("world", "sessions", "tokenize", "pretrain", "reward"),
    *("align", "evaluate", "recommend", "report"),
]


def again(out: Path, settings: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> set[str]:
    """Runs on `out` in this process; returns the stages that were made again."""
    capsys.readouterr()
    code = main(["run", "--out", str(out), "--config", str(settings), "--json", *flags])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    stages = json.loads(shown.out)["stages"]
    assert list(stages) == STAGES
    return {name for name, stage in stages.items() if not stage["skipped"]}


def test_summary_tells_every_stage(finished: Finished) -> None:
    out, summary = finished
    assert list(summary["stages"]) == STAGES
    assert not any(stage["skipped"] for stage in summary["stages"].values())
    assert summary["stages"]["world"]["users"] == 240
    assert summary["stages"]["pretrain"]["steps"] == 40
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


def test_second_run_skips_every_stage(
    run_copy: Path, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again(run_copy, settings, capsys) == set()


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        (["--evaluate.ks", "[5]"], {"evaluate", "report"}),
        (["--recommend.users", "10"], {"recommend"}),
        (["--train.log_every", "20"], set()),
        (["--train.seed", "1"], {"pretrain", "align", "evaluate", "recommend", "report"}),
        (["--align.beta", "0.2"], {"align", "evaluate", "recommend", "report"}),
        (["--reward.seed", "1"], {"reward", "align", "evaluate", "recommend", "report"}),
        (["--tokenize.codebook_size", "32"], set(STAGES) - {"world", "sessions", "reward"}),
        (["--sessions.min_history", "2"], set(STAGES) - {"world"}),
    ],
    ids=[
        *("evaluate", "recommend", "logging", "train", "align", "reward", "tokenize", "sessions"),
    ],
)
def test_change_makes_only_what_depends_on_it(
    flags: list[str],
    made: set[str],
    run_copy: Path,
    settings: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert again(run_copy, settings, capsys, *flags) == made


def test_damaged_output_is_made_again(
    run_copy: Path, settings: Path, capsys: pytest.CaptureFixture[str], contents: Contents
) -> None:
    before = contents(run_copy)
    (run_copy / "tokenize" / "trie.bin").write_bytes(b"rubbish")
    assert again(run_copy, settings, capsys) == {"tokenize"}
    after = contents(run_copy)
    assert after.pop("tokenize/stage.json") != ""  # the time it took is another
    before.pop("tokenize/stage.json")
    assert after == before


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


def long_settings(settings: Path, tmp_path: Path) -> Path:
    """Enough steps that a signal comes in the middle."""
    path = tmp_path / "long.yaml"
    path.write_text(settings.read_text().replace("steps: 40", "steps: 300"))
    return path


def stopped_in_training(
    finished: Finished, settings: Path, out: Path, popen: Popen, number: int
) -> tuple[int, str]:
    """Starts pretraining and sends a signal once checkpoints exist."""
    for stage in ("world", "sessions", "tokenize"):
        shutil.copytree(finished[0] / stage, out / stage)
    process = popen("pretrain", "--out", out, "--config", settings)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".pretrain.partial/checkpoints/step_*"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate()
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_stopped_training_goes_on_to_the_same_weights(
    number: signal.Signals,
    finished: Finished,
    settings: Path,
    tmp_path: Path,
    popen: Popen,
    start: Start,
) -> None:
    path = long_settings(settings, tmp_path)
    out, whole = tmp_path / "stopped", tmp_path / "whole"
    code, err = stopped_in_training(finished, path, out, popen, number)
    assert not (out / "pretrain").exists()
    if number == signal.SIGINT:
        assert code == 130
        assert err.strip().splitlines()[-1].startswith("onerec: interrupted")
        assert "Traceback" not in err
    else:
        assert code == -signal.SIGKILL
    resumed = start("pretrain", "--out", out, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["summary"]["resumed_from"] >= 10

    for stage in ("world", "sessions", "tokenize"):
        shutil.copytree(finished[0] / stage, whole / stage)
    assert start("pretrain", "--out", whole, "--config", path).returncode == 0
    weights = "pretrain/model/model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


def test_two_runs_on_one_directory(
    finished: Finished, settings: Path, tmp_path: Path, popen: Popen, start: Start
) -> None:
    out = tmp_path / "out"
    first = popen("run", "--out", out, "--config", settings)
    while not (out / ".lock").is_file() or not (out / ".lock").read_text():
        assert first.poll() is None
        time.sleep(0.02)
    second = start("run", "--out", out, "--config", settings)
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert f"in use by another onerec (onerec run, process {first.pid})" in second.stderr


@pytest.mark.data
@pytest.mark.parametrize("name", ["kuairand_pure", "amazon2014_beauty"])
def test_real_logs(name: str, data_dir: Path, settings: Path, tmp_path: Path, start: Start) -> None:
    ended = start(
        "run", "--data", data_dir / name, "--out", tmp_path / "out", "--config", settings,
        "--tokenize.levels", "3", "--tokenize.codebook_size", "32", "--json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    stages = json.loads(ended.stdout)["stages"]
    assert "world" not in stages
    assert ("align" in stages) == (name == "kuairand_pure"), "reviews have no feedback"
    assert stages["sessions"]["items"] == {"kuairand_pure": 7583, "amazon2014_beauty": 12101}[name]
    assert stages["recommend"]["users"] == 50
    assert stages["recommend"]["users_without_items"] == 0
    assert stages["evaluate"]["measures"]["recall@10"]["model"][0] >= 0


def test_two_processes_make_one_stage(finished: Finished, settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for stage in ("world", "sessions", "tokenize"):
        shutil.copytree(finished[0] / stage, out / stage)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*launch, "-m", "onerec", "pretrain", "--out", out, "--config", settings, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    together = json.loads(ended.stdout)
    alone = json.loads((finished[0] / "pretrain" / "stage.json").read_text())
    assert together["fingerprint"] == alone["fingerprint"]
    assert together["summary"]["valid_loss"] == pytest.approx(
        alone["summary"]["valid_loss"], rel=1e-3
    )
