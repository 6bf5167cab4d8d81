"""SASRec (arXiv 1808.09781) with cross entropy or its own binary loss: the baseline of tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onerec.model.attention import SelfAttention
from onerec.model.item_loss import item_cross_entropy, sampled_item_cross_entropy
from onerec.model.output import OneRecOutput
from onerec.model.pretrained import Pretrained


@dataclass(frozen=True)
class SASRecConfig:
    """Shape and loss of a `SASRec`.

    Attributes:
        n_items: N, the size of the catalogue.
        history_length: Items that it reads, the latest ones.
        d_model: Width.
        n_layers: Blocks.
        n_heads: Attention heads; divides `d_model`.
        dropout: Rate on embeddings and on what each sublayer adds.
        loss: "ce" is the softmax over items (arXiv 2307.14906 shows what it is worth), "bce" the
            paper's binary loss against drawn negatives.
        negatives: With "bce", negatives of each position, uniform draws outside the user's
            sequence (the paper: 1). With "ce", negatives that a whole batch shares; 0 takes the
            whole catalogue.
        init_std: Standard deviation of every weight matrix.
    """

    n_items: int
    history_length: int = 50
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 1
    dropout: float = 0.2
    loss: Literal["ce", "bce"] = "ce"
    negatives: int = 0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("n_items", "history_length", "d_model", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model, got {self.n_heads} and {self.d_model}")
        if self.loss not in ("ce", "bce"):
            raise ValueError(f"loss must be 'ce' or 'bce', got {self.loss!r}")
        if self.negatives < (self.loss == "bce"):
            raise ValueError(
                f"negatives must be at least {int(self.loss == 'bce')} with {self.loss!r}, "
                f"got {self.negatives}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def session_length(self) -> int:
        """One: the next item."""
        return 1


class _Block(nn.Module):
    """Causal self-attention and two position-wise layers, each behind a LayerNorm."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        d = config.d_model
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = SelfAttention(d, config.n_heads)
        self.w1, self.w2 = nn.Linear(d, d), nn.Linear(d, d)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), causal=True))
        inner = self.dropout(F.relu(self.w1(self.ffn_norm(x))))
        out: Tensor = x + self.dropout(self.w2(inner))
        return out


class SASRec(Pretrained):
    """Causal transformer over items whose state is matched with the items' own embeddings.

    Differs from the paper in the norms' place (before each sublayer, and once at the end) and, with
    "ce", in the loss. It trains in the loop of `onerec.training.pretrain`, where an item's index is
    its one code: sids = arange(N)[:, None].

    Args:
        config: Its shape.
    """

    model_type = "sasrec"
    config_class = SASRecConfig
    config: SASRecConfig
    prefixes = True
    item_column = False

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        self.items = nn.Embedding(config.n_items, config.d_model)
        self.position = nn.Embedding(config.history_length, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layers))
        self.blocks = cast("Sequence[_Block]", blocks)
        self.norm = nn.LayerNorm(config.d_model)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_std)

    def forward(self, history: Tensor, target: Tensor) -> OneRecOutput:
        """Mean loss of the next items.

        Args:
            history: int64 [B, S, 1], item indices, oldest first, -1 past a history's end.
            target: int64 [B, S, 1, 1], the item after each prefix, or [B, 1, 1], the item after
                the whole history; -1 where there is none.
        """
        states = self._states(history)
        if target.dim() == 3:
            last = (history[..., 0] >= 0).sum(dim=1) - 1
            states = states[torch.arange(len(states), device=states.device), last].unsqueeze(1)
            target = target.unsqueeze(1)
        wanted = target[:, :, 0, 0]
        real = wanted >= 0
        rows, items = states[real], wanted[real]
        if self.config.loss == "bce":
            loss = self._binary(rows, items, history, real)
        elif self.config.negatives and self.training:
            drawn = torch.randint(
                self.config.n_items, (self.config.negatives,), device=items.device
            )
            same = items[:, None] == drawn
            loss = sampled_item_cross_entropy(
                rows, self.items(items), self.items(drawn), same, self.config.n_items
            )
        else:
            loss = item_cross_entropy(rows, self.items.weight, items)
        return OneRecOutput(loss, loss.detach()[None], real.sum(), None)

    def scores(self, history: Tensor) -> Tensor:
        """Logits of every item as the next one, [B, N].

        Args:
            history: As for `forward`; each row has at least one item.
        """
        last = (history[..., 0] >= 0).sum(dim=1) - 1
        states = self._states(history)[torch.arange(len(history), device=history.device), last]
        return states @ self.items.weight.T

    def _states(self, history: Tensor) -> Tensor:
        items = history[..., 0].clamp(min=0)
        x = self.items(items) * math.sqrt(self.config.d_model)
        x = self.dropout(x + self.position.weight[: items.shape[1]])
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def _binary(self, rows: Tensor, items: Tensor, history: Tensor, real: Tensor) -> Tensor:
        """-log sigmoid(positive) - sum over negatives of log(1 - sigmoid(negative))."""
        count = self.config.negatives
        drawn = torch.randint(self.config.n_items, (len(items), count), device=items.device)
        user = real.nonzero()[:, 0]
        seen = (drawn[:, :, None] == history[user, None, :, 0]).any(dim=2)
        seen |= drawn == items[:, None]
        positive = (rows * self.items(items)).sum(dim=1)
        negative = torch.einsum("td,tnd->tn", rows, self.items(drawn))
        against = F.softplus(negative).masked_fill(seen, 0.0).sum(dim=1)
        return (F.softplus(-positive) + against).mean()
