"""Checkpoints and metrics as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onerec.errors import DataError, OneRecError
from onerec.training.checkpoint import CheckpointStore
from onerec.training.metrics import MetricsLog, read_metrics


def make_store(root: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(root, keep, main=True, barrier=lambda: None)


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"abc" * 1000)
    (folder / "part").mkdir()
    (folder / "part" / "more").write_text("x")


def test_newest_and_keep(tmp_path: Path):
    store = make_store(tmp_path)
    assert store.newest() is None
    for step in (5, 20, 100):
        store.best_path(step).write_bytes(b"")
        store.save(step, {"best_step": 20 if step > 5 else 5, "n": step}, write)
    assert store.steps() == [100, 20]
    assert store.newest() == (100, {"best_step": 20, "n": 100})
    # The best weights of the checkpoints that are left, and no others.
    assert [path.name for path in tmp_path.glob("best_*")] == ["best_00000020.safetensors"]


def test_a_failing_write_leaves_the_earlier_ones(tmp_path: Path):
    store = make_store(tmp_path)
    store.save(1, {"n": 1}, write)

    def fail(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OneRecError, match=r"checkpoint of step 2 .*No space left.*are whole"):
        store.save(2, {"n": 2}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert store.newest() == (1, {"n": 1})


def test_leftovers_of_a_kill_are_removed(tmp_path: Path):
    (tmp_path / ".step_00000009").mkdir()
    (tmp_path / ".step_00000009" / "weights").write_bytes(b"half")
    store = make_store(tmp_path)
    assert store.newest() is None
    assert not list(tmp_path.iterdir())


def test_missing_best_weights_count_as_damage(tmp_path: Path):
    store = make_store(tmp_path)
    store.save(1, {"best_step": None}, write)
    store.best_path(2).write_bytes(b"")
    store.save(2, {"best_step": 2}, write)
    store.best_path(2).unlink()
    found = store.newest()
    assert found is not None
    assert found[0] == 1


def test_a_file_in_a_folder_below_is_checked_too(tmp_path: Path):
    store = make_store(tmp_path)
    store.save(1, {}, write)
    (store.path(1) / "part" / "more").write_text("y")
    with pytest.raises(DataError, match=r"part/more: contents do not match the checksum"):
        store.newest()


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = make_store(tmp_path)
    monkeypatch.setattr("onerec.training.checkpoint.FORMAT", 99)
    store.save(1, {}, write)
    monkeypatch.undo()
    with pytest.raises(DataError, match="wanted format 1, got 99"):
        store.newest()


def test_metrics_are_cut_at_the_step_and_appended(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.sync()
    log.close()
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path, 2)
    log.write({"step": 3, "again": True})
    log.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_metrics_damaged_in_the_middle(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: wanted a JSON object"):
        read_metrics(path)
