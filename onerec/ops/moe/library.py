"""The operations of the mixture of experts as torch.library operators, with gradients.

`onerec::moe_route` (Triton's routing), `onerec::moe_plan`, `onerec::moe_experts` and
`onerec::moe_experts_backward` take tensors that are already checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onerec.ops.moe import grouped

_library = torch.library.Library("onerec", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "moe_route(Tensor logits, Tensor? bias, Tensor? mask, int top_k, bool normalize) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "moe_plan(Tensor ids, int experts, int first, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "moe_experts(Tensor x, Tensor? order, Tensor? inverse, Tensor ends, "
    "Tensor? gates, Tensor w13, Tensor w2, str activation, str backend, bool save) "
    "-> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "moe_experts_backward(Tensor grad, Tensor x, Tensor? order, Tensor? inverse, Tensor ends, "
    "Tensor? gates, Tensor w13, Tensor w2, Tensor hidden, str activation, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _route(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, top_k: int, normalize: bool
) -> tuple[Tensor, ...]:
    from onerec.kernels.moe_route import moe_route  # type: ignore[import-not-found]

    with torch.cuda.device(logits.get_device()):  # where Triton launches
        return tuple(
            moe_route(logits, top_k=top_k, normalize=normalize, selection_bias=bias, mask=mask)
        )


def _plan(ids: Tensor, experts: int, first: int, backend: str) -> tuple[Tensor, ...]:
    if backend == "triton":
        from onerec.kernels.moe_plan import moe_plan  # type: ignore[import-not-found]

        with torch.cuda.device(ids.get_device()):
            planned: tuple[Tensor, ...] = moe_plan(ids, experts, first)
        return planned
    return grouped.plan(ids, experts, first)


def _experts(
    x: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    ends: Tensor,
    gates: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    activation: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from onerec.kernels import moe_experts  # type: ignore[import-not-found]

        with torch.cuda.device(x.get_device()):
            made: tuple[Tensor, Tensor] = moe_experts.forward(
                x, order, inverse, ends, gates, w13, w2, activation, save
            )
        return made
    return grouped.forward(
        x, order, inverse, ends, gates, w13, w2, activation, backend == "grouped", save
    )


def _experts_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "triton":
        from onerec.kernels import moe_experts

        with torch.cuda.device(x.get_device()):
            made: tuple[Tensor, Tensor, Tensor, Tensor] = moe_experts.backward(
                grad, x, order, inverse, ends, gates, w13, w2, hidden, activation
            )
        return made
    return grouped.backward(
        grad, x, order, inverse, ends, gates, w13, w2, hidden, activation, backend == "grouped"
    )


for _name, _kernel in (
    ("moe_route", _route),
    ("moe_plan", _plan),
    ("moe_experts", _experts),
    ("moe_experts_backward", _experts_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@torch.library.register_fake("onerec::moe_route", lib=_library)  # type: ignore[untyped-decorator]
def _(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, top_k: int, normalize: bool
) -> tuple[Tensor, ...]:
    tokens, n_experts = logits.shape
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    counts = logits.new_empty(n_experts, dtype=torch.int64)
    scalar = logits.new_empty(())
    return (
        ids,
        logits.new_empty(tokens, top_k),
        counts,
        logits.new_empty(n_experts),
        scalar,
        logits.new_empty(()),
    )


@torch.library.register_fake("onerec::moe_plan", lib=_library)  # type: ignore[untyped-decorator]
def _(ids: Tensor, experts: int, first: int, backend: str) -> tuple[Tensor, ...]:
    return (
        ids.new_empty(ids.numel(), dtype=torch.int32),
        ids.new_empty(ids.numel(), dtype=torch.int32),
        ids.new_empty(experts, dtype=torch.int32),
    )


@torch.library.register_fake("onerec::moe_experts", lib=_library)  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    ends: Tensor,
    gates: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    activation: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] if order is None else order.shape[0]
    return x.new_empty(x.shape), x.new_empty(rows if save else 0, w13.shape[1])


@torch.library.register_fake("onerec::moe_experts_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_gates = x.new_empty(0, dtype=torch.float32) if gates is None else gates.new_empty(gates.shape)
    return x.new_empty(x.shape), d_gates, w13.new_empty(w13.shape), w2.new_empty(w2.shape)


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, mask, _, normalize = inputs
    ids, gates, counts, _, _, entropy = output
    ctx.mark_non_differentiable(ids, counts, entropy)
    ctx.save_for_backward(logits, mask, ids, gates)
    ctx.normalize = normalize


def _route_gradients(
    ctx: Any,
    _ids: Tensor,
    d_gates: Tensor,
    _counts: Tensor,
    d_probability: Tensor,
    d_z: Tensor,
    _entropy: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of gates, probability sums and z-sum with respect to the logits."""
    logits, mask, ids, gates = ctx.saved_tensors
    z = logits.logsumexp(dim=-1, keepdim=True)
    p = (logits - z).exp()
    if mask is not None:
        # A masked token has no ids; any column does, as its gradient is cleared below.
        ids = torch.where(mask[:, None], ids, 0)
    if ctx.normalize:
        total = p.gather(1, ids).sum(dim=-1, keepdim=True)
        d_gates = (d_gates - (d_gates * gates).sum(dim=-1, keepdim=True)) / total
    # The ids of a row differ (or are cleared), so the order of additions does not matter.
    d_p = d_probability.expand_as(p).scatter_add(1, ids, d_gates)
    d_logits = p * (d_p - (p * d_p).sum(dim=-1, keepdim=True)) + 2 * d_z * z * p
    if mask is not None:
        d_logits = torch.where(mask[:, None], d_logits, 0)
    return d_logits, None, None, None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, order, inverse, ends, gates, w13, w2, activation, backend, _ = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, order, inverse, ends, gates, w13, w2, hidden)
    ctx.activation, ctx.backend = activation, backend


def _gradients(ctx: Any, grad: Tensor, _hidden: Tensor) -> tuple[Tensor | None, ...]:
    x, order, inverse, ends, gates, w13, w2, hidden = ctx.saved_tensors
    with torch.autocast(device_type=x.device.type, enabled=False):
        d_x, d_gates, d_w13, d_w2 = torch.ops.onerec.moe_experts_backward(
            grad.contiguous(),
            x,
            order,
            inverse,
            ends,
            gates,
            w13,
            w2,
            hidden,
            ctx.activation,
            ctx.backend,
        )
    return d_x, None, None, None, None if gates is None else d_gates, d_w13, d_w2, None, None, None


torch.library.register_autograd(
    "onerec::moe_route", _route_gradients, setup_context=_route_setup, lib=_library
)
torch.library.register_autograd(
    "onerec::moe_experts", _gradients, setup_context=_setup, lib=_library
)
route = torch.ops.onerec.moe_route.default
plan = torch.ops.onerec.moe_plan.default
experts = torch.ops.onerec.moe_experts.default
