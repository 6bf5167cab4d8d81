"""Training that is killed, interrupted, started twice or on two processes."""

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

import pytest

Start = Callable[..., "subprocess.CompletedProcess[str]"]
Popen = Callable[..., "subprocess.Popen[str]"]
Finished = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def longer(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings with enough steps that a signal comes in the middle."""
    path = tmp_path_factory.mktemp("longer") / "long.yaml"
    path.write_text(settings.read_text().replace("steps: 40", "steps: 60"))
    return path


def before_training(finished: Finished, out: Path) -> Path:
    for stage in ("world", "sessions", "tokenize"):
        shutil.copytree(finished[0] / stage, out / stage)
    return out


@pytest.fixture(scope="module")
def weights(
    finished: Finished, longer: Path, tmp_path_factory: pytest.TempPathFactory, start: Start
) -> bytes:
    """What training without a break gives."""
    out = before_training(finished, tmp_path_factory.mktemp("whole"))
    assert start("pretrain", "--out", out, "--config", longer).returncode == 0
    return (out / "pretrain/model/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_stopped_training_goes_on_to_the_same_weights(
    number: signal.Signals,
    finished: Finished,
    longer: Path,
    weights: bytes,
    tmp_path: Path,
    popen: Popen,
    start: Start,
) -> None:
    out = before_training(finished, tmp_path)
    process = popen("pretrain", "--out", out, "--config", longer)
    deadline = time.monotonic() + 120
    while len(list(out.glob(".pretrain.partial/checkpoints/step_*"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate()
    assert not (out / "pretrain").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.strip().splitlines()[-1].startswith("onerec: interrupted")
        assert "Traceback" not in err
    else:
        assert process.returncode == -signal.SIGKILL
    resumed = start("pretrain", "--out", out, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["summary"]["resumed_from"] >= 10
    assert (out / "pretrain/model/model.safetensors").read_bytes() == weights


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


def test_two_processes_make_one_stage(finished: Finished, settings: Path, tmp_path: Path) -> None:
    out = before_training(finished, tmp_path)
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
