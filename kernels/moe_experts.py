"""The feed-forward experts of a mixture as Triton kernels: forward and backward.

Rows are gathered while they are multiplied, the activation and the gate are applied in the
epilogues, and every kernel is persistent: as many programs as fit the device take tile after tile,
expert by expert, with bounds that only the device knows. No atomics, no host synchronisation, so
runs are deterministic and can be captured in a CUDA graph. Backward recomputes the activation from
the pre-activation and takes the gates' gradient from <d activation, activation>, so the experts'
outputs are never kept (the arrangement of arXiv 2512.14080).

Compiled for sm_90 and sm_80 and run through Triton's interpreter; not yet run on a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from onerec.activations import GATED


class Config(NamedTuple):
    """How a product is cut; chosen by `config` from a small table, never tuned at run time.

    Attributes:
        bm: Rows (tokens) of a tile; for weight gradients rows of the weight.
        bn: Columns of a tile.
        bk: Depth of one step.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        per_sm: Programs on one multiprocessor.
        swap: Multiply the weights from the left, so that few tokens fill wgmma's narrow side.
        split: Parts that the depth of the second product is cut into, for more tiles.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    per_sm: int
    swap: bool = False
    split: int = 1


# (rows an expert at most, config); the first that fits. Names: "up" is x W13^T, "down" is the
# product with W2 and the one back to x, "back" the one back through W2, "weight" the two gradients
# of weights.
HALF: dict[str, list[tuple[float, Config]]] = {
    "up": [
        (12, Config(16, 64, 128, 4, 3, 2, swap=True)),
        (24, Config(32, 64, 128, 4, 2, 2, swap=True)),
        (96, Config(64, 64, 64, 4, 4, 2, swap=True)),
        (384, Config(64, 64, 64, 4, 4, 2)),
        (float("inf"), Config(128, 128, 64, 8, 3, 1)),
    ],
    "down": [
        (12, Config(16, 64, 128, 4, 5, 2, swap=True, split=4)),
        (24, Config(32, 64, 128, 4, 4, 2, swap=True, split=4)),
        (96, Config(64, 64, 128, 4, 3, 2, swap=True, split=2)),
        (384, Config(64, 128, 64, 4, 4, 2)),
        (float("inf"), Config(128, 256, 64, 8, 3, 1)),
    ],
    "back": [
        (384, Config(64, 64, 64, 4, 4, 2)),
        (float("inf"), Config(128, 128, 64, 8, 4, 1)),
    ],
    "weight": [
        (384, Config(128, 128, 64, 8, 5, 1)),
        (float("inf"), Config(128, 256, 64, 8, 5, 1)),
    ],
}
# float32 is for checks and small models: exact products without tensor cores by default.
SINGLE: dict[str, list[tuple[float, Config]]] = {
    kind: [(float("inf"), Config(32, 32, 32, 4, 2, 2))] for kind in HALF
}


def config(kind: str, dtype: torch.dtype, rows: float, capability: int = 90) -> Config:
    """The configuration of a product.

    Args:
        kind: A key of `HALF`.
        dtype: Of its operands.
        rows: Mean rows an expert.
        capability: 90 or more for wgmma, 80 or more for mma.
    """
    table = (SINGLE if dtype == torch.float32 else HALF)[kind]
    cut = next(entry for limit, entry in table if rows <= limit)
    if kind == "up" and capability < 90 and cut.bm == 128:
        # mma keeps its operands in registers too: two accumulators of 128 columns would spill.
        return cut._replace(bn=64)
    return cut


