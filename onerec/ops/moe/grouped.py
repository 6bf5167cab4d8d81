"""The experts in PyTorch: pairs sorted by expert, one product an expert or `F.grouped_mm`.

Forward keeps x and at most the pre-activation; backward recomputes the activation from it and takes
the gate's gradient from <d activation, activation>, so the expert outputs are never kept (the
arrangement of arXiv 2512.14080). Sums over slots have a fixed order; there are no atomics.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from onerec.activations import GATED
from onerec.ops.moe.reference import activate

_aten = torch.ops.aten


def grouped_mm_fits(x: Tensor, w2: Tensor) -> str | None:
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


def plan(ids: Tensor, n_experts: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of the P = T k (token, slot) pairs by expert; those of nobody come last.

    Args:
        ids: int64 [T, k]; experts first .. first + n_experts - 1 are here.
        n_experts: Experts that are here.
        first: Id of the first of them.

    Returns:
        order int32 [P], the pair t k + j of each sorted row, stable, so by token within an expert;
        inverse int32 [P], the sorted row of each pair; ends int32 [E], the sorted row where each
        expert's rows end.
    """
    local = ids.flatten() - first
    local = torch.where((local < 0) | (local >= n_experts), n_experts, local)
    keys, order = local.sort(stable=True)
    experts = torch.arange(n_experts, device=keys.device)
    ends = torch.searchsorted(keys, experts, right=True, out_int32=True)
    inverse = torch.empty(len(order), dtype=torch.int32, device=order.device)
    inverse[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return order.int(), inverse, ends


def forward(
    x: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    ends: Tensor,
    gates: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    activation: str,
    fused: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The experts' forward pass.

    Args:
        x: [T, d].
        order: int32 [P] of `plan`, or None when the rows of `x` are sorted already (P = T).
        inverse: int32 [P] of `plan`, None when `order` is.
        ends: int32 [E].
        gates: [T, k], or None with sorted rows, which have no gate.
        w13: [E, 2F, d] or [E, F, d].
        w2: [E, d, F].
        activation: See `reference.activate`.
        fused: Multiply by `F.grouped_mm`, which needs no copy of `ends` to the host.
        save: Return the pre-activation too.

    Returns:
        y [T, d]; the pre-activation [P, 2F or F] in sorted order, or [0, ...] without `save`.
    """
    rows = len(x) if order is None else len(order)
    token = _tokens(order, gates)
    if fused and rows:
        gathered = x if token is None else x.index_select(0, token)
        hidden = F.grouped_mm(gathered, w13.transpose(1, 2), offs=ends)
        out = F.grouped_mm(activate(hidden, activation), w2.transpose(1, 2), offs=ends)
        # grouped_mm leaves the rows of nobody as they were in memory.
        out = torch.where(_here(ends, rows), out, 0)
        if not save:
            hidden = hidden.new_empty(0, w13.shape[1])
    else:
        # A segment of rows stays in the cache between the two products of an expert.
        segments = _segments(ends)
        hidden = x.new_empty(rows if save else 0, w13.shape[1])
        out = x.new_empty(rows, x.shape[1])
        out[segments[-1][2] if segments else 0 :].zero_()
        for e, a, b in segments:
            part = x[a:b] if token is None else x.index_select(0, token[a:b])
            h = torch.mm(part, w13[e].T, out=hidden[a:b] if save else None)
            torch.mm(activate(h, activation), w2[e].T, out=out[a:b])
    if inverse is None or gates is None:
        return out, hidden
    return _combine(out, inverse.view_as(gates), gates), hidden


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
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x`, `gates` ([0] when None), `w13` and `w2`; arguments as for `forward`.

    Args:
        grad: [T, d].
        hidden: The saved pre-activation, or [0, ...] to compute it again.
    """
    rows = len(x) if order is None else len(order)
    token = _tokens(order, gates)
    flat = None if order is None or gates is None else gates.flatten().index_select(0, order)
    slot_type = torch.float32 if flat is None else flat.dtype
    dots = torch.zeros(0 if flat is None else rows, dtype=slot_type, device=x.device)

    def gather(source: Tensor, a: int, b: int) -> Tensor:
        return source[a:b] if token is None else source.index_select(0, token[a:b])

    if fused and rows:
        inputs, d_out = gather(x, 0, rows), gather(grad, 0, rows)
        if not len(hidden):
            hidden = F.grouped_mm(inputs, w13.transpose(1, 2), offs=ends)
        activated = activate(hidden, activation)
        d_activated = F.grouped_mm(d_out, w2, offs=ends)
        if flat is not None:
            product = (d_activated.to(slot_type) * activated.to(slot_type)).sum(dim=-1)
            dots = torch.where(_here(ends, rows)[:, 0], product, 0)
            gate = flat[:, None].to(x.dtype)
            d_activated, d_out = d_activated * gate, d_out * gate
        d_w2 = F.grouped_mm(d_out.T, activated, offs=ends)
        d_hidden = torch.empty_like(hidden)
        _activate_backward(hidden, d_activated, activation, d_hidden)
        d_w13 = F.grouped_mm(d_hidden.T, inputs, offs=ends)
        d_rows = F.grouped_mm(d_hidden, w13, offs=ends)
        d_rows = torch.where(_here(ends, rows), d_rows, 0)
    else:
        segments = _segments(ends)
        d_rows = x.new_empty(rows, x.shape[1])
        d_rows[segments[-1][2] if segments else 0 :].zero_()
        d_w13, d_w2 = torch.empty_like(w13), torch.empty_like(w2)
        idle = set(range(len(w2))) - {e for e, _, _ in segments}
        for e in idle:
            d_w13[e].zero_()
            d_w2[e].zero_()
        for e, a, b in segments:
            inputs, d_out = gather(x, a, b), gather(grad, a, b)
            h = hidden[a:b] if len(hidden) else inputs @ w13[e].T
            activated = activate(h, activation)
            d_activated = d_out @ w2[e]
            if flat is not None:
                torch.sum(
                    d_activated.to(slot_type) * activated.to(slot_type), dim=-1, out=dots[a:b]
                )
                gate = flat[a:b, None].to(x.dtype)
                d_activated, d_out = d_activated.mul_(gate), d_out * gate
            torch.mm(d_out.T, activated, out=d_w2[e])
            d_hidden = torch.empty_like(h)
            _activate_backward(h, d_activated, activation, d_hidden)
            torch.mm(d_hidden.T, inputs, out=d_w13[e])
            torch.mm(d_hidden, w13[e], out=d_rows[a:b])
    if inverse is None or gates is None:
        return d_rows, dots, d_w13, d_w2
    d_x = _combine(d_rows, inverse.view_as(gates), None)
    return d_x, dots.index_select(0, inverse).view_as(gates), d_w13, d_w2


def _tokens(order: Tensor | None, gates: Tensor | None) -> Tensor | None:
    """int32 [P], the token of each sorted row; None when rows are tokens."""
    return None if order is None or gates is None else order // gates.shape[1]


def _here(ends: Tensor, rows: int) -> Tensor:
    """bool [P, 1], sorted rows that belong to an expert."""
    return (torch.arange(rows, device=ends.device) < ends[-1])[:, None]


def _segments(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first, last) of the experts that have rows; copies the ends to the host."""
    bounds = [0, *ends.tolist()]
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if a < b]


def _combine(rows: Tensor, where: Tensor, gates: Tensor | None) -> Tensor:
    """[T, n], the sum of the k rows of each token in slot order, in float32 or more.

    Args:
        rows: [P, n] in sorted order, zeros for nobody.
        where: int32 [T, k], the sorted row of each pair.
        gates: [T, k], the weights of the sum, or None for ones.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(len(where), rows.shape[1], dtype=dtype)
    for slot in range(where.shape[1]):
        part = rows.index_select(0, where[:, slot])
        if gates is None:
            total += part
        else:
            total.addcmul_(part.to(dtype), gates[:, slot, None].to(dtype))
    return total.to(rows.dtype)


def _activate_backward(hidden: Tensor, grad: Tensor, activation: str, out: Tensor) -> None:
    """Writes the gradient of `activate(hidden)` to `out`, of the shape of `hidden`."""
    if activation in GATED:
        gate, value = hidden.chunk(2, dim=-1)
        d_gate, d_value = out.chunk(2, dim=-1)
        product = grad * value
        if activation == "swiglu":
            torch.mul(grad, F.silu(gate), out=d_value)
            d_gate.copy_(_aten.silu_backward(product, gate))
        else:
            torch.mul(grad, F.gelu(gate), out=d_value)
            d_gate.copy_(_aten.gelu_backward(product, gate))
    elif activation == "gelu":
        out.copy_(_aten.gelu_backward(grad, hidden))
    else:
        out.copy_(_aten.threshold_backward(grad, hidden, 0))
