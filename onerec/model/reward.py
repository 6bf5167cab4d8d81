"""The reward model: what a user would do with a whole session (arXiv 2502.18965, section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onerec.model.attention import RMSNorm, SelfAttention, merge_heads, split_heads
from onerec.model.config import RewardModelConfig
from onerec.model.pretrained import Pretrained


class RewardModel(Pretrained):
    """Target attention over the history, self-attention over the session, a tower a target.

    An item's vector v_i is a projection of its features plus a vector of its own. Target attention
    makes of it e_i = v_i (.) u: v_i asks the user's history (with each item's age), and e_i is a
    small network of v_i, the answer, and their product. Self-attention over e_1 .. e_m (with their
    slots) gives the states h_f; towers read their sum, or each of them (`config.labels`). With
    `config.wide` a linear model of the features is added to each output.

    Args:
        config: Its shape.

    Attributes:
        item_features: float32 [n_items, feature_dim], a buffer: it is saved with the weights.
    """

    model_type = "onerec-reward"
    config_class = RewardModelConfig
    config: RewardModelConfig
    item_features: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.register_buffer("item_features", torch.zeros(config.n_items, config.feature_dim))
        self.features = nn.Linear(config.feature_dim, d)
        self.items = nn.Embedding(config.n_items, d) if config.item_ids else None
        self.age = nn.Embedding(config.history_length, d)
        self.nobody = nn.Parameter(torch.zeros(d))
        self.query = nn.Linear(d, d, bias=False)
        self.keys_values = nn.Linear(d, 2 * d, bias=False)
        self.meet = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))
        self.slot = nn.Embedding(config.session_length, d)
        self.norm = RMSNorm(d, 1e-6)
        self.among = SelfAttention(d, config.n_heads)
        self.final_norm = RMSNorm(d, 1e-6)
        self.dropout = nn.Dropout(config.dropout)
        width = config.tower_width
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, 1))
            for _ in config.targets
        )
        self.wide = (
            nn.Linear(config.feature_dim + 1, len(config.targets), bias=False)
            if config.wide
            else None
        )
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        tables = [self.age, self.slot, *([self.items] if self.items is not None else [])]
        for table in tables:
            table.weight.normal_(std=0.02)
        self.nobody.normal_(std=0.02)
        if self.wide is not None:
            self.wide.weight.zero_()
        for tower, rate, weight in zip(
            self.towers, self.config.base_rates, self.config.positive_weights, strict=True
        ):
            last = tower[-1]  # type: ignore[index]
            # Rare targets start at their rate instead of at one half.
            last.bias.fill_(float(torch.logit(torch.tensor(rate)) + torch.tensor(weight).log()))
            last.weight.mul_(0.1)

    def forward(self, history: Tensor, sessions: Tensor) -> Tensor:
        """Logits as trained (positives weighted).

        Args:
            history: int64 [B, S], item indices, oldest first, -1 past a user's history; S may be 0
                and at most `history_length`.
            sessions: int64 [B, N, m], N sessions of each user, -1 past a session's end.

        Returns:
            [B, N, m, targets] with labels of items (padded slots mean nothing), else
            [B, N, 1, targets].

        Raises:
            ValueError: A wrong shape, or an item index out of range.
        """
        self._check(history, sessions)
        batch, count, length = sessions.shape
        real = sessions >= 0
        own = self._vectors(sessions.clamp(min=0)).flatten(1, 2)
        met = self._target_attention(own, history)
        state = self.meet(torch.cat([own, met, own * met], dim=-1))
        state = state.view(batch * count, length, -1) + self.slot.weight[:length]
        # An empty session sees its own padding instead of nothing at all.
        seen = (real | ~real.any(dim=-1, keepdim=True)).view(batch * count, 1, 1, length)
        state = state + self.among(self.norm(state), mask=seen)
        if self.config.labels == "session":
            shown = real.view(batch * count, length, 1)
            state = torch.where(shown, state, 0).sum(dim=1, keepdim=True)
        state = self.dropout(self.final_norm(state))
        logits = torch.cat([tower(state) for tower in self.towers], dim=-1)
        logits = logits.view(batch, count, -1, len(self.towers))
        return logits if self.wide is None else logits + self._linear(history, sessions)

    def predict(self, history: Tensor, sessions: Tensor) -> Tensor:
        """Calibrated outputs of whole sessions, [B, N, targets] in (0, 1): the mean over items.

        Arguments as for `forward`.
        """
        probabilities = self.probabilities(self(history, sessions))
        if self.config.labels == "session":
            return probabilities.squeeze(2)
        real = (sessions >= 0).unsqueeze(-1)
        total = torch.where(real, probabilities, 0).sum(dim=2)
        return total / real.sum(dim=2).clamp(min=1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid of the logits, with the weight of the positives taken out.

        Positives that count w times multiply the odds by w, so log w is subtracted.
        """
        weights = torch.tensor(self.config.positive_weights, device=logits.device)
        return torch.sigmoid(logits.float() - weights.log())

    def score(self, history: Tensor, sessions: Tensor) -> Tensor:
        """The fused reward [B, N]: the weighted mean of the targets, each over its base rate.

        1 is a session like the average of the log. Arguments as for `forward`.
        """
        weights = torch.tensor(self.config.weights, device=sessions.device)
        rates = torch.tensor(self.config.base_rates, device=sessions.device)
        lifts: Tensor = self.predict(history, sessions) / rates
        return (lifts * weights).sum(dim=-1) / weights.abs().sum()

    def _linear(self, history: Tensor, sessions: Tensor) -> Tensor:
        """The wide part, of items [B, N, m, targets] or their mean [B, N, 1, targets]."""
        assert self.wide is not None
        real = (sessions >= 0).unsqueeze(-1)
        features = self.item_features[sessions.clamp(min=0)]
        length = (history >= 0).sum(dim=1).to(features.dtype).log1p()
        length = length.view(-1, 1, 1, 1).expand(*sessions.shape, 1)
        logits: Tensor = self.wide(torch.cat([features, length], dim=-1))
        if self.config.labels == "session":
            total = torch.where(real, logits, 0).sum(dim=2, keepdim=True)
            logits = total / real.sum(dim=2, keepdim=True).clamp(min=1)
        return logits

    def _vectors(self, items: Tensor) -> Tensor:
        vectors: Tensor = self.features(self.item_features[items])
        return vectors if self.items is None else vectors + self.items(items)

    def _target_attention(self, own: Tensor, history: Tensor) -> Tensor:
        """What items [B, Q, d] read in the history [B, S]."""
        real = history >= 0
        back = (
            real.sum(dim=1, keepdim=True)
            - 1
            - torch.arange(history.shape[1], device=history.device)
        )
        past = self._vectors(history.clamp(min=0)) + self.age(back.clamp(min=0))
        past = torch.cat([self.nobody.expand(len(past), 1, -1), past], dim=1)
        mask = F.pad(real, (1, 0), value=True)[:, None, None, :]
        heads = self.config.n_heads
        keys, values = (
            split_heads(part, heads) for part in self.keys_values(past).chunk(2, dim=-1)
        )
        asked = split_heads(self.query(own), heads)
        return merge_heads(F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask))

    def _check(self, history: Tensor, sessions: Tensor) -> None:
        config = self.config
        if history.dim() != 2 or history.shape[1] > config.history_length:
            raise ValueError(
                f"history must be [B, at most {config.history_length}], got {list(history.shape)}"
            )
        if (
            sessions.dim() != 3
            or len(sessions) != len(history)
            or not 1 <= sessions.shape[2] <= config.session_length
        ):
            raise ValueError(
                f"sessions must be [{len(history)}, N, 1 to {config.session_length}], "
                f"got {list(sessions.shape)}"
            )
        for name, items in (("history", history), ("sessions", sessions)):
            if items.device.type == "cpu" and items.numel():
                low, high = int(items.min()), int(items.max())
                if low < -1 or high >= config.n_items:
                    raise ValueError(
                        f"{name} must hold item indices 0..{config.n_items - 1} (-1 is padding), "
                        f"got {low}..{high}"
                    )
