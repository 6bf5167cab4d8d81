"""Sparse mixture of experts: softmax over all experts, top-k, gated feed-forward experts.

The layer of OneRec's decoder (arXiv 2502.18965, section 3.2): 24 experts, the best 2 a token, gates
straight from the softmax and not renormalised. `moe` is `moe_route` followed by `moe_experts`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onerec.activations import GATED, PLAIN
from onerec.ops.moe import library, reference
from onerec.ops.moe.grouped import grouped_mm_fits
from onerec.ops.moe.native import PackedExperts

__all__ = [
    "MoEStats",
    "PackedExperts",
    "Routing",
    "moe",
    "moe_experts",
    "moe_experts_sorted",
    "moe_route",
]


class MoEStats(NamedTuple):
    """What the router did with the T tokens that were routed.

    `mean_probability` and `z_loss` carry gradients, for the balance loss of arXiv 2101.03961
    (E * sum_e counts_e / (T k) * mean_probability_e) and the z-loss of arXiv 2202.08906.

    Attributes:
        counts: int64 [E], (token, slot) pairs that chose an expert.
        mean_probability: [E], mean softmax probability over tokens.
        z_loss: [], mean squared log-sum-exp of the logits.
        entropy: [], mean entropy of the softmax in nats; no gradient.
        dropped: int64 [], pairs of `counts` that were over the capacity and got no expert.
    """

    counts: Tensor
    mean_probability: Tensor
    z_loss: Tensor
    entropy: Tensor
    dropped: Tensor


class Routing(NamedTuple):
    """Expert ids int64 [T, k] (best first; E for nobody), gates [T, k], statistics."""

    ids: Tensor
    gates: Tensor
    stats: MoEStats


def moe(
    x: Tensor,
    router: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    top_k: int,
    activation: str = "swiglu",
    normalize: bool = False,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
    capacity: int | None = None,
    first_expert: int = 0,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, MoEStats]:
    """y[t] = sum over the top-k experts e of softmax(router x[t])_e * FFN_e(x[t]).

    Dropless unless `capacity` is given, and deterministic: pairs are sorted by expert (stable),
    multiplied expert by expert, and summed per token in the order of its choices; no atomics.
    Gradients flow to `x`, `router`,
    `w13` and `w2`. Under `torch.autocast` the experts compute in the autocast type; the router
    computes in float32 always (float64 for float64 input).

    Args:
        x: [T, d], float32, float64, float16 or bfloat16; T = 0 is legal.
        router: [E, d], one centroid an expert.
        w13: [E, 2F, d], gate half first; [E, F, d] for the plain activations. Fewer experts than
            the router's are those from `first_expert` on (expert parallelism).
        w2: [E, d, F].
        top_k: Experts a token, 1..E. Ties go to the lower expert id.
        activation: "swiglu" or "geglu" (gated), "gelu" or "relu" (plain).
        normalize: Divide the kept gates by their sum, which equals a softmax over the kept logits.
        selection_bias: [E], added to the probabilities for the choice only, never to the gates
            (loss-free balancing, arXiv 2408.15664, section 3).
        mask: bool [T]; tokens with False get no expert: y = 0, and they are in no statistic.
        capacity: Pairs that an expert takes at most; first choices go before second ones, tokens in
            order (arXiv 2006.16668, algorithm 1). A pair over it adds nothing to y.
        first_expert: Id of the first expert of `w13` and `w2`; others' pairs add nothing.
        recompute: Save x only for the backward pass, not the pre-activation [T k, 2F]: 2 of the 9
            products of a training step are then computed twice.
        backend: "reference" (loop over experts), "torch" (sorted, a matrix product per expert),
            "grouped" (sorted, `F.grouped_mm`), "triton" (CUDA, not float64), or "auto": "torch" on
            the CPU; on CUDA "triton" for float16 and bfloat16, else "torch".

    Returns:
        y [T, d] of the type of `x` (the autocast type under autocast), and the statistics.

    Raises:
        ValueError: Shapes that do not fit, `top_k` out of range, an unknown activation or backend,
            or a backend that cannot run these types on this device.
    """
    backend = _choose(backend, x)
    x = _without_masked(x, mask)
    routing = moe_route(
        x,
        router,
        top_k=top_k,
        normalize=normalize,
        selection_bias=selection_bias,
        mask=mask,
        capacity=capacity,
        backend="torch" if backend == "grouped" else backend,
    )
    y = moe_experts(
        x,
        routing.ids,
        routing.gates,
        w13,
        w2,
        activation=activation,
        first_expert=first_expert,
        recompute=recompute,
        backend=backend,
    )
    return y, routing.stats


def moe_route(
    x: Tensor,
    router: Tensor,
    *,
    top_k: int,
    normalize: bool = False,
    selection_bias: Tensor | None = None,
    mask: Tensor | None = None,
    capacity: int | None = None,
    backend: str = "auto",
) -> Routing:
    """The choice of experts alone; arguments as for `moe`.

    Args:
        backend: "reference", "torch", "triton" (CUDA, not float64, at most 1,024 experts), or
            "auto": "triton" on CUDA where it can, else "torch".

    Raises:
        ValueError: As for `moe`.
    """
    if x.dim() != 2 or router.dim() != 2 or x.shape[1] != router.shape[1]:
        raise ValueError(
            f"x and router: wanted [T, d] and [E, d], got {list(x.shape)} and {list(router.shape)}"
        )
    n_experts = router.shape[0]
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k: wanted 1..{n_experts} (the number of experts), got {top_k}")
    if selection_bias is not None and selection_bias.shape != (n_experts,):
        raise ValueError(f"selection_bias: wanted [{n_experts}], got {list(selection_bias.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:1]):
        raise ValueError(f"mask: wanted bool [{x.shape[0]}], got {mask.dtype} {list(mask.shape)}")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity: wanted at least 0, got {capacity}")
    if backend not in ("auto", "reference", "torch", "triton"):
        raise ValueError(
            f"backend: wanted 'auto', 'reference', 'torch' or 'triton', got {backend!r}"
        )
    if backend == "triton":
        _need_triton(x)
    elif backend == "auto":
        able = x.is_cuda and x.dtype != torch.float64 and n_experts <= 1024
        backend = "triton" if able else "torch"
    x = _without_masked(x, mask)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(device_type=x.device.type, enabled=False):
        if backend == "reference":
            logits, gates, ids = reference.route(
                x, router, top_k=top_k, normalize=normalize, selection_bias=selection_bias
            )
            ids, stats = _statistics(logits, logits.softmax(dim=-1), ids, mask)
        elif backend == "triton":
            ids, gates, counts, mass, z_sum, entropy_sum = library.route(
                x.to(dtype) @ router.to(dtype).T, selection_bias, mask, top_k, normalize
            )
            total = max(len(x), 1) if mask is None else mask.sum().clamp(min=1)
            stats = MoEStats(
                counts, mass / total, z_sum / total, entropy_sum / total, counts.new_zeros(())
            )
        else:
            logits = x.to(dtype) @ router.to(dtype).T
            probabilities = logits.softmax(dim=-1)
            scores = probabilities.detach()
            if selection_bias is not None:
                scores = scores + selection_bias
            ids = _top_k(scores, top_k)
            gates = probabilities.gather(1, ids)
            if normalize:
                gates = gates / gates.sum(dim=-1, keepdim=True)
            ids, stats = _statistics(logits, probabilities, ids, mask)
        if capacity is not None:
            if backend == "reference":
                ids = reference.limit(ids, n_experts, capacity)
            else:
                ids = _limit(ids, n_experts, capacity)
            dropped = (stats.counts - capacity).clamp(min=0).sum()
            stats = stats._replace(dropped=dropped)
    return Routing(ids, gates, stats)


def _without_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` with zeros in masked rows, whose values may be anything: 0 * NaN would be NaN."""
    if mask is None or mask.shape != x.shape[:1] or mask.dtype != torch.bool:
        return x  # `moe_route` refuses a wrong mask
    return torch.where(mask[:, None], x, 0)


