"""The kernels of a beam's attentions: interpreted, compiled ahead of time, and on a GPU if any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onerec.ops import ancestry_attention, cross_attention

pytest.importorskip("triton")


def test_interpreted(interpreted: str) -> None:
    assert " passed" in interpreted


def test_cross_starts_for_any_number_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    from onerec.kernels import cross_attention as cross

    grids = []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(cross, "cross_attention_kernel", Launches())
    q, keys = torch.zeros(4096, 1, 16, 8), torch.zeros(4096, 16, 1, 8)
    cross.cross_attention(q, keys, keys, torch.ones(4096, dtype=torch.int32))
    ((first, *others),) = grids
    assert first == 65536
    assert max(others) < 65536  # CUDA's limit


@pytest.mark.parametrize("capability", [90, 80])
@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, "*bf16"), (torch.float32, "*fp32")], ids=["bf16", "fp32"]
)
def test_compiles_without_spills(
    capability: int,
    dtype: torch.dtype,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads of 128 over 768 keys, as the 0.1b and 1b presets have them, and five items' tokens."""
    from onerec.kernels import ancestry_attention as own
    from onerec.kernels import cross_attention as cross
    from onerec.kernels.ahead_of_time import compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = cross.tiles(128, dtype)
    types = dict.fromkeys(("q", "keys", "values", "qkv"), kind)
    types |= {"lengths": "*i32", "tops": "*fp32", "sums": "*fp32", "parts": "*fp32"}
    types |= {"slots": "*i64", "scale": "fp32"}
    whole = ("queries", "size", "chunk", "cells", "start", "beams", "times", "width", "slot_stride")
    types |= dict.fromkeys(whole, "i32")
    shape: dict[str, Any] = {"H": 8, "D": 128, "BLOCK_D": 128}
    combine = {"D": 128, "BLOCK_D": 128, "SPLITS": 4, "BLOCK_N": 8}
    launches = [
        ("cut", cross.cross_attention_kernel, "*fp32", {**sizes, **shape, "SPLITS": 4}, 2),
        (
            "whole",
            cross.cross_attention_kernel,
            kind,
            {**sizes, **shape, "SPLITS": 1, "tops": None, "sums": None},
            2,
        ),
        ("combine", cross.combine_kernel, kind, combine, 3),
        *(
            (
                f"own {new}",
                own.ancestry_attention_kernel,
                kind,
                {**shape, "NEW": new, "BLOCK_T": own.BLOCK_T},
                3,
            )
            for new in (1, 2)
        ),
    ]
    for name, kernel, out, constants, stages in launches:
        used = compile_kernel(
            kernel,
            {**types, "out": out},
            constants,
            capability=capability,
            num_warps=cross.warps(dtype, capability)
            if kernel is cross.cross_attention_kernel
            else 4,
            num_stages=stages,
        )
        fast = used.ptx.count("wgmma.mma_async") + used.ptx.count("mma.sync")
        print(
            f"sm_{capability} {kind} {name}: {used.registers} registers, {used.shared} B shared, "
            f"{fast} matrix instructions"
        )
        # ptxas of another version may spare a register or two under the limit of the warps.
        assert used.spilled <= 16, name
        assert used.shared <= 100 * 1024, name  # two blocks an SM
        assert "atom" not in used.ptx, name  # deterministic
        if name in ("cut", "whole") and dtype == torch.bfloat16:
            assert fast, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "queries", "size"), [(1, 1, 769), (1, 128, 769), (4, 256, 130)])
def test_cross_on_gpu_equals_reference(
    batch: int, queries: int, size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    q = torch.randn(batch, queries, 8, 128, device="cuda", dtype=dtype)
    keys, values = torch.randn(2, batch, 8, size, 128, device="cuda", dtype=dtype)
    lengths = torch.randint(1, size + 1, (batch,), device="cuda", dtype=torch.int32)
    got = cross_attention(q, keys, values, lengths, backend="triton")
    wide = (t.double() for t in (q, keys, values))
    want = cross_attention(*wide, lengths, backend="torch").float()
    error = float((got.float() - want).norm() / want.norm())
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert torch.equal(got, cross_attention(q, keys, values, lengths))
    for b in range(batch):  # alone as in the batch, to the last bit
        one = (t[b : b + 1] for t in (q, keys, values, lengths))
        assert torch.equal(cross_attention(*one)[0], got[b])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("start", "new"), [(0, 1), (3, 2), (18, 1), (40, 2)])
def test_ancestry_on_gpu_equals_reference(start: int, new: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    beams, times = 128, start + new
    qkv = torch.randn(3, beams, new, 3, 8, 128, device="cuda", dtype=dtype)
    keys, values = torch.randn(2, 3, times, beams, 8, 128, device="cuda", dtype=dtype)
    slots = torch.randint(beams, (3, beams, times), device="cuda")
    slots[..., start:] = torch.arange(beams, device="cuda").unsqueeze(-1)
    wide = [keys.double(), values.double()]
    want = ancestry_attention(qkv.double(), *wide, slots, start, backend="torch").float()
    got = ancestry_attention(qkv, keys, values, slots, start, backend="triton")
    error = float((got.float() - want).norm() / want.norm())
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert torch.equal(keys.double(), wide[0])
    assert torch.equal(values.double(), wide[1])
