"""Mixture of experts: sorted segments beside `F.grouped_mm` as others use it and a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onerec._native import core
from onerec.ops import moe_experts, moe_route

# (d, F, experts): the tiny preset, and a small model of OneRec's proportions.
SIZES = {"tiny": (128, 512, 8), "small": (512, 2048, 24)}
TOP_K = 2


def grouped_mm(x: Tensor, ids: Tensor, gates: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """What transformers and torchtitan do: sort, gather, `F.grouped_mm` twice, sum over slots."""
    pairs, order = ids.flatten().sort(stable=True)
    ends = torch.bincount(pairs, minlength=len(w2)).cumsum(0).int()
    hidden = F.grouped_mm(x[order // TOP_K], w13.transpose(-2, -1), offs=ends)
    gate, value = hidden.chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * value, w2.transpose(-2, -1), offs=ends)
    out = out * gates.flatten()[order, None]
    return out[order.argsort()].view(*ids.shape, -1).sum(dim=1)


def providers(
    size: str, tokens: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor], dict[str, Any]]:
    d, f, e = SIZES[size]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return made.to(device, dtype)

    x, router = normal(tokens, d) * d**0.5, normal(e, d)
    w13, w2 = normal(e, 2 * f, d), normal(e, d, f)
    ids, gates, _ = moe_route(x, router, top_k=TOP_K)
    gates = gates.to(dtype)
    weights = (x, gates, w13, w2)
    backend = "triton" if device == "cuda" else "torch"
    calls: dict[str, Callable[[], Tensor]] = {
        "onerec": lambda: moe_experts(x, ids, gates, w13, w2, backend=backend),
        "F.grouped_mm": lambda: grouped_mm(x, ids, gates, w13, w2),
        "loop": lambda: moe_experts(x, ids, gates, w13, w2, backend="reference"),
    }
    flops = 6 * tokens * TOP_K * d * f
    hit = int(ids.unique().numel())
    facts = {"d": d, "F": f, "experts": e, "experts hit": hit, "flops": flops}
    return calls, list(weights), facts


def near(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < (1e-5 if a.dtype == torch.float32 else 2e-2), error


# Without AVX-512 a CPU has no bfloat16 arithmetic; emulated it takes minutes and says nothing.
BFLOAT16 = pytest.param(
    torch.bfloat16,
    id="bf16",
    marks=pytest.mark.skipif(core().isa() != "avx512", reason="no bfloat16 arithmetic"),
)
DTYPES = pytest.mark.parametrize("dtype", [pytest.param(torch.float32, id="fp32"), BFLOAT16])


@DTYPES
@pytest.mark.parametrize(
    ("size", "tokens"), [("tiny", 1), ("tiny", 128), ("tiny", 2048), ("small", 1), ("small", 128)]
)
def test_forward(compare: Any, size: str, tokens: int, dtype: torch.dtype) -> None:
    calls, _, facts = providers(size, tokens, dtype, "cpu")
    with torch.inference_mode():
        compare(
            {name: lambda call=call: [call()] for name, call in calls.items()},
            check=near,
            work={"GFLOP/s": facts.pop("flops") / 1e9},
            facts=facts,
            calls=20 if tokens == 1 else 1,
            seconds=1.0,
        )


def training(calls: dict[str, Callable[[], Tensor]], leaves: list[Tensor]) -> dict[str, Any]:
    """Each call followed by its gradients with respect to x, gates and weights."""
    for leaf in leaves:
        leaf.requires_grad_()

    def whole(call: Callable[[], Tensor]) -> list[Tensor]:
        y = call()
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    return {name: lambda call=call: whole(call) for name, call in calls.items()}


@DTYPES
@pytest.mark.parametrize(("size", "tokens"), [("tiny", 2048), ("small", 128)])
def test_training_step(compare: Any, size: str, tokens: int, dtype: torch.dtype) -> None:
    calls, leaves, facts = providers(size, tokens, dtype, "cpu")
    if size == "small":
        # The loop's backward writes a gradient of all experts' weights once an expert: seconds.
        del calls["loop"]
    compare(
        training(calls, leaves),
        check=near,
        work={"GFLOP/s": 3 * facts.pop("flops") / 1e9},
        facts=facts,
        seconds=1.0,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 128, 2048, 16384])
def test_forward_on_gpu(compare: Any, tokens: int) -> None:
    calls, _, facts = providers("small", tokens, torch.bfloat16, "cuda")
    with torch.inference_mode():
        compare(
            {name: lambda call=call: [call()] for name, call in calls.items()},
            check=near,
            work={"GFLOP/s": facts.pop("flops") / 1e9},
            facts=facts,
            device="cuda",
        )


@pytest.mark.gpu
def test_training_step_on_gpu(compare: Any) -> None:
    calls, leaves, facts = providers("small", 16384, torch.bfloat16, "cuda")
    compare(
        training(calls, leaves),
        check=near,
        work={"GFLOP/s": 3 * facts.pop("flops") / 1e9},
        facts=facts,
        device="cuda",
    )
