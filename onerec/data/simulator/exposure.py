"""One exposure by itself: skipped, watched in part or to the end, and the feedback on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Polynomials in x = log(length / 76 s), fitted as the package's docstring says.
_SKIP_LOGIT = (0.48, -0.039, 0.180)
_FULL_LOGIT = (-3.07, -1.000, -0.032)
_SKIP_LOG_MEDIAN, _SKIP_SIGMA = 0.90, 0.66
_PART_TOP = 0.95
_PART_ALPHA = (-0.40, -0.160)
_PART_BETA = (0.045, 0.242, 0.262)
_AGAIN_LOGIT = (-0.9, -1.3)
_AGAIN_MEAN = (-1.08, -0.27)
# Feedback rates by share watched (KuaiRand-Pure, tab 1), interpolated between these points.
_RATIO_POINTS = (0.0, 0.01, 0.06, 0.2, 0.45, 0.75, 1.0, 1.5, 2.5)
_RATES = {
    "like": (0.005, 0.005, 0.009, 0.016, 0.023, 0.036, 0.038, 0.048, 0.086),
    "follow": (0.0005, 0.0005, 0.0012, 0.0012, 0.0018, 0.0015, 0.0036, 0.0024, 0.005),
    "comment": (0.0004, 0.0004, 0.0007, 0.0007, 0.0036, 0.0035, 0.0039, 0.0144, 0.031),
    "share": (0.0001, 0.0001, 0.0004, 0.0008, 0.0013, 0.002, 0.0013, 0.0029, 0.0062),
    "hate": (0.0007,) * 9,
}
FEEDBACK = tuple(_RATES)
_PART, _FULL = 1, 2  # 0 is a skip


class Watching:
    """How long items are watched, by their lengths.

    Args:
        seconds: Length of each item [N].
    """

    def __init__(self, seconds: Floats) -> None:
        x = np.log(seconds / 76.0)

        def poly(coefficients: tuple[float, ...]) -> Floats:
            return np.asarray(sum(c * x**i for i, c in enumerate(coefficients)))

        self._length = seconds
        self._skip_logit, self._full_logit = poly(_SKIP_LOGIT), poly(_FULL_LOGIT)
        self._alpha, self._beta = np.exp(poly(_PART_ALPHA)), np.exp(poly(_PART_BETA))
        self._again = 1.0 / (1.0 + np.exp(-poly(_AGAIN_LOGIT)))
        self._again_mean = np.exp(poly(_AGAIN_MEAN))
        # E[min(X, length)] of a lognormal X.
        z = (np.log(seconds) - _SKIP_LOG_MEDIAN) / _SKIP_SIGMA
        below = np.array([0.5 * math.erfc(-(v - _SKIP_SIGMA) / math.sqrt(2)) for v in z])
        above = np.array([0.5 * math.erfc(v / math.sqrt(2)) for v in z])
        skip = math.exp(_SKIP_LOG_MEDIAN + _SKIP_SIGMA**2 / 2) * below + seconds * above
        part = _PART_TOP * seconds * self._alpha / (self._alpha + self._beta)
        full = seconds * (1.0 + self._again * self._again_mean)
        self._means = np.stack([skip, part, full], axis=-1)

    def probabilities(self, score: Floats, items: npt.NDArray[Any]) -> Floats:
        """P(skip), P(part), P(full) [..., 3] of items at a score."""
        skip = np.exp(self._skip_logit[items] - 0.5 * score)
        full = np.exp(self._full_logit[items] + 0.5 * score)
        total = skip + 1.0 + full
        return np.stack([skip / total, 1.0 / total, full / total], axis=-1)

    def seconds(self, probabilities: Floats, items: npt.NDArray[Any]) -> Floats:
        """Expected watch seconds: p_skip m_skip + p_part m_part + p_full m_full."""
        return np.asarray(np.sum(probabilities * self._means[items], axis=-1))

    def draw(
        self, outcome: npt.NDArray[np.int8], items: npt.NDArray[Any], rng: np.random.Generator
    ) -> Floats:
        """Draws watch seconds, given 0 (skip), 1 (part) or 2 (full) for each of `items`."""
        length = self._length[items]
        watch: Floats = np.minimum(
            np.exp(_SKIP_LOG_MEDIAN + _SKIP_SIGMA * rng.standard_normal(items.shape)), length
        )
        part, full = outcome == _PART, outcome == _FULL
        watch[part] = (
            _PART_TOP * length[part] * rng.beta(self._alpha[items[part]], self._beta[items[part]])
        )
        extra = rng.exponential(self._again_mean[items[full]])
        extra *= rng.random(len(extra)) < self._again[items[full]]
        watch[full] = length[full] * (1.0 + extra + rng.uniform(-0.03, 0.03, len(extra)))
        return watch

    def shares(self, draws: int, rng: np.random.Generator) -> Floats:
        """Draws of the share watched of every item, given skip, part and full: [N, 3, draws]."""
        shape = (len(self._length), draws)
        skip = np.exp(_SKIP_LOG_MEDIAN + _SKIP_SIGMA * rng.standard_normal(shape))
        part = _PART_TOP * rng.beta(self._alpha[:, None], self._beta[:, None], shape)
        again = rng.random(shape) < self._again[:, None]
        full = 1.0 + again * rng.exponential(self._again_mean[:, None], shape)
        return np.stack([np.minimum(skip / self._length[:, None], 1.0), part, full], axis=1)


def feedback_rates(share: Floats, readiness: npt.NDArray[Any]) -> Iterator[tuple[str, Floats]]:
    """The probability of each kind of feedback on exposures.

    Args:
        share: Share watched of each.
        readiness: The user's, broadcasts with it; hates do not depend on it.

    Yields:
        Each of `FEEDBACK` and its rates, of the shape of `share`.
    """
    for name, rates in _RATES.items():
        rate = np.interp(share, _RATIO_POINTS, rates) * (1.0 if name == "hate" else readiness)
        yield name, np.minimum(rate, 0.9)
