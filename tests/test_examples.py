"""The examples run as they stand and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def printed(name: str, *arguments: str) -> str:
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning"]  # other libraries' own
    command = [sys.executable, *warnings, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_own_log_learns_the_topic_of_a_user(tmp_path: Path) -> None:
    sessions = printed("own_log.py", str(tmp_path)).splitlines()[-2:]
    topics = re.findall(r"video \d+ about topic (\d)", "\n".join(sessions))
    assert len(topics) == 10
    assert topics.count("3") >= 8
    assert (tmp_path / "catalog" / "trie.bin").is_file()


def test_own_model_gets_legal_items_only() -> None:
    text = printed("own_model.py")
    leaves = [int(leaf) for leaf in re.findall(r"leaf (\d+)", text)]
    items = int(text.split()[0].replace(",", ""))
    assert len(leaves) == 4
    assert all(0 <= leaf < items for leaf in leaves)
    assert all(len(set(leaves[i : i + 2])) == 2 for i in (0, 2))
