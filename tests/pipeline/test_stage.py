"""Stages are made once, appear whole, and notice every change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onerec.errors import OneRecError
from onerec.pipeline.stage import data_digest, locked, read_record, require, run_stage


class Maker:
    """Makes one stage and counts how often it was built."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.builds = 0
        self.lines: list[str] = []

    def __call__(self, text: str = "x", **changes: Any) -> bool:
        def build(folder: Path) -> dict[str, Any]:
            self.builds += 1
            (folder / "deep").mkdir()
            (folder / "deep" / "a.txt").write_text(text)
            return {"length": len(text)}

        arguments: dict[str, Any] = {
            "config": {"size": 1, "ks": (5, 10)},
            "inputs": {"sessions": "abc"},
            "code": ["errors.py"],
            "build": build,
            "say": self.lines.append,
        }
        return run_stage(self.directory, "tokenize", **{**arguments, **changes}).skipped


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def test_equal_fingerprint_is_skipped(maker: Maker) -> None:
    assert not maker()
    assert maker()
    assert maker.builds == 1
    assert maker.lines[-1] == "tokenize: unchanged, skipped"
    record = read_record(maker.directory / "tokenize")
    assert record is not None
    assert record.summary == {"length": 1}
    assert record.outputs["deep/a.txt"]["bytes"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"size": 2, "ks": (5, 10)}}, "size (1 -> 2) changed"),
        ({"inputs": {"sessions": "abd"}}, "input sessions changed"),
        ({"code": ["files.py"]}, "onerec itself changed"),
    ],
    ids=["config", "input", "code"],
)
def test_any_change_makes_it_again(maker: Maker, change: dict[str, Any], words: str) -> None:
    maker()
    assert not maker(**change)
    assert maker.builds == 2
    assert any(words in line for line in maker.lines)


@pytest.mark.parametrize("harm", ["remove", "truncate", "flip", "record"])
def test_damage_is_told_and_mended(maker: Maker, harm: str) -> None:
    maker("hello")
    folder = maker.directory / "tokenize"
    output = folder / "deep" / "a.txt"
    if harm == "remove":
        output.unlink()
    elif harm == "truncate":
        output.write_text("hell")
    elif harm == "flip":
        output.write_text("hellO")
    else:
        (folder / "stage.json").write_text("{")
    with pytest.raises(OneRecError, match="onerec tokenize --out"):
        require(maker.directory, "tokenize")
    assert not maker("hello")
    assert "making it again" in maker.lines[1]
    assert output.read_text() == "hello"
    assert require(maker.directory, "tokenize").summary == {"length": 5}


def test_failure_leaves_the_earlier_result(maker: Maker) -> None:
    maker("first")

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half.txt").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        maker(config={"size": 2}, build=fail)
    assert (maker.directory / "tokenize" / "deep" / "a.txt").read_text() == "first"
    assert [p.name for p in maker.directory.iterdir()] == ["tokenize"]
    assert maker("first"), "the earlier result is still known by its fingerprint"


def test_resumable_build_finds_its_own_work_only(maker: Maker) -> None:
    def work(folder: Path) -> dict[str, Any]:
        seen = (folder / "checkpoints").exists()
        (folder / "checkpoints").mkdir(exist_ok=True)
        if not seen:
            raise KeyboardInterrupt
        return {"resumed": seen}

    arguments: dict[str, Any] = {"build": work, "resumable": True, "scratch": ["checkpoints"]}
    with pytest.raises(KeyboardInterrupt):
        maker(**arguments)
    with pytest.raises(KeyboardInterrupt):
        maker(config={"size": 2}, **arguments)  # another configuration starts afresh
    assert not maker(config={"size": 2}, **arguments)
    record = require(maker.directory, "tokenize")
    assert record.summary == {"resumed": True}
    assert record.outputs == {}


def test_folder_of_somebody_else_is_refused(maker: Maker) -> None:
    (maker.directory / "tokenize").mkdir()
    (maker.directory / "tokenize" / "thesis.txt").write_text("years of work")
    with pytest.raises(OneRecError, match="not made by onerec"):
        maker()
    assert (maker.directory / "tokenize" / "thesis.txt").read_text() == "years of work"


def test_killed_between_the_two_renames(maker: Maker) -> None:
    maker("first")
    folder = maker.directory / "tokenize"
    folder.rename(maker.directory / ".tokenize.old")
    assert maker("first")
    assert (folder / "deep" / "a.txt").read_text() == "first"


def test_missing_stage_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(OneRecError, match="onerec simulate --out"):
        require(tmp_path, "world")


def test_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from onerec.pipeline.stage import locked\n"
        "with locked(Path(sys.argv[1]), 'run'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(OneRecError, match=f"in use by .*onerec run, process {holder.pid}"),
        locked(tmp_path, "run"),
    ):
        pytest.fail("two processes held one directory")
    holder.kill()
    holder.communicate()
    with locked(tmp_path, "run"):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_out_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OneRecError, match="wanted a directory"), locked(path, "run"):
        pytest.fail("a file was taken for a directory")


def test_torchrun_around_a_verb_that_is_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OneRecError, match="run is one process"), locked(tmp_path, "run"):
        pass
    with locked(tmp_path, "pretrain"):
        pass


def test_data_is_known_by_content_not_by_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.parquet").write_bytes(b"123")
    assert data_digest(tmp_path / "a") == data_digest(tmp_path / "b")
    (tmp_path / "b" / "log.parquet").write_bytes(b"124")
    assert data_digest(tmp_path / "a") != data_digest(tmp_path / "b")


def test_record_is_readable_json(maker: Maker) -> None:
    maker()
    record = json.loads((maker.directory / "tokenize" / "stage.json").read_text())
    assert record["config"] == {"size": 1, "ks": [5, 10]}
    assert set(record) >= {"fingerprint", "inputs", "outputs", "version", "seconds", "summary"}


def test_code_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="moved_away"):
        Maker(tmp_path)(code=["errors.py", "moved_away.py"])
