"""The position-wise layers: a dense one and a sparse mixture of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onerec.model.config import OneRecConfig
from onerec.ops import MoEStats, moe
from onerec.ops.moe.reference import activate


class FeedForward(nn.Module):
    """w2 act(w13 x), the gate half of w13 first."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.activation = config.activation
        rows = config.d_ff * (2 if config.activation in ("swiglu", "geglu") else 1)
        self.w13 = nn.Linear(config.d_model, rows, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(activate(self.w13(x), self.activation))
        return out


class MoE(nn.Module):
    """Sparse mixture of experts with loss-free balancing (arXiv 2502.18965 and 2408.15664).

    Attributes:
        selection_bias: float32 [E], a buffer; stays float32 when the module is cast.
    """

    selection_bias: Tensor

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        e, d, f = config.n_experts, config.d_model, config.expert_d_ff
        rows = f * (2 if config.activation in ("swiglu", "geglu") else 1)
        self.config = config
        self.router = nn.Parameter(torch.zeros(e, d))
        self.w13 = nn.Parameter(torch.zeros(e, rows, d))
        self.w2 = nn.Parameter(torch.zeros(e, d, f))
        self.register_buffer("selection_bias", torch.zeros(e, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        bias = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.selection_bias.dtype != bias.dtype:
            # A step of 1e-3 would be lost in bfloat16.
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, MoEStats]:
        """y [T, d] and what the router did.

        Args:
            x: [T, d].
            mask: bool [T]; tokens with False are skipped (y = 0) and not counted.
        """
        return moe(
            x,
            self.router,
            self.w13,
            self.w2,
            top_k=self.config.experts_per_token,
            activation=self.config.activation,
            normalize=self.config.normalize_gates,
            selection_bias=self.selection_bias if self.config.loss_free_balancing else None,
            mask=mask,
        )

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """selection_bias += rate * sign(mean count - count), algorithm 1 of arXiv 2408.15664.

        Args:
            counts: [E], (token, slot) pairs each expert got in the whole batch.
        """
        load = counts.to(self.selection_bias)
        self.selection_bias += self.config.balancing_rate * (load.mean() - load).sign()
