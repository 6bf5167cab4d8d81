"""What a forward pass in training gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from onerec.ops import MoEStats


class RouterStats(NamedTuple):
    """Routing of one forward pass, a row for each decoder layer.

    Attributes:
        counts: int64 [layers, E], (token, slot) pairs of each expert; padding not counted.
        mean_probability: [layers, E].
        entropy: [layers], mean entropy of the routing softmax in nats.
        z_loss: [layers].
    """

    counts: Tensor
    mean_probability: Tensor
    entropy: Tensor
    z_loss: Tensor

    @classmethod
    def stack(cls, layers: Sequence[MoEStats]) -> Self:
        """The statistics of all layers as one."""
        return cls(*(torch.stack([getattr(s, name) for s in layers]) for name in cls._fields))

    def balance(self) -> Tensor:
        """The balance loss of arXiv 2101.03961, summed over layers, []."""
        share = self.counts / self.counts.sum(dim=-1, keepdim=True).clamp(min=1)
        return self.counts.shape[-1] * (share * self.mean_probability).sum()


class OneRecOutput(NamedTuple):
    """What a training step needs.

    Attributes:
        loss: [], `loss_per_level.sum()` plus the weighted losses of the router and of the item.
        loss_per_level: [L], mean over predicted items of -log p(code), in nats.
        items: int64 [], predicted items, the weight of this batch in an average.
        router: None for a dense decoder.
    """

    loss: Tensor
    loss_per_level: Tensor
    items: Tensor
    router: RouterStats | None
