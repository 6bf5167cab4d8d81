"""The routing kernel: interpreted, compiled ahead of time, and on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def test_interpreted(interpreted: str) -> None:
    assert " passed" in interpreted


@pytest.mark.parametrize(
    ("capability", "experts", "top_k", "optional"),
    [(90, 24, 2, False), (90, 24, 2, True), (90, 256, 8, True), (80, 24, 2, True)],
)
def test_compiles_without_spills(
    capability: int,
    experts: int,
    top_k: int,
    optional: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onerec.kernels.ahead_of_time import compile_kernel
    from onerec.kernels.moe_route import block_sizes, moe_route_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {
        "logits": "*fp32",
        "ids": "*i64",
        "gates": "*fp32",
        "counts": "*i32",
        "sums": "*fp32",
        "tokens": "i32",
    }
    constants = {"E": experts, "K": top_k, "NORMALIZE": True, **block_sizes(experts, top_k)}
    if optional:
        signature |= {"bias": "*fp32", "mask": "*i8"}
    else:
        constants |= {"bias": None, "mask": None}
    used = compile_kernel(moe_route_kernel, signature, constants, capability=capability)
    print(f"sm_{capability} E={experts} k={top_k}: {used.registers} registers, {used.shared} B")
    assert used.spilled == 0
    assert used.registers <= 168  # three blocks of 128 threads an SM at least
    assert used.shared <= 48 * 1024
    assert "atom" not in used.ptx  # deterministic


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 128, 5000])
def test_on_gpu_equals_reference(tokens: int, dtype: torch.dtype) -> None:
    from onerec.ops import moe_route

    torch.manual_seed(0)
    x = torch.randn(tokens, 64, device="cuda", dtype=dtype, requires_grad=True)
    router = torch.randn(24, 64, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(24, device="cuda") * 0.01
    mask = torch.rand(tokens, device="cuda") < 0.8
    results = []
    for backend in ("torch", "triton"):
        ids, gates, stats = moe_route(
            x, router, top_k=2, selection_bias=bias, mask=mask, backend=backend
        )
        loss = gates[mask].square().sum() + stats.z_loss + stats.mean_probability.square().sum()
        results.append((ids, gates, *stats, *torch.autograd.grad(loss, (x, router))))
    for got, want in zip(*results, strict=True):
        rtol = 1e-2 if got.dtype == torch.bfloat16 else 1e-4  # a bit of the gradient's own type
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-5)
