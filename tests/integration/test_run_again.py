"""A second run makes what changed or was damaged, and what depends on it; nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onerec import pipeline
from onerec.cli.main import main

Contents = Callable[[Path], dict[str, str]]
STAGES = [name for name in pipeline.STAGES if name != "mixture"]  # of a run of sessions


def again(out: Path, settings: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> set[str]:
    """Runs on `out` in this process; returns the stages that were made again."""
    capsys.readouterr()
    code = main(["run", "--out", str(out), "--config", str(settings), "--json", *flags])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    stages = json.loads(shown.out)["stages"]
    assert list(stages) == STAGES
    return {name for name, stage in stages.items() if not stage["skipped"]}


def test_second_run_skips_every_stage(
    run_copy: Path, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert again(run_copy, settings, capsys) == set()


@pytest.mark.slow
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
