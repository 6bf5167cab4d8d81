"""Mixture of experts: ours beside `F.grouped_mm` as others use it, a loop and liger-kernel.

On the CPU the forward pass is the packed native one and the training step the sorted one; on CUDA
both are the Triton kernels and the forward pass includes the routing, replayed from a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from roofs import roofs
from torch import Tensor

from onerec._native import core
from onerec.ops import PackedExperts, moe, moe_experts, moe_route

# (d, F, experts): the tiny preset, a small model of OneRec's proportions, a large one.
SIZES = {"tiny": (128, 512, 8), "small": (512, 2048, 24), "large": (1024, 4096, 24)}
TOP_K = 2


def grouped_mm(x: Tensor, ids: Tensor, gates: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """What transformers and torchtitan do: sort, gather, `F.grouped_mm` twice, sum over slots."""
    pairs, order = ids.flatten().sort(stable=True)
    # Not bincount, which waits for the device.
    each = torch.arange(len(w2), device=ids.device)
    ends = torch.searchsorted(pairs, each, right=True, out_int32=True)
    hidden = F.grouped_mm(x[order // TOP_K], w13.transpose(-2, -1), offs=ends)
    gate, value = hidden.chunk(2, dim=-1)
    out = F.grouped_mm(F.silu(gate) * value, w2.transpose(-2, -1), offs=ends)
    out = out * gates.flatten()[order, None]
    return out[order.argsort()].view(*ids.shape, -1).sum(dim=1)


def dense(x: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """As many multiplications as the experts need, as one dense layer: what the machine can do."""
    hidden = x.repeat_interleave(TOP_K, dim=0) @ w13[0].T
    gate, value = hidden.chunk(2, dim=-1)
    return (F.silu(gate) * value) @ w2[0].T


class Problem(NamedTuple):
    """Inputs of a layer: `leaves` are x, gates, w13, w2."""

    x: Tensor
    router: Tensor
    ids: Tensor
    gates: Tensor
    w13: Tensor
    w2: Tensor
    facts: dict[str, Any]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.gates, self.w13, self.w2]


def problem(
    size: str, tokens: int, dtype: torch.dtype, device: str, routing: str = "uniform"
) -> Problem:
    d, f, e = SIZES[size]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(*shape, generator=generator, device=device)
        return (made / shape[-1] ** 0.5).to(dtype)

    x, router = normal(tokens, d) * d**0.5, normal(e, d)
    if routing == "zipf":
        x[:, 0] = 1.0
        router[:, 0] = -2.0 * torch.arange(1, e + 1, device=device).log()
    w13, w2 = normal(e, 2 * f, d), normal(e, d, f)
    ids, gates, stats = moe_route(x, router, top_k=TOP_K)
    hit = int((stats.counts > 0).sum())
    facts = {
        "d": d,
        "F": f,
        "experts": e,
        "experts hit": hit,
        "busiest": round(float(stats.counts.max() / max(tokens * TOP_K, 1)), 3),
        "flops": 6 * tokens * TOP_K * d * f,
        "bytes": (3 * hit * d * f + 2 * tokens * d) * x.element_size(),
    }
    return Problem(x, router, ids, gates.to(dtype), w13, w2, facts)


def near(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        error = float((a.double() - b.double()).norm() / b.double().norm())
        assert error < (1e-5 if b.dtype == torch.float32 else 2e-2), error


def measured(p: Problem, device: str, passes: int = 1) -> dict[str, Any]:
    """What `compare` notes of the work, the machine and the time below which none can come."""
    facts = dict(p.facts)
    flops, size = passes * facts.pop("flops"), passes * facts.pop("bytes")
    facts |= roofs(p.x.dtype, device)
    floor = max(flops / facts["roof GFLOP/s"], size / facts["roof GB/s"]) / 1e9
    return {
        "check": near,
        "work": {"GFLOP/s": flops / 1e9, "GB/s": size / 1e9},
        "facts": {**facts, "floor_s": floor},
        "device": device,
    }


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def skip_slow_bfloat16(dtype: torch.dtype) -> None:
    """Without AVX-512 torch emulates bfloat16: large products take minutes and say nothing."""
    if dtype == torch.bfloat16 and not core().isa().startswith("avx512"):
        pytest.skip("no bfloat16 arithmetic")


@DTYPES
@pytest.mark.parametrize(
    ("size", "tokens"),
    [("tiny", 1), ("tiny", 128), ("small", 1), ("small", 8), ("small", 128), ("small", 2048)],
)
def test_forward(compare: Any, size: str, tokens: int, dtype: torch.dtype) -> None:
    if tokens > 128:
        skip_slow_bfloat16(dtype)
    p = problem(size, tokens, dtype, "cpu")
    packed = PackedExperts(p.w13, p.w2, dtype=dtype)
    # As the engine calls it: float32 in and out. A conversion by torch in the same call would leave
    # libgomp's threads polling beside the pool's.
    x, gates = p.x.float(), p.gates.float()
    routes = [p.ids]
    if tokens == 1:  # others each time, as in a decoder, or the cache would hold the weights
        routes = list(torch.arange(len(p.w2)).view(-1, 1, TOP_K))

    def in_turn(call: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        ids = itertools.cycle(routes)
        return lambda: [call(next(ids))]

    def loop(ids: Tensor) -> Tensor:
        return moe_experts(p.x, ids, *p.leaves[1:], backend="reference")

    with torch.inference_mode():
        compare(
            {
                "onerec": in_turn(lambda i: packed(x, i, gates)),
                "onerec torch": in_turn(lambda i: moe_experts(p.x, i, *p.leaves[1:])),
                "F.grouped_mm": in_turn(lambda i: grouped_mm(p.x, i, *p.leaves[1:])),
                "loop": in_turn(loop),
            },
            expected=[loop(routes[0])],
            calls=20 if tokens == 1 else 1,
            seconds=2.0,
            **measured(p, "cpu"),
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
@pytest.mark.parametrize(("size", "tokens"), [("tiny", 2048), ("small", 128), ("small", 2048)])
def test_training_step(compare: Any, size: str, tokens: int, dtype: torch.dtype) -> None:
    skip_slow_bfloat16(dtype)
    p = problem(size, tokens, dtype, "cpu")
    x, gates, w13, w2 = p.leaves
    calls = {
        "onerec": lambda: moe_experts(x, p.ids, gates, w13, w2),
        "F.grouped_mm": lambda: grouped_mm(x, p.ids, gates, w13, w2),
        "loop": lambda: moe_experts(x, p.ids, gates, w13, w2, backend="reference"),
    }
    compare(training(calls, p.leaves), seconds=1.0, **measured(p, "cpu", passes=3))


class Graphed:
    """A call in a CUDA graph, captured when first made, so that it fails in `compare` alone."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.out = self.call()
        return graph

    def __call__(self) -> list[Tensor]:
        if self.graph is None:
            self.graph = self.capture()
        self.graph.replay()
        return [self.out]


