"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from onerec.checks import at_least, at_least_or_none, fraction, one_of, positive


@dataclass
class TrainConfig:
    """Settings of a training run.

    The defaults suit `paper-tiny` on a CPU. OneRec (arXiv 2502.18965, section 4) trains with
    Adam at an initial learning rate of 2e-4 in bfloat16; it gives no batch size, number of steps,
    warm-up or weight decay.

    Attributes:
        epochs: Passes over the training samples; may be a fraction. Ignored when `steps` is given.
        steps: Optimizer steps of the whole run. None: follows from `epochs`.
        min_steps: At least so many steps follow from `epochs`, for logs of few samples.
        max_steps: At most so many steps follow from `epochs`; None for no bound.
        batch_size: Samples per optimizer step, over all processes and micro-batches together, so
            that the loss curve does not depend on how many processes run. None: the power of two
            with which a step has about 1,536 target items, 16 to 1,024.
        lr: Learning rate after the warm-up.
        warmup: Share of all steps over which the learning rate rises linearly from 0, in [0, 1].
        min_lr: Where the cosine ends, as a share of `lr`, in [0, 1].
        weight_decay: AdamW decay; never applied to embeddings, norms, biases and other vectors.
        beta1: Decay of AdamW's first moment.
        beta2: Decay of AdamW's second moment.
        grad_clip: Largest L2 norm of the whole gradient; 0 turns clipping off.
        grad_accumulation: Micro-batches per optimizer step.
        mixed_precision: "no", "bf16", or "auto": bf16 on CUDA, none on the CPU, where bf16 is
            slower than float32 without matrix units for it.
        device: "auto" takes CUDA where there is one; or "cpu", "cuda".
        seed: Of the order of the samples and of dropout; every step draws its own stream, so a
            resumed run drops the same units.
        bucket_batches: Samples are sorted by history length within this many shuffled batches, so
            that a batch holds histories of about one length; 1 turns it off.
        log_every: Steps between two records in metrics.jsonl.
        eval_every: Steps between two validations; 0 validates only after the last step.
        checkpoint_every: Steps between two checkpoints; 0 saves only at the end and on Ctrl-C.
        keep: Newest checkpoints kept, at least 1.
        select: Weights of the result: "best" by validation loss (the last without validation
            samples) or "last".
        num_threads: CPU threads of each process. None: torch's own choice.
        tensorboard: Also write TensorBoard events (needs the extra `onerec[tensorboard]`).
    """

    epochs: float = 6.0
    steps: int | None = None
    min_steps: int = 0
    max_steps: int | None = 1500
    batch_size: int | None = 128
    lr: float = 3e-3
    warmup: float = 0.05
    min_lr: float = 0.0
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    grad_clip: float = 1.0
    grad_accumulation: int = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    bucket_batches: int = 32
    log_every: int = 10
    eval_every: int = 200
    checkpoint_every: int = 200
    keep: int = 2
    select: Literal["best", "last"] = "best"
    num_threads: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        at_least(self, 1, "grad_accumulation", "bucket_batches", "log_every", "keep")
        at_least_or_none(self, 1, "steps", "max_steps", "batch_size", "num_threads")
        at_least(self, 0, "min_steps", "eval_every", "checkpoint_every", "seed")
        positive(self, "lr", "epochs")
        at_least(self, 0, "weight_decay", "grad_clip", finite=True)
        fraction(self, "warmup", "min_lr")
        fraction(self, "beta1", "beta2", ends="[)")
        one_of(self, "mixed_precision", ("auto", "no", "bf16"))
        one_of(self, "device", ("auto", "cpu", "cuda"))
        one_of(self, "select", ("best", "last"))

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, for a training set of so many batches."""
        if self.steps is not None:
            return self.steps
        total = max(self.min_steps, math.ceil(self.epochs * steps_per_epoch))
        return total if self.max_steps is None else min(total, self.max_steps)

    def learning_rate(self, step: int, total: int) -> float:
        """The rate of step 0..total-1: a linear warm-up, then half a cosine down to `min_lr`."""
        warmup = round(self.warmup * total)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        angle = math.pi * (step - warmup) / max(1, total - warmup)
        return self.lr * (self.min_lr + (1 - self.min_lr) * 0.5 * (1 + math.cos(angle)))


# Settings that change the speed or the logs of a run, never its weights: they may differ when a
# run is resumed.
FREE_ON_RESUME = frozenset({"log_every", "checkpoint_every", "keep", "num_threads", "tensorboard"})
