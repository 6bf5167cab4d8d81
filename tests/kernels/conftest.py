"""Triton's interpreter for the tests of kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def interpreted(request: pytest.FixtureRequest) -> str:
    """What pytest says of interpreted_X.py, beside test_X.py, through Triton's interpreter.

    In another process: the interpreter is chosen when triton is first imported.
    """
    file = request.path.with_name(request.path.name.replace("test_", "interpreted_", 1))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout
