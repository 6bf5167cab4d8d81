"""Attention of many beams to one context, cut over the keys; lengths are read on the device.

Compiled for sm_90 and sm_80 and run through Triton's interpreter; not yet run on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def cross_attention_kernel(  # type: ignore[no-untyped-def]
    q,  # [B, Q, H, D]
    keys,  # [B, H, S, D]
    values,  # [B, H, S, D]
    lengths,  # int32 [B]
    out,  # [B, Q, H, D]; with SPLITS > 1 float32 [B, Q, H, SPLITS, D], not yet divided
    tops,  # float32 [B, Q, H, SPLITS], highest score (base 2) of a part, or None
    sums,  # float32 [B, Q, H, SPLITS], sum of its exponentials, or None
    queries,
    size,
    chunk,  # keys of a part
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The pairs are too many for another axis than the first, which alone may exceed 65,535.
    tiles = tl.cdiv(queries, BLOCK_Q)
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = pair // H, pair % H
    part = tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    row = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    wide, inside = column < D, row < queries
    cell = (batch * queries + row) * H + head
    here = inside[:, None] & wide[None, :]
    x = tl.load(q + cell[:, None] * D + column[None, :], here, other=0.0)
    first = part * chunk
    last = tl.minimum(first + chunk, tl.load(lengths + batch))
    base = pair * size * D
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for at in range(first, last, BLOCK_K):
        key = at + tl.arange(0, BLOCK_K)
        real = key < last
        k = tl.load(
            keys + base + key[None, :] * D + column[:, None],
            real[None, :] & wide[:, None],
            other=0.0,
        )
        score = tl.dot(x, k, input_precision=PRECISION) * scale
        score = tl.where(real[None, :], score, float("-inf"))
        high = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2(score - high[:, None])
        fade = tl.exp2(top - high)
        total = total * fade + tl.sum(p, axis=1)
        v = tl.load(
            values + base + key[:, None] * D + column[None, :],
            real[:, None] & wide[None, :],
            other=0.0,
        )
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = high
    if SPLITS == 1:
        y = acc / total[:, None]
        tl.store(out + cell[:, None] * D + column[None, :], y.to(out.dtype.element_ty), here)
    else:
        cell = cell * SPLITS + part
        tl.store(out + cell[:, None] * D + column[None, :], acc, here)
        tl.store(tops + cell, top, inside)
        tl.store(sums + cell, total, inside)


@triton.jit  # type: ignore[untyped-decorator]
def combine_kernel(  # type: ignore[no-untyped-def]
    parts,  # float32 [N, SPLITS, D]
    tops,  # float32 [N, SPLITS]
    sums,  # float32 [N, SPLITS]
    out,  # [N, D]
    cells,  # N
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    inside = cell < cells
    here = inside[:, None] & (column < D)[None, :]
    # Part 0 always has a key, so the top is finite; a part without keys has the top -inf.
    top = tl.load(tops + cell * SPLITS, inside, other=0.0)
    for part in tl.static_range(1, SPLITS):
        top = tl.maximum(top, tl.load(tops + cell * SPLITS + part, inside, other=0.0))
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for part in tl.static_range(SPLITS):
        at = cell * SPLITS + part
        weight = tl.exp2(tl.load(tops + at, inside, other=0.0) - top)
        total += weight * tl.load(sums + at, inside, other=1.0)
        y = tl.load(parts + at[:, None] * D + column[None, :], here, other=0.0)
        acc += weight[:, None] * y
    y = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + cell[:, None] * D + column[None, :], y, here)


def cut(size: int) -> tuple[int, int]:
    """Parts that the keys are cut into, and keys of a part.

    By the number of keys alone: a sum's order, and so its last bits, must not depend on the batch.
    """
    splits = min(triton.cdiv(size, 256), 8)
    return splits, triton.cdiv(triton.cdiv(size, splits), 64) * 64


def tiles(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the attention kernel for heads of `width`."""
    half = dtype != torch.float32
    return {
        "BLOCK_Q": 64 if half else 32,
        "BLOCK_K": 64 if half else 32,
        "BLOCK_D": max(triton.next_power_of_2(width), 16),
        "PRECISION": "tf32" if half else "ieee",
    }


def warps(dtype: torch.dtype, capability: int) -> int:
    """Warps of a block of the attention kernel, so that nothing spills; `capability` as 90."""
    return 4 if dtype == torch.float32 and capability >= 90 else 8


def cross_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """As `onerec.ops.cross_attention`; one launch, or two when the keys are cut.

    Raises:
        ValueError: A tensor that is not contiguous, or a type other than float32, float16 and
            bfloat16.
    """
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q: wanted float32, float16 or bfloat16, got {q.dtype}")
    for name, tensor in (("q", q), ("keys", keys), ("values", values)):
        if not tensor.is_contiguous() or tensor.dtype != q.dtype:
            raise ValueError(f"{name}: wanted contiguous {q.dtype}, got {tensor.dtype}")
    batch, queries, heads, width = q.shape
    size = keys.shape[2]
    splits, chunk = cut(size)
    out = torch.empty_like(q)
    parts, tops, sums = out, None, None
    if splits > 1:
        shape = (batch, queries, heads, splits)
        parts = q.new_empty(*shape, width, dtype=torch.float32)
        tops, sums = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    sizes = tiles(width, q.dtype)
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9
    if q.numel():
        grid = (triton.cdiv(queries, sizes["BLOCK_Q"]) * batch * heads, splits)
        cross_attention_kernel[grid](
            q,
            keys,
            values,
            lengths,
            parts,
            tops,
            sums,
            queries,
            size,
            chunk,
            math.log2(math.e) / math.sqrt(width),
            H=heads,
            D=width,
            SPLITS=splits,
            num_warps=warps(q.dtype, 10 * major),
            num_stages=2,
            **sizes,
        )
        if splits > 1:
            cells = batch * queries * heads
            combine_kernel[(triton.cdiv(cells, 8),)](
                parts,
                tops,
                sums,
                out,
                cells,
                D=width,
                SPLITS=splits,
                BLOCK_N=8,
                BLOCK_D=sizes["BLOCK_D"],
                num_warps=4,
            )
    return out.flatten(2)
