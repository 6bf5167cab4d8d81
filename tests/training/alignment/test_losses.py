"""Alignment losses against scalar computations in Python floats, and their gradients.

The scalar formulas are those of the papers. Where TRL (1.16) has the same loss, its own code gives
the same values and gradients: `test_trl`, which runs where `pip install trl` has been.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from onerec.training.alignment import losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairs(seed: int = 0, size: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-40 * torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(4)]


Scalar = Callable[[float, float, float, float], float]

CASES: dict[str, tuple[Callable[..., Tensor], Scalar]] = {
    "dpo": (
        lambda *a: losses.dpo(*a, beta=0.3),
        lambda w, v, rw, rv: -math.log(sigmoid(0.3 * ((w - rw) - (v - rv)))),
    ),
    "ipo": (
        lambda *a: losses.ipo(*a, beta=0.3),
        lambda w, v, rw, rv: ((w - rw) - (v - rv) - 1 / 0.6) ** 2,
    ),
    "conservative_dpo": (
        lambda *a: losses.conservative_dpo(*a, beta=0.3, label_smoothing=0.2),
        lambda w, v, rw, rv: (
            -0.8 * math.log(sigmoid(0.3 * ((w - rw) - (v - rv))))
            - 0.2 * math.log(sigmoid(-0.3 * ((w - rw) - (v - rv))))
        ),
    ),
    "robust_dpo": (
        lambda *a: losses.robust_dpo(*a, beta=0.3, label_smoothing=0.2),
        lambda w, v, rw, rv: (
            (
                -0.8 * math.log(sigmoid(0.3 * ((w - rw) - (v - rv))))
                + 0.2 * math.log(sigmoid(-0.3 * ((w - rw) - (v - rv))))
            )
            / 0.6
        ),
    ),
    "cpo": (
        lambda w, v, rw, rv: losses.cpo(w, v, beta=0.3, nll_weight=0.5),
        lambda w, v, rw, rv: -math.log(sigmoid(0.3 * (w - v))) - 0.5 * w,
    ),
    "simpo": (
        lambda w, v, rw, rv: losses.simpo(w, v, 15, 12, beta=2.0, gamma=0.5),
        lambda w, v, rw, rv: -math.log(sigmoid(2 * w / 15 - 2 * v / 12 - 0.5)),
    ),
    "softmax_dpo": (
        lambda w, v, rw, rv: losses.softmax_dpo(
            w, torch.stack([v, w], 1), rw, torch.stack([rv, rv], 1), beta=0.2
        ),
        lambda w, v, rw, rv: (
            -math.log(
                sigmoid(
                    -math.log(
                        math.exp(0.2 * ((v - rv) - (w - rw)))
                        + math.exp(0.2 * ((w - rv) - (w - rw)))
                    )
                )
            )
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    loss, scalar = CASES[name]
    inputs = pairs()
    expected = [scalar(*row) for row in zip(*(t.tolist() for t in inputs), strict=True)]
    torch.testing.assert_close(loss(*inputs), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_differences(name: str) -> None:
    loss, scalar = CASES[name]
    winner, loser, ref_winner, ref_loser = pairs(1)
    winner.requires_grad_()
    loser.requires_grad_()
    loss(winner, loser, ref_winner, ref_loser).sum().backward()
    step = 1e-5
    for i in range(len(winner)):
        row = [t[i].item() for t in (winner, loser, ref_winner, ref_loser)]
        for side, grad in ((0, winner.grad), (1, loser.grad)):
            up, down = list(row), list(row)
            up[side] += step
            down[side] -= step
            slope = (scalar(*up) - scalar(*down)) / (2 * step)
            assert grad is not None
            assert grad[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


CODES = 15


def trl_dpo(kind: str, w: Tensor, v: Tensor, rw: Tensor, rv: Tensor, **settings: float) -> Tensor:
    """`DPOTrainer`'s loss of each pair; the model it asks gives sessions of `CODES` codes."""
    from trl import DPOTrainer

    def same(value: Any) -> Any:
        return value

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    mask = torch.ones(2, 1 + CODES, dtype=torch.int64)
    mask[:, 0] = 0  # the prompt
    one = torch.zeros(2, CODES)
    found = []
    for row in range(len(w)):
        codes = torch.stack([w[row], v[row]])[:, None].expand(2, CODES) / CODES
        answer = SimpleNamespace(log_probs=codes, entropy=one, mean_logits=one, is_top1=one > 0)
        inputs = {
            "input_ids": mask,
            "attention_mask": mask,
            "completion_mask": mask,
            "ref_chosen_logps": rw[row : row + 1],
            "ref_rejected_logps": rv[row : row + 1],
        }
        found.append(DPOTrainer._compute_loss(trainer, lambda a=answer, **_: a, inputs, False))
    return torch.stack(found)


