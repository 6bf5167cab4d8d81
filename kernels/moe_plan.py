"""The order of a mixture's (token, slot) pairs by expert, made on the device without atomics.

Compiled for sm_90 and sm_80 and run through Triton's interpreter; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A single block sorts so many pairs in one launch; more take one launch to count and one to sort.
ALONE = 2048


@triton.jit  # type: ignore[untyped-decorator]
def _chunk(ids, at, pairs, first, E: tl.constexpr, BLOCK_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [CHUNK, BLOCK_E], one-hot expert of each pair; column E is nobody's."""
    local = tl.load(ids + at, at < pairs, other=0) - first
    local = tl.where((local < 0) | (local >= E), E, local).to(tl.int32)
    hit = local[:, None] == tl.arange(0, BLOCK_E)[None, :]
    return (hit & (at < pairs)[:, None]).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def moe_count_kernel(  # type: ignore[no-untyped-def]
    ids,  # int64 [P]
    counts,  # int32 [blocks, BLOCK_E]
    pairs,
    first,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    block = tl.program_id(0)
    total = tl.zeros((BLOCK_E,), tl.int32)
    for c in range(CHUNKS):
        at = (block * CHUNKS + c) * CHUNK + tl.arange(0, CHUNK)
        total += tl.sum(_chunk(ids, at, pairs, first, E, BLOCK_E), axis=0)
    tl.store(counts + block * BLOCK_E + tl.arange(0, BLOCK_E), total)


@triton.jit  # type: ignore[untyped-decorator]
def moe_plan_kernel(  # type: ignore[no-untyped-def]
    ids,  # int64 [P]
    counts,  # int32 [blocks, BLOCK_E], or None when there is one block
    order,  # int32 [P]
    inverse,  # int32 [P]
    ends,  # int32 [E]
    pairs,
    first,
    blocks,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    block = tl.program_id(0)
    column = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    if counts is None:
        for c in range(CHUNKS):
            at = c * CHUNK + tl.arange(0, CHUNK)
            total += tl.sum(_chunk(ids, at, pairs, first, E, BLOCK_E), axis=0)
    else:
        for b in range(0, blocks, BLOCK_B):
            row = b + tl.arange(0, BLOCK_B)
            part = tl.load(
                counts + row[:, None] * BLOCK_E + column[None, :], (row < blocks)[:, None], other=0
            )
            total += tl.sum(part, axis=0)
            before += tl.sum(tl.where((row < block)[:, None], part, 0), axis=0)
    last = tl.cumsum(total, axis=0)
    if block == 0:
        tl.store(ends + column, last, column < E)
    start = last - total + before
    for c in range(CHUNKS):
        at = (block * CHUNKS + c) * CHUNK + tl.arange(0, CHUNK)
        hit = _chunk(ids, at, pairs, first, E, BLOCK_E)
        # Earlier pairs of the same expert go before, so the order is stable.
        place = tl.sum(hit * (tl.cumsum(hit, axis=0) - 1 + start[None, :]), axis=1)
        tl.store(order + place, at, at < pairs)
        tl.store(inverse + at, place, at < pairs)
        start += tl.sum(hit, axis=0)


def block_sizes(n_experts: int, pairs: int) -> dict[str, int]:
    """Constants of both kernels: chunks of about 8,192 one-hot entries."""
    block_e = triton.next_power_of_2(n_experts + 1)
    chunk = max(8192 // block_e, 1)
    chunks = triton.cdiv(pairs, chunk) if pairs <= ALONE else max(1024 // chunk, 1)
    return {"BLOCK_E": block_e, "CHUNK": chunk, "CHUNKS": triton.next_power_of_2(chunks)}


def moe_plan(ids: Tensor, n_experts: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `onerec.ops.moe.grouped.plan`; deterministic, no host synchronisation.

    Args:
        ids: int64 [T, k], T k below 2^31.
        n_experts: Experts that are here, E.
        first: Id of the first of them.

    Returns:
        order int32 [P], inverse int32 [P], ends int32 [E].
    """
    pairs, device = ids.numel(), ids.device
    order, inverse = (torch.empty(pairs, dtype=torch.int32, device=device) for _ in range(2))
    if pairs == 0:
        return order, inverse, torch.zeros(n_experts, dtype=torch.int32, device=device)
    ends = torch.empty(n_experts, dtype=torch.int32, device=device)
    sizes = block_sizes(n_experts, pairs)
    blocks = triton.cdiv(pairs, sizes["CHUNK"] * sizes["CHUNKS"])
    ids, counts = ids.contiguous(), None
    if blocks > 1:
        counts = torch.empty(blocks, sizes["BLOCK_E"], dtype=torch.int32, device=device)
        moe_count_kernel[(blocks,)](ids, counts, pairs, first, E=n_experts, num_warps=8, **sizes)
    moe_plan_kernel[(blocks,)](
        ids,
        counts,
        order,
        inverse,
        ends,
        pairs,
        first,
        blocks,
        E=n_experts,
        BLOCK_B=max(2048 // sizes["BLOCK_E"], 1),
        num_warps=8,
        **sizes,
    )
    return order, inverse, ends
