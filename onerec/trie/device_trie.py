"""A trie's bytes on a device."""

from __future__ import annotations

import numpy as np
import torch

from onerec.trie.sid_trie import SidTrie


class DeviceTrie:
    """A trie's bytes and tags on a device, found by CUDA's steps through addresses in its memory.

    A step that a CUDA graph has captured reads the addresses when it runs, so it goes on with the
    new trie after `swap`.

    Args:
        trie: What to copy.
        device: Usually a CUDA device.

    Attributes:
        trie: The trie that the device has.
        data: Its bytes there.
        tags: int64, the tags of each level's edges there, as bits; empty if the trie has none.
        address: int64 [1 + L] on the device: where the bytes begin, and each level's tags, or 0.
    """

    def __init__(self, trie: SidTrie, device: str | torch.device) -> None:
        self._copy(trie, torch.device(device))
        self.address = self.addresses().to(device)
        self._before: tuple[torch.Tensor, ...] = ()

    def swap(self, trie: SidTrie) -> None:
        """Puts another trie of the same shape in place, in the order of the current stream.

        What was copied before stays until the next swap, for steps of other streams that read it.

        Raises:
            ValueError: Other levels or another codebook size.
        """
        if (trie.levels, trie.codebook_size) != (self.trie.levels, self.trie.codebook_size):
            raise ValueError(
                f"trie: wanted {self.trie.levels} levels of {self.trie.codebook_size} codes, got "
                f"{trie.levels} of {trie.codebook_size}"
            )
        self._before = (self.data, *self.tags)
        self._copy(trie, self.address.device)
        self.address.copy_(self.addresses())

    def _copy(self, trie: SidTrie, device: torch.device) -> None:
        levels = range(trie.levels) if trie.has_tags else ()
        self.trie, self.data = trie, trie.data.to(device)
        self.tags = [
            torch.from_numpy(trie.native.tags(level).view(np.int64)).to(device) for level in levels
        ]

    def addresses(self) -> torch.Tensor:
        """`address`, on the CPU."""
        tags = [tensor.data_ptr() for tensor in self.tags] or [0] * self.trie.levels
        return torch.tensor([self.data.data_ptr(), *tags])