def _top_k(scores: Tensor, top_k: int) -> Tensor:
    """The `top_k` best columns of each row, best first, ties by the lower column."""
    if top_k > 8:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    # A few maxima are three times as fast as a stable sort, and argmax returns the first of equals.
    scores = scores.clone()
    chosen = []
    for _ in range(top_k):
        best = scores.argmax(dim=-1, keepdim=True)
        chosen.append(best)
        scores.scatter_(1, best, float("-inf"))
    return torch.cat(chosen, dim=1)


def _limit(ids: Tensor, n_experts: int, capacity: int) -> Tensor:
    """`reference.limit` without a loop."""
    slots_first = ids.T.flatten()
    keys, order = slots_first.sort(stable=True)
    rank = torch.arange(len(keys), device=keys.device) - torch.searchsorted(keys, keys)
    kept = torch.where(rank < capacity, keys, n_experts)
    return torch.empty_like(keys).index_copy_(0, order, kept).view(ids.T.shape).T.contiguous()


def _statistics(
    logits: Tensor, probabilities: Tensor, ids: Tensor, mask: Tensor | None
) -> tuple[Tensor, MoEStats]:
    """The ids with E, which is nobody, for masked tokens, and the statistics of the others."""
    tokens, n_experts = logits.shape
    z = logits.logsumexp(dim=-1).square()
    with torch.no_grad():
        entropy = torch.special.entr(probabilities).sum(dim=-1)
    total: Tensor | int = max(tokens, 1)
    if mask is not None:
        ids = torch.where(mask[:, None], ids, n_experts)
        probabilities = torch.where(mask[:, None], probabilities, 0)
        z, entropy = torch.where(mask, z, 0), torch.where(mask, entropy, 0)
        total = mask.sum().clamp(min=1)
    each = torch.arange(n_experts, device=ids.device)
    counts = (ids.unsqueeze(-1) == each).sum(dim=(0, 1))
    return ids, MoEStats(
        counts,
        probabilities.sum(dim=0) / total,
        z.sum() / total,
        entropy.sum() / total,
        counts.new_zeros(()),
    )


