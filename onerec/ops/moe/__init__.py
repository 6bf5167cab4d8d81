"""Sparse mixture of experts: softmax over all experts, top-k, gated feed-forward experts.

The layer of OneRec's decoder (arXiv 2502.18965, section 3.2): 24 experts, the best 2 a token, gates
straight from the softmax and not renormalised. `moe` is `moe_route` followed by `moe_experts`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from onerec.ops.moe import reference, triton_route
from onerec.ops.moe.grouped import GATED, PLAIN, grouped_experts, grouped_mm_fits

__all__ = ["MoEStats", "Routing", "moe", "moe_experts", "moe_route"]


class MoEStats(NamedTuple):
    """What the router did with the T tokens that were routed.

    `mean_probability` and `z_loss` carry gradients, for the balance loss of arXiv 2101.03961
    (E * sum_e counts_e / (T k) * mean_probability_e) and the z-loss of arXiv 2202.08906.

    Attributes:
        counts: int64 [E], (token, slot) pairs that an expert got.
        mean_probability: [E], mean softmax probability over tokens.
        z_loss: [], mean squared log-sum-exp of the logits.
        entropy: [], mean entropy of the softmax in nats; no gradient.
    """

    counts: Tensor
    mean_probability: Tensor
    z_loss: Tensor
    entropy: Tensor


class Routing(NamedTuple):
    """Expert ids int64 [T, k] (best first; E where a token is masked), gates [T, k], statistics."""

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
    backend: str = "auto",
) -> tuple[Tensor, MoEStats]:
    """y[t] = sum over the top-k experts e of softmax(router x[t])_e * FFN_e(x[t]).

    Dropless and deterministic: pairs are sorted by expert (stable), multiplied expert by expert,
    and summed per token in the order of its choices; no atomics. Gradients flow to `x`, `router`,
    `w13` and `w2`. Under `torch.autocast` the experts compute in the autocast type; the router
    computes in float32 always (float64 for float64 input).

    Args:
        x: [T, d], float32, float64, float16 or bfloat16; T = 0 is legal.
        router: [E, d], one centroid an expert.
        w13: [E, 2F, d], gate half first; [E, F, d] for the plain activations.
        w2: [E, d, F].
        top_k: Experts a token, 1..E. Ties go to the lower expert id.
        activation: "swiglu" or "geglu" (gated), "gelu" or "relu" (plain).
        normalize: Divide the kept gates by their sum, which equals a softmax over the kept logits.
        selection_bias: [E], added to the probabilities for the choice only, never to the gates
            (loss-free balancing, arXiv 2408.15664, section 3).
        mask: bool [T]; tokens with False get no expert: y = 0, and they are in no statistic.
        backend: "reference" (loop over experts), "torch" (sorted, a matrix product per expert),
            "grouped" (sorted, `F.grouped_mm`), "triton" (routing by one Triton kernel on CUDA,
            then "grouped"), or "auto": "torch" on the CPU, "grouped" on CUDA where its types and
            strides fit, else "torch".

    Returns:
        y [T, d] of the type of `x` (the autocast type under autocast), and the statistics.

    Raises:
        ValueError: Shapes that do not fit, `top_k` out of range, an unknown activation or backend,
            or a backend that cannot run these types on this device.
    """
    routing = moe_route(
        x,
        router,
        top_k=top_k,
        normalize=normalize,
        selection_bias=selection_bias,
        mask=mask,
        backend=backend if backend in ("reference", "triton") else "torch",
    )
    y = moe_experts(
        x,
        routing.ids,
        routing.gates,
        w13,
        w2,
        activation=activation,
        backend="grouped" if backend == "triton" else backend,
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
    backend: str = "auto",
) -> Routing:
    """The choice of experts alone; arguments as for `moe`.

    Args:
        backend: "reference", "torch", "triton" (one kernel, CUDA, not float64), or "auto", which is
            "torch": the kernel is compiled and interpreted in tests, but no GPU has run it yet.

    Raises:
        ValueError: As for `moe`.
    """
    if x.dim() != 2 or router.dim() != 2 or x.shape[1] != router.shape[1]:
        raise ValueError(
            f"x and router must be [T, d] and [E, d], got {list(x.shape)} and {list(router.shape)}"
        )
    n_experts = router.shape[0]
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k must lie in 1..{n_experts} (the number of experts), got {top_k}")
    if selection_bias is not None and selection_bias.shape != (n_experts,):
        raise ValueError(f"selection_bias must be [{n_experts}], got {list(selection_bias.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:1]):
        raise ValueError(f"mask must be bool [{x.shape[0]}], got {mask.dtype} {list(mask.shape)}")
    if backend not in ("auto", "reference", "torch", "triton"):
        raise ValueError(
            f"backend must be 'auto', 'reference', 'torch' or 'triton', got {backend!r}"
        )
    with torch.autocast(device_type=x.device.type, enabled=False):
        if backend == "reference":
            logits, gates, ids = reference.route(
                x, router, top_k=top_k, normalize=normalize, selection_bias=selection_bias
            )
            probabilities = logits.softmax(dim=-1)
        elif backend == "triton":
            return _triton_route(x, router, top_k, normalize, selection_bias, mask)
        else:
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = x.to(dtype) @ router.to(dtype).T
            probabilities = logits.softmax(dim=-1)
            scores = probabilities.detach()
            if selection_bias is not None:
                scores = scores + selection_bias
            ids = _top_k(scores, top_k)
            gates = probabilities.gather(1, ids)
            if normalize:
                gates = gates / gates.sum(dim=-1, keepdim=True)
        return _finish(logits, probabilities, ids, gates, mask)


def _triton_route(
    x: Tensor,
    router: Tensor,
    top_k: int,
    normalize: bool,
    selection_bias: Tensor | None,
    mask: Tensor | None,
) -> Routing:
    if not x.is_cuda or x.dtype == torch.float64:
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, not float64; got {x.dtype} on {x.device}"
        )
    ids, gates, counts, mass, z_sum, entropy_sum = triton_route.route(
        x.float() @ router.float().T,
        top_k=top_k,
        normalize=normalize,
        selection_bias=selection_bias,
        mask=mask,
    )
    total = max(len(x), 1) if mask is None else mask.sum().clamp(min=1)
    return Routing(ids, gates, MoEStats(counts, mass / total, z_sum / total, entropy_sum / total))


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


def _finish(
    logits: Tensor, probabilities: Tensor, ids: Tensor, gates: Tensor, mask: Tensor | None
) -> Routing:
    """Statistics of the routed tokens; masked tokens get the id E, which belongs to nobody."""
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
    stats = MoEStats(
        counts, probabilities.sum(dim=0) / total, z.sum() / total, entropy.sum() / total
    )
    return Routing(ids, gates, stats)


def moe_experts(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: str = "swiglu",
    backend: str = "auto",
) -> Tensor:
    """y[t] = sum_j gates[t, j] FFN_{ids[t, j]}(x[t]) for a choice that is already made.

    An id outside 0..E-1 means "not here": it adds nothing (masked tokens, experts elsewhere).

    Args:
        x: [T, d].
        ids: int64 [T, k]; an expert may not appear twice in a row.
        gates: [T, k], any floating type; differentiable.
        w13: [E, 2F, d], or [E, F, d] for the plain activations.
        w2: [E, d, F].
        activation: "swiglu", "geglu", "gelu" or "relu".
        backend: "reference", "torch", "grouped" or "auto", as for `moe`.

    Raises:
        ValueError: As for `moe`.
    """
    if activation not in (*GATED, *PLAIN):
        raise ValueError(f"activation must be one of {(*GATED, *PLAIN)}, got {activation!r}")
    if w2.dim() != 3 or w13.dim() != 3 or x.dim() != 2:
        raise ValueError(
            "x, w13, w2 must be [T, d], [E, 2F, d], [E, d, F], "
            f"got {list(x.shape)}, {list(w13.shape)}, {list(w2.shape)}"
        )
    n_experts, width, hidden = w2.shape
    rows = 2 * hidden if activation in GATED else hidden
    if x.shape[1] != width or w13.shape != (n_experts, rows, width):
        raise ValueError(
            f"with w2 {list(w2.shape)} and {activation}, x must be [T, {width}] and w13 "
            f"[{n_experts}, {rows}, {width}], got {list(x.shape)} and {list(w13.shape)}"
        )
    if ids.shape != gates.shape or ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"ids and gates must both be [{x.shape[0]}, k], "
            f"got {list(ids.shape)} and {list(gates.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w13, w2 = x.to(dtype), w13.to(dtype), w2.to(dtype)
    if not x.dtype == w13.dtype == w2.dtype:
        raise ValueError(f"x, w13, w2 must share a type, got {x.dtype}, {w13.dtype}, {w2.dtype}")
    fits = grouped_mm_fits(x, w13, w2)
    if backend == "auto":
        backend = "grouped" if x.is_cuda and fits is None else "torch"
    with torch.autocast(device_type=x.device.type, enabled=False):
        if backend == "reference":
            return reference.experts(x, ids, gates, w13, w2, activation=activation)
        if backend == "torch":
            return grouped_experts(x, ids, gates, w13, w2, activation, False)
        if backend == "grouped":
            if fits is not None:
                raise ValueError(f"backend 'grouped' cannot be used: {fits}")
            return grouped_experts(x, ids, gates, w13, w2, activation, True)
    raise ValueError(f"backend must be 'auto', 'reference', 'torch' or 'grouped', got {backend!r}")
