"""Routing of a mixture of experts in one kernel: softmax, top-k, gates and load counts.

Compiled for sm_90 and sm_80 and run through Triton's interpreter; not yet run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Routed(NamedTuple):
    """See `moe_route`.

    Attributes:
        ids: int64 [T, k], best first, ties by the lower id; E where a token is masked.
        gates: float32 [T, k].
        counts: int64 [E].
        probability_sum: float32 [E], softmax probabilities summed over tokens.
        z_sum: float32 [], squared log-sum-exps summed over tokens.
        entropy_sum: float32 [], entropies (nats) summed over tokens.
    """

    ids: Tensor
    gates: Tensor
    counts: Tensor
    probability_sum: Tensor
    z_sum: Tensor
    entropy_sum: Tensor


@triton.jit  # type: ignore[untyped-decorator]
def moe_route_kernel(  # type: ignore[no-untyped-def]
    logits,  # float32 [T, E]
    bias,  # float32 [E] or None
    mask,  # bool as int8 [T] or None
    ids,  # int64 [T, K]
    gates,  # float32 [T, K]
    counts,  # int32 [blocks, E]
    sums,  # float32 [blocks, E + 2]
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    row = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_E)
    inside = row < tokens
    expert = (column < E)[None, :]
    x = tl.load(logits + row[:, None] * E + column[None, :], inside[:, None] & expert, other=0.0)
    x = tl.where(expert, x, float("-inf"))
    high = tl.max(x, axis=1)
    x -= high[:, None]
    e = tl.exp(x)
    total = tl.sum(e, axis=1)
    p = e / total[:, None]
    log_total = tl.log(total)
    z = high + log_total
    # -sum p log p; an expert of probability 0 adds nothing.
    log_p = tl.where(e > 0.0, x - log_total[:, None], 0.0)
    entropy = -tl.sum(p * log_p, axis=1)

    score = p
    if bias is not None:
        score += tl.load(bias + column, column < E, other=0.0)[None, :]
    score = tl.where(score == score, score, float("inf"))  # NaN is chosen first, as by argmax
    score = tl.where(expert, score, float("-inf"))
    slot = tl.arange(0, BLOCK_K)[None, :]
    chosen_ids = tl.full((BLOCK_T, BLOCK_K), E, tl.int64)
    chosen_gates = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for j in tl.static_range(K):
        best = tl.argmax(score, axis=1, tie_break_left=True)
        hit = column[None, :] == best[:, None]
        gate = tl.sum(tl.where(hit, p, 0.0), axis=1)
        chosen_ids = tl.where(slot == j, best[:, None].to(tl.int64), chosen_ids)
        chosen_gates = tl.where(slot == j, gate[:, None], chosen_gates)
        chosen += hit.to(tl.int32)
        score = tl.where(hit, float("-inf"), score)
    if NORMALIZE:
        chosen_gates /= tl.sum(chosen_gates, axis=1)[:, None]

    real = inside
    if mask is not None:
        real = inside & (tl.load(mask + row, inside, other=0) != 0)
    chosen_ids = tl.where(real[:, None], chosen_ids, E)
    at = row[:, None] * K + slot
    valid = inside[:, None] & (slot < K)
    tl.store(ids + at, chosen_ids, valid)
    tl.store(gates + at, chosen_gates, valid)
    # One row of partial sums a block, added up afterwards in a fixed order: no atomics.
    load = tl.sum(tl.where(real[:, None], chosen, 0), axis=0)
    mass = tl.sum(tl.where(real[:, None], p, 0.0), axis=0)
    tl.store(counts + block * E + column, load, column < E)
    tl.store(sums + block * (E + 2) + column, mass, column < E)
    tl.store(sums + block * (E + 2) + E, tl.sum(tl.where(real, z * z, 0.0), axis=0))
    tl.store(sums + block * (E + 2) + E + 1, tl.sum(tl.where(real, entropy, 0.0), axis=0))


def block_sizes(n_experts: int, top_k: int) -> dict[str, int]:
    """Constants of the kernel: rows so that a block holds about 2,048 logits."""
    block_e = max(triton.next_power_of_2(n_experts), 2)
    return {
        "BLOCK_T": max(2048 // block_e, 1),
        "BLOCK_E": block_e,
        "BLOCK_K": triton.next_power_of_2(top_k),
    }


def moe_route(
    logits: Tensor,
    *,
    top_k: int,
    normalize: bool = False,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routed:
    """Chooses experts as `onerec.ops.moe_route` does; no gradients, no host synchronisation.

    Deterministic. Allocates its outputs and two small arrays of partial sums.

    Args:
        logits: float32 [T, E], contiguous, E at most 1,024.
        top_k: 1..E.
        normalize: Divide the kept gates by their sum.
        selection_bias: float32 [E], added to the probabilities for the choice only.
        mask: bool [T]; tokens with False get the id E and are in no sum.

    Raises:
        ValueError: `logits` are not contiguous float32 [T, E <= 1024].
    """
    if logits.dtype != torch.float32 or logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(
            f"logits: wanted contiguous float32 [T, E], got {logits.dtype} {list(logits.shape)}"
        )
    tokens, n_experts = logits.shape
    if n_experts > 1024:
        raise ValueError(f"logits: wanted at most 1024 experts, got {n_experts}")
    sizes = block_sizes(n_experts, top_k)
    blocks = triton.cdiv(tokens, sizes["BLOCK_T"])
    device = logits.device
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    gates = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    counts = torch.empty(blocks, n_experts, dtype=torch.int32, device=device)
    sums = torch.empty(blocks, n_experts + 2, dtype=torch.float32, device=device)
    if blocks:
        moe_route_kernel[(blocks,)](
            logits,
            None if selection_bias is None else selection_bias.float().contiguous(),
            None if mask is None else mask.contiguous().view(torch.int8),
            ids,
            gates,
            counts,
            sums,
            tokens,
            E=n_experts,
            K=top_k,
            NORMALIZE=normalize,
            num_warps=4,
            enable_fp_fusion=True,
            **sizes,
        )
    totals = sums.sum(dim=0)
    return Routed(
        ids, gates, counts.sum(dim=0), totals[:n_experts], totals[n_experts], totals[n_experts + 1]
    )
