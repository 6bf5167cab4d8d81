"""onerec.ops.moe against its loop, in values, gradients and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from onerec.ops import PackedExperts, moe, moe_experts, moe_experts_sorted, moe_route
from onerec.ops.moe import library

ACTIVATIONS = ["swiglu", "geglu", "gelu", "relu"]
FAST = ["torch", "grouped"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def weights(
    tokens: int,
    *,
    width: int = 16,
    hidden: int = 24,
    experts: int = 6,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = hidden * (2 if activation in ("swiglu", "geglu") else 1)
    made = (
        normal(tokens, width),
        normal(experts, width),
        normal(experts, rows, width) / width**0.5,
        normal(experts, width, hidden) / hidden**0.5,
    )
    return tuple(t.to(dtype).requires_grad_() for t in made)  # type: ignore[return-value]


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    scale = max(want.detach().double().abs().max().item(), 1e-3) if want.numel() else 1.0
    assert got.dtype == want.dtype
    torch.testing.assert_close(
        got.double(), want.double(), rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=False
    )


def by_hand(
    x: Tensor, router: Tensor, w13: Tensor, w2: Tensor, top_k: int
) -> tuple[Tensor, list[list[int]]]:
    """Section 3.2 of arXiv 2502.18965 token by token, SwiGLU experts, plain Python."""
    x, router, w13, w2 = (t.detach() for t in (x, router, w13, w2))
    outs, chosen = [], []
    for row in x:
        p = torch.softmax(router @ row, dim=0)
        best = sorted(range(len(p)), key=lambda e: (-float(p[e]), e))[:top_k]
        total = torch.zeros_like(row)
        for e in best:
            gate, value = (w13[e] @ row).chunk(2)
            total = total + p[e] * (w2[e] @ (gate * torch.sigmoid(gate) * value))
        outs.append(total)
        chosen.append(best)
    return torch.stack(outs), chosen


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_paper_token_by_token(backend: str) -> None:
    x, router, w13, w2 = weights(9)
    y, stats = moe(x, router, w13, w2, top_k=2, backend=backend)
    want, chosen = by_hand(x, router, w13, w2, 2)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    flat = torch.tensor(chosen).flatten()
    assert stats.counts.tolist() == [int((flat == e).sum()) for e in range(6)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [0, 1, 31, 33])
def test_fast_path_equals_reference(tokens: int, top_k: int, activation: str) -> None:
    given = weights(tokens, experts=8, activation=activation)
    upstream = torch.randn(tokens, 16, dtype=torch.float64)
    results = []
    for backend in ("reference", "torch"):
        y, stats = moe(*given, top_k=top_k, activation=activation, backend=backend)
        grads = torch.autograd.grad(y, given, upstream)
        results.append((y, *grads, *stats))
    for got, want in zip(*results, strict=True):
        close(got, want, torch.float64)
    assert int(results[0][5].sum()) == tokens * top_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("normalize", [False, True])
def test_smaller_types_stay_near_double(backend: str, dtype: torch.dtype, normalize: bool) -> None:
    given = weights(45, dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in given]
    upstream = torch.randn(45, 16, dtype=torch.float64).to(dtype)
    # The choice must be the same one: take it in double and run the experts alone.
    ids, gates, _ = moe_route(doubles[0], doubles[1], top_k=2, normalize=normalize)
    gates = gates.detach().requires_grad_()
    small = gates.detach().float().requires_grad_()
    inputs = [given[0], small, given[2], given[3]]
    y = moe_experts(given[0], ids, small, given[2], given[3], backend=backend)
    grads = torch.autograd.grad(y, inputs, upstream)
    wide = [doubles[0], gates, doubles[2], doubles[3]]
    want = moe_experts(doubles[0], ids, gates, doubles[2], doubles[3], backend="reference")
    wanted = torch.autograd.grad(want, wide, upstream.double())
    for got, expected in zip((y, *grads), (want, *wanted), strict=True):
        close(got, expected.to(got.dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 33, 1000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_gpu_equals_reference(activation: str, tokens: int) -> None:
    given = weights(
        tokens, width=64, hidden=96, experts=24, activation=activation, dtype=torch.bfloat16
    )
    given = tuple(t.detach().cuda().requires_grad_() for t in given)
    x, router, w13, w2 = given
    mask = torch.arange(tokens, device="cuda") % 5 != 3
    routing = moe_route(x, router, top_k=2, mask=mask)
    gates = routing.gates.detach().requires_grad_()
    upstream = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for backend in ("reference", "auto", "torch", "grouped", "grouped"):
        y = moe_experts(x, routing.ids, gates, w13, w2, activation=activation, backend=backend)
        results.append((y, *torch.autograd.grad(y, (x, gates, w13, w2), upstream)))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            close(got, want, torch.bfloat16)
    assert all(a.equal(b) for a, b in zip(*results[-2:], strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(activation: str, normalize: bool) -> None:
    given = weights(5, width=4, hidden=3, experts=4, activation=activation, seed=3)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        y, stats = moe(
            *tensors, top_k=2, activation=activation, normalize=normalize, backend="torch"
        )
        return y, stats.mean_probability, stats.z_loss

    assert torch.autograd.gradcheck(call, given)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_one_expert_takes_everything(backend: str) -> None:
    x, _, w13, w2 = weights(20, dtype=torch.float32)
    ids = torch.full((20, 1), 4)
    gates = torch.ones(20, 1)
    y = moe_experts(x, ids, gates, w13, w2, backend=backend)
    gate, value = (x @ w13[4].T).chunk(2, dim=-1)
    close(y, (torch.nn.functional.silu(gate) * value) @ w2[4].T, torch.float32)
    d_w13, d_w2 = torch.autograd.grad(y.sum(), (w13, w2))
    idle = [e for e in range(6) if e != 4]
    assert not d_w13[idle].any()
    assert not d_w2[idle].any()
    assert d_w13[4].any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_ids_outside_belong_to_nobody(backend: str) -> None:
    x, _, w13, w2 = weights(12, dtype=torch.float32)
    ids = torch.randint(6, (12, 2))
    gates = torch.rand(12, 2, requires_grad=True)
    ids[3], ids[5, 0], ids[7, 1] = 6, -1, 99
    y = moe_experts(x, ids, gates, w13, w2, backend=backend)
    assert not y[3].any()
    d_x, d_gates = torch.autograd.grad(y.sum(), (x, gates))
    assert not d_x[3].any()
    assert not d_gates[[3, 3, 5, 7], [0, 1, 0, 1]].any()
    assert d_gates[0].all()
    alone = moe_experts(x[5:6], ids[5:6, 1:], gates[5:6, 1:], w13, w2, backend="reference")
    close(y[5:6], alone, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_what_masked_rows_hold_comes_through_nowhere(
    backend: str, normalize: bool, value: float
) -> None:
    mask = torch.arange(30) % 3 != 1
    given = weights(30, dtype=torch.float32)
    options: dict[str, Any] = {"top_k": 2, "mask": mask, "normalize": normalize, "backend": backend}
    results = []
    for hidden in (0.0, value):
        tensors = [t.detach().clone().requires_grad_() for t in given]
        tensors[0].data[~mask] = hidden
        y, stats = moe(*tensors, **options)
        assert (y[~mask] == 0).all()
        (y.square().sum() + stats.z_loss).backward()
        results.append([y, *stats, *(t.grad for t in tensors)])
        assert (tensors[0].grad[~mask] == 0).all()
    for clean, got in zip(*results, strict=True):
        torch.testing.assert_close(got, clean, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_masked_tokens_are_skipped_and_not_counted(backend: str) -> None:
    x, router, w13, w2 = weights(30, dtype=torch.float32)
    mask = torch.rand(30) < 0.6
    y, stats = moe(x, router, w13, w2, top_k=2, mask=mask, backend=backend)
    rest, alone = moe(x[mask], router, w13, w2, top_k=2, backend=backend)
    assert not y[~mask].any()
    close(y[mask], rest, torch.float32)
    assert stats.counts.equal(alone.counts)
    for got, want in zip(stats[1:], alone[1:], strict=True):
        torch.testing.assert_close(got, want)
    none, empty = moe(x, router, w13, w2, top_k=2, mask=torch.zeros(30).bool(), backend=backend)
    assert not none.any()
    assert not any(s.detach().any() for s in empty)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("top_k", [1, 2, 8, 12])
def test_ties_go_to_the_lower_expert(backend: str, top_k: int) -> None:
    router = torch.zeros(12, 4)
    router[7] = 1.0
    x = torch.ones(3, 4)
    ids = moe_route(x, router, top_k=top_k, backend=backend).ids
    want = [7, *(e for e in range(12) if e != 7)][:top_k]
    assert ids.tolist() == [want] * 3


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bias_chooses_but_does_not_gate(backend: str) -> None:
    x, router, _, _ = weights(40)
    bias = torch.tensor([0.0, 0, 0, 0, 0, 5.0], dtype=torch.float64)
    routing = moe_route(x, router, top_k=2, selection_bias=bias, backend=backend)
    probabilities = (x @ router.T).softmax(dim=-1)
    assert (routing.ids[:, 0] == 5).all()
    torch.testing.assert_close(routing.gates, probabilities.gather(1, routing.ids))
    assert routing.stats.counts[5] == 40


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_normalised_gates_are_a_softmax_over_the_kept_logits(backend: str) -> None:
    x, router, _, _ = weights(17)
    routing = moe_route(x, router, top_k=3, normalize=True, backend=backend)
    kept = (x @ router.T).gather(1, routing.ids)
    torch.testing.assert_close(routing.gates, kept.softmax(dim=-1))


def test_statistics() -> None:
    x, router, _, _ = weights(50)
    stats = moe_route(x, router, top_k=2).stats
    logits = (x @ router.T).detach()
    p = logits.softmax(-1)
    torch.testing.assert_close(stats.mean_probability, p.mean(0))
    torch.testing.assert_close(stats.z_loss, logits.exp().sum(-1).log().square().mean())
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(-1).mean())
    assert stats.mean_probability.requires_grad
    assert not stats.entropy.requires_grad


def test_router_computes_in_float32_whatever_the_input() -> None:
    x, router, w13, w2 = weights(64, dtype=torch.bfloat16)
    routing = moe_route(x, router, top_k=2)
    assert routing.gates.dtype == torch.float32
    want = (x.double() @ router.double().T).softmax(-1)
    torch.testing.assert_close(
        routing.gates.double(), want.gather(1, routing.ids), rtol=1e-5, atol=1e-7
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = [t.detach().float().requires_grad_() for t in (x, router, w13, w2)]
        y, _ = moe(*wide, top_k=2)
        again = moe_route(wide[0], wide[1], top_k=2)
    assert y.dtype == torch.bfloat16
    assert again.gates.dtype == torch.float32
    torch.testing.assert_close(again.gates, routing.gates)
    plain, _ = moe(x, router, w13, w2, top_k=2)
    assert plain.equal(y)
    y.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in wide)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 9),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_routing(tokens: int, experts: int, seed: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    x, router, w13, w2 = weights(tokens, width=8, hidden=4, experts=experts, seed=seed)
    with torch.no_grad():
        x.copy_((x * 2).round() / 2)  # many equal rows and ties
        router.copy_(router.round())
    results = [moe(x, router, w13, w2, top_k=top_k, backend=b) for b in ("reference", "torch")]
    close(results[0][0], results[1][0], torch.float64)
    assert results[0][1].counts.equal(results[1][1].counts)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_tokens(backend: str) -> None:
    given = weights(0, dtype=torch.float32)
    y, stats = moe(*given, top_k=2, backend=backend)
    assert y.shape == (0, 16)
    assert stats.counts.tolist() == [0] * 6
    grads = torch.autograd.grad(y.sum(), given)
    assert [g.shape for g in grads] == [t.shape for t in given]
    assert not any(g.any() for g in grads)


@pytest.mark.parametrize("backend", FAST)
def test_same_bits_every_time(backend: str) -> None:
    given = weights(64, dtype=torch.float32)
    results = []
    for _ in range(3):
        y, stats = moe(*given, top_k=2, backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), given), *stats))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("capacity", [0, 1, 4, 1000])
def test_capacity_drops_later_choices(capacity: int) -> None:
    given = weights(40, dtype=torch.float32)
    mask = torch.arange(40) % 7 != 2
    results = []
    for backend in ("reference", "torch"):
        routing = moe_route(*given[:2], top_k=3, mask=mask, capacity=capacity, backend=backend)
        y, _ = moe(*given, top_k=3, mask=mask, capacity=capacity, backend=backend)
        results.append((y, routing.ids, routing.gates, *routing.stats))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    free = moe_route(*given[:2], top_k=3, mask=mask)
    kept = torch.bincount(routing.ids.flatten(), minlength=7)[:6]
    assert kept.equal(free.stats.counts.clamp(max=capacity))
    assert routing.stats.dropped == free.stats.counts.sum() - kept.sum()
    assert routing.stats.counts.equal(free.stats.counts)
    changed = routing.ids != free.ids
    assert (routing.ids[changed] == 6).all()
    if capacity >= 40:
        assert not changed.any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_parts_of_the_experts_sum_to_the_whole(backend: str) -> None:
    x, router, w13, w2 = weights(33, dtype=torch.float32)
    whole, _ = moe(x, router, w13, w2, top_k=3, backend="reference")
    parts = [
        moe(x, router, w13[a:b], w2[a:b], top_k=3, first_expert=a, backend=backend)[0]
        for a, b in ((0, 1), (1, 4), (4, 6))
    ]
    close(torch.stack(parts).sum(dim=0), whole, torch.float32)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sizes", [(3, 0, 9, 0, 1, 0), (0,) * 6, (0, 0, 0, 0, 0, 15)], ids=str)
def test_sorted_rows(backend: str, recompute: bool, sizes: tuple[int, ...]) -> None:
    x, _, w13, w2 = weights(15, dtype=torch.float32)
    ends = torch.tensor(sizes).cumsum(0).int()
    upstream = torch.randn(15, 16)
    results = []
    for name in (backend, "reference"):
        y = moe_experts_sorted(x, ends, w13, w2, recompute=recompute, backend=name)
        results.append((y, *torch.autograd.grad(y, (x, w13, w2), upstream)))
    for got, want in zip(*results, strict=True):
        close(got, want, torch.float32)
    assert not results[0][0][sum(sizes) :].any()


@pytest.mark.parametrize("backend", FAST)
def test_recomputing_changes_memory_only(backend: str) -> None:
    given = weights(40, dtype=torch.float32)
    results, saved = [], []
    for recompute in (False, True):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, _ = moe(*given, top_k=2, recompute=recompute, backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), given)))
        saved.append(sum(kept.values()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert saved[0] - saved[1] == 40 * 2 * 48  # the pre-activation


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("is_sorted", [False, True])
def test_operators_are_registered_rightly(backend: str, is_sorted: bool) -> None:
    x, router, w13, w2 = weights(10, dtype=torch.float32)
    routing = moe_route(x, router, top_k=2)
    order, inverse, ends = library.plan(routing.ids, 6, 0, backend)
    torch.library.opcheck(library.plan, (routing.ids, 6, 0, backend))
    gates = routing.gates.detach().requires_grad_()
    if is_sorted:
        order = inverse = gates = None
        ends = torch.tensor([1, 1, 4, 6, 10, 10], dtype=torch.int32)
    arguments = (x, order, inverse, ends, gates, w13, w2, "swiglu", backend)
    torch.library.opcheck(library.experts, (*arguments, True))
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    hidden = library.experts(*plain, True)[1]
    torch.library.opcheck(
        torch.ops.onerec.moe_experts_backward.default,
        (torch.randn(10, 16), *plain[:7], hidden, "swiglu", backend),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "width", "hidden"), [(0, 16, 24), (1, 33, 40), (400, 19, 70)])
def test_packed_experts(
    tokens: int, width: int, hidden: int, dtype: torch.dtype, activation: str, isa: str
) -> None:
    given = weights(tokens, width=width, hidden=hidden, activation=activation, dtype=torch.float32)
    x, router, w13, w2 = (t.detach() for t in given)
    mask = torch.arange(tokens) % 5 != 3
    ids, gates, _ = moe_route(x, router, top_k=2, mask=mask)
    packed = PackedExperts(w13[1:], w2[1:], activation=activation, dtype=dtype)
    y = packed(x, ids, gates, first_expert=1)
    w13, w2 = w13[1:].to(dtype).double(), w2[1:].to(dtype).double()
    close(
        y.double(),
        moe_experts(
            x.double(),
            ids,
            gates.double(),
            w13,
            w2,
            activation=activation,
            first_expert=1,
            backend="reference",
        ),
        dtype if isa == "avx512_bf16" else torch.float32,  # x is rounded there, and nowhere else
    )
    assert packed(x, ids, gates, first_expert=1, num_threads=3).equal(y)
    some = torch.randperm(tokens)[: tokens // 3]  # a row's result is its own
    assert packed(x[some], ids[some], gates[some], first_expert=1).equal(y[some])
    half = 2 if dtype == torch.bfloat16 else 1
    assert packed.nbytes * half >= (w13.numel() + w2.numel()) * 4


IDS = torch.zeros(2, 1, dtype=torch.int64)
NARROW: dict[str, Any] = {"width": 6, "dtype": torch.float32}
CALLS: list[tuple[str, Callable[[], object]]] = [
    ("top_k", lambda: moe(*weights(3), top_k=7)),
    ("top_k", lambda: moe(*weights(3), top_k=0)),
    ("backend", lambda: moe(*weights(3), top_k=1, backend="fast")),
    ("backend", lambda: moe_route(*weights(3)[:2], top_k=1, backend="fast")),
    ("activation", lambda: moe(*weights(3), top_k=1, activation="tanh")),
    ("grouped", lambda: moe(*weights(3), top_k=1, backend="grouped")),
    ("CUDA", lambda: moe(*weights(3), top_k=1, backend="triton")),
    ("multiple of 16", lambda: moe(*weights(3, **NARROW), top_k=1, backend="grouped")),
    ("selection_bias", lambda: moe(*weights(3), top_k=1, selection_bias=torch.zeros(5))),
    ("capacity", lambda: moe(*weights(3), top_k=1, capacity=-1)),
    ("ends", lambda: moe_experts_sorted(weights(3)[0], torch.zeros(6), *weights(3)[2:])),
    ("mask", lambda: moe(*weights(3), top_k=1, mask=torch.ones(3))),
    ("w13", lambda: moe(*weights(3), top_k=1, activation="relu")),
    ("router", lambda: moe_route(torch.zeros(2, 3), torch.zeros(4, 5), top_k=1)),
    ("w13", lambda: PackedExperts(*weights(3)[2:], activation="relu")),
    ("activation", lambda: PackedExperts(*weights(3)[2:], activation="tanh")),
    ("dtype", lambda: PackedExperts(*weights(3)[2:], dtype=torch.float16)),
    ("x: wanted", lambda: PackedExperts(*weights(3)[2:])(torch.zeros(2, 3), IDS, IDS.float())),
    ("float32", lambda: PackedExperts(*weights(3)[2:])(torch.zeros(2, 16), IDS, IDS.double())),
    ("ids", lambda: moe_experts(torch.zeros(2, 16), IDS, torch.ones(2, 2), *weights(1)[2:])),
]


@pytest.mark.parametrize(
    ("words", "call"), CALLS, ids=[f"{w}-{i}" for i, (w, _) in enumerate(CALLS)]
)
def test_mistakes_name_the_argument(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=words):
        call()
