"""One ranking from generator, dense head and counts: a log-linear mixture fitted on held-out users.

An item's score is w . f, where f holds the log-probabilities of the generator and of the dense head
and the evidence of each part of a `CountRanker`. The weights maximize the mean log-probability of
the items that were really taken under the softmax of the scores over the candidates of their
request (a conditional logit, McFadden 1974), with a small quadratic penalty. Rankings without and
with the items of the history ask for different weights, so both are fitted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from onerec.errors import DataError
from onerec.files import atomic_write
from onerec.inference.results import NextItems
from onerec.model.counting import CountRanker

_PENALTY = 1e-3  # of squared weights of features with variance 1
_STEPS = 100


FILES = ("mixture.json", "counts.npz")

Requests = Sequence[tuple[NextItems, npt.NDArray[np.integer[Any]]]]


@dataclass(frozen=True)
class Mixture:
    """Weights of a ranking by generator, dense head and counts.

    Attributes:
        counts: What is counted, and in which order its parts are weighed.
        masked: float64 [2 + parts]: weights of generator, dense head and parts of `counts` where
            the items of the history are left out.
        unmasked: The same where the history may be recommended.
    """

    counts: CountRanker
    masked: npt.NDArray[np.float64]
    unmasked: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in ("masked", "unmasked"):
            weights = getattr(self, name)
            if weights.shape != (2 + len(self.counts.parts),):
                raise ValueError(
                    f"{name}: wanted a weight for generator, dense head and each of "
                    f"{len(self.counts.parts)} parts, got shape {list(weights.shape)}"
                )
            if not np.isfinite(weights).all():
                raise ValueError(f"{name}: wanted finite weights, got {weights.tolist()}")

    def best(
        self, found: NextItems, k: int, *, exclude_history: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The k best of the items found for a request, best first, and their scores; ties by index.

        Args:
            found: From `Recommender.next_items` with the same `counts` and `exclude_history`.
            k: Most items.
            exclude_history: Whether the items of the history are left out.
        """
        score = (self.masked if exclude_history else self.unmasked) @ found.features()
        order = np.argsort(-score, kind="stable")[:k]
        return found.items[order], score[order]

    def grown(self, n_items: int) -> Mixture:
        """The same mixture over a catalogue with more items behind, of which nothing is counted."""
        return Mixture(self.counts.grown(n_items), self.masked, self.unmasked)

    @classmethod
    def fit(cls, counts: CountRanker, masked: Requests, unmasked: Requests) -> Self:
        """Fits the weights; requests without a taken item among their candidates are left out.

        Args:
            counts: As given to `Recommender.next_items`.
            masked: Requests with the history left out: for each one its candidates and the items
                that were really taken.
            unmasked: Requests whose history may be recommended.

        Returns:
            The mixture; with no request to learn from, the generator's ranking.
        """
        return cls(counts, *(_fit(2 + len(counts.parts), part) for part in (masked, unmasked)))

    def save(self, folder: str | Path) -> None:
        """Writes `mixture.json` and `counts.npz` into a folder.

        Raises:
            OSError: A file cannot be written.
        """
        self.counts.save(Path(folder) / FILES[1])
        weights = {name: getattr(self, name).tolist() for name in ("masked", "unmasked")}
        with atomic_write(Path(folder) / FILES[0]) as temporary:
            temporary.write_text(json.dumps({"format": 2, **weights}), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            DataError: A file is missing, damaged or of another format.
        """
        path, counted = (Path(folder) / name for name in FILES)
        try:
            counts = CountRanker.load(counted)
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != 2:
                raise DataError(f"{path}: wanted format 2, got {stored['format']!r}")
            return cls(
                counts, *(np.array(stored[n], dtype=np.float64) for n in ("masked", "unmasked"))
            )
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: there is no such file") from None
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error})") from None


def _fit(features: int, requests: Requests) -> npt.NDArray[np.float64]:
    """The weights [features] that make the taken items likeliest."""
    kept = [(f.features(), np.isin(f.items, taken)) for f, taken in requests]
    kept = [(rows, hit) for rows, hit in kept if hit.any()]
    weights: npt.NDArray[np.float64] = np.eye(features)[0]
    if not kept:
        return weights
    import torch

    rows = torch.from_numpy(np.concatenate([f for f, _ in kept], axis=1).T)
    hits = torch.from_numpy(np.concatenate([hit for _, hit in kept]))
    sizes = torch.tensor([len(hit) for _, hit in kept])
    request = torch.repeat_interleave(torch.arange(len(kept)), sizes)
    spread = rows.std(dim=0, correction=0)
    rows = rows / torch.where(spread > 0, spread, 1.0)
    share = (
        hits.double()
        / hits.double().new_zeros(len(kept)).index_add(0, request, hits.double())[request]
    )
    w = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        score = rows @ w
        peak = score.detach().new_full((len(kept),), -torch.inf)
        peak = peak.scatter_reduce(0, request, score.detach(), "amax")
        total = score.new_zeros(len(kept)).index_add(0, request, (score - peak[request]).exp())
        log_p = score - (total.log() + peak)[request]
        value = -(share * log_p).sum() / len(kept) + _PENALTY * w.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weights = (w.detach() / torch.where(spread > 0, spread, 1.0)).numpy()
    return weights
