"""Session-wise beam search over the trie of semantic ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from onerec._native import core
from onerec.ops.beam_step import LOGIT_TYPES, SCORINGS, check_logits, check_scoring
from onerec.ops.session_beam.reference import ReferenceSearch
from onerec.trie import ArrayLike, SidTrie, as_int_array

if TYPE_CHECKING:
    from onerec import _C


class BeamState(NamedTuple):
    """Beams after a step, best first; rows past `valid` are dead.

    Attributes:
        parents: int64 [B, M], row before the step that each beam continues; 0 on dead rows, so
            that caches can be gathered without a mask.
        tokens: int64 [B, M], code chosen; -1 on dead rows.
        scores: float32 [B, M], descending; -inf on dead rows.
        valid: int32 [B], live beams.
        level: Level of the next code, 0 to L - 1.
        item: Index in the session of the item that the next code belongs to.
        done: Whether every item of the session is finished.
    """

    parents: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    valid: torch.Tensor
    level: int
    item: int
    done: bool


@dataclass(frozen=True)
class BeamResult:
    """Sessions found, best first; rows past `valid` hold -1 and -inf.

    Attributes:
        sids: int32 [B, M, m, L], semantic ids.
        items: int64 [B, M, m], their leaf ids.
        scores: float32 [B, M], sum of the scores of a session's codes.
        valid: int32 [B], live rows.
    """

    sids: torch.Tensor
    items: torch.Tensor
    scores: torch.Tensor
    valid: torch.Tensor


class BeamSearch:
    """Exact beam search for sessions of semantic ids, one call a code.

    Every beam starts at the trie's root; after L codes it has an item and starts again, until it
    has `session_length` items. Only continuations that still lead to an allowed item are legal: an
    item is allowed if it is not denied to its request and not yet in the beam's own session. So no
    beam runs into a dead end, and no result is illegal. Each step keeps the best `beam_width` of
    all legal continuations, ordered by score descending, then parent, then code.

    A beam's score is the sum over its codes of x_t / T - n(x), x being its row of logits and n(x)
    - "full_softmax": log sum exp(x / T) over all codes,
    - "legal_softmax": the same over the legal codes,
    - "raw": 0.
    A NaN logit is read as -inf and never chosen; +inf is read as the largest finite float32.

    Args:
        trie: The allowed semantic ids.
        batch_size: Requests B; 0 is allowed.
        beam_width: Beams of a request M; may exceed the number of codes.
        session_length: Items of a session m.
        scoring: See above.
        temperature: T, positive and finite.
        deny: For each request leaf ids never to produce, or None.
        num_threads: Threads of a step; None asks torch. Does not change the result.
        backend: "native", or "reference" (plain NumPy, slow).

    Raises:
        ValueError: An argument out of range; a denied leaf that the trie lacks.
    """

    def __init__(
        self,
        trie: SidTrie,
        *,
        batch_size: int,
        beam_width: int,
        session_length: int,
        scoring: str = "full_softmax",
        temperature: float = 1.0,
        deny: Sequence[ArrayLike | None] | None = None,
        num_threads: int | None = None,
        backend: str = "native",
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 0),
            ("beam_width", beam_width, 1),
            ("session_length", session_length, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: wanted {least} or more, got {value}")
        check_scoring(scoring, temperature)
        if backend not in ("native", "reference"):
            raise ValueError(f"backend: wanted 'native' or 'reference', got {backend!r}")
        self.trie = trie
        self.batch_size, self.beam_width = batch_size, beam_width
        self.session_length = session_length
        self.scoring, self.temperature = scoring, float(temperature)
        self.backend = backend
        shape = (batch_size, beam_width, trie.codebook_size)
        self._shapes = [shape]
        self._first_shapes = [shape, (batch_size, 1, trie.codebook_size)]
        self._native: _C.BeamSearch | None = None
        if backend == "native":
            self._native = core().BeamSearch(
                trie.native,
                batch_size,
                beam_width,
                session_length,
                SCORINGS.index(scoring),
                self.temperature,
                torch.get_num_threads() if num_threads is None else num_threads,
            )
        self.reset(deny)

    def reset(self, deny: Sequence[ArrayLike | None] | None = None) -> None:
        """Starts anew, with other deny lists; the workspace is kept."""
        lists = _deny_lists(deny, self.batch_size, self.trie.n_leaves)
        if self._native is not None:
            leaves = np.concatenate([np.empty(0, np.int64), *lists])
            offsets = np.cumsum([0, *(len(x) for x in lists)]).astype(np.int64)
            self._native.reset(leaves.ctypes.data, offsets.ctypes.data)
        else:
            self._reference = ReferenceSearch(
                self.trie.leaf_sids(np.arange(self.trie.n_leaves)),
                self.batch_size,
                self.beam_width,
                self.session_length,
                self.scoring,
                self.temperature,
                lists,
            )
        self._steps = 0
        self._states = self._empty_states()

    @property
    def level(self) -> int:
        """Level of the next code."""
        return self._steps % self.trie.levels

    @property
    def item(self) -> int:
        """Index in the session of the item that the next code belongs to."""
        return self._steps // self.trie.levels

    @property
    def done(self) -> bool:
        """Whether every item of the session is finished."""
        return self.item == self.session_length

    def step(self, logits: torch.Tensor) -> BeamState:
        """Extends every beam by one code.

        Args:
            logits: float32 [B, M, K], row i belonging to beam i of the last state; rows of dead
                beams are not read. The first step also takes [B, 1, K], as only beam 0 is live.

        Raises:
            TypeError: `logits` are not floating point.
            ValueError: Their shape is wrong, they are not on the CPU, or the search is done.
        """
        if self.done:
            raise ValueError(f"step: the session of {self.session_length} items is finished")
        check_logits(logits, self._first_shapes if self._steps == 0 else self._shapes)
        state = self._states[self._steps]
        if self._native is not None:
            self._native.step(
                logits.data_ptr(),
                LOGIT_TYPES[logits.dtype],
                logits.stride(0),
                logits.stride(1),
                logits.shape[1],
            )
            self._native.state(
                state.parents.data_ptr(),
                state.tokens.data_ptr(),
                state.scores.data_ptr(),
                state.valid.data_ptr(),
            )
        else:
            made = self._reference.step(logits.detach().float().numpy())
            for mine, theirs in zip(state[:4], made, strict=True):
                mine.copy_(theirs)
        self._steps += 1
        return state

    def _empty_states(self) -> list[BeamState]:
        """The states that the steps will fill, made ahead of them."""
        levels, steps = self.trie.levels, self.trie.levels * self.session_length
        shape = (steps, self.batch_size, self.beam_width)
        parents, tokens = torch.empty((2, *shape), dtype=torch.int64)
        scores = torch.empty(shape, dtype=torch.float32)
        valid = torch.empty(shape[:2], dtype=torch.int32)
        columns = (parents.unbind(), tokens.unbind(), scores.unbind(), valid.unbind())
        return [
            BeamState(*tensors, level=i % levels, item=i // levels, done=i == steps)
            for i, tensors in enumerate(zip(*columns, strict=True), start=1)
        ]

    def result(self) -> BeamResult:
        """The sessions so far; items not yet finished are -1."""
        shape = (self.batch_size, self.beam_width)
        items = torch.empty((*shape, self.session_length), dtype=torch.int64)
        sids = torch.empty((*items.shape, self.trie.levels), dtype=torch.int32)
        if self._native is not None:
            self._native.items(items.data_ptr())
            self._native.sids(sids.data_ptr())
        else:
            self._reference.result(items, sids)
        if self._steps == 0:
            scores = torch.full(shape, float("-inf"))
            scores[:, 0] = 0.0
            valid = torch.ones(self.batch_size, dtype=torch.int32)
        else:
            scores, valid = self._states[self._steps - 1][2:4]
        return BeamResult(sids, items, scores, valid)


def _deny_lists(
    deny: Sequence[ArrayLike | None] | None, batch_size: int, n_leaves: int
) -> list[npt.NDArray[np.int64]]:
    """For each request its denied leaves, ascending and distinct."""
    if deny is None:
        return [np.empty(0, dtype=np.int64)] * batch_size
    if len(deny) != batch_size:
        raise ValueError(f"deny: wanted a list for each of {batch_size} requests, got {len(deny)}")
    lists = []
    for i, given in enumerate(deny):
        leaves = as_int_array(f"deny[{i}]", [] if given is None else given, np.int64, 1)
        leaves = np.unique(leaves)
        if len(leaves) and not (leaves[0] >= 0 and leaves[-1] < n_leaves):
            wrong = leaves[0] if leaves[0] < 0 else leaves[-1]
            raise ValueError(f"deny[{i}]: wanted leaf ids in [0, {n_leaves}), got {wrong}")
        lists.append(leaves)
    return lists
