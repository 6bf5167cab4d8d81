"""Losses of preference alignment, as functions of log-probabilities alone.

Every argument named `*_winner` or `*_loser` is log P(session | user) [B]: the sum over the
session's m * L codes. `policy_*` carries gradients, `reference_*` is the frozen snapshot. Each
function returns one loss per pair, [B]; the caller takes the mean. With

    margin = (policy_winner - reference_winner) - (policy_loser - reference_loser)

beta * margin is the difference of implicit rewards. Two different methods are called "cDPO" in the
literature: `conservative_dpo` (label smoothing) and `critical_dpo` (critical tokens).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _margin(
    policy_winner: Tensor, policy_loser: Tensor, reference_winner: Tensor, reference_loser: Tensor
) -> Tensor:
    return (policy_winner - reference_winner) - (policy_loser - reference_loser)


def dpo(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation: -log sigmoid(beta * margin).

    arXiv 2305.18290, eq. 7; the L_DPO of OneRec's IPA (arXiv 2502.18965, section 3.3).
    """
    margin = _margin(policy_winner, policy_loser, reference_winner, reference_loser)
    return -F.logsigmoid(beta * margin)


def ipo(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Identity preference optimisation: (margin - 1 / (2 beta))^2.

    arXiv 2310.12036, eq. 17, with tau = beta. The margin is a sum over codes. TRL takes means over
    codes: for sessions of T codes that is this loss with beta / T, divided by T^2.
    """
    margin = _margin(policy_winner, policy_loser, reference_winner, reference_loser)
    return (margin - 1 / (2 * beta)).square()


def conservative_dpo(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """DPO whose labels are flipped with probability eps = `label_smoothing`.

    -(1 - eps) log sigmoid(beta * margin) - eps log sigmoid(-beta * margin); E. Mitchell, "A note on
    DPO with noisy preferences and relationship to IPO", 2023.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    eps = _flip_rate(label_smoothing)
    logit = beta * _margin(policy_winner, policy_loser, reference_winner, reference_loser)
    return -(1 - eps) * F.logsigmoid(logit) - eps * F.logsigmoid(-logit)


def robust_dpo(
    policy_winner: Tensor,
    policy_loser: Tensor,
    reference_winner: Tensor,
    reference_loser: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> Tensor:
    """The unbiased estimate of the DPO loss when a share eps of the labels is flipped.

    (-(1 - eps) log sigmoid(beta * margin) + eps log sigmoid(-beta * margin)) / (1 - 2 eps);
    arXiv 2403.00409.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    eps = _flip_rate(label_smoothing)
    logit = beta * _margin(policy_winner, policy_loser, reference_winner, reference_loser)
    return (-(1 - eps) * F.logsigmoid(logit) + eps * F.logsigmoid(-logit)) / (1 - 2 * eps)


def _flip_rate(value: float) -> float:
    if not 0 <= value < 0.5:
        raise ValueError(f"label_smoothing: wanted a value in [0, 0.5), got {value}")
    return value


def cpo(
    policy_winner: Tensor, policy_loser: Tensor, *, beta: float = 0.1, nll_weight: float = 1.0
) -> Tensor:
    """Contrastive preference optimisation, which needs no reference.

    -log sigmoid(beta (policy_winner - policy_loser)) - nll_weight * policy_winner;
    arXiv 2401.08417 (there with weight 1).
    """
    return -F.logsigmoid(beta * (policy_winner - policy_loser)) - nll_weight * policy_winner


def simpo(
    policy_winner: Tensor,
    policy_loser: Tensor,
    winner_length: Tensor | int,
    loser_length: Tensor | int,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """Simple preference optimisation: mean log-probabilities, a target margin, no reference.

    -log sigmoid(beta policy_winner / |winner| - beta policy_loser / |loser| - gamma);
    arXiv 2405.14734, eq. 6.

    Args:
        policy_winner: [B].
        policy_loser: [B].
        winner_length: Codes of each winner, [B] or one number.
        loser_length: Codes of each loser, [B] or one number.
        beta: Scale of the mean log-probabilities.
        gamma: Margin that the winner should lead by.
    """
    return -F.logsigmoid(
        beta * (policy_winner / winner_length - policy_loser / loser_length) - gamma
    )


def softmax_dpo(
    policy_winner: Tensor,
    policy_losers: Tensor,
    reference_winner: Tensor,
    reference_losers: Tensor,
    *,
    beta: float = 1.0,
) -> Tensor:
    """S-DPO: one winner against n losers in a Plackett-Luce model.

    -log sigmoid(-log sum_j exp(beta (rel_loser_j - rel_winner))), rel = policy - reference;
    arXiv 2406.09215. With one loser it is `dpo`.

    Args:
        policy_winner: [B].
        policy_losers: [B, n]; -inf where a winner has fewer than n losers. One without any costs
            nothing.
        reference_winner: [B].
        reference_losers: [B, n]; anything finite where `policy_losers` is -inf.
        beta: Scale of the implicit reward.
    """
    winner = policy_winner - reference_winner
    losers = policy_losers - reference_losers
    lead = beta * (losers - winner[:, None])
    alone = ~(lead > -torch.inf).any(dim=1)  # the gradient through a sum of nothing is NaN
    sums = torch.logsumexp(lead.masked_fill(alone[:, None], 0.0), dim=1)
    return torch.where(alone, 0.0, -F.logsigmoid(-sums))


def contrastive_token_scores(
    positive_logits: Tensor, negative_logits: Tensor, codes: Tensor, *, beta: float = 1.0
) -> Tensor:
    """How likely each code is for a good session rather than a bad one; low = critical.

    s_t = softmax((1 + beta) log P_positive - beta log P_negative)[code_t], normalised over one
    level's codes; arXiv 2411.19943. Codes that may not be chosen have logits of -inf in both.

    Args:
        positive_logits: [..., K], of the model fine-tuned on high-reward sessions.
        negative_logits: [..., K], of the model fine-tuned on low-reward sessions.
        codes: int64 [...], the codes of the losing session.
        beta: Strength of the contrast.

    Returns:
        [...] in (0, 1).
    """
    positive, negative = positive_logits.log_softmax(-1), negative_logits.log_softmax(-1)
    contrast = (1 + beta) * positive - beta * negative
    contrast = contrast.masked_fill(positive.isneginf(), float("-inf"))
    return contrast.softmax(-1).gather(-1, codes[..., None]).squeeze(-1)


def critical_dpo(
    policy_winner: Tensor,
    policy_loser_codes: Tensor,
    reference_winner: Tensor,
    reference_loser_codes: Tensor,
    token_scores: Tensor,
    *,
    gamma: float = 1.0,
) -> Tensor:
    """DPO whose loser counts code by code, weighted by how critical each code is.

    -log sigmoid(gamma (policy_winner - reference_winner)
                 - gamma sum_t (1 - s_t) (policy_loser_t - reference_loser_t));
    arXiv 2411.19943. The winner is not weighted. The paper says gamma = 1.0, the released
    configuration of its authors 0.1.

    Args:
        policy_winner: [B].
        policy_loser_codes: [B, T], log-probability of each code; 0 past the session's end.
        reference_winner: [B].
        reference_loser_codes: [B, T].
        token_scores: s_t [B, T], of `contrastive_token_scores`; no gradient flows through it.
        gamma: Scale of the implicit reward.
    """
    weighted = (1 - token_scores.detach()) * (policy_loser_codes - reference_loser_codes)
    return -F.logsigmoid(gamma * (policy_winner - reference_winner - weighted.sum(-1)))


def group_advantage(rewards: Tensor, *, min_spread: float = 1e-6) -> Tensor:
    """Rewards normalised within each group: (r - mean) / standard deviation.

    arXiv 2402.03300. A group whose rewards are all alike teaches nothing and gets
    zeros, instead of a division by nearly nothing.

    Args:
        rewards: [B, G], G samples of each user.
        min_spread: Standard deviation below which a group counts as all alike.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(spread > min_spread, centred / spread.clamp(min=min_spread), 0)


def ecpo(
    policy: Tensor, old: Tensor, advantage: Tensor, *, epsilon: float = 0.2, delta: float = 0.1
) -> Tensor:
    """Early-clipped policy optimisation: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A).

    ratio = pi / pi_old', pi_old' = max(sg(pi) / (1 + eps + delta), pi_old), so that a large ratio
    on a negative advantage cannot explode; arXiv 2506.13695 (sg = no gradient).

    Args:
        policy: log pi of each sample, any shape.
        old: log pi_old of the policy that generated it.
        advantage: A, of the same shape; see `group_advantage`.
        epsilon: Clipping range.
        delta: How far past the range the ratio may go.
    """
    floor = policy.detach() - torch.log1p(torch.tensor(epsilon + delta, dtype=policy.dtype))
    ratio = torch.exp(policy - torch.maximum(floor, old))
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def gbpo(policy: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Gradient-bounded policy optimisation: -A pi / pi_old', without clipping.

    pi_old' = max(pi_old, sg(pi)) if A >= 0 else max(pi_old, 1 - sg(pi)), which bounds the gradient
    by that of a binary cross-entropy; arXiv 2508.20900 (sg = no gradient).

    Args:
        policy: log pi of each sample, any shape, <= 0.
        old: log pi_old of the policy that generated it.
        advantage: A, of the same shape.
    """
    now = policy.detach()
    # log(1 - p) without cancellation for small p; p = 1 gives -inf, and pi_old then decides.
    other = torch.log1p(-now.exp()).where(now < -0.6931, torch.log(-torch.expm1(now)))
    bound = torch.maximum(old, torch.where(advantage >= 0, now, other))
    return -advantage * torch.exp(policy - bound)
