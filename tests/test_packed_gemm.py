"""Products with packed weights: right, and a row's result is its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onerec._native import core

TYPES = {"float32": 0, "bfloat16": 1}


def pack(w: torch.Tensor, kind: str) -> np.ndarray:
    packed = np.empty(core().packed_bytes(*w.shape, TYPES[kind]), dtype=np.uint8)
    core().pack_weights(w.data_ptr(), *w.shape, w.stride(0), TYPES[kind], packed.ctypes.data, 2)
    return packed


def product(
    x: torch.Tensor, packed: np.ndarray, n: int, kind: str, threads: int = 1
) -> torch.Tensor:
    y = torch.empty(len(x), n)
    core().packed_gemm(
        x.data_ptr(),
        len(x),
        x.stride(0),
        packed.ctypes.data,
        n,
        x.shape[1],
        TYPES[kind],
        y.data_ptr(),
        n,
        False,
        threads,
    )
    return y


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(0, 5, 3), (1, 1, 1), (3, 33, 31), (33, 1000, 17), (200, 48, 129)]
)
def test_equals_torch_and_a_row_does_not_depend_on_the_others(
    rows: int, n: int, k: int, kind: str, isa: str
) -> None:
    generator = torch.Generator().manual_seed(rows + n + k)
    x = torch.randn(rows, k + 2, generator=generator)[:, :k]  # rows apart
    w = torch.randn(n, k, generator=generator)
    packed = pack(w, kind)
    y = product(x, packed, n, kind)
    stored = w.to(getattr(torch, kind)).double()
    dots = kind == "bfloat16" and isa == "avx512_bf16"
    read = (x.bfloat16() if dots else x).double()  # elsewhere activations stay float
    torch.testing.assert_close(y.double(), read @ stored.T, rtol=1e-5, atol=2e-6 * k)
    assert torch.equal(product(x, packed, n, kind, threads=3), y)
    for row in {0, rows // 2, rows - 1} & set(range(rows)):
        assert torch.equal(product(x[row : row + 1], packed, n, kind), y[row : row + 1])


@pytest.mark.skipif("avx512" not in core().isas(), reason="no AVX-512")
def test_avx2_and_avx512_agree_bit_for_bit() -> None:
    x, w = torch.randn(19, 65), torch.randn(70, 65)
    before, results = core().isa(), []
    for name in ("avx2", "avx512"):
        core().set_isa(name)
        results.append(product(x, pack(w, "bfloat16"), 70, "bfloat16"))
    core().set_isa(before)
    assert torch.equal(*results)