def trl_cpo(
    kind: str, w: Tensor, v: Tensor, *, label_smoothing: float = 0.0, **settings: float
) -> Tensor:
    """`CPOTrainer`'s loss of each pair, without the winner's own log-probability."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=0.0,
        loss_type=kind,
        label_smoothing=label_smoothing,
        **settings,
    )
    found: Tensor = CPOTrainer.cpo_loss(trainer, w, v)[0]
    return found


# Ours, TRL's. TRL's IPO is of means over codes, which is ours with beta / codes, over codes^2; its
# conservative loss is in `CPOTrainer`, which is given the ratios to the reference.
TRL_CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dpo": (CASES["dpo"][0], lambda *a: trl_dpo("sigmoid", *a, beta=0.3)),
    "robust_dpo": (
        CASES["robust_dpo"][0],
        lambda *a: trl_dpo("robust", *a, beta=0.3, label_smoothing=0.2),
    ),
    "ipo": (
        lambda *a: losses.ipo(*a, beta=0.3 / CODES) / CODES**2,
        lambda *a: trl_dpo("ipo", *a, beta=0.3),
    ),
    "conservative_dpo": (
        CASES["conservative_dpo"][0],
        lambda w, v, rw, rv: trl_cpo("sigmoid", w - rw, v - rv, beta=0.3, label_smoothing=0.2),
    ),
    "cpo": (
        lambda w, v, *_: losses.cpo(w, v, beta=0.3, nll_weight=0.0),
        lambda w, v, *_: trl_cpo("sigmoid", w, v, beta=0.3),
    ),
    "simpo": (
        CASES["simpo"][0],
        lambda w, v, *_: trl_cpo("simpo", w / 15, v / 12, beta=2.0, simpo_gamma=0.5),
    ),
}


@pytest.mark.filterwarnings("ignore")  # TRL's
@pytest.mark.parametrize("name", TRL_CASES)
def test_trl(name: str) -> None:
    pytest.importorskip("trl", reason="compares with TRL: pip install trl")
    found = []
    for loss in TRL_CASES[name]:
        w, v, rw, rv = pairs(3)
        values = loss(w.requires_grad_(), v.requires_grad_(), rw, rv)
        values.sum().backward()
        found.append((values.detach(), w.grad, v.grad))
    torch.testing.assert_close(found[0], found[1])


def test_family_relations() -> None:
    w, v, rw, rv = pairs(2)
    plain = losses.dpo(w, v, rw, rv, beta=0.4)
    torch.testing.assert_close(
        losses.conservative_dpo(w, v, rw, rv, beta=0.4, label_smoothing=0.0), plain
    )
    torch.testing.assert_close(
        losses.robust_dpo(w, v, rw, rv, beta=0.4, label_smoothing=0.0), plain
    )
    torch.testing.assert_close(losses.softmax_dpo(w, v[:, None], rw, rv[:, None], beta=0.4), plain)
    # Missing losers change nothing.
    padded = torch.stack([v, torch.full_like(v, -torch.inf)], 1)
    reference = torch.stack([rv, torch.zeros_like(rv)], 1)
    torch.testing.assert_close(losses.softmax_dpo(w, padded, rw, reference, beta=0.4), plain)
    # At the reference every margin is zero.
    torch.testing.assert_close(losses.dpo(w, v, w, v), torch.full_like(w, math.log(2.0)))


@pytest.mark.parametrize("rate", [-0.1, 0.5, 1.0])
def test_flip_rate_is_checked(rate: float) -> None:
    for loss in (losses.conservative_dpo, losses.robust_dpo):
        with pytest.raises(ValueError, match="label_smoothing: wanted a value in"):
            loss(*pairs(), label_smoothing=rate)


def test_extreme_margins_stay_finite() -> None:
    w = torch.tensor([0.0, -1e6], requires_grad=True)
    v = torch.tensor([-1e6, 0.0])
    zero = torch.zeros(2)
    loss = losses.softmax_dpo(w, v[:, None], zero, zero[:, None], beta=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()


def test_winners_without_losers_cost_nothing_and_leave_the_others_alone() -> None:
    w = torch.tensor([0.5, -2.0], requires_grad=True)
    v = torch.tensor([[0.1, 0.2], [-torch.inf, -torch.inf]], requires_grad=True)
    zero, none = torch.zeros(2), torch.zeros(2, 2)
    loss = losses.softmax_dpo(w, v, zero, none, beta=0.5)
    loss.sum().backward()
    alone = losses.softmax_dpo(w[:1], v[:1], zero[:1], none[:1], beta=0.5)
    torch.testing.assert_close(loss, torch.stack([alone[0], torch.tensor(0.0)]))
    assert w.grad is not None
    assert v.grad is not None
    assert w.grad[0] < 0
    assert w.grad[1] == 0
    assert torch.isfinite(v.grad).all()
    w.grad = None
    nobody = losses.softmax_dpo(w, v[:, :0], zero, none[:, :0])
    nobody.sum().backward()
    assert nobody.tolist() == w.grad.tolist() == [0.0, 0.0]


def test_contrastive_scores() -> None:
    positive = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    negative = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
    beta = 0.5
    weights = [p ** (1 + beta) / n**beta for p, n in zip(positive[0], negative[0], strict=True)]
    for code in range(3):
        score = losses.contrastive_token_scores(
            positive.log(), negative.log(), torch.tensor([code]), beta=beta
        )
        assert score.item() == pytest.approx(float(weights[code] / sum(weights)))
    # Illegal codes take no part, in logits that are not normalised either.
    illegal = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64)
    score = losses.contrastive_token_scores(
        positive.log() + illegal + 3.0, negative.log() + illegal - 2.0, torch.tensor([0]), beta=beta
    )
    assert score.item() == pytest.approx(float(weights[0] / (weights[0] + weights[1])))


def test_critical_dpo() -> None:
    winner, ref_winner = torch.tensor([-3.0]), torch.tensor([-3.5])
    codes, ref_codes = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    scores = torch.tensor([[0.9, 0.1, 0.3]], requires_grad=True)
    loss = losses.critical_dpo(winner, codes, ref_winner, ref_codes, scores, gamma=0.5)
    phi = 0.5 * (0.1 * 0.5 + 0.9 * -1.0)
    assert loss.item() == pytest.approx(-math.log(sigmoid(0.5 * 0.5 - phi)), rel=1e-6)
    assert not loss.requires_grad
    # With every code fully critical it is DPO on the sums.
    plain = losses.dpo(winner, codes.sum(1), ref_winner, ref_codes.sum(1), beta=0.5)
    torch.testing.assert_close(
        losses.critical_dpo(winner, codes, ref_winner, ref_codes, torch.zeros(1, 3), gamma=0.5),
        plain,
    )


def test_group_advantage() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    advantage = losses.group_advantage(rewards)
    torch.testing.assert_close(advantage[0], torch.tensor([-1.0, 0.0, 1.0]) * math.sqrt(1.5))
    assert (advantage[1] == 0).all()


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize(("now", "old"), [(-1.0, -1.0), (-0.2, -6.0), (-6.0, -0.2), (-0.01, -3.0)])
def test_policy_gradients(now: float, old: float, advantage: float) -> None:
    policy = torch.tensor([now], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([old], dtype=torch.float64)
    gain = torch.tensor([advantage], dtype=torch.float64)

    floor = max(math.exp(now) / (1 + 0.2 + 0.1), math.exp(old))
    ratio = math.exp(now) / floor
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    clipped = losses.ecpo(policy, before, gain, epsilon=0.2, delta=0.1)
    assert clipped.item() == pytest.approx(expected)
    assert ratio <= 1.3 + 1e-9

    other = math.exp(now) if advantage >= 0 else 1 - math.exp(now)
    bounded = losses.gbpo(policy, before, gain)
    assert bounded.item() == pytest.approx(-advantage * math.exp(now) / max(math.exp(old), other))
    (slope,) = torch.autograd.grad(bounded.sum(), policy)
    # d/d log pi of the bounded ratio equals the ratio itself: the bound takes no gradient.
    assert slope.item() == pytest.approx(bounded.item())
