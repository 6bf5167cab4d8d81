"""Session-wise beam search over the trie of semantic ids."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from onerec._native import core
from onerec.ops.beam_step.step import LOGIT_TYPES, banned_leaves, check_logits, deny_lists
from onerec.ops.session_beam.reference import ReferenceSearch
from onerec.trie import SCORINGS, ArrayLike, SidTrie, allow_masks, check_scoring

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


class LegalCodes(NamedTuple):
    """The legal codes of every live beam, in the order of requests, beams and codes.

    Attributes:
        rows: int64 [n], beam of each code: b * M + i.
        codes: int32 [n].
        counts: int64 [B, M], legal codes of each beam.
    """

    rows: torch.Tensor
    codes: torch.Tensor
    counts: torch.Tensor


class BeamSearch:
    """Exact beam search for sessions of semantic ids, one call a code.

    Every beam starts at the trie's root; after L codes it has an item and starts again, until it
    has `session_length` items. Only continuations that still lead to an allowed item are legal: an
    item is allowed if it is not removed from the trie, not denied to its request, has one of the
    request's tags, and is not yet in the beam's own session. So no beam runs into a dead end, and
    no result is illegal. Each step keeps the best `beam_width` of all legal continuations, ordered
    by score descending, then parent, then code.

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
        width_ramp: Most beams after the first steps, 1 to M each; M after the others. A narrow
            start saves rows of the model: a step wants `rows` of them at least.
        deny, allow_tags, widths: As for `reset`.
        num_threads: Threads of a step; None asks torch. Does not change the result.
        backend: "native", or "reference" (plain NumPy, slow).

    Raises:
        TypeError: A size that is not an integer.
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
        width_ramp: Sequence[int] = (),
        deny: Sequence[ArrayLike | None] | None = None,
        allow_tags: Sequence[int | None] | None = None,
        widths: Sequence[int] | None = None,
        num_threads: int | None = None,
        backend: str = "native",
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 0),
            ("beam_width", beam_width, 1),
            ("session_length", session_length, 1),
        ):
            if not isinstance(value, int | np.integer):
                raise TypeError(f"{name}: wanted an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name}: wanted {least} or more, got {value}")
        check_scoring(scoring, temperature)
        if backend not in ("native", "reference"):
            raise ValueError(f"backend: wanted 'native' or 'reference', got {backend!r}")
        for width in width_ramp:
            if not 1 <= width <= beam_width:
                raise ValueError(f"width_ramp: wanted 1 to {beam_width}, got {width}")
        self.trie = trie
        self.batch_size, self.beam_width = batch_size, beam_width
        self.session_length = session_length
        self.scoring, self.temperature = scoring, float(temperature)
        self.width_ramp = tuple(width_ramp)
        self.backend = backend
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
                list(self.width_ramp),
            )
        self.reset(deny, allow_tags=allow_tags, widths=widths)

    def reset(
        self,
        deny: Sequence[ArrayLike | None] | None = None,
        *,
        allow_tags: Sequence[int | None] | None = None,
        widths: Sequence[int] | None = None,
        trie: SidTrie | None = None,
    ) -> None:
        """Starts anew with other requests; the workspace is kept.

        Args:
            deny: For each request leaf ids never to produce, or None.
            allow_tags: For each request a set of tags (bit t for tag t) of which an item must have
                one, or None; the trie needs tags (`SidTrie.with_tags`).
            widths: For each request its most beams, 0 to M; None gives all of them M.
            trie: Another trie of the same shape to go on with, such as `LiveTrie.pin().trie`.

        Raises:
            ValueError: A list of another length, a leaf that the trie lacks, tags without a trie
                that has them, or a trie of another shape. The search is then as it was.
        """
        new = self.trie if trie is None else trie
        if (new.levels, new.codebook_size) != (self.trie.levels, self.trie.codebook_size):
            raise ValueError(
                f"trie: wanted {self.trie.levels} levels of {self.trie.codebook_size} codes, got "
                f"{new.levels} of {new.codebook_size}"
            )
        lists = deny_lists(deny, self.batch_size, new.n_leaves)
        allow = allow_masks(allow_tags, self.batch_size, new)
        if widths is None:
            widths = [self.beam_width] * self.batch_size
        if len(widths) != self.batch_size:
            raise ValueError(f"widths: wanted one for each of {self.batch_size}, got {len(widths)}")
        for width in widths:
            if not 0 <= width <= self.beam_width:
                raise ValueError(f"widths: wanted 0 to {self.beam_width}, got {width}")
        if self._native is not None:
            leaves = np.concatenate([np.empty(0, np.int64), *lists])
            offsets = np.cumsum([0, *(len(x) for x in lists)]).astype(np.int64)
            most = np.array(widths, dtype=np.int64)
            self._native.reset(
                leaves.ctypes.data,
                offsets.ctypes.data,
                allow.ctypes.data,
                most.ctypes.data,
                new.native,
            )
        else:
            self._reference = ReferenceSearch(
                new.leaf_sids(np.arange(new.n_leaves)),
                [self._ramped(width) for width in widths],
                self.session_length,
                self.scoring,
                self.temperature,
                [banned_leaves(new, *both) for both in zip(lists, allow, strict=True)],
                self.beam_width,
            )
        self.trie = new
        self._codes, self._all_steps = new.codebook_size, new.levels * self.session_length
        self._widths = list(widths)
        self._rows = [1, *(max(most, 1) for most in self._ramped(max(widths, default=0)))]
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
        return self._steps == self._all_steps

    def _ramped(self, width: int) -> list[int]:
        """A request's most beams after each step."""
        steps = self.trie.levels * self.session_length
        ramp = [*self.width_ramp[:steps]]
        ramp += [self.beam_width] * (steps - len(ramp))
        return [min(width, most) for most in ramp]

    @property
    def rows(self) -> int:
        """Rows of logits that the next step wants at least: no request has more live beams."""
        return self._rows[self._steps]

    def step(self, logits: torch.Tensor) -> BeamState:
        """Extends every beam by one code.

        Args:
            logits: float32, float16 or bfloat16 [B, R, K], row i belonging to beam i of the last
                state and `rows` <= R <= M; rows of dead beams are not read.

        Raises:
            TypeError: `logits` are not a tensor of such a type.
            ValueError: Their shape is wrong, they are not on the CPU, or the search is done.
        """
        self._check_not_done()
        tensor = isinstance(logits, torch.Tensor) and logits.ndim == 3
        given, least = logits.shape[1] if tensor else 0, self.rows
        enough = least <= given <= self.beam_width
        wanted = [given] if enough else sorted({least, self.beam_width}, reverse=True)
        check_logits(logits, [(self.batch_size, rows, self._codes) for rows in wanted])
        if self._native is not None:
            self._native.step(
                logits.data_ptr(),
                LOGIT_TYPES[logits.dtype],
                logits.stride(0),
                logits.stride(1),
                logits.shape[1],
            )
            return self._next_state(None)
        return self._next_state(self._reference.step(logits.detach().float().numpy()))

    def legal(self) -> LegalCodes:
        """The codes that the next step may choose from.

        Under "legal_softmax" and "raw" no other logits matter, so a caller can multiply with those
        rows of its output layer only, and go on with `step_legal`. Native backend only.
        """
        native = self._native_only("legal")
        offsets_at, codes_at = native.legal()
        beams = self.batch_size * self.beam_width
        offsets = _copy(offsets_at, beams + 1, ctypes.c_int64)
        codes = _copy(codes_at, int(offsets[-1]), ctypes.c_int32)
        counts = offsets.diff()
        rows = torch.repeat_interleave(counts)
        return LegalCodes(rows, codes, counts.view(self.batch_size, self.beam_width))

    def step_legal(self, logits: torch.Tensor) -> BeamState:
        """`step` with the logits of `legal`'s codes alone, float32 [n] in their order.

        A beam with one legal code keeps its score under "legal_softmax" whatever finite logit that
        code has, so such a beam needs no forward pass of the model for this code.

        Raises:
            TypeError: `logits` are not float32.
            ValueError: Another shape, "full_softmax", no `legal` before, or the search is done.
        """
        native = self._native_only("step_legal")
        self._check_not_done()
        if logits.dtype != torch.float32:
            raise TypeError(f"logits: wanted float32, got {logits.dtype}")
        if logits.ndim != 1 or not logits.is_cpu:
            raise ValueError(f"logits: wanted [n] on the CPU, got {list(logits.shape)}")
        logits = logits.contiguous()
        native.step_legal(logits.data_ptr(), len(logits))
        return self._next_state(None)

    def _check_not_done(self) -> None:
        if self.done:
            raise ValueError(f"step: the session of {self.session_length} items is finished")

    def _native_only(self, name: str) -> _C.BeamSearch:
        if self._native is None:
            raise ValueError(f"{name}: wanted backend 'native', got {self.backend!r}")
        return self._native

    def _next_state(self, made: tuple[torch.Tensor, ...] | None) -> BeamState:
        """The state after a step, which the native search has or the reference `made`."""
        state = self._states[self._steps]
        if made is None:
            self._native_only("step").state(
                state.parents.data_ptr(),
                state.tokens.data_ptr(),
                state.scores.data_ptr(),
                state.valid.data_ptr(),
            )
        else:
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
            valid = (torch.tensor(self._widths) > 0).int()
            scores[valid > 0, 0] = 0.0
        else:
            scores, valid = self._states[self._steps - 1][2:4]
        return BeamResult(sids, items, scores, valid)


def _copy(address: int, count: int, kind: type[ctypes.c_int64 | ctypes.c_int32]) -> torch.Tensor:
    """A tensor of `count` numbers at an address."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64 if kind is ctypes.c_int64 else torch.int32)
    return torch.from_numpy(np.ctypeslib.as_array((kind * count).from_address(address)).copy())
