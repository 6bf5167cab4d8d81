"""The plain mixture of experts: a loop over experts, in the words of the papers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def route(
    x: Tensor,
    router: Tensor,
    *,
    top_k: int,
    normalize: bool = False,
    selection_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses `top_k` experts a token by softmax over all experts (arXiv 2502.18965, section 3.2).

    Args:
        x: [T, d].
        router: [E, d], one centroid an expert.
        top_k: Experts a token.
        normalize: Divide the kept gates by their sum.
        selection_bias: [E], added to the probabilities for the choice only (arXiv 2408.15664).

    Returns:
        logits [T, E] and gates [T, k] in float32 (float64 for float64 input), and expert ids
        int64 [T, k], best first, ties by the lower id.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(dtype) @ router.to(dtype).T
    probabilities = logits.softmax(dim=-1)
    scores = probabilities if selection_bias is None else probabilities + selection_bias
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    gates = probabilities.gather(1, ids)
    if normalize:
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return logits, gates, ids


def limit(ids: Tensor, n_experts: int, capacity: int) -> Tensor:
    """`ids` with n_experts where an expert had taken `capacity` pairs before.

    First choices of all tokens come before second choices, tokens in order (arXiv 2006.16668,
    algorithm 1).
    """
    ids, taken = ids.clone(), [0] * n_experts
    for slot in range(ids.shape[1]):
        for token in range(ids.shape[0]):
            expert = int(ids[token, slot])
            if expert == n_experts:
                continue
            if taken[expert] == capacity:
                ids[token, slot] = n_experts
            else:
                taken[expert] += 1
    return ids


def activate(hidden: Tensor, activation: str) -> Tensor:
    """`swiglu` and `geglu` gate the second half by the first; `gelu` and `relu` are plain."""
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
    if activation == "geglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.gelu(gate) * value
    return F.gelu(hidden) if activation == "gelu" else F.relu(hidden)


def experts(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: str = "swiglu",
    first_expert: int = 0,
) -> Tensor:
    """y[t] = sum_j gates[t, j] FFN_{ids[t, j]}(x[t]); an id of no expert here adds nothing.

    Args:
        x: [T, d].
        ids: int64 [T, k].
        gates: [T, k].
        w13: [E, 2F, d] for gated activations (gate half first), [E, F, d] for plain ones.
        w2: [E, d, F].
        activation: See `activate`.
        first_expert: Id of the first of the E experts.

    Returns:
        [T, d], of the type of `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for expert in range(w2.shape[0]):
        token, slot = (ids == first_expert + expert).nonzero(as_tuple=True)
        hidden = activate(x[token] @ w13[expert].T, activation)
        out = (hidden @ w2[expert].T).to(dtype) * gates[token, slot, None]
        y = y.index_add(0, token, out)
    return y.to(x.dtype)
