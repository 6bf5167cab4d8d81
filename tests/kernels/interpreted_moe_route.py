"""The routing kernel through Triton's interpreter; run by test_moe_route.py in its own process."""

from __future__ import annotations

import pytest
import torch

from onerec.kernels.moe_route import moe_route as kernel_route
from onerec.ops import moe_route
from onerec.ops.moe import _statistics, library


def check(
    logits: torch.Tensor,
    top_k: int,
    normalize: bool = False,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> None:
    got = kernel_route(logits, top_k=top_k, normalize=normalize, selection_bias=bias, mask=mask)
    p = logits.softmax(-1)
    scores = p if bias is None else p + bias
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    gates = p.gather(1, ids)
    if normalize:
        gates = gates / gates.sum(-1, keepdim=True)
    ids, stats = _statistics(logits, p, ids, mask)
    assert got.ids.dtype == torch.int64
    assert got.ids.equal(ids)
    torch.testing.assert_close(got.gates, gates, rtol=1e-5, atol=1e-7)
    assert got.counts.equal(stats.counts)
    count = max(len(logits) if mask is None else int(mask.sum()), 1)
    for total, mean in (
        (got.probability_sum, stats.mean_probability),
        (got.z_sum, stats.z_loss),
        (got.entropy_sum, stats.entropy),
    ):
        torch.testing.assert_close(total / count, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 65])
@pytest.mark.parametrize(
    ("experts", "top_k"), [(1, 1), (3, 2), (24, 2), (24, 5), (32, 8), (100, 3)]
)
def test_sizes(tokens: int, experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    check(torch.randn(tokens, experts) * 3, top_k)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_options(normalize: bool, biased: bool, masked: bool) -> None:
    torch.manual_seed(1)
    check(
        torch.randn(150, 24),
        2,
        normalize,
        torch.randn(24) * 0.1 if biased else None,
        torch.rand(150) < 0.7 if masked else None,
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(normalize: bool, masked: bool) -> None:
    torch.manual_seed(2)
    logits = torch.randn(70, 24, requires_grad=True)
    mask = torch.rand(70) < 0.7 if masked else None
    weight = torch.randn(70, 3)
    ids, gates, _, mass, z_sum, _ = library.route(logits, None, mask, 3, normalize)
    kept = (ids < 24).float()
    loss = (gates * weight * kept).sum() + mass.square().sum() + z_sum
    want = moe_route(logits, torch.eye(24), top_k=3, normalize=normalize, mask=mask)
    total = 70 if mask is None else mask.sum()
    expected = (want.gates * weight * kept).sum()
    expected = expected + (want.stats.mean_probability * total).square().sum()
    expected = expected + want.stats.z_loss * total
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_ties_and_extremes() -> None:
    rows = torch.zeros(6, 24)
    rows[1, 5] = rows[1, 20] = 1.0
    rows[2, 3:] = float("-inf")
    rows[3] = 1e10 * torch.arange(24)
    rows[4] = -1e4
    rows[5, 7] = 80.0
    check(rows, 4)
    check(rows, 2, mask=torch.zeros(6, dtype=torch.bool))


def test_nan_rows_choose_distinct_experts() -> None:
    rows = torch.zeros(2, 24)
    rows[0, 3] = float("nan")
    got = kernel_route(rows, top_k=3)
    assert got.ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert got.gates[0].isnan().all()
    assert not got.gates[1].isnan().any()


def test_mistakes() -> None:
    good = torch.zeros(3, 4)
    for wrong in (good.double(), good.T, good[0], torch.zeros(1, 1025)):
        with pytest.raises(ValueError, match="logits"):
            kernel_route(wrong, top_k=1)
