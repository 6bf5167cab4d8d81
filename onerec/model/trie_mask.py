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
        self.codebook_size, self.levels = codebook_size, sids.shape[1]
        width = -(-codebook_size // 8)
        # Of each level: the node of each item before it [N], and at last its leaf; the numbers
        # node * K + code of its edges, ascending (an edge's place is the node behind it); the bits
        # [nodes, width]; the most children of a node.
        self._nodes: list[Tensor] = []
        self._most: list[int] = []
        self._edges: list[Tensor] = []
        self._bits: list[Tensor] = []
        node = torch.zeros(len(sids), dtype=torch.int64, device=sids.device)
        for level in range(sids.shape[1]):
            edges, after = torch.unique(node * codebook_size + sids[:, level], return_inverse=True)
            parent, code = edges // codebook_size, edges % codebook_size
            bits = torch.zeros((int(parent[-1]) + 1) * width, dtype=torch.uint8, device=sids.device)
            # No edge comes twice: the sum of its bits is their union.
            bits.index_add_(0, parent * width + code // 8, (1 << code % 8).to(torch.uint8))
            self._most.append(int(torch.bincount(parent).max()))
            self._nodes.append(node)
            self._edges.append(edges)
            self._bits.append(bits.view(-1, width))
            node = after
        self._nodes.append(node)

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

    def after(self, level: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The nodes behind a level, in the order of their edges: siblings are neighbors.

        Args:
            level: 0..L-1.
            device: Where the tensors are wanted.

        Returns:
            The code of each node, int64 [nodes], and the node of each item, int64 [N].
        """
        self._move(device)
        return self._edges[level] % self.codebook_size, self._nodes[level + 1]

    def before(self, items: Tensor, level: int) -> Tensor:
        """The node of items before a level, int64 [...]."""
        self._move(items.device)
        return self._nodes[level][items]

    def children(self, node: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """The nodes behind a level that follow nodes before it.

        Args:
            node: int64 [...], nodes before the level.
            level: 0..L-1.

        Returns:
            int64 [..., C] of C children, the most that a node has, and bool [..., C], which of them
            are real; the others repeat the first child.
        """
        self._move(node.device)
        edges, size = self._edges[level], self.codebook_size
        first = torch.searchsorted(edges, node * size).unsqueeze(-1)
        end = torch.searchsorted(edges, (node + 1) * size).unsqueeze(-1)
        place = first + torch.arange(self._most[level], device=node.device)
        real = place < end
        return torch.where(real, place, first).clamp(max=len(edges) - 1), real

    def step(self, node: Tensor, code: Tensor, level: int) -> Tensor:
        """The node behind a code of a level; any node where the trie has no such code."""
        self._move(node.device)
        edges = self._edges[level]
        edge = node * self.codebook_size + code.clamp(min=0)
        return torch.searchsorted(edges, edge).clamp(max=len(edges) - 1)

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
        for level in range(len(self._edges)):
            rows.append(self._row(node, level) | padding)
            node = self.step(node, sids[..., level], level)
        return torch.stack(rows, dim=-2)

    def _row(self, node: Tensor, level: int) -> Tensor:
        shift = torch.arange(8, dtype=torch.uint8, device=node.device)
        bits = self._bits[level][node].unsqueeze(-1) >> shift & 1
        return bits.flatten(-2)[..., : self.codebook_size].bool()

    def _move(self, device: torch.device) -> None:
        if self._nodes[0].device != device:
            for tables in (self._nodes, self._edges, self._bits):
                tables[:] = [table.to(device) for table in tables]
