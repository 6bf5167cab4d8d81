"""The main job on real logs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("name", ["kuairand_pure", "amazon2014_beauty"])
def test_real_logs(name: str, data_dir: Path, settings: Path, tmp_path: Path, start: Start) -> None:
    ended = start(
        "run", "--data", data_dir / name, "--out", tmp_path / "out", "--config", settings,
        "--tokenize.levels", "3", "--tokenize.codebook_size", "32", "--train.steps", "10",
        "--reward.max_steps", "10", "--reward.judge", "false", "--align.iterations", "1",
        "--sessions.exposed_sessions", "3000", "--json",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    stages = json.loads(ended.stdout)["stages"]
    assert "world" not in stages
    assert ("align" in stages) == (name == "kuairand_pure"), "reviews have no feedback"
    assert stages["sessions"]["items"] == {"kuairand_pure": 7583, "amazon2014_beauty": 12101}[name]
    assert stages["recommend"]["users"] == 50
    assert stages["recommend"]["users_without_items"] == 0
    assert stages["evaluate"]["measures"]["recall@10"]["model"][0] >= 0
