"""What incremental decoding keeps between its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Memory(NamedTuple):
    """The encoded history as the decoder reads it; made once a request, shared by its beams.

    Attributes:
        keys: For each decoder layer [B, heads, S, dh].
        values: As `keys`.
        mask: bool [B, 1, 1, S], True at real tokens.
        state: [B, d], the encoder's output at the latest item, which a BOS reads with
            `decoder_start` = "state".
        nodes: With `node_outputs` the output vectors of each level's nodes.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    state: Tensor
    nodes: list[Tensor]


@dataclass
class DecoderCache:
    """Keys and values of generated tokens; they stay where they were written.

    A beam finds its ancestors by `slots`: the token at time t of beam m lies in slot
    `slots[b, m, t]` of time t. Choosing beams rewrites that small table only.

    Attributes:
        keys: For each decoder layer [B, T, M, heads, dh].
        values: As `keys`.
        slots: int64 [B, M, T]; M is the present number of beams.
        nodes: int64 [B, M], the trie's node of each beam's unfinished item; 0 before its first
            code.
        length: Tokens written so far.
    """

    keys: list[Tensor]
    values: list[Tensor]
    slots: Tensor
    nodes: Tensor
    length: int = 0

    def choose(self, parents: Tensor) -> None:
        """Goes on with beam `parents[b, m]` as beam m.

        Args:
            parents: int64 [B, M]; -1 (a dead beam) is read as 0.
        """
        index = parents.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.slots.shape[2])
        self.slots = self.slots.gather(1, index)
        self.nodes = self.nodes.gather(1, parents.clamp(min=0))
