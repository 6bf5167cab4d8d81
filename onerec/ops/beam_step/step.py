"""One exact beam step over the trie of semantic ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from onerec._native import core
from onerec.ops.beam_step.reference import LeafTable, request_step
from onerec.trie import (
    EVERY_TAG,
    SCORINGS,
    ArrayLike,
    DeviceTrie,
    SidTrie,
    allow_masks,
    as_int_array,
    check_scoring,
)

_CPU = torch.device("cpu")
LOGIT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class BeamStep(NamedTuple):
    """Beams after a step, best first; rows past `valid` are dead.

    Attributes:
        parents: int64 [B, M], row before the step; 0 on dead rows.
        tokens: int64 [B, M], code chosen; -1 on dead rows.
        nodes: int64 [B, M], trie node reached (a leaf id after the last level); -1 on dead rows.
        scores: float64 [B, M], descending; -inf on dead rows.
        valid: int32 [B], live beams.
    """

    parents: torch.Tensor
    tokens: torch.Tensor
    nodes: torch.Tensor
    scores: torch.Tensor
    valid: torch.Tensor


def beam_step(
    logits: torch.Tensor,
    scores: torch.Tensor,
    nodes: torch.Tensor,
    trie: SidTrie | DeviceTrie,
    *,
    level: int,
    beam_width: int,
    scoring: str = "full_softmax",
    temperature: float = 1.0,
    widths: Sequence[int] | None = None,
    deny: Sequence[ArrayLike | None] | None = None,
    allow_tags: Sequence[int | None] | None = None,
    num_threads: int | None = None,
    backend: str = "native",
) -> BeamStep:
    """Extends beams by one code: normalise, constrain, take the best, advance the nodes.

    The legal codes of a beam are the children of its node. Kept are the best `beam_width` of all
    legal continuations of a request: score descending, then parent, then code. `BeamSearch`
    describes the scores; it also holds the state between the steps, of whole sessions. In torch
    this is the operation `torch.ops.onerec.beam_step`, which takes `trie.data` for the trie, or
    `DeviceTrie.address` on CUDA; there it waits for nothing and can be captured in a CUDA graph.

    Args:
        logits: float32, float16 or bfloat16 [B, R, K]; the last stride must be 1.
        scores: float64 [B, R] of the beams before the step, on the device of the logits.
        nodes: int64 [B, R], their nodes of depth `level` (the root is 0); -1 is a dead beam, whose
            row is not read.
        trie: The allowed semantic ids; `SidTrie.to` copies them to the CUDA device of the logits.
        level: Codes that each beam has, 0 to L - 1.
        beam_width: Beams to keep, M; may exceed K.
        scoring: "full_softmax", "legal_softmax" or "raw".
        temperature: Divides the logits; positive and finite.
        widths: For each request its most beams, 0 to M; None gives all of them M.
        deny: For each request leaf ids not to be reached, or None. Removed ones never are.
        allow_tags: For each request a set of tags (bit t for tag t) of which a leaf to be reached
            must have one, or None.
        num_threads: None asks torch. Does not change the result.
        backend: "native", or "reference" (plain NumPy, slow).

    Raises:
        TypeError: A tensor of another dtype.
        ValueError: A shape, node or setting out of range.
    """
    check_scoring(scoring, temperature)
    on_device = trie if isinstance(trie, DeviceTrie) else None
    trie = trie if isinstance(trie, SidTrie) else trie.trie
    device = torch.device("cpu") if on_device is None else on_device.address.device
    if not 0 <= level < trie.levels:
        raise ValueError(f"level: wanted 0 to {trie.levels - 1}, got {level}")
    if beam_width < 1:
        raise ValueError(f"beam_width: wanted 1 or more, got {beam_width}")
    if logits.ndim != 3:
        raise ValueError(f"logits: wanted [B, R, {trie.codebook_size}], got {list(logits.shape)}")
    check_logits(logits, [(*logits.shape[:2], trie.codebook_size)], device)
    for name, tensor, dtype in (
        ("scores", scores, torch.float64),
        ("nodes", nodes, torch.int64),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: wanted {dtype}, got {tensor.dtype}")
        if tensor.shape != logits.shape[:2]:
            wanted = list(logits.shape[:2])
            raise ValueError(f"{name}: wanted shape {wanted}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: wanted them on {device}, got {tensor.device}")
    batch = len(logits)
    denied = deny_lists(deny, batch, trie.n_leaves)
    allow = allow_masks(allow_tags, batch, trie)
    if widths is not None and (
        len(widths) != batch or not all(0 <= width <= beam_width for width in widths)
    ):
        raise ValueError(f"widths: wanted {batch} numbers 0 to {beam_width}, got {list(widths)}")
    if backend == "native":
        threads = torch.get_num_threads() if num_threads is None else num_threads
        dead, offsets, tags, masks = _filters(trie, level, denied, allow)
        filters = (dead, offsets, tags if on_device is None else None, masks)
        out = torch.ops.onerec.beam_step(
            logits,
            scores,
            nodes,
            trie.data if on_device is None else on_device.address,
            level,
            beam_width,
            SCORINGS.index(scoring),
            temperature,
            threads,
            None if widths is None else torch.tensor(widths, dtype=torch.int64, device=device),
            *(None if tensor is None else tensor.to(device) for tensor in filters),
        )
        return BeamStep(*out)
    if backend != "reference":
        raise ValueError(f"backend: wanted 'native' or 'reference', got {backend!r}")
    banned = [banned_leaves(trie, *both) for both in zip(denied, allow, strict=True)]
    table = LeafTable(trie.leaf_sids(range(trie.n_leaves)))
    out = _outputs(logits, beam_width)
    out.parents.fill_(0)
    out.tokens.fill_(-1)
    out.nodes.fill_(-1)
    out.scores.fill_(float("-inf"))
    for b in range(batch):
        kept = request_step(
            logits[b].detach().float().numpy(),
            scores[b].numpy(),
            nodes[b].tolist(),
            table,
            level,
            beam_width if widths is None else widths[b],
            scoring,
            temperature,
            [banned[b].tolist()] * logits.shape[1],
        )
        out.valid[b] = len(kept)
        for i, (score, parent, token, child) in enumerate(kept):
            out.parents[b, i], out.tokens[b, i] = parent, token
            out.nodes[b, i], out.scores[b, i] = child, score
    return out


def deny_lists(
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


def check_logits(
    logits: torch.Tensor, shapes: Sequence[tuple[int, ...]], device: torch.device = _CPU
) -> None:
    """Refuses logits that have none of the shapes or cannot be read as they lie.

    Raises:
        TypeError: No tensor, or another dtype than float32, float16, bfloat16.
        ValueError: Another shape or device, or codes that do not follow one another.
    """
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"logits: wanted a torch tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGIT_TYPES:
        raise TypeError(f"logits: wanted float32, float16 or bfloat16, got {logits.dtype}")
    if logits.device != device:
        raise ValueError(f"logits: wanted them on {device}, got {logits.device}")
    if logits.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"logits: wanted shape {wanted}, got {list(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel():
        raise ValueError(f"logits: wanted a last stride of 1, got {logits.stride(-1)}")


def banned_leaves(
    trie: SidTrie, deny: npt.NDArray[np.int64], allow: np.uint64
) -> npt.NDArray[np.int64]:
    """Leaves that a request must not reach: removed, denied or without its tags."""
    banned = np.union1d(trie.removed, deny)
    if allow != EVERY_TAG:
        banned = np.union1d(banned, np.flatnonzero((trie.tags & allow) == 0))
    return banned


def _filters(
    trie: SidTrie, level: int, denied: list[npt.NDArray[np.int64]], allow: npt.NDArray[np.uint64]
) -> tuple[torch.Tensor | None, ...]:
    """Dead edges of the level with their offsets, the edges' tags and the requests' ones."""
    dead = offsets = tags = masks = None
    if trie.n_live < trie.n_leaves or any(map(len, denied)):
        lists = [
            trie.native.dead_edges(level, int(mask), leaves.ctypes.data, len(leaves))
            for leaves, mask in zip(denied, allow, strict=True)
        ]
        dead = torch.from_numpy(np.concatenate(lists))
        offsets = torch.tensor([0, *map(len, lists)]).cumsum(0)
    if (allow != EVERY_TAG).any():
        tags = torch.from_numpy(trie.native.tags(level).view(np.int64))
        masks = torch.from_numpy(allow.view(np.int64))
    return dead, offsets, tags, masks


def _outputs(logits: torch.Tensor, beam_width: int) -> BeamStep:
    shape = (logits.shape[0], beam_width)
    parents, tokens, nodes = (logits.new_empty(shape, dtype=torch.int64) for _ in range(3))
    scores = logits.new_empty(shape, dtype=torch.float64)
    return BeamStep(parents, tokens, nodes, scores, logits.new_empty(shape[:1], dtype=torch.int32))


def _own_items(
    paths: torch.Tensor | None,
    items: int,
    leaf_offsets: torch.Tensor | None,
    leaf_tags: torch.Tensor | None,
) -> tuple[int, int, int, int, int]:
    """Address and row length of the paths, items in them, addresses of the offsets and the tags."""
    if paths is None:
        return 0, 0, 0, 0, 0
    dead, tags = (0 if t is None else t.data_ptr() for t in (leaf_offsets, leaf_tags))
    return paths.data_ptr(), paths.stride(1), items, dead, tags


# `paths` int64 [B, R, >= items * L] are the edges of the `items` items that every beam has and must
# not reach again; `leaf_offsets` int64 [B + 1] tells where a request's dead leaves lie in `dead`,
# and `leaf_tags` are the tags of the last level. On CUDA all tags are found through `trie`. The
# state between the steps is the caller's, as in `onerec.inference.graph`.
_library = torch.library.Library("onerec", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "beam_step(Tensor logits, Tensor scores, Tensor nodes, Tensor trie, int level, int beam_width,"
    " int scoring, float temperature, int num_threads, Tensor? widths=None, Tensor? dead=None,"
    " Tensor? dead_offsets=None, Tensor? tags=None, Tensor? allow=None, Tensor? paths=None,"
    " int items=0, Tensor? leaf_offsets=None, Tensor? leaf_tags=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _native_step(
    logits: torch.Tensor,
    scores: torch.Tensor,
    nodes: torch.Tensor,
    trie: torch.Tensor,
    level: int,
    beam_width: int,
    scoring: int,
    temperature: float,
    num_threads: int,
    widths: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    dead_offsets: torch.Tensor | None = None,
    tags: torch.Tensor | None = None,
    allow: torch.Tensor | None = None,
    paths: torch.Tensor | None = None,
    items: int = 0,
    leaf_offsets: torch.Tensor | None = None,
    leaf_tags: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """The step on the device of the logits.

    Args:
        logits: As the others, as for `beam_step`.
        trie: uint8, the trie's bytes; on CUDA `DeviceTrie.address`.
    """
    scores, nodes = scores.contiguous(), nodes.contiguous()
    out = _outputs(logits, beam_width)
    batch, rows, codebook_size = logits.shape
    given: tuple[Any, ...] = (
        level,
        logits.data_ptr(),
        LOGIT_TYPES[logits.dtype],
        logits.stride(0),
        logits.stride(1),
        batch,
        rows,
        scores.data_ptr(),
        nodes.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (widths, dead, dead_offsets, tags, allow)),
        *_own_items(paths, items, leaf_offsets, leaf_tags),
        scoring,
        temperature,
        beam_width,
        *(tensor.data_ptr() for tensor in out),
    )
    if not logits.is_cuda:
        core().beam_step(trie.data_ptr(), trie.numel(), *given, num_threads)
        return tuple(out)
    size = core().cuda_beam_step_bytes(batch, rows, items)
    workspace = logits.new_empty(size, dtype=torch.uint8)
    with torch.cuda.device(logits.device):
        stream = torch.cuda.current_stream().cuda_stream
        core().cuda_beam_step(trie.data_ptr(), codebook_size, *given, workspace.data_ptr(), stream)
    return tuple(out)


for _device in ("CPU", "CUDA"):
    _library.impl("beam_step", _native_step, _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("onerec::beam_step", lib=_library)  # type: ignore[untyped-decorator]
def _fake_step(
    logits: torch.Tensor,
    scores: torch.Tensor,
    nodes: torch.Tensor,
    trie: torch.Tensor,
    level: int,
    beam_width: int,
    scoring: int,
    temperature: float,
    num_threads: int,
    widths: torch.Tensor | None = None,
    dead: torch.Tensor | None = None,
    dead_offsets: torch.Tensor | None = None,
    tags: torch.Tensor | None = None,
    allow: torch.Tensor | None = None,
    paths: torch.Tensor | None = None,
    items: int = 0,
    leaf_offsets: torch.Tensor | None = None,
    leaf_tags: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    return tuple(_outputs(logits, beam_width))
