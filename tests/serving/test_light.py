"""A server where torch cannot be imported."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason='needs the extra "serve"')
pytest.importorskip("prometheus_client", reason='needs the extra "serve"')

from serving_helpers import run_command, write_export

from onerec import Recommender

WITHOUT_TORCH = (
    "-c",
    "import sys; sys.modules['torch'] = None; from onerec.cli.main import main; sys.exit(main())",
)


@pytest.mark.parametrize("ranks", [True, False], ids=["mixture", "sessions"])
def test_a_server_of_an_export_needs_no_torch(tmp_path: Path, ranks: bool) -> None:
    first = write_export(tmp_path / "first", ranks=ranks)
    second = write_export(tmp_path / "second", ranks=ranks, seed=1)
    process, client = run_command(
        first, "--num_threads", "1", "--beam_width", "16", program=WITHOUT_TORCH
    )
    try:
        body: dict[str, Any] = {"history": [3, 77777, 5], "allow_tags": ["de", "fr"]}
        options: dict[str, Any] = {"beam_width": 16, "allow_tags": [["de", "fr"]]}
        for folder in (first, second):
            if folder == second:
                status, got, _ = client.send("POST", "/admin/swap", {"folder": str(second)})
                assert (status, got["version"]) == (200, 2)
            here = Recommender.from_exported(folder, num_threads=1)
            status, got, _ = client.send("POST", "/v1/recommend", body)
            (wanted,) = here.recommend([[3, 5]], **options)
            assert (status, got["sessions"][0]["items"]) == (200, wanted.item_ids[0])
            status, got, _ = client.send("POST", "/v1/rank", {**body, "k": 9})
            assert (status, got["items"]) == (200, here.rank([[3, 5]], 9, **options)[0])
        assert client.send("GET", "/")[0] == 200
        assert client.send("POST", "/try/recommend", {"history": ["3"], "k": 5})[0] == 200
    finally:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def test_a_server_without_its_parser_says_what_to_install() -> None:
    program = WITHOUT_TORCH[1].replace("torch", "httptools")
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'pip install "onerec[serve]"' in done.stderr
    assert "httptools" in done.stderr