def liger() -> Callable[..., Tensor] | None:
    """liger-kernel's fused experts, where installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return lambda x, ids, gates, w13, w2: LigerFusedMoEFunction.apply(x, w13, w2, ids.int(), gates)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize("tokens", [1, 16, 128, 512, 2048, 16384])
def test_forward_on_gpu(compare: Any, tokens: int, routing: str) -> None:
    p = problem("large", tokens, torch.bfloat16, "cuda", routing)

    def routed(experts: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            choice = moe_route(p.x, p.router, top_k=TOP_K, backend="torch")
            return experts(p.x, choice.ids, choice.gates.to(p.x.dtype), p.w13, p.w2)

        return call

    def layer() -> Tensor:
        return moe(p.x, p.router, p.w13, p.w2, top_k=TOP_K, backend="triton")[0]

    def loop() -> list[Tensor]:
        return [moe(p.x, p.router, p.w13, p.w2, top_k=TOP_K, backend="reference")[0]]

    with torch.inference_mode():
        calls: dict[str, Callable[[], list[Tensor]]] = {"onerec": Graphed(layer)}
        calls["onerec, no graph"] = lambda: [layer()]
        calls["F.grouped_mm"] = Graphed(routed(grouped_mm))
        if fused := liger():
            peer = routed(fused)
            calls["liger-kernel"] = lambda: [peer()]
        calls["loop"] = loop
        rest = measured(p, "cuda")
        rest["facts"]["dense_s"] = seconds(Graphed(lambda: dense(p.x, p.w13, p.w2)))
        compare(calls, calls=20 if tokens <= 2048 else 2, seconds=1.0, **rest)


def seconds(call: Callable[[], Any], calls: int = 20) -> float:
    """Median time of a call on the GPU, made once before."""
    call()
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[3]


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize("tokens", [16384, 65536])
def test_training_step_on_gpu(compare: Any, tokens: int, routing: str) -> None:
    p = problem("large", tokens, torch.bfloat16, "cuda", routing)
    x, gates, w13, w2 = p.leaves
    calls: dict[str, Callable[[], Tensor]] = {
        "onerec": lambda: moe_experts(x, p.ids, gates, w13, w2, backend="triton"),
        "onerec, recomputed": lambda: moe_experts(
            x, p.ids, gates, w13, w2, recompute=True, backend="triton"
        ),
    }
    if fused := liger():
        calls["liger-kernel"] = lambda: fused(x, p.ids, gates, w13, w2)
    calls["F.grouped_mm"] = lambda: grouped_mm(x, p.ids, gates, w13, w2)
    calls["loop"] = lambda: moe_experts(x, p.ids, gates, w13, w2, backend="reference")
    rest = measured(p, "cuda", passes=3)
    timed = training(calls, p.leaves)
    weights = {w.data_ptr() for w in p.leaves}
    for name, call in calls.items():
        kept: dict[int, int] = {}

        def note(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if tensor.data_ptr() not in weights:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                call()
        except RuntimeError:
            continue  # `compare` will say so
        rest["facts"][f"saved MB, {name}"] = round(sum(kept.values()) / 1e6)
    alone = training({"dense": lambda: dense(x, w13, w2)}, [x, w13, w2])["dense"]
    rest["facts"]["dense_s"] = seconds(alone, calls=2)
    compare(timed, **rest)
