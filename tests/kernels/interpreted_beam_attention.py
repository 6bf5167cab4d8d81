"""The attention kernels of a beam through Triton's interpreter; run by test_beam_attention.py."""

from __future__ import annotations

import pytest
import torch

from onerec.kernels.ancestry_attention import ancestry_attention as kernel_ancestry
from onerec.kernels.cross_attention import cross_attention as kernel_cross
from onerec.kernels.cross_attention import cut
from onerec.ops import ancestry_attention, cross_attention
from onerec.ops.beam_attention import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "size", "width", "lengths"),
    [
        (1, 1, 1, 1, 16, [1]),
        (3, 5, 2, 70, 24, [70, 1, 33]),
        (1, 70, 1, 40, 64, [17]),
        (2, 35, 2, 600, 16, [600, 210]),  # three parts, of which the second has two that are empty
        (1, 3, 1, 2500, 32, [2049]),
    ],
)
def test_cross(
    batch: int,
    queries: int,
    heads: int,
    size: int,
    width: int,
    lengths: list[int],
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    q = torch.randn(batch, queries, heads, width).to(dtype)
    keys, values = torch.randn(2, batch, heads, size, width).to(dtype)
    count = torch.tensor(lengths, dtype=torch.int32)
    beyond = torch.arange(size) >= count[:, None]
    for tensor in (keys, values):  # what is past the end must not be read
        tensor.masked_fill_(beyond[:, None, :, None], float("nan"))
    got = kernel_cross(q, keys, values, count)
    clean = [t.float().nan_to_num(0.0) for t in (keys, values)]
    want = reference.cross_attention(q.float(), *clean, count)
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def test_cross_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(1)
    q, lengths = torch.randn(3, 4, 1, 16), torch.tensor([300, 5, 280], dtype=torch.int32)
    keys, values = torch.randn(2, 3, 1, 300, 16)
    assert cut(300)[0] == 2
    whole = kernel_cross(q, keys, values, lengths)
    for b in range(3):
        one = (t[b : b + 1] for t in (q, keys, values, lengths))
        assert torch.equal(kernel_cross(*one)[0], whole[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("start", "new", "beams", "width"), [(0, 1, 1, 16), (1, 1, 3, 24), (5, 2, 4, 16), (40, 2, 2, 8)]
)
def test_ancestry(start: int, new: int, beams: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, heads, places = 2, 2, 5
    times = start + new + 1
    qkv = torch.randn(batch, beams, new, 3, heads, width).to(dtype)
    keys, values = torch.randn(2, batch, times, places, heads, width).to(dtype)
    # Rows of a wider table, as the engine has them.
    table = torch.randint(places, (batch, beams, 3 + times))
    slots = table[..., 3 : 3 + start + new]
    slots[..., start:] = torch.arange(beams).unsqueeze(-1)
    wide = [keys.float(), values.float()]
    want = reference.ancestry_attention(qkv.float(), *wide, slots, start)
    got = kernel_ancestry(qkv, keys, values, slots, start)
    assert got.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip((keys, values), wide, strict=True):
        assert torch.equal(mine.float(), theirs)


def test_mistakes() -> None:
    q, keys = torch.randn(1, 2, 2, 16), torch.randn(1, 2, 3, 16)
    lengths = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="q: wanted float32, float16 or bfloat16"):
        kernel_cross(q.double(), keys.double(), keys.double(), lengths)
    with pytest.raises(ValueError, match="values: wanted contiguous"):
        kernel_cross(q, keys, keys.transpose(2, 3).contiguous().transpose(2, 3), lengths)
    with pytest.raises(ValueError, match="keys and values: wanted"):
        cross_attention(q, keys[:, :1], keys, lengths)
    with pytest.raises(ValueError, match="backend: wanted"):
        cross_attention(q, keys, keys, lengths, backend="cuda")
    qkv, cache = torch.randn(1, 2, 1, 3, 2, 16), torch.randn(1, 4, 2, 2, 16)
    slots = torch.zeros(1, 2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="slots: wanted int64"):
        kernel_ancestry(qkv, cache, cache, slots.int(), 0)
    with pytest.raises(ValueError, match="T >= 5"):
        ancestry_attention(qkv, cache, cache, slots, 4)
