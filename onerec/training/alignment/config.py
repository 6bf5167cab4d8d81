"""Settings of preference alignment; light to import."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from onerec.checks import at_least, at_least_or_none, between, fraction, one_of
from onerec.training.config import TrainConfig

Method = Literal[
    "dpo",
    "ipo",
    "conservative_dpo",
    "robust_dpo",
    "cpo",
    "simpo",
    "softmax_dpo",
    "critical_dpo",
    "cem",
    "ecpo",
    "gbpo",
    "ntp",
]
METHODS: tuple[str, ...] = Method.__args__  # type: ignore[attr-defined]
# Those whose group has one winner and its losers.
PAIRED = frozenset(METHODS) - {"cem", "ecpo", "gbpo", "ntp"}


@dataclass(frozen=True)
class AlignmentConfig:
    """Settings of iterative preference alignment (algorithm 2 of arXiv 2502.18965).

    An iteration is an epoch of that algorithm. v1 states `rate` and `candidates`; its beta, lambda,
    number of epochs and learning rate are not published.

    Attributes:
        method: A preference loss of `onerec.training.alignment.losses` ("dpo" with several
            iterations is the paper's IPA); "cem", which fine-tunes on the sessions of highest
            reward; "ecpo" or "gbpo", policy gradients over a group of sessions; "ntp", the same
            training without any preferences, as a control.
        iterations: Epochs T; each generates with the snapshot of the one before. With 0
            `onerec run` leaves reward model and alignment out.
        steps: Optimizer steps of an iteration; None is one pass over the training sessions.
        max_steps: At most so many steps of an iteration; None for no bound.
        rate: r_dpo, the share of samples that get candidates. Paper: 0.01.
        candidates: N, beams of the session search. Paper: 128.
        asynchronous: Generate the next iteration's candidates while this one trains, in a second
            process: they come from the snapshot that this iteration began with, `steps` older than
            the model that learns from them. That snapshot is then also the reference, and
            `max_winner_drop` counts from it.
        exclude_history: Never generate what the user has already taken, as in serving.
        loser: "worst" of the candidates by reward (the paper), or one drawn from the "low_quarter",
            which the reward model's errors choose less often.
        losers: Losers of a sample with "softmax_dpo", the worst ones.
        min_gap: Least difference of reward between winner and loser, in rewards of an average
            session; other samples are skipped, as noise of the reward model. An iteration that
            skips all of them ends the run.
        weight: lambda. None chooses it once, before the first step, such that the gradient of the
            preference loss has `gradient_share` of the norm of the next-token loss's.
        gradient_share: See `weight`.
        beta: Scale of implicit rewards; None is the loss's own default (0.1; simpo 2, softmax_dpo
            1). Of "critical_dpo" the strength of the contrast (default 1).
        gamma: Of "simpo" the margin, of "critical_dpo" the scale of implicit rewards; None is the
            loss's own default (1).
        label_smoothing: Share of flipped preferences that conservative_dpo and robust_dpo assume.
        winner_nll: Weight of the winner's negative log-probability (a code) beside a preference
            loss, against likelihood displacement (arXiv 2502.07599); of "cpo" its own term.
        normalize: Log-probabilities over the "legal" codes at each place, so that a preference
            moves no weight to or from illegal ids, or over the "full" codebook.
        elite: Share of the candidates that "cem" keeps.
        group: Candidates of a sample that "ecpo" and "gbpo" learn from, drawn evenly.
        epsilon: Clipping range of "ecpo".
        delta: How far past it the ratio may go (arXiv 2506.13695: 0.1).
        format_samples: Sessions of the unconstrained search beside each group of "ecpo" and "gbpo";
            legal ones count with advantage 1, others not at all (the format reward of arXiv
            2506.13695, which takes 5 of 128). Where the model writes legal ids anyway they only
            raise its favourites.
        batch_size: Samples a step, over all processes.
        lr: Learning rate; a tenth to a fifth of pretraining's.
        warmup: Share of all steps over which the learning rate rises.
        min_lr: Where the cosine ends, as a share of `lr`.
        weight_decay: AdamW decay of matrices.
        grad_clip: Largest norm of the whole gradient; 0 turns it off.
        grad_accumulation: Micro-batches a step.
        monitor: Held-out sessions that the stopping rules are watched on.
        monitor_beam: Beams of the sessions generated for them.
        max_legality_drop: Stop when the unconstrained legality has fallen by more, a share of ids.
        max_winner_drop: Stop when winners lost more log-probability in an iteration, nats an item.
        max_drift: Stop when the divergence from the seed model is larger, nats an item.
        mixed_precision: As in `TrainConfig`.
        device: As in `TrainConfig`.
        seed: Of the choice of samples and groups and the order of training.
        log_every: Steps between two records.
        checkpoint_every: Steps between two checkpoints; 0 saves at the end and on Ctrl-C only.
        keep: Newest checkpoints kept.
        num_threads: CPU threads of each process. None: torch's own choice.
    """

    method: Method = "dpo"
    iterations: int = 3
    steps: int | None = None
    max_steps: int | None = 200
    rate: float = 0.01
    candidates: int = 128
    asynchronous: bool = False
    exclude_history: bool = True
    loser: Literal["worst", "low_quarter"] = "worst"
    losers: int = 3
    min_gap: float = 0.05
    weight: float | None = None
    gradient_share: float = 1.0
    beta: float | None = None
    gamma: float | None = None
    label_smoothing: float = 0.1
    winner_nll: float = 0.0
    normalize: Literal["legal", "full"] = "legal"
    elite: float = 0.05
    group: int = 16
    epsilon: float = 0.2
    delta: float = 0.1
    format_samples: int = 0
    batch_size: int = 128
    lr: float = 5e-4
    warmup: float = 0.05
    min_lr: float = 0.1
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    grad_accumulation: int = 1
    monitor: int = 128
    monitor_beam: int = 20
    max_legality_drop: float = 0.1
    max_winner_drop: float = 0.5
    max_drift: float = 2.0
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 100
    keep: int = 2
    num_threads: int | None = None

    def __post_init__(self) -> None:
        one_of(self, "method", METHODS)
        one_of(self, "loser", ("worst", "low_quarter"))
        one_of(self, "normalize", ("legal", "full"))
        at_least(self, 1, "losers", "monitor", "monitor_beam", "log_every", "keep")
        at_least(self, 2, "candidates", "group")
        at_least_or_none(self, 1, "steps", "max_steps", "num_threads")
        fraction(self, "rate", "elite", ends="(]")
        between(self, 0, 0.5, "label_smoothing", ends="[)")
        at_least_or_none(self, 0, "weight", "beta", "gamma", finite=True)
        at_least(self, 0, "iterations", "min_gap", "gradient_share", "winner_nll", "epsilon")
        at_least(self, 0, "delta", "format_samples")
        at_least(self, 0, "max_legality_drop", "max_winner_drop", "max_drift")
        self.train_config(1)  # checks the rest

    def train_config(self, steps: int) -> TrainConfig:
        """The settings of the loop, for so many optimizer steps in all."""
        shared = {field.name for field in dataclasses.fields(TrainConfig)} - {"steps", "max_steps"}
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in shared}
        return TrainConfig(**own, steps=steps, eval_every=0, select="last")


# Settings that change the speed or the logs, never the weights.
FREE_ON_RESUME = frozenset({"log_every", "checkpoint_every", "keep", "num_threads"})
