"""A small training job for tests that need processes of their own.

Usage: train_job.py OUT_DIR '{"overrides of TrainConfig": ...}' [action]
Actions: "kill=N" sends SIGKILL to itself when the progress reports step N; "full=N" forbids files
over 20 kB from there on; "together=N" trains in N forked processes, and when one fails, the others
are ended and the job exits with 1.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import socket
import sys
from typing import Any

import numpy as np
import torch

from onerec.data.session_set import Samples
from onerec.model import OneRec, OneRecConfig
from onerec.progress import Progress
from onerec.training import TrainConfig, TrainResult, pretrain

ITEMS, LEVELS, CODES = 60, 3, 8


def make_samples(n: int, seed: int) -> Samples:
    """Users who walk through the items in steps of 1 or 2, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    lengths, sizes = rng.integers(0, 14, n), rng.integers(1, 5, n)
    walks = [
        (rng.integers(ITEMS) + np.cumsum(rng.integers(1, 3, a + b))) % ITEMS
        for a, b in zip(lengths, sizes, strict=True)
    ]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return Samples(
        sequence_values=np.concatenate(
            [walk[:a] for walk, a in zip(walks, lengths, strict=True)]
        ).astype(np.int32),
        history_begin=bounds[:-1],
        history_end=bounds[1:],
        target_values=np.concatenate(
            [walk[a:] for walk, a in zip(walks, lengths, strict=True)]
        ).astype(np.int32),
        target_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        user_row=np.arange(n, dtype=np.int32),
        timestamp=np.zeros(n, np.int64),
    )


def make_sids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, CODES, (ITEMS, LEVELS), dtype=np.int32)


def make_model(dropout: float = 0.1) -> OneRec:
    torch.manual_seed(0)
    return OneRec(
        OneRecConfig.preset(
            "paper-tiny",
            codebook_size=CODES,
            levels=LEVELS,
            session_length=4,
            history_length=10,
            d_model=16,
            n_heads=2,
            encoder_layers=1,
            d_ff=16,
            n_experts=4,
            expert_d_ff=16,
            dropout=dropout,
        )
    )


def run(
    out_dir: Any, *, dropout: float = 0.1, progress: Progress | None = None, **overrides: Any
) -> TrainResult:
    settings: dict[str, Any] = {
        "steps": 40,
        "batch_size": 16,
        "lr": 1e-3,
        "log_every": 7,
        "eval_every": 12,
        "checkpoint_every": 10,
        "num_threads": 1,
    }
    config = TrainConfig(**{**settings, **overrides})
    train, valid = make_samples(200, 1), make_samples(50, 2)
    return pretrain(
        make_model(dropout), train, valid, make_sids(), config, out_dir, progress=progress
    )


def together(processes: int) -> None:
    """Goes on in so many forked processes: imports are paid once."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return
        children.append(child)
    failed = False
    while children:
        ended, status = os.wait()
        children.remove(ended)
        if status and not failed:
            failed = True
            for child in children:
                os.kill(child, signal.SIGKILL)
    sys.exit(int(failed))


def main() -> None:
    out_dir, overrides, *actions = sys.argv[1:]

    def progress(step: int, total: int, note: str) -> None:
        for action in actions:
            name, at = action.split("=")
            if step == int(at) and name == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if step == int(at) and name == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    logging.basicConfig(level=logging.WARNING)
    for action in actions:
        if action.startswith("together="):
            together(int(action.partition("=")[2]))
    run(out_dir, progress=progress, **json.loads(overrides))


if __name__ == "__main__":
    main()
