"""The position-wise layers: a dense one and a sparse mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onerec.model.config import OneRecConfig
from onerec.ops import MoEStats, PackedExperts, moe, moe_route
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

    In evaluation mode without gradients, float32 on the CPU runs native code on a packed copy of
    the experts' weights. The copy is made again when the weights have changed (which autograd's
    version counter tells: writes through `.data` are not seen) and dropped by `train()`.

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
        self._packed: tuple[tuple[int, ...], PackedExperts] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        bias = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.selection_bias.dtype != bias.dtype:
            # A step of 1e-3 would be lost in bfloat16.
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def forward(
        self, x: Tensor, mask: Tensor | None = None, backend: str = "auto"
    ) -> tuple[Tensor, MoEStats]:
        """y [T, d] and what the router did.

        Args:
            x: [T, d].
            mask: bool [T]; tokens with False are skipped (y = 0) and not counted.
            backend: As for `onerec.ops.moe`.
        """
        bias = self.selection_bias if self.config.loss_free_balancing else None
        top_k, normalize = self.config.experts_per_token, self.config.normalize_gates
        if backend == "auto" and self._use_packed(x):
            routing = moe_route(
                x, self.router, top_k=top_k, normalize=normalize, selection_bias=bias, mask=mask
            )
            return self._pack()(x, routing.ids, routing.gates), routing.stats
        return moe(
            x,
            self.router,
            self.w13,
            self.w2,
            top_k=top_k,
            activation=self.config.activation,
            normalize=normalize,
            selection_bias=bias,
            mask=mask,
            backend=backend,
        )

    def train(self, mode: bool = True) -> MoE:
        if mode:
            self._packed = None
        return super().train(mode)

    def _use_packed(self, x: Tensor) -> bool:
        return (
            not self.training
            and not torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == self.w13.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not self.w13.is_inference()
            and not torch.compiler.is_compiling()
        )

    def _pack(self) -> PackedExperts:
        """The packed copy of the present weights."""
        state = tuple(n for w in (self.w13, self.w2) for n in (w.data_ptr(), w._version))
        current = self._packed  # another thread may exchange it
        if current is None or current[0] != state:
            current = (state, PackedExperts(self.w13, self.w2, activation=self.config.activation))
            self._packed = current
        return current[1]

    def __getstate__(self) -> dict[str, Any]:
        """Pickled and copied without the packed weights."""
        return {**self.__dict__, "_packed": None}

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """selection_bias += rate * sign(mean count - count), algorithm 1 of arXiv 2408.15664.

        Args:
            counts: [E], (token, slot) pairs each expert got in the whole batch.
        """
        load = counts.to(self.selection_bias)
        self.selection_bias += self.config.balancing_rate * (load.mean() - load).sign()
