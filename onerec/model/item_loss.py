"""Cross entropy of the next item over a catalogue: all of it, or negatives drawn from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at once, and items whose logits are made together: on a CPU a tile of 1,024 stays in
# cache from its product to its exponential; a GPU wants few and large kernels.
_CELLS = {"cpu": 4_000_000, "cuda": 256_000_000}
_TILE = {"cpu": 1024, "cuda": 1 << 30}


class _FullCrossEntropy(torch.autograd.Function):
    """The mean of -log softmax(states @ table.T)[targets], its gradients made in the same pass.

    At most `_CELLS` logits exist at once.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        needed = any(ctx.needs_input_grad)
        count, device = len(states), states.device.type
        rows = max(1, _CELLS.get(device, _CELLS["cpu"]) // len(table))
        size = _TILE.get(device, _TILE["cpu"])
        tiles = [slice(i, i + size) for i in range(0, len(table), size)]
        exact = torch.promote_types(states.dtype, torch.float32)
        total = states.new_zeros((), dtype=exact)
        d_states = torch.zeros_like(states, dtype=table.dtype)
        d_table = torch.zeros_like(table)
        for begin in range(0, count, rows):
            chunk = slice(begin, begin + rows)
            x, wanted = states[chunk], table[targets[chunk]]
            odds = [(x @ table[tile].T).to(exact) for tile in tiles]
            peak = torch.stack([part.amax(dim=1) for part in odds]).amax(dim=0).unsqueeze(1)
            odds = [part.sub_(peak).exp_() for part in odds]
            scale = torch.stack([part.sum(dim=1) for part in odds]).sum(dim=0).unsqueeze(1)
            wanted_logit = (x * wanted).sum(dim=1, keepdim=True).to(exact)
            total += (scale.log() + peak - wanted_logit).sum()
            if not needed:
                continue
            share = (1 / (scale * count)).to(table.dtype)
            x, slope = x.to(table.dtype), d_states[chunk]
            scaled = x * share
            for some, tile in zip(odds, tiles, strict=True):
                some = some.to(table.dtype)
                slope.addmm_(some, table[tile])
                d_table[tile].addmm_(some.T, scaled)
            slope.mul_(share).sub_(wanted, alpha=1 / count)
            d_table.index_add_(0, targets[chunk], x, alpha=-1 / count)
        if needed:
            ctx.save_for_backward(d_states.to(states.dtype), d_table)
        return total / count

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
