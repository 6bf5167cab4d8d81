"""The documents agree with the code."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAPER = (ROOT / "docs" / "paper.md").read_text()
HOMES = {
    "OneRecConfig": "onerec.model.config",
    "TrainConfig": "onerec.training.config",
    "SessionConfig": "onerec.data.sessions",
    "RewardConfig": "onerec.training.reward_config",
    "AlignmentConfig": "onerec.training.alignment_config",
    "TokenizeConfig": "onerec.cli.config",
    "RecommendConfig": "onerec.cli.config",
    "EvaluationConfig": "onerec.evaluation.config",
}
# `Config.field` with its default in the next pair of backticks: "| `C.f` | `v` |" or "`C.f` = `v`".
STATED = re.findall(r"`(\w+Config)\.(\w+)`(?: \| | = )`([^`]+)`", PAPER)


def test_every_field_that_the_page_names_comes_with_its_default() -> None:
    assert len(STATED) == len(re.findall(r"`\w+Config\.\w+`", PAPER)) > 40


@pytest.mark.parametrize(("config", "field", "default"), STATED, ids=lambda value: str(value))
def test_the_paper_page_states_the_default(config: str, field: str, default: str) -> None:
    value = getattr(importlib.import_module(HOMES[config]), config)
    assert str(getattr(value(), field)) == default


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_example_gives_new_items_in_each_session() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    report, *sessions = result.stdout.splitlines()
    assert "'colliding_items': 0" in report
    assert len(sessions) == 2
    for line in sessions:
        items = line.split()[1:]
        assert len(set(items)) == 5
        assert all(re.fullmatch(r"video-\d+", item) for item in items)
        assert not set(items) & {"video-3", "video-14", "video-159"}
