"""The plan and expert kernels: interpreted, compiled ahead of time, and on a GPU if any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onerec.ops import moe, moe_experts, moe_experts_sorted, moe_route

pytest.importorskip("triton")
# What a block may have of an SM's shared memory (232,448 bytes on sm_90, 166,912 on sm_80).
SHARED = {90: 227 * 1024, 80: 163 * 1024}


@pytest.mark.slow
def test_interpreted(interpreted: str) -> None:
    assert " passed" in interpreted


def launches(capability: int) -> Iterator[tuple[str, Any, Any, dict[str, str], dict[str, Any]]]:
    """Every kernel with every configuration it can get: bfloat16, d = 1024, F = 4096, E = 24."""
    from onerec.kernels import moe_experts as m
    from onerec.kernels.moe_plan import block_sizes, moe_count_kernel, moe_plan_kernel

    d, f = 1024, 4096
    for name, limit in (("small", 1024), ("large", 32768)):
        sizes = block_sizes(24, limit)
        alone = name == "small"
        signature = {"ids": "*i64", "order": "*i32", "inverse": "*i32", "ends": "*i32"}
        signature |= {"pairs": "i32", "first": "i32", "blocks": "i32", "counts": "*i32"}
        constants = {"E": 24, **sizes}
        cut = m.Config(0, 0, 0, 8, 3, 1)
        if not alone:
            yield f"count {name}", moe_count_kernel, cut, signature, constants
        constants |= {"BLOCK_B": 64} | ({"counts": None} if alone else {})
        yield f"plan {name}", moe_plan_kernel, cut, signature, constants

    half = {"*bf16": ("x", "w13", "hidden", "activated", "a", "w", "grad", "w2", "d_hidden")}
    half["*bf16"] += ("weighted", "left", "right")
    types = {name: kind for kind, names in half.items() for name in names}
    types |= {"order": "*i32", "ends": "*i32", "gates": "*fp32", "dots": "*fp32", "pairs": "i32"}
    cut = m.Config(0, 0, 0, 4, 3, 1)
    types |= {"rows": "*fp32", "inverse": "*i32", "y": "*bf16", "tokens": "i32"}
    constants = {"E": 24, "N": d, "K": 2, "SPLIT": 4, "BLOCK": 1024}
    yield "combine", m.moe_combine_kernel, cut, types, constants
    layer = {"D": d, "F": f, "ACTIVATION": "swiglu", "GATED": True}
    for kind, table in m.HALF.items():
        for rows, _ in table:
            cut = m.config(kind, torch.bfloat16, rows, capability)
            tile = {"BM": cut.bm, "BN": cut.bn, "BK": cut.bk, "E": 24, "PRECISION": "tf32"}
            name = f"{kind} {cut.bm}x{cut.bn}x{cut.bk}"
            out = {**types, "out": "*bf16" if cut.split == 1 else "*fp32"}
            if kind == "up":
                constants = {**layer, "K": 2, "SWAP": cut.swap, "BLOCK_E": 32}
                yield name, m.moe_up_kernel, cut, out, {**tile, **constants}
            elif kind == "down":
                for flipped, depth in ((False, f), (True, 2 * f)):
                    if flipped and cut.swap:
                        continue
                    constants = {"D": depth, "N": d, "FLIPPED": flipped, "SPLIT": cut.split}
                    constants |= {"SWAP": cut.swap, "BLOCK_E": 32}
                    name = f"{name} flipped" if flipped else name
                    yield name, m.moe_down_kernel, cut, out, {**tile, **constants}
            elif kind == "back":
                # Triton makes an argument of 1 a constant: it must compile like that too.
                constants = {**layer, "K": 2, "BLOCK_E": 32} | ({"pairs": 1} if rows < 999 else {})
                yield name, m.moe_back_kernel, cut, out, {**tile, **constants}
            else:
                constants = {"M": 2 * f, "N": d, "K": 2}
                constants |= {"GATHER_LEFT": False, "GATHER_RIGHT": True}
                yield name, m.moe_weight_kernel, cut, out, {**tile, **constants}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
def test_compiles_without_spills(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onerec.kernels.ahead_of_time import compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, kernel, cut, signature, constants in launches(capability):
        used = compile_kernel(
            kernel,
            signature,
            constants,
            capability=capability,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        fast = used.ptx.count("wgmma.mma_async")
        print(
            f"sm_{capability} {name}: {used.registers} registers, {used.shared} B shared, "
            f"{cut.warps} warps, {cut.per_sm} an SM, {fast} wgmma"
        )
        assert used.spilled == 0, name
        # An SM keeps 1 KiB of its shared memory a block.
        assert cut.per_sm * (used.shared + 1024) <= SHARED[capability] + 1024, name
        assert cut.per_sm * cut.warps * 32 * used.registers <= 65536, name
        assert "atom." not in used.ptx, name  # deterministic
        assert "C7515" not in used.log, name  # wgmma one after the other
        assert "Compiling entry function" in used.log
        if capability == 90 and cut.bm:
            assert fast, name


def problem(tokens: int, dtype: torch.dtype, zipf: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    d, f, e = 256, 384, 24
    x, router = torch.randn(tokens, d), torch.randn(e, d)
    if zipf:
        router *= (1.0 / torch.arange(1, e + 1))[:, None]
    made = (x, router, torch.randn(e, 2 * f, d) / d**0.5, torch.randn(e, d, f) / f**0.5)
    return [t.to("cuda", dtype).requires_grad_() for t in made]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zipf", [False, True])
# Mean rows an expert from below 1 to above 384: every entry of the table.
@pytest.mark.parametrize("tokens", [0, 1, 130, 260, 1000, 4000, 6000])
def test_on_gpu_equals_reference(tokens: int, zipf: bool, dtype: torch.dtype) -> None:
    x, router, w13, w2 = problem(tokens, dtype, zipf)
    mask = torch.arange(tokens, device="cuda") % 5 != 3
    routing = moe_route(x, router, top_k=2, mask=mask)
    gates = routing.gates.detach().requires_grad_()
    leaves = [x, gates, w13, w2]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    # Toward y: the gradient of a lone gate is then no small difference of large products.
    toward = moe_experts(wide[0], routing.ids, *wide[1:], backend="torch")
    upstream = torch.randn_like(x) + toward.detach().to(dtype)
    results = []
    for given, backend in ((leaves, "triton"), (leaves, "triton"), (wide, "torch")):
        y = moe_experts(given[0], routing.ids, *given[1:], backend=backend)
        results.append((y, *torch.autograd.grad(y, given, upstream.to(y.dtype))))
    again = moe_experts(x, routing.ids, gates, w13, w2, recompute=True, backend="triton")
    results.insert(1, (again, *torch.autograd.grad(again, leaves, upstream)))
    for got, recomputed, second, want in zip(*results, strict=True):
        assert got.equal(second)  # the same bits every time
        assert got.equal(recomputed)
        error = (got.float() - want).norm() / want.norm().clamp(min=1e-3)
        limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
        assert error.item() < limit


@pytest.mark.gpu
def test_sorted_rows_and_parts_on_gpu() -> None:
    x, router, w13, w2 = problem(500, torch.bfloat16)
    ends = torch.arange(1, 25, device="cuda", dtype=torch.int32) * 20
    got = moe_experts_sorted(x, ends, w13, w2, backend="triton")
    want = moe_experts_sorted(x.float(), ends, w13.float(), w2.float(), backend="reference")
    assert ((got.float() - want).norm() / want.norm()).item() < 1.5e-2
    assert not got[480:].any()
    whole, _ = moe(x, router, w13, w2, top_k=2, backend="triton")
    halves = [
        moe(x, router, w13[a : a + 12], w2[a : a + 12], top_k=2, first_expert=a)[0] for a in (0, 12)
    ]
    assert ((sum(halves) - whole).float().norm() / whole.float().norm()).item() < 1.5e-2


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    x, router, w13, w2 = (t.detach() for t in problem(128, torch.bfloat16))
    moe(x, router, w13, w2, top_k=2)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, stats = moe(x, router, w13, w2, top_k=2)
    for seed in (1, 2):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        graph.replay()
        want, counted = moe(x, router, w13, w2, top_k=2)
        assert y.equal(want)
        assert stats.counts.equal(counted.counts)
