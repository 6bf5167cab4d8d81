"""How well probabilities fit labels, and two plain predictors to hold a reward model against.

Labels may be soft, in [0, 1]: a label y counts as a positive of weight y and a negative of weight
1 - y.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Floats = npt.NDArray[np.float64]

_SMALLEST = 1e-7


def auc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """P(a positive's score exceeds a negative's), ties counting one half; NaN without both kinds.

    Args:
        scores: [n].
        labels: [n], in [0, 1].
    """
    values, place = np.unique(np.asarray(scores, np.float64), return_inverse=True)
    y = np.asarray(labels, np.float64)
    positive = np.bincount(place, weights=y, minlength=len(values))
    negative = np.bincount(place, weights=1 - y, minlength=len(values))
    pairs = positive.sum() * negative.sum()
    if pairs <= 0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float(np.sum(positive * (below + 0.5 * negative)) / pairs)


def log_loss(probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean binary cross-entropy, nats."""
    p = np.clip(np.asarray(probabilities, np.float64), _SMALLEST, 1 - _SMALLEST)
    y = np.asarray(labels, np.float64)
    return float(np.mean(-y * np.log(p) - (1 - y) * np.log1p(-p)))


def calibration(
    probabilities: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 10
) -> dict[str, Any]:
    """Predicted against observed rates in bins of equally many rows.

    Returns:
        "ratio" (mean predicted / mean label), "error" (mean over rows of their bin's |predicted -
        observed|), "bins": rows of [predicted, observed, rows].
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    order = np.argsort(p, kind="stable")
    rows = [
        [float(p[part].mean()), float(y[part].mean()), len(part)]
        for part in np.array_split(order, bins)
        if len(part)
    ]
    error = sum(abs(a - b) * n for a, b, n in rows) / len(p)
    return {"ratio": float(p.mean() / max(y.mean(), _SMALLEST)), "error": error, "bins": rows}


def measure(probabilities: Floats, labels: Floats) -> dict[str, Any]:
    """AUC, log loss, the same as a share of the base rate's, and calibration."""
    loss = log_loss(probabilities, labels)
    base = log_loss(np.full(len(labels), labels.mean()), labels)
    return {
        "auc": auc(probabilities, labels),
        "log_loss": loss,
        "normalised_log_loss": loss / base if base > 0 else float("nan"),
        "calibration": calibration(probabilities, labels),
    }


def item_means(
    items: npt.NDArray[np.int64],
    labels: Floats,
    n_items: int,
    base: Floats,
    strength: float = 20.0,
) -> Floats:
    """Mean label of each item, drawn to the base rate as by `strength` more rows of it.

    Args:
        items: [n].
        labels: [n, targets], NaN where unknown.
        n_items: N.
        base: [targets].
        strength: Pseudo-rows.

    Returns:
        [N, targets].
    """
    means = np.empty((n_items, labels.shape[1]))
    for target in range(labels.shape[1]):
        known = np.isfinite(labels[:, target])
        count = np.bincount(items[known], minlength=n_items)
        total = np.bincount(items[known], weights=labels[known, target], minlength=n_items)
        means[:, target] = (total + strength * base[target]) / (count + strength)
    return means


class LogisticRegression:
    """One logistic regression a target, by L-BFGS, with soft labels and an L2 penalty.

    Args:
        penalty: Weight of half the squared coefficients (of standardised features), a row.
    """

    def __init__(self, penalty: float = 1e-4) -> None:
        self.penalty = penalty

    def fit(
        self, features: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]
    ) -> LogisticRegression:
        """Fits features [n, D] to labels [n, targets] (NaN where unknown)."""
        x = torch.from_numpy(features).float()
        self._mean, self._spread = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
        x = (x - self._mean) / self._spread
        y = torch.from_numpy(labels).float()
        known = y.isfinite()
        y, share = y.nan_to_num(), known.float() / known.sum(dim=0).clamp(min=1)
        self._weights = torch.zeros(x.shape[1], y.shape[1], requires_grad=True)
        self._bias = torch.zeros(y.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self._weights, self._bias], max_iter=60, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(
                x @ self._weights + self._bias, y, weight=share, reduction="sum"
            )
            loss = loss + 0.5 * self.penalty * self._weights.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return self

    def predict(self, features: npt.NDArray[np.float32]) -> Floats:
        """Probabilities [n, targets]."""
        x = (torch.from_numpy(features).float() - self._mean) / self._spread
        with torch.no_grad():
            found: Floats = torch.sigmoid(x @ self._weights + self._bias).double().numpy()
        return found