def moe_experts(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: str = "swiglu",
    first_expert: int = 0,
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y[t] = sum_j gates[t, j] FFN_{ids[t, j]}(x[t]) for a choice that is already made.

    An id outside first_expert .. first_expert + E - 1 means "not here": it adds nothing (masked or
    dropped tokens, experts elsewhere).

    Args:
        x: [T, d].
        ids: int64 [T, k]; an expert may not appear twice in a row.
        gates: [T, k], any floating type; differentiable.
        w13: [E, 2F, d], or [E, F, d] for the plain activations.
        w2: [E, d, F].
        activation: "swiglu", "geglu", "gelu" or "relu".
        first_expert: As for `moe`.
        recompute: As for `moe`.
        backend: As for `moe`.

    Raises:
        ValueError: As for `moe`.
    """
    _check_weights(x, w13, w2, activation)
    if ids.shape != gates.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"ids and gates: wanted both [{x.shape[0]}, k], "
            f"got {list(ids.shape)} and {list(gates.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type):
        x, w13, w2 = x.to(_type(x)), w13.to(_type(x)), w2.to(_type(x))
    backend = _fit(_choose(backend, x), x, w13, w2)
    with torch.autocast(device_type=x.device.type, enabled=False):
        if backend == "reference":
            return reference.experts(
                x, ids, gates, w13, w2, activation=activation, first_expert=first_expert
            )
        sort = library.plan(ids, len(w2), first_expert, backend)
        save = not recompute and _needs_gradient(x, gates, w13, w2)
        y: Tensor = library.experts(x, *sort, gates, w13, w2, activation, backend, save)[0]
        return y


def moe_experts_sorted(
    x: Tensor,
    ends: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: str = "swiglu",
    recompute: bool = False,
    backend: str = "auto",
) -> Tensor:
    """FFN_e(x[p]) for rows that are sorted by expert, as an all-to-all delivers them; no gates.

    Args:
        x: [P, d].
        ends: int32 [E], not falling: rows ends[e - 1] .. ends[e] - 1 are those of expert e (from 0
            for the first); rows from ends[E - 1] on give zeros.
        w13: [E, 2F, d], or [E, F, d] for the plain activations.
        w2: [E, d, F].
        activation: As for `moe_experts`.
        recompute: As for `moe`.
        backend: As for `moe`.

    Returns:
        [P, d].

    Raises:
        ValueError: As for `moe`; `ends` is not int32 [E].
    """
    _check_weights(x, w13, w2, activation)
    if ends.dtype != torch.int32 or ends.shape != w2.shape[:1]:
        raise ValueError(f"ends: wanted int32 [{len(w2)}], got {ends.dtype} {list(ends.shape)}")
    if torch.is_autocast_enabled(x.device.type):
        x, w13, w2 = x.to(_type(x)), w13.to(_type(x)), w2.to(_type(x))
    backend = _fit(_choose(backend, x), x, w13, w2)
    with torch.autocast(device_type=x.device.type, enabled=False):
        if backend == "reference":
            ids = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
            ones = x.new_ones(len(x), 1)
            return reference.experts(x, ids[:, None], ones, w13, w2, activation=activation)
        save = not recompute and _needs_gradient(x, w13, w2)
        y: Tensor = library.experts(x, None, None, ends, None, w13, w2, activation, backend, save)[
            0
        ]
        return y


def _type(x: Tensor) -> torch.dtype:
    """The type that the experts compute in: that of `x`, or the autocast type."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _choose(backend: str, x: Tensor) -> str:
    """The backend that "auto" means for `x`."""
    if backend not in ("auto", "reference", "torch", "grouped", "triton"):
        raise ValueError(
            f"backend: wanted 'auto', 'reference', 'torch', 'grouped' or 'triton', got {backend!r}"
        )
    if backend != "auto":
        return backend
    return "triton" if x.is_cuda and _type(x) in (torch.float16, torch.bfloat16) else "torch"


def _need_triton(x: Tensor) -> None:
    if not x.is_cuda or x.dtype == torch.float64:
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, not float64; got {x.dtype} on {x.device}"
        )


