"""A tiny run that the tests of this folder share, and ways to start the command."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SETTINGS = """
world: {n_users: 240, n_items: 120, n_creators: 20, requests_per_user: 8, seed: 3}
sessions: {length: 3}
tokenize: {levels: 2, codebook_size: 16}
model: {history_length: 16, d_model: 32, n_heads: 2, encoder_layers: 1, decoder_layers: 1,
        d_ff: 64, n_experts: 4, expert_d_ff: 32, dropout: 0.0, decoder_dropout: 0.0,
        item_dropout: 0.0, vector_dropout: 0.0, item_negatives: 0}
train: {steps: 40, batch_size: 32, eval_every: 20, checkpoint_every: 10, log_every: 5}
reward: {max_steps: 40, batch_size: 64, d_model: 16, n_heads: 2, min_positives: 20}
align: {iterations: 2, steps: 6, rate: 0.2, candidates: 12, batch_size: 32, monitor: 20,
        monitor_beam: 4, min_gap: 0.001, checkpoint_every: 4}
evaluate: {max_users: 60, resamples: 50, latency_requests: 3, beam_width: 10}
recommend: {users: 50, beam_width: 10, examples: 2}
"""

Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def popen() -> Callable[..., subprocess.Popen[str]]:
    """Starts the command in a process of its own: `popen("run", "--out", path)`."""

    def begin(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        # One thread: sums are equal bit by bit, and tests do not fight over the cores.
        return subprocess.Popen(
            [sys.executable, "-m", "onerec", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **options,
        )

    return begin


@pytest.fixture(scope="session")
def start(popen: Callable[..., subprocess.Popen[str]]) -> Start:
    """Runs the command to its end: `start("run", "--out", path)` -> code, stdout, stderr."""

    def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        process = popen(*arguments, **options)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML file of a run that takes seconds."""
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, settings: Path, start: Start
) -> tuple[Path, dict[str, Any]]:
    """A finished tiny run that tests must not change, and what it printed as JSON.

    One for all of pytest-xdist's processes: the first that wants it makes it.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_TESTRUNUID" in os.environ:
        folder = folder.parent
    out, printed = folder / "finished", folder / "finished.json"
    with (folder / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            ended = start("run", "--out", out, "--config", settings, "--json")
            assert ended.returncode == 0, ended.stderr
            printed.write_text(ended.stdout)
    summary: dict[str, Any] = json.loads(printed.read_text())
    return out, summary


@pytest.fixture
def run_copy(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of the finished run that a test may harm."""
    target = tmp_path / "out"
    shutil.copytree(finished[0], target)
    return target


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """Hash of each file of the finished stages: what a failure must leave as it is."""

    def read(directory: Path) -> dict[str, str]:
        return {
            str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.glob("*/**/*"))
            if path.is_file() and not path.relative_to(directory).parts[0].startswith(".")
        }

    return read
