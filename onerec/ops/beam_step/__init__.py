"""One exact beam step over the trie of semantic ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from onerec._native import core
from onerec.ops.beam_step.reference import LeafTable, request_step
from onerec.trie import SidTrie

SCORINGS = ("full_softmax", "legal_softmax", "raw")
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
    trie: SidTrie,
    *,
    level: int,
    beam_width: int,
    scoring: str = "full_softmax",
    temperature: float = 1.0,
    num_threads: int | None = None,
    backend: str = "native",
) -> BeamStep:
    """Extends beams by one code: normalise, constrain, take the best, advance the nodes.

    The legal codes of a beam are the children of its node. Kept are the best `beam_width` of all
    legal continuations of a request: score descending, then parent, then code. `BeamSearch`
    describes the scores; it also holds the state between the steps, of whole sessions. In torch
    this is the operation `torch.ops.onerec.beam_step`, which takes `trie.data` for the trie.

    Args:
        logits: float32, float16 or bfloat16 [B, R, K] on the CPU; the last stride must be 1.
        scores: float64 [B, R] of the beams before the step.
        nodes: int64 [B, R], their nodes of depth `level` (the root is 0); -1 is a dead beam, whose
            row is not read.
        trie: The allowed semantic ids.
        level: Codes that each beam has, 0 to L - 1.
        beam_width: Beams to keep, M; may exceed K.
        scoring: "full_softmax", "legal_softmax" or "raw".
        temperature: Divides the logits; positive and finite.
        num_threads: None asks torch. Does not change the result.
        backend: "native", or "reference" (plain NumPy, slow).

    Raises:
        TypeError: A tensor of another dtype.
        ValueError: A shape, node or setting out of range.
    """
    check_scoring(scoring, temperature)
    if not 0 <= level < trie.levels:
        raise ValueError(f"level: wanted 0 to {trie.levels - 1}, got {level}")
    if beam_width < 1:
        raise ValueError(f"beam_width: wanted 1 or more, got {beam_width}")
    if logits.ndim != 3:
        raise ValueError(f"logits: wanted [B, R, {trie.codebook_size}], got {list(logits.shape)}")
    check_logits(logits, [(*logits.shape[:2], trie.codebook_size)])
    for name, tensor, dtype in (
        ("scores", scores, torch.float64),
        ("nodes", nodes, torch.int64),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: wanted {dtype}, got {tensor.dtype}")
        if tensor.shape != logits.shape[:2]:
            wanted = list(logits.shape[:2])
            raise ValueError(f"{name}: wanted shape {wanted}, got {list(tensor.shape)}")
    if backend == "native":
        threads = torch.get_num_threads() if num_threads is None else num_threads
        out = torch.ops.onerec.beam_step(
            logits,
            scores,
            nodes,
            trie.data,
            level,
            beam_width,
            SCORINGS.index(scoring),
            temperature,
            threads,
        )
        return BeamStep(*out)
    if backend != "reference":
        raise ValueError(f"backend: wanted 'native' or 'reference', got {backend!r}")
    return _reference(logits, scores, nodes, trie, level, beam_width, scoring, temperature)


def check_scoring(scoring: str, temperature: float) -> None:
    """Raises ValueError for an unknown scoring or a temperature out of range."""
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: wanted one of {SCORINGS}, got {scoring!r}")
    if not (0.0 < temperature < float("inf")):
        raise ValueError(f"temperature: wanted a positive finite number, got {temperature}")


def check_logits(logits: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuses logits that have none of the shapes or cannot be read as they lie.

    Raises:
        TypeError: Another dtype than float32, float16, bfloat16.
        ValueError: Another shape, not on the CPU, or codes that do not follow one another.
    """
    if logits.dtype not in LOGIT_TYPES:
        raise TypeError(f"logits: wanted float32, float16 or bfloat16, got {logits.dtype}")
    if not logits.is_cpu:
        raise ValueError(f"logits: wanted them on the CPU, got {logits.device}")
    if logits.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"logits: wanted shape {wanted}, got {list(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1 and logits.numel():
        raise ValueError(f"logits: wanted a last stride of 1, got {logits.stride(-1)}")


def _reference(
    logits: torch.Tensor,
    scores: torch.Tensor,
    nodes: torch.Tensor,
    trie: SidTrie,
    level: int,
    beam_width: int,
    scoring: str,
    temperature: float,
) -> BeamStep:
    table = LeafTable(trie.leaf_sids(range(trie.n_leaves)))
    out = _outputs(logits, beam_width)
    out.parents.fill_(0)
    out.tokens.fill_(-1)
    out.nodes.fill_(-1)
    out.scores.fill_(float("-inf"))
    for b in range(len(logits)):
        kept = request_step(
            logits[b].detach().float().numpy(),
            scores[b].numpy(),
            nodes[b].tolist(),
            table,
            level,
            beam_width,
            scoring,
            temperature,
        )
        out.valid[b] = len(kept)
        for i, (score, parent, token, child) in enumerate(kept):
            out.parents[b, i], out.tokens[b, i] = parent, token
            out.nodes[b, i], out.scores[b, i] = child, score
    return out


def _outputs(logits: torch.Tensor, beam_width: int) -> BeamStep:
    shape = (logits.shape[0], beam_width)
    parents, tokens, nodes = (logits.new_empty(shape, dtype=torch.int64) for _ in range(3))
    scores = logits.new_empty(shape, dtype=torch.float64)
    return BeamStep(parents, tokens, nodes, scores, logits.new_empty(shape[:1], dtype=torch.int32))


_library = torch.library.Library("onerec", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "beam_step(Tensor logits, Tensor scores, Tensor nodes, Tensor trie, int level, int beam_width,"
    " int scoring, float temperature, int num_threads)"
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
) -> tuple[torch.Tensor, ...]:
    scores, nodes = scores.contiguous(), nodes.contiguous()
    out = _outputs(logits, beam_width)
    core().beam_step(
        trie.data_ptr(),
        trie.numel(),
        level,
        logits.data_ptr(),
        LOGIT_TYPES[logits.dtype],
        logits.stride(0),
        logits.stride(1),
        logits.shape[0],
        logits.shape[1],
        scores.data_ptr(),
        nodes.data_ptr(),
        scoring,
        temperature,
        beam_width,
        *(tensor.data_ptr() for tensor in out),
        num_threads,
    )
    return tuple(out)


_library.impl("beam_step", _native_step, "CPU")  # type: ignore[no-untyped-call]


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
) -> tuple[torch.Tensor, ...]:
    return tuple(_outputs(logits, beam_width))
