"""Settings of the reward stage; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onerec.checks import at_least, one_of, positive, wanted

# Targets that are computed; every other name is a 0/1 column of the log.
SOFT_TARGETS = ("swt", "vtr")


@dataclass(frozen=True)
class RewardConfig:
    """How the reward model is made (arXiv 2502.18965, section 3.3).

    The paper leaves sizes and fusion open.

    Attributes:
        targets: What is predicted: "swt" (watch seconds, a soft label: the share of a cap), "vtr"
            (share of the length that was watched, a soft label, at most 1), or a 0/1 column of the
            log: "long_view", "like" (the paper's ltr), "follow" (wtr), "share", "comment", "hate".
            Those that the log lacks or has too few positives of are left out and named.
        weights: Share of each target in the fused score; a negative one for what is unwanted. The
            default lifts watch time in the simulator without costing likes; more of watch time
            alone buys seconds with likes (docs/alignment.md).
        labels: "item": towers predict each item of a session and their mean is the session's;
            "session": towers read the sum over the session and predict the mean label, as the
            paper's formula has it. One label an item teaches more than one a session.
        min_positives: Labels (a soft one counts as its share) that a target needs in training.
        max_positive_weight: Positives count sqrt(negatives / positives) times, at most so much; the
            probabilities are corrected for it. 1 weighs all alike.
        judge: Also train a second model. The first then learns from users of even row, the second
            from the others; the second takes no part in the alignment, it only measures.
        history_length: Items of history that the target attention sees.
        d_model: Width.
        n_heads: Attention heads.
        item_ids: Whether items have learned vectors beside their features.
        wide: Whether each target also has a linear part of the item's features and the history's
            length, past all layers; with little data that is what a deep model is slow to learn.
        dropout: Rate on item states.
        epochs: Passes over the training sessions; may be a fraction.
        max_steps: At most so many optimizer steps.
        batch_size: Exposed sessions a step.
        lr: Learning rate after a warm-up over a twentieth of the steps; then half a cosine to 0.
        weight_decay: AdamW decay, of all weights but biases and norms.
        evaluations: Validations during training; the weights of the best one are kept.
        seed: Of weights, order and dropout.
    """

    targets: tuple[str, ...] = ("swt", "vtr", "long_view", "like", "follow")
    weights: tuple[float, ...] = (1.0, 0.7, 0.0, 0.5, 0.0)
    labels: Literal["item", "session"] = "item"
    min_positives: int = 100
    max_positive_weight: float = 10.0
    judge: bool = True
    history_length: int = 50
    d_model: int = 64
    n_heads: int = 4
    item_ids: bool = True
    wide: bool = False
    dropout: float = 0.1
    epochs: float = 4.0
    max_steps: int = 600
    batch_size: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.05
    evaluations: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "weights", tuple(self.weights))
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise wanted("targets", "distinct names, at least one", self.targets)
        if len(self.weights) != len(self.targets):
            what = f"a value for each of {len(self.targets)} targets"
            raise wanted("weights", what, self.weights)
        at_least(self, 1, "min_positives", "history_length", "d_model", "n_heads", "max_steps")
        at_least(self, 1, "batch_size", "evaluations", "max_positive_weight")
        positive(self, "epochs", "lr")
        one_of(self, "labels", ("item", "session"))
