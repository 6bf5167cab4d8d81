"""Routing by the Triton kernel, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def route(
    logits: Tensor,
    *,
    top_k: int,
    normalize: bool,
    selection_bias: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """ids, gates, counts, and the sums of `onerec.kernels.moe_route.Routed`; float32 logits [T, E].

    Gradients of gates, probability sums and z-sum reach `logits`.
    """
    out: tuple[Tensor, ...] = _Route.apply(logits, selection_bias, mask, top_k, normalize)  # type: ignore[no-untyped-call]
    return out


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        selection_bias: Tensor | None,
        mask: Tensor | None,
        top_k: int,
        normalize: bool,
    ) -> tuple[Tensor, ...]:
        from onerec.kernels.moe_route import moe_route  # type: ignore[import-not-found]

        routed = moe_route(
            logits, top_k=top_k, normalize=normalize, selection_bias=selection_bias, mask=mask
        )
        ctx.save_for_backward(logits, routed.ids, routed.gates, mask)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(routed.ids, routed.counts, routed.entropy_sum)
        return tuple(routed)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _ids: Tensor,
        d_gates: Tensor,
        _counts: Tensor,
        d_probability: Tensor,
        d_z: Tensor,
        _entropy: Tensor,
    ) -> tuple[Tensor | None, ...]:
        logits, ids, gates, mask = ctx.saved_tensors
        z = logits.logsumexp(dim=-1, keepdim=True)
        p = (logits - z).exp()
        if mask is not None:
            # A masked token has no ids; any column does, as its gradient is cleared below.
            ids = torch.where(mask[:, None], ids, 0)
        if ctx.normalize:
            total = p.gather(1, ids).sum(dim=-1, keepdim=True)
            d_gates = (d_gates - (d_gates * gates).sum(dim=-1, keepdim=True)) / total
        # The ids of a row differ (or are cleared), so the order of additions does not matter.
        d_p = d_probability.expand_as(p).scatter_add(1, ids, d_gates)
        d_logits = p * (d_p - (p * d_p).sum(dim=-1, keepdim=True)) + 2 * d_z * z * p
        if mask is not None:
            d_logits = torch.where(mask[:, None], d_logits, 0)
        return d_logits, None, None, None, None
