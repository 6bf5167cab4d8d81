"""The documents agree with the code."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from onerec.data import open_log

ROOT = Path(__file__).resolve().parents[1]
PAPER = (ROOT / "docs" / "paper.md").read_text()
HOMES = {
    "OneRecConfig": "onerec.model.config",
    "TrainConfig": "onerec.training.config",
    "SessionConfig": "onerec.data.config",
    "RewardConfig": "onerec.training.reward.config",
    "AlignmentConfig": "onerec.training.alignment.config",
    "TokenizeConfig": "onerec.pipeline.settings",
    "RecommendConfig": "onerec.pipeline.settings",
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


def test_decisions_are_dated_and_short() -> None:
    entries = re.findall(r"^- (.*(?:\n  .*)*)", (ROOT / "docs" / "decisions.md").read_text(), re.M)
    assert len(entries) > 90
    for entry in entries:
        assert re.match(r"\*\*\d{4}-\d\d-\d\d\. ", entry), entry
        assert len(entry.split()) <= 60, entry


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_the_data_page_makes_a_log_of_other_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, Any] = {
        "uid": ["u1", "u1", "u2", "u1"],
        "video": ["a", "b", "a", "b"],
        "shown_at": pa.array(
            [1_700_000_000, 1_700_000_001, 1_600_000_000, 1_700_000_001], pa.timestamp("s")
        ),
        "watched_s": [20.5, None, 3.0, None],
        "event": ["click", "purchase", "like", "purchase"],  # the last row is a repeat
    }
    products = {"video": ["a", "b"], "title": ["A", "B"], "category": ["film", "news"]}
    products |= {"regions": [["NL"], []], "clip": [[0.5, 1.0], None]}
    monkeypatch.chdir(tmp_path)
    for number in range(2):  # two files of a partitioned folder
        part = pa.table(rows).slice(2 * number, 2)
        folder = tmp_path / "raw" / f"day={number}"
        folder.mkdir(parents=True)
        if kind == "parquet":
            pq.write_table(part, folder / "part.parquet")
        elif kind == "csv":
            csv.write_csv(part, folder / "part.csv")
        else:
            lines = (json.dumps(row, default=str) for row in part.to_pylist())
            (folder / "part.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table(products), tmp_path / "raw" / "products.parquet")
    (tmp_path / "logs").mkdir()
    page = (ROOT / "docs" / "data.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "COPY" in c)
    exec(code.replace("raw/*/*.parquet", f"raw/*/*.{kind}"), {})

    with open_log(tmp_path / "logs") as log:
        found = log.interactions.order_by("row").to_pyarrow().to_pylist()
        assert [row["item_id"] for row in found] == ["a", "a", "b"]
        assert [row["timestamp"] for row in found] == [
            1_600_000_000_000,
            1_700_000_000_000,
            1_700_000_001_000,
        ]
        assert [row["watch_time_ms"] for row in found] == [3000, 20500, None]
        assert [row["like"] for row in found] == [1, 0, 1]
        assert log.items["tags"].to_pylist() == [["film", "NL"], ["news"]]
        assert log.vectors["embedding"].load()[1].tolist() == [[0.5, 1.0]]


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
