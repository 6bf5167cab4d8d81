"""The fast PyTorch experts: pairs sorted by expert, grouped products, a deterministic combine.

Forward keeps x and the pre-activation only; backward recomputes the activation from it and takes
the gate's gradient from <d activation, activation>, so the expert outputs are never kept (the
arrangement of arXiv 2512.14080).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


def grouped_mm_fits(x: Tensor, w13: Tensor, w2: Tensor) -> str | None:
    """Why `F.grouped_mm` cannot take these tensors, or None when it can."""
    types = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if x.dtype not in types:
        return (
            f"F.grouped_mm takes {' or '.join(map(str, types))} on {x.device.type}, not {x.dtype}"
        )
    for name, size in (("d", x.shape[1]), ("F", w2.shape[2])):
        if size * x.element_size() % 16:
            return f"F.grouped_mm needs rows of a multiple of 16 bytes, {name} is {size}"
    return None


def grouped_experts(
    x: Tensor, ids: Tensor, gates: Tensor, w13: Tensor, w2: Tensor, activation: str, fused: bool
) -> Tensor:
    """y [T, d]; arguments as for `onerec.ops.moe_experts`, already checked.

    Args:
        fused: Multiply by `F.grouped_mm`, which needs no copy of the counts to the host, instead of
            expert by expert with `torch.mm`.
    """
    # grouped_mm is not asked to multiply nothing; no rows cost no copy either.
    function = _Fused if fused and len(ids) else _Segmented
    out: Tensor = function.apply(x, ids, gates, w13, w2, activation)  # type: ignore[no-untyped-call]
    return out


def _activate(hidden: Tensor, activation: str) -> Tensor:
    if activation in PLAIN:
        return PLAIN[activation](hidden)
    gate, value = hidden.chunk(2, dim=-1)
    return GATED[activation](gate) * value


def _activate_backward(hidden: Tensor, grad: Tensor, activation: str) -> Tensor:
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        return torch.autograd.grad(_activate(leaf, activation), leaf, grad)[0]


class _Plan:
    """The order of (token, slot) pairs by expert; P = T k pairs, those of nobody last.

    Attributes:
        order: int64 [P], pair of each sorted position; stable, so by token within an expert.
        inverse: int64 [T, k], sorted position of each pair.
        token: int64 [P], token of each sorted position.
        here: bool [P], sorted positions that belong to an expert.
        ends: int64 [E], sorted position where the rows of each expert end.
    """

    def __init__(self, ids: Tensor, n_experts: int) -> None:
        outside = (ids < 0) | (ids >= n_experts)
        keys, self.order = ids.masked_fill(outside, n_experts).flatten().sort(stable=True)
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(keys), device=keys.device)
        self.inverse = inverse.view_as(ids)
        self.token = self.order // ids.shape[1]
        self.here = keys < n_experts
        experts = torch.arange(n_experts, device=keys.device)
        self.ends = torch.searchsorted(keys, experts, right=True)

    def segments(self) -> list[tuple[int, int, int]]:
        """(expert, first, last) of the experts that have rows; copies the ends to the host."""
        bounds = [0, *self.ends.tolist()]
        return [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if a < b]

    def combine(self, rows: Tensor, gates: Tensor | None) -> Tensor:
        """Sums the k rows of each token in slot order, times its gates, in float32 or more.

        Args:
            rows: [P, n], zeros for the rows of nobody.
            gates: [T, k], or None for ones.

        Returns:
            [T, n] of the type of `rows`.
        """
        dtype = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros(self.inverse.shape[0], rows.shape[1], dtype=dtype)
        for slot in range(self.inverse.shape[1]):
            part = rows.index_select(0, self.inverse[:, slot])
            if gates is None:
                total += part
            else:
                total.addcmul_(part.to(dtype), gates[:, slot, None].to(dtype))
        return total.to(rows.dtype)


class _Segmented(torch.autograd.Function):
    """Expert by expert over its contiguous rows, so that a segment stays in the cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, gates: Tensor, w13: Tensor, w2: Tensor, activation: str
    ) -> Tensor:
        plan = _Plan(ids, w2.shape[0])
        segments = plan.segments()
        keep = any(ctx.needs_input_grad)
        hidden = x.new_empty(len(plan.order), w13.shape[1]) if keep else None
        out = x.new_empty(len(plan.order), x.shape[1])
        out[segments[-1][2] if segments else 0 :].zero_()
        for e, a, b in segments:
            rows = x.index_select(0, plan.token[a:b])
            h = torch.mm(rows, w13[e].T, out=None if hidden is None else hidden[a:b])
            torch.mm(_activate(h, activation), w2[e].T, out=out[a:b])
        if keep:
            ctx.save_for_backward(x, gates, w13, w2, hidden)
            ctx.plan, ctx.segments, ctx.activation = plan, segments, activation
        return plan.combine(out, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, w13, w2, hidden = ctx.saved_tensors
        plan: _Plan = ctx.plan
        flat = gates.flatten()
        dots = torch.zeros_like(flat)
        d_rows = torch.zeros(len(plan.order), x.shape[1], dtype=x.dtype, device=x.device)
        d_w13, d_w2 = torch.zeros_like(w13), torch.zeros_like(w2)
        for e, a, b in ctx.segments:
            pair, token = plan.order[a:b], plan.token[a:b]
            d_out = grad.index_select(0, token)
            gate = flat.index_select(0, pair)
            activated = _activate(hidden[a:b], ctx.activation)
            d_activated = d_out @ w2[e]
            dots[pair] = (d_activated.to(flat.dtype) * activated.to(flat.dtype)).sum(dim=-1)
            gate = gate[:, None].to(x.dtype)
            torch.mm(d_out.T, activated * gate, out=d_w2[e])
            d_hidden = _activate_backward(hidden[a:b], d_activated * gate, ctx.activation)
            torch.mm(d_hidden.T, x.index_select(0, token), out=d_w13[e])
            torch.mm(d_hidden, w13[e], out=d_rows[a:b])
        return plan.combine(d_rows, None), None, dots.view_as(gates), d_w13, d_w2, None


class _Fused(torch.autograd.Function):
    """All experts in one `F.grouped_mm` a product; nothing is copied to the host."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, gates: Tensor, w13: Tensor, w2: Tensor, activation: str
    ) -> Tensor:
        plan = _Plan(ids, w2.shape[0])
        ends = plan.ends.to(torch.int32)
        rows = x.index_select(0, plan.token)
        hidden = F.grouped_mm(rows, w13.transpose(1, 2), offs=ends)
        out = F.grouped_mm(_activate(hidden, activation), w2.transpose(1, 2), offs=ends)
        ctx.save_for_backward(x, gates, w13, w2, hidden)
        ctx.plan, ctx.activation = plan, activation
        # grouped_mm leaves the rows of nobody as they were in memory.
        return plan.combine(torch.where(plan.here[:, None], out, 0), gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, w13, w2, hidden = ctx.saved_tensors
        plan: _Plan = ctx.plan
        ends = plan.ends.to(torch.int32)
        flat = gates.flatten()
        d_out = grad.index_select(0, plan.token)
        activated = _activate(hidden, ctx.activation)
        d_activated = F.grouped_mm(d_out, w2, offs=ends)
        dots = (d_activated.to(flat.dtype) * activated.to(flat.dtype)).sum(dim=-1)
        d_gates = torch.where(plan.here, dots, 0).index_select(0, plan.inverse.flatten())
        gate = flat.index_select(0, plan.order)[:, None].to(x.dtype)
        d_w2 = F.grouped_mm(d_out.T, activated * gate, offs=ends)
        d_hidden = _activate_backward(hidden, d_activated * gate, ctx.activation)
        d_w13 = F.grouped_mm(d_hidden.T, x.index_select(0, plan.token), offs=ends)
        d_rows = F.grouped_mm(d_hidden, w13, offs=ends)
        d_x = plan.combine(torch.where(plan.here[:, None], d_rows, 0), None)
        return d_x, None, d_gates.view_as(gates), d_w13, d_w2, None
