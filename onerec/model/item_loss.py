"""Cross entropy of the next item over a catalogue: all of it, or negatives drawn from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CELLS = 500_000  # logits held at once: 2 MB, which a cache can hold


class _FullCrossEntropy(torch.autograd.Function):
    """The mean of -log softmax(states @ table.T)[targets], its gradients made in the same pass.

    The [T, N] logits never exist as a whole.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        needed = any(ctx.needs_input_grad)
        rows = max(1, _CELLS // len(table))
        exact = torch.promote_types(states.dtype, torch.float32)
        total = states.new_zeros((), dtype=exact)
        d_states = torch.empty_like(states) if needed else None
        d_table = torch.zeros_like(table) if needed else None
        for begin in range(0, len(states), rows):
            part = slice(begin, begin + rows)
            x, y = states[part], targets[part, None]
            logits = (x @ table.T).to(exact)
            wanted_logit = logits.gather(1, y)
            peak = logits.amax(dim=1, keepdim=True)
            odds = logits.sub_(peak).exp_()
            scale = odds.sum(dim=1, keepdim=True)
            total += (scale.log() + peak - wanted_logit).sum()
            if d_states is not None and d_table is not None:
                slope = odds.mul_(1 / (scale * len(states)))
                slope.scatter_add_(1, y, slope.new_full((len(x), 1), -1 / len(states)))
                slope = slope.to(table.dtype)
                d_states[part] = slope @ table
                d_table.addmm_(slope.T, x.to(table.dtype))
        if d_states is not None and d_table is not None:
            ctx.save_for_backward(d_states, d_table)
        return total / len(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        d_states, d_table = ctx.saved_tensors
        return d_states * grads[0], d_table * grads[0], None


def item_cross_entropy(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows of -log softmax(states @ table.T)[targets], over the whole catalogue.

    Args:
        states: [T, d], T >= 1.
        table: [N, d].
        targets: int64 [T] in 0..N-1.

    Returns:
        [], at least float32.
    """
    loss: Tensor = _FullCrossEntropy.apply(states, table, targets)  # type: ignore[no-untyped-call]
    return loss


def sampled_item_cross_entropy(
    states: Tensor, positives: Tensor, negatives: Tensor, same: Tensor, n_items: int
) -> Tensor:
    """The same over the target and n negatives that all rows share.

    The negatives are uniform draws: their logits get log((N - 1) / n), so that the sum over them is
    an unbiased estimate of the sum over the catalogue (Jean et al., arXiv 1412.2007, section 3).

    Args:
        states: [T, d].
        positives: [T, d], the target items' vectors.
        negatives: [n, d].
        same: bool [T, n], where a negative is the row's target: left out.
        n_items: N.

    Returns:
        [], at least float32.
    """
    logits = states @ negatives.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits + math.log((n_items - 1) / len(negatives))
    logits = logits.masked_fill(same, float("-inf"))
    wanted = (states * positives).sum(dim=1, keepdim=True).to(logits.dtype)
    return (torch.cat([wanted, logits], dim=1).logsumexp(dim=1) - wanted.squeeze(1)).mean()