@triton.jit  # type: ignore[untyped-decorator]
def _load(at, real, ALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """A load without a mask where every element is `real`, known when compiling."""
    if ALL:
        return tl.load(at)
    else:
        return tl.load(at, real, other=0.0)


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit  # type: ignore[untyped-decorator]
def _activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "swiglu":
        return x * _sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit  # type: ignore[untyped-decorator]
def _slope(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "swiglu":
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        normal = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * normal


@triton.jit  # type: ignore[untyped-decorator]
def _last_tiles(ends, E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 [BLOCK_E], row tiles of experts 0..e; the experts past E have none."""
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(ends + expert, expert < E, other=0)
    begin = tl.load(ends + expert - 1, (expert > 0) & (expert < E), other=0)
    return tl.cumsum(tl.cdiv(end - begin, BM), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _place(tile, last, ends, COLUMNS: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Expert, column tile, first row and end of its rows: row tiles are next to each other.

    Programs that run together then share a few column tiles of the weights in the L2 cache.
    """
    e = tl.sum((last * COLUMNS <= tile).to(tl.int32))
    before = tl.max(tl.where(tl.arange(0, BLOCK_E) < e, last, 0))
    begin = tl.load(ends + e - 1, e > 0, other=0)
    end = tl.load(ends + e)
    tiles = tl.cdiv(end - begin, BM)
    local = tile - before * COLUMNS
    return e, local // tiles, begin + local % tiles * BM, end


@triton.jit  # type: ignore[untyped-decorator]
def moe_up_kernel(  # type: ignore[no-untyped-def]
    x,  # [T, D]
    order,  # int32 [P] or None
    ends,  # int32 [E]
    w13,  # [E, 2F or F, D]
    hidden,  # [P, 2F or F] or None
    activated,  # [P, F] or None
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden = x W13^T and activated = act(hidden), tokens gathered by `order`."""
    COLUMNS: tl.constexpr = (F + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * F if GATED else F
    last = _last_tiles(ends, E, BLOCK_E, BM)
    depth = tl.arange(0, BK)
    for tile in range(tl.program_id(0), tl.max(last) * COLUMNS, tl.num_programs(0)):
        e, n, first, end = _place(tile, last, ends, COLUMNS, BLOCK_E, BM)
        row = first + tl.arange(0, BM)
        real = row < end
        # Rows and columns past the end read a legal one instead; what they give is not stored.
        row = tl.where(real, row, first)
        token = row
        if order is not None:
            token = tl.load(order + row) // K
        column = n * BN + tl.arange(0, BN)
        legal = tl.minimum(column, F - 1)
        a_at = x + token.to(tl.int64)[:, None] * D + depth[None, :]
        w_at = w13 + e.to(tl.int64) * (WIDTH * D) + legal[:, None] * D + depth[None, :]
        gate = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        value = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        for k in range(0, D, BK):
            deep = (depth < D - k)[None, :]
            a = _load(a_at + k, deep, D % BK == 0)
            w = _load(w_at + k, deep, D % BK == 0)
            if SWAP:
                gate = tl.dot(w, tl.trans(a), gate, input_precision=PRECISION)
            else:
                gate = tl.dot(a, tl.trans(w), gate, input_precision=PRECISION)
            if GATED:
                v = _load(w_at + F * D + k, deep, D % BK == 0)
                if SWAP:
                    value = tl.dot(v, tl.trans(a), value, input_precision=PRECISION)
                else:
                    value = tl.dot(a, tl.trans(v), value, input_precision=PRECISION)
        if SWAP:
            gate = tl.trans(gate)
            value = tl.trans(value)
        kept = real[:, None] & (column < F)[None, :]
        if activated is not None:
            out = _activate(gate, ACTIVATION)
            if GATED:
                out *= value
            out_at = activated + row.to(tl.int64)[:, None] * F + column[None, :]
            tl.store(out_at, out.to(activated.dtype.element_ty), kept)
        if hidden is not None:
            h_at = hidden + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
            tl.store(h_at, gate.to(hidden.dtype.element_ty), kept)
            if GATED:
                tl.store(h_at + F, value.to(hidden.dtype.element_ty), kept)


@triton.jit  # type: ignore[untyped-decorator]
def moe_down_kernel(  # type: ignore[no-untyped-def]
    a,  # [P, D]
    order,  # int32 [P] or None
    ends,  # int32 [E]
    w,  # [E, N, D], or [E, D, N] when FLIPPED
    gates,  # [P] in pair order, or None for ones
    out,  # [SPLIT, P, N] in pair order
    pairs,
    E: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    FLIPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = gate (a W^T), scattered back to pairs; rows of nobody are not written."""
    COLUMNS: tl.constexpr = (N + BN - 1) // BN * SPLIT
    PART: tl.constexpr = (D + SPLIT * BK - 1) // (SPLIT * BK) * BK
    EVEN: tl.constexpr = D % (SPLIT * BK) == 0
    last = _last_tiles(ends, E, BLOCK_E, BM)
    for tile in range(tl.program_id(0), tl.max(last) * COLUMNS, tl.num_programs(0)):
        e, n, first, end = _place(tile, last, ends, COLUMNS, BLOCK_E, BM)
        row = first + tl.arange(0, BM)
        real = row < end
        row = tl.where(real, row, first)
        split = n % SPLIT
        column = n // SPLIT * BN + tl.arange(0, BN)
        wide = (column < N)[None, :]
        depth = split * PART + tl.arange(0, BK)
        a_at = a + row.to(tl.int64)[:, None] * D + depth[None, :]
        w_at = w + e.to(tl.int64) * (N * D)
        if FLIPPED:
            w_at += depth[:, None] * N + column[None, :]
        else:
            w_at += tl.minimum(column, N - 1)[:, None] * D + depth[None, :]
        total = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
        for k in range(0, PART, BK):
            deep = depth < D - k
            left = _load(a_at + k, deep[None, :], EVEN)
            if FLIPPED:
                right = _load(w_at + k * N, deep[:, None] & wide, EVEN and N % BN == 0)
            else:
                right = tl.trans(_load(w_at + k, deep[None, :], EVEN))
            if SWAP:
                total = tl.dot(tl.trans(right), tl.trans(left), total, input_precision=PRECISION)
            else:
                total = tl.dot(left, right, total, input_precision=PRECISION)
        if SWAP:
            total = tl.trans(total)
        pair = row
        if order is not None:
            pair = tl.load(order + row)
        if gates is not None:
            total *= tl.load(gates + pair).to(tl.float32)[:, None]
        out_at = out + (split.to(tl.int64) * pairs + pair)[:, None] * N + column[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), real[:, None] & wide)


@triton.jit  # type: ignore[untyped-decorator]
def moe_combine_kernel(  # type: ignore[no-untyped-def]
    rows,  # [SPLIT, P, N] in pair order
    inverse,  # int32 [P] or None
    ends,  # int32 [E]
    y,  # [T, N]
    tokens,
    pairs,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums the parts and slots of each token in a fixed order; a pair of nobody adds nothing."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = at // N
    here = tl.load(ends + E - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        pair = token * K + slot
        place = pair
        if inverse is not None:
            place = tl.load(inverse + pair, token < tokens, other=0).to(tl.int64)
        real = (token < tokens) & (place < here)
        for part in tl.static_range(SPLIT):
            row = rows + (pair + part * pairs) * N + at % N
            total += tl.load(row, real, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), token < tokens)


@triton.jit  # type: ignore[untyped-decorator]
def moe_back_kernel(  # type: ignore[no-untyped-def]
    grad,  # [T, D]
    order,  # int32 [P] or None
    ends,  # int32 [E]
    w2,  # [E, D, F]
    gates,  # [P] in pair order, or None
    hidden,  # [P, 2F or F]
    d_hidden,  # as hidden
    weighted,  # [P, F], gate times activation
    dots,  # float32 [column tiles, P] in pair order, or None without gates
    pairs,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """d activated = grad W2, and from it d hidden and the gates' gradient."""
    COLUMNS: tl.constexpr = (F + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * F if GATED else F
    last = _last_tiles(ends, E, BLOCK_E, BM)
    depth = tl.arange(0, BK)
    for tile in range(tl.program_id(0), tl.max(last) * COLUMNS, tl.num_programs(0)):
        e, n, first, end = _place(tile, last, ends, COLUMNS, BLOCK_E, BM)
        row = first + tl.arange(0, BM)
        real = row < end
        row = tl.where(real, row, first)
        pair = row
        if order is not None:
            pair = tl.load(order + row)
        column = n * BN + tl.arange(0, BN)
        wide = (column < F)[None, :]
        g_at = grad + (pair // K).to(tl.int64)[:, None] * D + depth[None, :]
        w_at = w2 + e.to(tl.int64) * (D * F) + depth[:, None] * F + column[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            deep = depth < D - k
            g = _load(g_at + k, deep[None, :], D % BK == 0)
            w = _load(w_at + k * F, deep[:, None] & wide, D % BK == 0 and F % BN == 0)
            total = tl.dot(g, w, total, input_precision=PRECISION)
        scale = tl.full((BM,), 1.0, tl.float32)
        if gates is not None:
            scale = tl.load(gates + pair).to(tl.float32)
        at = row.to(tl.int64)
        dot = tl.zeros((BM,), tl.float32)
        # Half of the columns at a time: the whole would not fit the registers.
        halves = tl.split(tl.permute(tl.reshape(total, (BM, 2, BN // 2)), (0, 2, 1)))
        for half in tl.static_range(2):
            part = halves[half]
            j = n * BN + half * (BN // 2) + tl.arange(0, BN // 2)
            kept = real[:, None] & (j < F)[None, :]
            h_at = at[:, None] * WIDTH + j[None, :]
            kind = d_hidden.dtype.element_ty
            gate = tl.load(hidden + h_at, kept, other=0.0).to(tl.float32)
            out = _activate(gate, ACTIVATION)
            d_gate = part * scale[:, None]
            if GATED:
                value = tl.load(hidden + h_at + F, kept, other=0.0).to(tl.float32)
                tl.store(d_hidden + h_at + F, (d_gate * out).to(kind), kept)
                out *= value
                d_gate *= value
            d_gate *= _slope(gate, ACTIVATION)
            tl.store(d_hidden + h_at, d_gate.to(kind), kept)
            dot += tl.sum(part * out, axis=1)
            out *= scale[:, None]
            tl.store(weighted + at[:, None] * F + j[None, :], out.to(kind), kept)
        if gates is not None:
            tl.store(dots + n.to(tl.int64) * pairs + pair, dot, real)


@triton.jit  # type: ignore[untyped-decorator]
def moe_weight_kernel(  # type: ignore[no-untyped-def]
    left,  # [P, M], or [T, M] with GATHER_LEFT
    right,  # [P, N], or [T, N] with GATHER_RIGHT
    order,  # int32 [P] or None
    ends,  # int32 [E]
    out,  # [E, M, N]
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out[e] = left_e^T right_e over the rows of e; zeros for an expert without rows."""
    ROWS: tl.constexpr = (M + BM - 1) // BM
    COLUMNS: tl.constexpr = (N + BN - 1) // BN
    for tile in range(tl.program_id(0), E * ROWS * COLUMNS, tl.num_programs(0)):
        e = tile // (ROWS * COLUMNS)
        local = tile % (ROWS * COLUMNS)
        # The shorter side first: what the longer side reads is then shared in the L2 cache.
        if M < N:
            m, n = local % ROWS, local // ROWS
        else:
            m, n = local // COLUMNS, local % COLUMNS
        begin = tl.load(ends + e - 1, e > 0, other=0)
        end = tl.load(ends + e)
        i = m * BM + tl.arange(0, BM)
        j = n * BN + tl.arange(0, BN)
        l_at, r_at = left + i[None, :], right + j[None, :]
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(begin, end, BK):
            row = k + tl.arange(0, BK)
            real = row < end
            token = row
            if order is not None:
                token = tl.load(order + row, real, other=0) // K
            l_row = token if GATHER_LEFT else row
            r_row = token if GATHER_RIGHT else row
            a_real, b_real = real[:, None], real[:, None]
            if M % BM:
                a_real &= (i < M)[None, :]
            if N % BN:
                b_real &= (j < N)[None, :]
            a = tl.load(l_at + l_row.to(tl.int64)[:, None] * M, a_real, other=0.0)
            b = tl.load(r_at + r_row.to(tl.int64)[:, None] * N, b_real, other=0.0)
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
        at = out + e.to(tl.int64) * (M * N) + i[:, None].to(tl.int64) * N + j[None, :]
        tl.store(at, total.to(out.dtype.element_ty), (i < M)[:, None] & (j < N)[None, :])


@lru_cache
def _properties(index: int) -> tuple[int, int]:
    """Multiprocessors and compute capability (10 major + minor) of a CUDA device."""
    found = torch.cuda.get_device_properties(index)
    return found.multi_processor_count, 10 * found.major + found.minor


class _Launch:
    """What the launches of one call share."""

    def __init__(self, x: Tensor, rows: int, ends: Tensor) -> None:
        self.dtype, self.device = x.dtype, x.device
        self.rows, self.experts = rows, len(ends)
        self.block_e = triton.next_power_of_2(self.experts)
        exact = x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        self.precision = "ieee" if exact else "tf32"
        # In the interpreter programs run one after the other; a few show the loop over tiles.
        self.processors, self.capability = _properties(x.device.index) if x.is_cuda else (2, 90)

    def config(self, kind: str) -> Config:
        return config(kind, self.dtype, self.rows / self.experts, self.capability)

    def row_tiles(self, cut: Config) -> int:
        """The most row tiles that any routing can give; the device knows how many there are."""
        return min(self.rows // cut.bm + self.experts, self.rows)

    def run(self, kernel: Any, cut: Config, tiles: int, *arguments: Any, **constants: Any) -> None:
        grid = (min(tiles, self.processors * cut.per_sm),)
        kernel[grid](
            *arguments,
            E=self.experts,
            PRECISION=self.precision,
            BM=cut.bm,
            BN=cut.bn,
            BK=cut.bk,
            num_warps=cut.warps,
            num_stages=cut.stages,
            **constants,
        )


def _up(
    launch: _Launch,
    x: Tensor,
    order: Tensor | None,
    ends: Tensor,
    slots: int,
    w13: Tensor,
    hidden: Tensor | None,
    activated: Tensor | None,
    activation: str,
) -> None:
    cut, gated = launch.config("up"), activation in GATED
    width = w13.shape[1] // 2 if gated else w13.shape[1]
    launch.run(
        moe_up_kernel,
        cut,
        launch.row_tiles(cut) * triton.cdiv(width, cut.bn),
        x,
        order,
        ends,
        w13,
        hidden,
        activated,
        D=x.shape[1],
        F=width,
        K=slots,
        ACTIVATION=activation,
        GATED=gated,
        SWAP=cut.swap,
        BLOCK_E=launch.block_e,
    )


def _down(
    launch: _Launch,
    rows: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    ends: Tensor,
    slots: int,
    w: Tensor,
    gates: Tensor | None,
    flipped: bool,
) -> Tensor:
    """[T, N], the second product and the sum over slots."""
    cut = launch.config("down")
    if flipped and cut.swap:
        cut = next(entry for _, entry in HALF["down"] if not entry.swap)
    width = w.shape[2] if flipped else w.shape[1]
    kind = rows.dtype if cut.split == 1 else torch.float32
    parts = torch.empty(cut.split, len(rows), width, dtype=kind, device=launch.device)
    launch.run(
        moe_down_kernel,
        cut,
        launch.row_tiles(cut) * triton.cdiv(width, cut.bn) * cut.split,
        rows,
        order,
        ends,
        w,
        gates,
        parts,
        len(rows),
        D=rows.shape[1],
        N=width,
        FLIPPED=flipped,
        SPLIT=cut.split,
        SWAP=cut.swap,
        BLOCK_E=launch.block_e,
    )
    y = torch.empty(len(rows) // slots, width, dtype=rows.dtype, device=launch.device)
    moe_combine_kernel[(triton.cdiv(y.numel(), 1024),)](
        parts,
        inverse,
        ends,
        y,
        len(y),
        len(rows),
        E=launch.experts,
        N=width,
        K=slots,
        SPLIT=cut.split,
        BLOCK=1024,
        num_warps=4,
    )
    return y


def _weight(
    launch: _Launch,
    left: Tensor,
    right: Tensor,
    order: Tensor | None,
    ends: Tensor,
    slots: int,
    gather_left: bool,
    like: Tensor,
) -> Tensor:
    cut = launch.config("weight")
    out = torch.empty(like.shape, dtype=like.dtype, device=launch.device)
    launch.run(
        moe_weight_kernel,
        cut,
        launch.experts * triton.cdiv(like.shape[1], cut.bm) * triton.cdiv(like.shape[2], cut.bn),
        left,
        right,
        order,
        ends,
        out,
        M=like.shape[1],
        N=like.shape[2],
        K=slots,
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=not gather_left,
    )
    return out


def forward(
    x: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    ends: Tensor,
    gates: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """As `onerec.ops.moe.grouped.forward`."""
    rows = len(x) if order is None else len(order)
    slots = 1 if gates is None else gates.shape[1]
    x, w13, w2 = x.contiguous(), w13.contiguous(), w2.contiguous()
    hidden = x.new_empty(rows if save else 0, w13.shape[1])
    if rows == 0:
        return torch.zeros_like(x), hidden
    launch = _Launch(x, rows, ends)
    activated = x.new_empty(rows, w2.shape[2])
    _up(launch, x, order, ends, slots, w13, hidden if save else None, activated, activation)
    flat = None if gates is None else gates.contiguous()
    return _down(launch, activated, order, inverse, ends, slots, w2, flat, False), hidden


def backward(
    grad: Tensor,
    x: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    ends: Tensor,
    gates: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    hidden: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `onerec.ops.moe.grouped.backward`."""
    rows = len(x) if order is None else len(order)
    slots = 1 if gates is None else gates.shape[1]
    d_gates = x.new_zeros(0, dtype=torch.float32) if gates is None else torch.zeros_like(gates)
    if rows == 0:
        return torch.zeros_like(x), d_gates, torch.zeros_like(w13), torch.zeros_like(w2)
    x, w13, w2, grad = x.contiguous(), w13.contiguous(), w2.contiguous(), grad.contiguous()
    launch, width = _Launch(x, rows, ends), w2.shape[2]
    if not len(hidden):
        hidden = x.new_empty(rows, w13.shape[1])
        _up(launch, x, order, ends, slots, w13, hidden, None, activation)
    cut = launch.config("back")
    columns = triton.cdiv(width, cut.bn)
    d_hidden, weighted = torch.empty_like(hidden), x.new_empty(rows, width)
    # Zeros, for pairs of nobody are not written.
    dots = None if gates is None else x.new_zeros(columns, rows, dtype=torch.float32)
    launch.run(
        moe_back_kernel,
        cut,
        launch.row_tiles(cut) * columns,
        grad,
        order,
        ends,
        w2,
        None if gates is None else gates.contiguous(),
        hidden,
        d_hidden,
        weighted,
        dots,
        rows,
        D=x.shape[1],
        F=width,
        K=slots,
        ACTIVATION=activation,
        GATED=activation in GATED,
        BLOCK_E=launch.block_e,
    )
    if gates is not None and dots is not None:
        d_gates = dots.sum(dim=0).to(gates.dtype).view_as(gates)
    d_w2 = _weight(launch, grad, weighted, order, ends, slots, True, w2)
    d_w13 = _weight(launch, d_hidden, x, order, ends, slots, False, w13)
    d_x = _down(launch, d_hidden, order, inverse, ends, slots, w13, None, True)
    return d_x, d_gates, d_w13, d_w2
