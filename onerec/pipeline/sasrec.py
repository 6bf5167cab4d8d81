"""SASRec on a run's own sequences: one more row of the evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec.progress import Progress

if TYPE_CHECKING:
    from onerec.data import Samples, SessionSet
    from onerec.evaluation.adapters import ScoreRanker

# Constant Adam, as in the paper; quality tables train with it too.
ADAM: dict[str, Any] = {
    "warmup": 0.0,
    "min_lr": 1.0,
    "weight_decay": 0.0,
    "grad_clip": 0.0,
    "lr": 1e-3,
}
RECIPE: dict[str, Any] = {**ADAM, "epochs": 24, "batch_size": 256, "grad_accumulation": 4}

_MIN_STEPS = 1000  # of a small log, which takes more epochs in smaller batches
_SMALL_BATCH = 64
_FEW_USERS = 5000
_WHOLE_SOFTMAX = 20_000  # items; a larger catalogue draws negatives
_NEGATIVES = 4096
_WATCHED = 3000  # sessions of valid that choose the checkpoint
_VALIDATIONS = 8
_DEPTH = 10  # of the NDCG that chooses


def sasrec_ranker(
    data: SessionSet,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "auto",
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> ScoreRanker:
    """Trains SASRec with cross entropy on what training may see, or goes on in `folder`.

    Each item of a user's train sequence is predicted from those before it, whatever rule made the
    sessions. The checkpoint is chosen by NDCG@10 on valid, the history masked. A log of fewer than
    5,000 users is trained in batches of 64 users for at least 1,000 steps; over 20,000 items the
    softmax is over 4,096 drawn negatives that a batch shares.

    Args:
        data: Sessions.
        folder: Gets model/ and metrics.jsonl.
        seed: Of the weights and the order of training.
        device: "auto", "cpu" or "cuda".
        num_threads: CPU threads; torch's own choice when None.
        progress: Called as `progress(steps done, all steps, note)`.

    Raises:
        ValueError: No user has two items in train.
        TrainingInterrupted: After Ctrl-C, once a checkpoint is saved.
    """
    import torch

    from onerec.evaluation.adapters import ScoreRanker
    from onerec.evaluation.metrics import ndcg, pad_rows, target_ranks
    from onerec.model import SASRec, SASRecConfig
    from onerec.training import TrainConfig, pretrain

    train = next_item_samples(data)
    if not len(train):
        raise ValueError("SASRec: wanted a user with two items in train, got none")
    users = len(np.unique(train.user_row))
    fields = dict(RECIPE)
    if users < _FEW_USERS:
        fields |= {"batch_size": _SMALL_BATCH, "grad_accumulation": 1}
    per_epoch = -(-users // fields["batch_size"])
    steps = max(_MIN_STEPS, fields.pop("epochs") * per_epoch)
    every = -(-steps // _VALIDATIONS)
    config = TrainConfig(
        **fields,
        steps=steps,
        seed=seed,
        device=device,  # type: ignore[arg-type]
        num_threads=num_threads,
        eval_every=every,
        checkpoint_every=every,
    )
    rows = np.arange(data.n_items)[:, None]
    watched = data.samples("valid").sample(_WATCHED, seed)
    seen = [watched.history(i) for i in range(len(watched))]
    targets = pad_rows([np.unique(watched.target(i)) for i in range(len(watched))])

    def ranker(network: SASRec) -> ScoreRanker:
        on = network.items.weight.device
        return ScoreRanker(network.scores, rows, network.config.history_length, device=on)

    def score(network: SASRec) -> float:
        ranks = target_ranks(ranker(network).rank(seen, _DEPTH, seen), targets, exclude=hidden)
        return float(ndcg(ranks, _DEPTH).mean())

    hidden = pad_rows(seen)
    torch.manual_seed(seed)
    negatives = _NEGATIVES if data.n_items > _WHOLE_SOFTMAX else 0
    model = SASRec(SASRecConfig(data.n_items, negatives=negatives))
    pretrain(
        model,
        train,
        _first_targets(watched),
        rows,
        config,
        folder,
        score=score if len(watched) else None,
        progress=progress,
    )
    shutil.rmtree(folder / "checkpoints")
    return ranker(model.eval())


def next_item_samples(data: SessionSet) -> Samples:
    """A sample for every item of a train sequence but the first: its history and itself."""
    from onerec.data import Samples
    from onerec.evaluation.counting import train_sequences

    items, offsets = train_sequences(data)
    sizes = np.diff(offsets)
    first = np.repeat(offsets[:-1], sizes)
    user = np.repeat(np.arange(len(sizes)), sizes)
    at = np.flatnonzero(np.arange(len(items)) > first)
    return Samples(
        items,
        first[at],
        at,
        items[at],
        np.arange(len(at) + 1),
        user[at].astype(np.int32),
        np.zeros(len(at), dtype=np.int64),
    )


def _first_targets(samples: Samples) -> Samples:
    """The samples with the first item of each target."""
    from dataclasses import replace

    firsts = samples.target_values[samples.target_offsets[:-1]]
    return replace(
        samples, target_values=firsts, target_offsets=np.arange(len(samples) + 1, dtype=np.int64)
    )
