"""A small alignment for tests that need processes of their own.

Usage: align_job.py OUT_DIR '{"overrides of AlignmentConfig": ...}' [STEP that kills it]
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from onerec.progress import Progress
from onerec.tokenizer import Catalog
from onerec.training import AlignmentConfig, AlignmentResult, align

_spec = importlib.util.spec_from_file_location(
    "train_job", Path(__file__).parent.with_name("train_job.py")
)
assert _spec is not None
assert _spec.loader is not None
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)


class Taste(nn.Module):
    """A reward that is the mean of a fixed value of each item."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("value", torch.rand(job.ITEMS, generator=generator))
        self.config = SimpleNamespace(n_items=job.ITEMS, session_length=4, history_length=10)

    def score(self, history: Tensor, sessions: Tensor) -> Tensor:
        values = torch.where(sessions >= 0, self.value[sessions.clamp(min=0)], 0)
        return 2 * values.sum(dim=-1) / (sessions >= 0).sum(dim=-1).clamp(min=1)


def catalog() -> Catalog:
    return Catalog.build(list(range(100, 100 + job.ITEMS)), job.make_sids(), job.CODES)


def run(out_dir: Any, *, progress: Progress | None = None, **overrides: Any) -> AlignmentResult:
    settings: dict[str, Any] = {
        "iterations": 2,
        "steps": 12,
        "batch_size": 16,
        "rate": 0.3,
        "candidates": 12,
        "lr": 3e-3,
        "monitor": 30,
        "monitor_beam": 4,
        "max_drift": 50.0,
        "max_legality_drop": 1.0,
        "max_winner_drop": 50.0,
        "log_every": 4,
        "checkpoint_every": 5,
        "num_threads": 1,
    }
    config = AlignmentConfig(**{**settings, **overrides})
    train, valid = job.make_samples(200, 1), job.make_samples(50, 2)
    return align(
        job.make_model(0.1), Taste(), train, valid, catalog(), config, out_dir, progress=progress
    )


def main() -> None:
    out_dir, overrides, *last = sys.argv[1:]

    def progress(step: int, total: int, note: str) -> None:
        if str(step) in last:
            os.kill(os.getpid(), signal.SIGKILL)

    run(out_dir, progress=progress, **json.loads(overrides))


if __name__ == "__main__":
    main()
