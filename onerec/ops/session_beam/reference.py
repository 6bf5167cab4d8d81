"""Session-wise beam search in NumPy, float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from onerec.ops.beam_step.reference import LeafTable, request_step


class ReferenceSearch:
    """The search that `onerec.ops.BeamSearch` describes, by listing every legal continuation."""

    def __init__(
        self,
        sids: npt.NDArray[Any],
        widths: Sequence[Sequence[int]],
        session_length: int,
        scoring: str,
        temperature: float,
        banned: Sequence[npt.NDArray[np.int64]],
        beam_width: int,
    ) -> None:
        """`widths` are each request's most beams after each step, `banned` the leaves it must not
        reach, `beam_width` the rows of a state."""
        self.table = LeafTable(sids)
        self.levels = self.table.sids.shape[1]
        self.shape = (len(widths), beam_width, session_length)
        self.scoring, self.temperature = scoring, temperature
        self.widths, self.banned = widths, banned
        self.level = self.item = 0
        # A beam: score, leaves of its finished items, node of the current one.
        self.beams: list[list[tuple[float, list[int], int]]] = [
            [(0.0, [], 0)] if steps and steps[0] > 0 else [] for steps in widths
        ]

    def step(
        self, logits: npt.NDArray[Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Parents, tokens, scores and valid counts as in `BeamState`."""
        batch, width, _ = self.shape
        parents = np.zeros((batch, width), dtype=np.int64)
        tokens = np.full((batch, width), -1, dtype=np.int64)
        scores = np.full((batch, width), -np.inf)
        for b, beams in enumerate(self.beams):
            kept = request_step(
                logits[b],
                np.array([beam[0] for beam in beams]),
                [beam[2] for beam in beams],
                self.table,
                self.level,
                self.widths[b][self.item * self.levels + self.level],
                self.scoring,
                self.temperature,
                [[*self.banned[b].tolist(), *beam[1]] for beam in beams],
            )
            last = self.level + 1 == self.levels
            self.beams[b] = [
                (score, [*beams[parent][1], child], 0) if last else (score, beams[parent][1], child)
                for score, parent, _, child in kept
            ]
            for i, (score, parent, token, _) in enumerate(kept):
                parents[b, i], tokens[b, i], scores[b, i] = parent, token, score
        self.level += 1
        if self.level == self.levels:
            self.level, self.item = 0, self.item + 1
        return (
            torch.from_numpy(parents),
            torch.from_numpy(tokens),
            torch.from_numpy(scores).float(),
            torch.tensor([len(beams) for beams in self.beams], dtype=torch.int32),
        )

    def result(self, items: torch.Tensor, sids: torch.Tensor) -> None:
        """Fills items [B, M, m] and sids [B, M, m, L]."""
        items.fill_(-1)
        sids.fill_(-1)
        for b, beams in enumerate(self.beams):
            for i, (_, leaves, _) in enumerate(beams):
                items[b, i, : len(leaves)] = torch.tensor(leaves)
                sids[b, i, : len(leaves)] = torch.from_numpy(self.table.sids[leaves])
