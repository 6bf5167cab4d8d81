"""The set of valid semantic ids as a trie."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onerec._native import core
from onerec.errors import DataError
from onerec.threads import default_threads

if TYPE_CHECKING:
    import torch

    from onerec import _C

MAX_LEVELS = 8
MAX_CODEBOOK_SIZE = 65536
MAX_TAGS = 63
EVERY_TAG = 1 << 63  # what every leaf has; csrc/include/onerec/trie.h

ArrayLike = Any  # whatever numpy.asarray takes, and CPU tensors


def as_int_array(name: str, values: ArrayLike, dtype: type, ndim: int) -> npt.NDArray[Any]:
    """`values` as a C-contiguous array of `dtype`; refuses what is not whole numbers or fits not.

    Raises:
        TypeError: The values are not integers.
        ValueError: Wrong number of dimensions, or a value that `dtype` cannot hold.
    """
    array = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    array = np.asarray(array)
    if array.size == 0 and array.dtype == np.float64:  # an empty list
        array = array.astype(dtype)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name}: wanted integers, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name}: wanted {ndim} dimension(s), got shape {array.shape}")
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{name}: wanted values that fit {np.dtype(dtype)}, got larger ones")
    return np.ascontiguousarray(array, dtype=dtype)


class SidTrie:
    """A read-only set of semantic ids; a leaf id is the rank of a distinct id in their order.

    Made by `build` or `load`. One block of bytes in memory and in the file: for each level the
    codes of the edges and, for each node, where its edges begin; a child's id is its edge's index
    (csrc/include/onerec/trie.h gives the format).

    A trie that `LiveTrie` has removed ids from keeps the others' leaf ids: it has the same bytes
    and a list of removed leaves, which nothing finds or produces any more.

    Attributes:
        levels: Codes in a semantic id, L (1 to 8).
        codebook_size: Codes of a level, K (1 to 65,536).
        n_leaves: Number of distinct semantic ids, removed ones counted; leaf ids are below it.
        n_live: Number of those that are not removed.
        nbytes: Size in memory and in a file, in bytes.
        has_tags: Whether leaves have tags.
    """

    def __init__(self, native: _C.Trie) -> None:
        self._native = native

    @classmethod
    def build(cls, sids: ArrayLike, codebook_size: int) -> SidTrie:
        """Builds from semantic ids in any order; an id that comes twice is one leaf.

        Args:
            sids: Integers [N, L], each in [0, codebook_size). N may be 0.
            codebook_size: Codes of a level, 1 to 65,536.

        Raises:
            TypeError: `sids` are not integers.
            ValueError: A shape, size or code out of range.
        """
        array = as_int_array("sids", sids, np.int32, 2)
        native = core().Trie.build(
            array.ctypes.data, len(array), array.shape[1], array.shape[1], int(codebook_size)
        )
        return cls(native)

    @classmethod
    def load(cls, path: str | Path) -> SidTrie:
        """Maps a saved trie into memory and checks all of it.

        Replace such a file by renaming, as `save` does; rewriting it in place would change or crash
        its readers.

        Raises:
            FileNotFoundError: There is no such file.
            DataError: The file is truncated, corrupt, or of another version or byte order.
            OSError: It cannot be read.
        """
        Path(path).stat()
        module = core()
        try:
            return cls(module.Trie.load(str(path)))
        except module.TrieFormatError as error:
            raise DataError(f"{path}: {error}") from None
        except RuntimeError as error:
            raise OSError(str(error)) from None

    def with_tags(self, tags: ArrayLike) -> SidTrie:
        """The same trie with a set of tags for each leaf, for `allow_tags` of a search.

        Args:
            tags: Integers [n_leaves], bit t (0 to 62) of which tells whether the leaf has tag t. A
                leaf that several items share has the tags of all of them. 8 bytes an edge.

        Raises:
            TypeError: `tags` are not integers.
            ValueError: Not one for each leaf, or a bit above 62.
        """
        array = as_int_array("tags", tags, np.int64, 1)
        if len(array) != self.n_leaves:
            raise ValueError(
                f"tags: wanted one for each of {self.n_leaves} leaves, got {len(array)}"
            )
        return type(self)(self._native.with_tags(array.ctypes.data))

    def save(self, path: str | Path) -> None:
        """Writes one file, whole or not at all. Equal sets of ids give equal bytes.

        Only live ids are written, and no tags: after a removal leaf ids are others in the file.

        Raises:
            OSError: It cannot be written.
        """
        try:
            native = self._native
            if self.n_live < self.n_leaves:
                native = native.with_sids(0, 0, 0, 0)
            native.save(str(path))
        except RuntimeError as error:
            raise OSError(str(error)) from None

    @property
    def levels(self) -> int:
        return self._native.levels

    @property
    def codebook_size(self) -> int:
        return self._native.codebook_size

    @property
    def n_leaves(self) -> int:
        return self._native.n_leaves

    @property
    def n_live(self) -> int:
        return self._native.n_live

    @property
    def has_tags(self) -> bool:
        return self._native.has_tags

    @property
    def removed(self) -> npt.NDArray[np.int64]:
        """Removed leaf ids, int64 [n], ascending."""
        return self._native.removed()

    @property
    def tags(self) -> npt.NDArray[np.uint64]:
        """Tags of each leaf, uint64 [n_leaves]; empty if the trie has none."""
        return self._native.tags(self.levels - 1) & np.uint64(EVERY_TAG - 1)

    @property
    def nbytes(self) -> int:
        return self._native.nbytes

    @property
    def native(self) -> _C.Trie:
        """The native object."""
        return self._native

    @property
    def data(self) -> torch.Tensor:
        """The trie's own bytes, uint8 [nbytes], not copied; never write to them."""
        import torch

        # The buffer, which the tensor keeps, keeps the native object in turn.
        buffer = (ctypes.c_uint8 * self.nbytes).from_address(self._native.address)
        buffer._trie = self._native  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def lookup(self, sids: ArrayLike, *, num_threads: int | None = None) -> npt.NDArray[np.int64]:
        """Leaf ids int64 [n] of semantic ids [n, L]; -1 where an id is not in the trie or removed.

        Raises:
            TypeError: `sids` are not integers.
            ValueError: They do not have L codes.
        """
        array = as_int_array("sids", sids, np.int32, 2)
        if array.shape[1] != self.levels:
            raise ValueError(f"sids: wanted [n, {self.levels}], got shape {array.shape}")
        return self._lookup(array, default_threads() if num_threads is None else num_threads)

    def _lookup(self, array: npt.NDArray[np.int32], num_threads: int) -> npt.NDArray[np.int64]:
        nodes = np.empty(len(array), dtype=np.int64)
        depth = array.shape[1]
        self._native.lookup(
            array.ctypes.data, len(array), depth, depth, nodes.ctypes.data, num_threads
        )
        return nodes

    def bitmask(self, prefixes: ArrayLike) -> torch.Tensor:
        """Legal next codes, for engines that apply a mask of their own.

        Args:
            prefixes: Integers [n, d], d codes each, 0 <= d < L.

        Returns:
            int32 [n, ceil(K / 32)]: code c of row i is legal if bit c % 32 of word c // 32 is set.
            No bit is set where no semantic id begins with the prefix.

        Raises:
            TypeError: `prefixes` are not integers.
            ValueError: They have L codes or more.
        """
        import torch

        array = as_int_array("prefixes", prefixes, np.int32, 2)
        if array.shape[1] >= self.levels:
            raise ValueError(f"prefixes: wanted fewer than {self.levels} codes, got {array.shape}")
        nodes = self._lookup(array, 1)
        words = torch.empty((len(array), (self.codebook_size + 31) // 32), dtype=torch.int32)
        self._native.bitmask(nodes.ctypes.data, len(nodes), array.shape[1], words.data_ptr())
        return words

    def leaf_sids(self, leaves: ArrayLike) -> npt.NDArray[np.int32]:
        """Semantic ids int32 [n, L] of leaf ids [n].

        Raises:
            ValueError: A leaf id outside [0, n_leaves).
        """
        array = as_int_array("leaves", leaves, np.int64, 1)
        sids = np.empty((len(array), self.levels), dtype=np.int32)
        self._native.leaf_sids(array.ctypes.data, len(array), sids.ctypes.data)
        return sids

    def stats(self) -> dict[str, Any]:
        """Sizes and shape.

        Returns:
            leaves, bytes, bytes_per_leaf, and `levels`: for each level the number of its nodes and
            edges, the mean and maximum degree, and the share of nodes with a single child.
        """
        levels = []
        for level in range(self.levels):
            nodes, edges, max_degree, single = self._native.level_stats(level)
            levels.append(
                {
                    "nodes": nodes,
                    "edges": edges,
                    "mean_degree": edges / nodes if nodes else 0.0,
                    "max_degree": max_degree,
                    "single_child_share": single / nodes if nodes else 0.0,
                }
            )
        return {
            "leaves": self.n_leaves,
            "bytes": self.nbytes,
            "bytes_per_leaf": self.nbytes / self.n_leaves if self.n_leaves else 0.0,
            "levels": levels,
        }

    def to(self, device: str | torch.device) -> DeviceTrie:
        """A copy of the bytes on a CUDA device, for `onerec.ops.beam_step` there."""
        return DeviceTrie(self, device)

    def __repr__(self) -> str:
        return (
            f"SidTrie(n_leaves={self.n_leaves}, levels={self.levels}, "
            f"codebook_size={self.codebook_size}, nbytes={self.nbytes})"
        )

    def __reduce__(self) -> tuple[Callable[..., SidTrie], tuple[Any, ...]]:
        tags = self.tags.astype(np.int64) if self.has_tags else None
        return _restore, (self.data.numpy().tobytes(), self.removed, tags)


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
        import torch

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
        import torch

        levels = range(trie.levels) if trie.has_tags else ()
        self.trie, self.data = trie, trie.data.to(device)
        self.tags = [
            torch.from_numpy(trie.native.tags(level).view(np.int64)).to(device) for level in levels
        ]

    def addresses(self) -> torch.Tensor:
        """`address`, on the CPU."""
        import torch

        tags = [tensor.data_ptr() for tensor in self.tags] or [0] * self.trie.levels
        return torch.tensor([self.data.data_ptr(), *tags])


def _restore(
    data: bytes, removed: npt.NDArray[np.int64], tags: npt.NDArray[np.int64] | None
) -> SidTrie:
    native = core().Trie.from_bytes(data).without(removed.ctypes.data, len(removed))
    trie = SidTrie(native)
    return trie if tags is None else trie.with_tags(tags)
