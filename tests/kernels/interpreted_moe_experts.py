"""The plan and expert kernels through Triton's interpreter; run by test_moe_experts.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onerec.kernels import moe_experts as kernels
from onerec.kernels.moe_experts import Config
from onerec.kernels.moe_plan import ALONE, moe_plan
from onerec.ops import moe_route
from onerec.ops.moe import grouped, library

# Small tiles, so that every kind of edge is met at sizes that can be interpreted.
PLAIN = Config(16, 16, 16, 4, 2, 1)
CUTS = {
    "plain": PLAIN,
    "swap": PLAIN._replace(swap=True),
    "split": PLAIN._replace(swap=True, split=4),
}


@pytest.mark.parametrize(
    ("pairs", "slots", "experts", "first", "seen"),
    [
        (0, 2, 3, 0, 3),
        (1, 1, 1, 0, 1),
        (66, 2, 24, 0, 25),
        (90, 3, 5, 7, 20),
        (ALONE + 1002, 2, 24, 0, 26),
        (600, 8, 256, 0, 256),
    ],
)
def test_plan(pairs: int, slots: int, experts: int, first: int, seen: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(seen, (pairs // slots, slots)) - (1 if seen > experts else 0)
    got = moe_plan(ids, experts, first)
    for have, want in zip(got, grouped.plan(ids, experts, first), strict=True):
        assert have.dtype == torch.int32
        assert have.equal(want)


def problem(
    tokens: int, width: int, hidden: int, experts: int, activation: str, dtype: torch.dtype
) -> list[Tensor]:
    torch.manual_seed(1)
    rows = hidden * (2 if activation in ("swiglu", "geglu") else 1)
    x, router = torch.randn(tokens, width), torch.randn(experts, width)
    w13 = torch.randn(experts, rows, width) / width**0.5
    w2 = torch.randn(experts, width, hidden) / hidden**0.5
    return [t.to(dtype).requires_grad_() for t in (x, router, w13, w2)]


def check(
    inputs: list[Tensor],
    plan: tuple[Tensor | None, ...],
    gates: Tensor | None,
    activation: str,
    save: bool,
    tolerance: float,
) -> None:
    """Values and gradients of the kernels against those of PyTorch in float32."""
    leaves = [inputs[0], *([] if gates is None else [gates]), *inputs[2:]]
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    results = []
    for backend, given in (("triton", leaves), ("torch", wide)):
        gate = None if gates is None else given[1]
        y, _ = library.experts(given[0], *plan, gate, *given[-2:], activation, backend, save)
        torch.manual_seed(2)
        results.append((y, *torch.autograd.grad(y, given, torch.randn(y.shape).to(y.dtype))))
    for got, want in zip(*results, strict=True):
        scale = want.abs().max().clamp(min=1e-3).item() if want.numel() else 1.0
        torch.testing.assert_close(got.float(), want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("cut", "activation", "tokens", "width", "hidden", "save"),
    [
        ("plain", "swiglu", 13, 40, 24, True),  # no side is a multiple of its tile
        ("plain", "geglu", 9, 32, 32, True),
        ("plain", "gelu", 17, 16, 48, False),
        ("plain", "relu", 1, 8, 8, True),
        ("swap", "swiglu", 13, 40, 24, False),
        ("split", "swiglu", 5, 16, 64, True),
        ("split", "geglu", 5, 24, 40, True),
    ],
)
def test_experts(
    monkeypatch: pytest.MonkeyPatch,
    cut: str,
    activation: str,
    tokens: int,
    width: int,
    hidden: int,
    save: bool,
) -> None:
    monkeypatch.setattr(kernels, "config", lambda *_: CUTS[cut])
    inputs = problem(tokens, width, hidden, 5, activation, torch.float32)
    mask = torch.arange(tokens) % 4 != 2
    routing = moe_route(inputs[0], inputs[1], top_k=2, mask=mask, backend="torch")
    # Experts 1 to 3 are here; pairs of the others belong to nobody.
    inputs[2:] = [w[1:4].detach().requires_grad_() for w in inputs[2:]]
    gates = routing.gates.detach().requires_grad_()
    check(inputs, moe_plan(routing.ids, 3, 1), gates, activation, save, 1e-5)


def test_sorted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "config", lambda *_: CUTS["plain"])
    inputs = problem(40, 16, 24, 4, "swiglu", torch.float32)
    ends = torch.tensor([0, 19, 19, 36], dtype=torch.int32)
    check(inputs, (None, None, ends), None, "swiglu", True, 1e-5)


@pytest.mark.parametrize("tokens", [0, 3, 40])
def test_tables_and_float16(tokens: int) -> None:
    """The tiles that a GPU gets, in the type that the interpreter has right."""
    inputs = problem(tokens, 48, 80, 2, "swiglu", torch.float16)
    routing = moe_route(inputs[0], inputs[1], top_k=1, backend="torch")
    gates = routing.gates.detach().requires_grad_()
    check(inputs, moe_plan(routing.ids, 2, 0), gates, "swiglu", True, 8e-3)