def _check_weights(x: Tensor, w13: Tensor, w2: Tensor, activation: str) -> None:
    if activation not in (*GATED, *PLAIN):
        raise ValueError(f"activation: wanted one of {(*GATED, *PLAIN)}, got {activation!r}")
    if w2.dim() != 3 or w13.dim() != 3 or x.dim() != 2:
        raise ValueError(
            "x, w13, w2: wanted [T, d], [E, 2F, d], [E, d, F], "
            f"got {list(x.shape)}, {list(w13.shape)}, {list(w2.shape)}"
        )
    n_experts, width, hidden = w2.shape
    rows = 2 * hidden if activation in GATED else hidden
    if x.shape[1] != width or w13.shape != (n_experts, rows, width):
        raise ValueError(
            f"x and w13: wanted [T, {width}] and [{n_experts}, {rows}, {width}] for w2 "
            f"{list(w2.shape)} and {activation}, got {list(x.shape)} and {list(w13.shape)}"
        )


def _fit(backend: str, x: Tensor, w13: Tensor, w2: Tensor) -> str:
    """`backend`, if it can run these tensors."""
    if not x.dtype == w13.dtype == w2.dtype:
        raise ValueError(f"x, w13, w2: wanted one type, got {x.dtype}, {w13.dtype}, {w2.dtype}")
    if backend == "triton":
        _need_triton(x)
    if backend == "grouped" and (why := grouped_mm_fits(x, w2)):
        raise ValueError(f"backend 'grouped' cannot be used: {why}")
    return backend
