"""Training: how fast batches are made, how fast `paper-tiny` learns, the share of the data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onerec.data.session_set import Samples
from onerec.model import OneRec, OneRecConfig
from onerec.training import Batch, SessionBatches, TrainConfig, pretrain, read_metrics

ITEMS, CODES, LEVELS, SESSION, STEPS = 10_000, 64, 3, 5, 4


def make(users: int, longest: int) -> tuple[Samples, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths, sizes = rng.integers(1, longest + 1, users), rng.integers(1, SESSION + 1, users)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    samples = Samples(
        sequence_values=rng.integers(0, ITEMS, bounds[-1], dtype=np.int32),
        history_begin=bounds[:-1],
        history_end=bounds[1:],
        target_values=rng.integers(0, ITEMS, sizes.sum(), dtype=np.int32),
        target_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        user_row=np.arange(users, dtype=np.int32),
        timestamp=np.zeros(users, np.int64),
    )
    return samples, rng.integers(0, CODES, (ITEMS, LEVELS), dtype=np.int32)


def plain(samples: Samples, sids: np.ndarray, rows: np.ndarray, length: int) -> Batch:
    """The same batch, a sample at a time."""
    histories = [sids[samples.history(row)[-length:]] for row in rows]
    targets = [sids[samples.target(row)] for row in rows]
    history = torch.full((len(rows), max(map(len, histories)), LEVELS), -1)
    target = torch.full((len(rows), SESSION, LEVELS), -1)
    for i in range(len(rows)):
        history[i, : len(histories[i])] = torch.from_numpy(histories[i])
        target[i, : len(targets[i])] = torch.from_numpy(targets[i])
    return Batch(history, target, sum(map(len, targets)))


def same(got: Batch, want: Batch) -> None:
    assert torch.equal(got.history, want.history)
    assert torch.equal(got.target, want.target)
    assert got.items == want.items


@pytest.mark.parametrize(("size", "length"), [(128, 50), (1024, 256)])
def test_batch(compare: Any, size: int, length: int) -> None:
    samples, sids = make(20_000, length)
    batches = SessionBatches(
        samples, sids, history_length=length, session_length=SESSION, batch_size=size
    )
    rows = batches.rows(3)
    compare(
        {"onerec": lambda: batches.batch(3), "plain": lambda: plain(samples, sids, rows, length)},
        check=same,
        work={"tokens/s": batches.step_tokens(3)},
        facts={"batch": size, "history": length},
        seconds=1.0,
    )


def train(folder: Path, samples: Samples, sids: np.ndarray, device: str) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = OneRec(
        OneRecConfig.preset(
            "paper-tiny", codebook_size=CODES, levels=LEVELS, session_length=SESSION
        )
    )
    config = TrainConfig(steps=STEPS, log_every=1, checkpoint_every=0, device=device)
    pretrain(model, samples, None, sids, config, folder)
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pretrain(compare: Any, tmp_path: Path, device: str) -> None:
    """Whole calls of `pretrain`, start, checkpoint and saved model included."""
    samples, sids = make(20_000, 50)
    number = itertools.count()

    def run() -> list[dict[str, Any]]:
        return train(tmp_path / str(next(number)), samples, sids, device)

    def check(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
        tolerance = 1e-6 if device == "cpu" else 1e-2
        for a, b in zip(got, want, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)

    records = run()
    seconds = [b["seconds"] - a["seconds"] for a, b in itertools.pairwise(records)]
    batches = SessionBatches(
        samples, sids, history_length=50, session_length=SESSION, batch_size=128
    )
    compare(
        {"onerec": run},
        check=check,
        expected=records,
        work={"tokens/s": sum(batches.step_tokens(step) for step in range(STEPS))},
        facts={
            "step s": float(np.median(seconds)),
            "data share": float(np.median([record["data_share"] for record in records[1:]])),
        },
        seconds=5.0,
        device=device,
    )
