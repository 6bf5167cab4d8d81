"""Which codes continue a prefix of a semantic id, for whole batches of ids at once."""

from __future__ import annotations

import torch
from torch import Tensor


class TrieMask:
    """The legal codes at every place of given semantic ids.

    A level is a table with a row of K bits for each distinct prefix, so that a lookup has a fixed
    shape and never waits for a device.

    Args:
        sids: int64 [N, L], the catalogue's semantic ids.
        codebook_size: K.
    """

    def __init__(self, sids: Tensor, codebook_size: int) -> None:
        self.codebook_size = codebook_size
        width = -(-codebook_size // 8)
        # Of each level: the node of each item before it [N]; the numbers node * K + code of its
        # edges, ascending (an edge's place is the node behind it); the bits [nodes, width].
        self._nodes: list[Tensor] = []
        self._edges: list[Tensor] = []
        self._bits: list[Tensor] = []
        node = torch.zeros(len(sids), dtype=torch.int64, device=sids.device)
        for level in range(sids.shape[1]):
            edges, after = torch.unique(node * codebook_size + sids[:, level], return_inverse=True)
            parent, code = edges // codebook_size, edges % codebook_size
            bits = torch.zeros((int(parent[-1]) + 1) * width, dtype=torch.uint8, device=sids.device)
            # No edge comes twice: the sum of its bits is their union.
            bits.index_add_(0, parent * width + code // 8, (1 << code % 8).to(torch.uint8))
            self._nodes.append(node)
            self._edges.append(edges)
            self._bits.append(bits.view(-1, width))
            node = after

    def items(self, items: Tensor, level: int) -> Tensor:
        """Whether a code may follow the codes of items before a level.

        Args:
            items: int64 [...], rows of the catalogue.
            level: 0..L-1.

        Returns:
            bool [..., K] on the device of `items`.
        """
        self._move(items.device)
        return self._row(self._nodes[level][items], level)

    def mask(self, sids: Tensor) -> Tensor:
        """Whether a code may stand at a place, given the id's codes before it.

        Args:
            sids: int64 [..., L] of any legal ids; -1 is padding, where every code is allowed.

        Returns:
            bool [..., L, K] on the device of `sids`.
        """
        self._move(sids.device)
        padding = sids[..., :1] < 0
        node = torch.zeros_like(sids[..., 0])
        rows = []
        for level, edges in enumerate(self._edges):
            rows.append(self._row(node, level) | padding)
            edge = node * self.codebook_size + sids[..., level]
            node = torch.searchsorted(edges, edge).clamp(max=len(edges) - 1)
        return torch.stack(rows, dim=-2)

    def _row(self, node: Tensor, level: int) -> Tensor:
        shift = torch.arange(8, dtype=torch.uint8, device=node.device)
        bits = self._bits[level][node].unsqueeze(-1) >> shift & 1
        return bits.flatten(-2)[..., : self.codebook_size].bool()

    def _move(self, device: torch.device) -> None:
        if self._nodes[0].device != device:
            for tables in (self._nodes, self._edges, self._bits):
                tables[:] = [table.to(device) for table in tables]
