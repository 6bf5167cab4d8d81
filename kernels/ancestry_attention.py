"""Attention of beams to their own tokens through a table of ancestors, with the new ones appended.

Compiled for sm_90 and sm_80 and run through Triton's interpreter; not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 32  # times read at once; five items of three codes have 20


@triton.jit(do_not_specialize=["start"])  # type: ignore[untyped-decorator]
def ancestry_attention_kernel(  # type: ignore[no-untyped-def]
    qkv,  # [B, M, NEW, 3, H, D]
    keys,  # [B, T, W, H, D]
    values,  # [B, T, W, H, D]
    slots,  # int64 [B, M, slot_stride]
    out,  # [B, M, NEW, H, D]
    start,
    beams,  # M
    times,  # T
    width,  # W
    slot_stride,
    scale,  # log2(e) / sqrt(D)
    H: tl.constexpr,
    D: tl.constexpr,
    NEW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch, beam = row // beams, row % beams
    column = tl.arange(0, BLOCK_D)
    wide = column < D
    for j in tl.static_range(NEW):
        mine = qkv + ((row * NEW + j) * 3 * H + head) * D + column
        q = tl.load(mine, wide, other=0.0).to(tl.float32) * scale
        # Other beams see this key in later launches only, so nobody reads it while it is written.
        k = tl.load(mine + H * D, wide, other=0.0)
        v = tl.load(mine + 2 * H * D, wide, other=0.0)
        place = (((batch * times + start + j) * width + beam) * H + head) * D + column
        tl.store(keys + place, k, wide)
        tl.store(values + place, v, wide)
        # The token itself first, so that the top is finite; then its pair's first, then ancestors.
        top = tl.sum(q * k.to(tl.float32), axis=0)
        total = tl.full((), 1.0, tl.float32)
        acc = v.to(tl.float32)
        for i in tl.static_range(j):
            other = qkv + ((row * NEW + i) * 3 * H + head) * D + column
            other_k = tl.load(other + H * D, wide, other=0.0).to(tl.float32)
            other_v = tl.load(other + 2 * H * D, wide, other=0.0).to(tl.float32)
            other_score = tl.sum(q * other_k, axis=0)
            other_top = tl.maximum(top, other_score)
            other_p = tl.exp2(other_score - other_top)
            acc = acc * tl.exp2(top - other_top) + other_p * other_v
            total = total * tl.exp2(top - other_top) + other_p
            top = other_top
        for first in range(0, start, BLOCK_T):
            time = first + tl.arange(0, BLOCK_T)
            seen = time < start
            slot = tl.load(slots + row * slot_stride + time, seen, other=0)
            cell = ((batch * times + time) * width + slot) * H + head
            at = cell[:, None] * D + column[None, :]
            here = seen[:, None] & wide[None, :]
            past_k = tl.load(keys + at, here, other=0.0).to(tl.float32)
            past_v = tl.load(values + at, here, other=0.0).to(tl.float32)
            score = tl.sum(past_k * q[None, :], axis=1)
            score = tl.where(seen, score, float("-inf"))
            high = tl.maximum(top, tl.max(score, axis=0))
            fade, p = tl.exp2(top - high), tl.exp2(score - high)
            acc = acc * fade + tl.sum(p[:, None] * past_v, axis=0)
            total = total * fade + tl.sum(p, axis=0)
            top = high
        y = (acc / total).to(out.dtype.element_ty)
        tl.store(out + ((row * NEW + j) * H + head) * D + column, y, wide)


def ancestry_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, start: int
) -> Tensor:
    """As `onerec.ops.ancestry_attention`, in one launch.

    Raises:
        ValueError: A tensor that does not lie as said there, or types that differ.
    """
    for name, tensor in (("qkv", qkv), ("keys", keys), ("values", values)):
        if not tensor.is_contiguous() or tensor.dtype != qkv.dtype:
            raise ValueError(f"{name}: wanted contiguous {qkv.dtype}, got {tensor.dtype}")
    batch, beams, new, _, heads, width = qkv.shape
    stride = slots.stride(1)
    if slots.dtype != torch.int64 or slots.stride() != (beams * stride, stride, 1):
        raise ValueError(
            f"slots: wanted int64 rows one after another, got {slots.dtype} of strides "
            f"{slots.stride()}"
        )
    out = qkv.new_empty(batch, beams, new, heads * width)
    if out.numel():
        ancestry_attention_kernel[(batch * beams, heads)](
            qkv,
            keys,
            values,
            slots,
            out,
            start,
            beams,
            keys.shape[1],
            keys.shape[2],
            stride,
            math.log2(math.e) / math.sqrt(width),
            H=heads,
            D=width,
            NEW=new,
            BLOCK_T=BLOCK_T,
            BLOCK_D=triton.next_power_of_2(width),
            num_warps=4,
        )
    return out
