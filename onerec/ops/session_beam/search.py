"""The whole constrained search, for anybody's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from onerec.ops.session_beam.beam import BeamResult, BeamSearch
from onerec.trie import ArrayLike, SidTrie


def constrained_beam_search(
    step_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    trie: SidTrie,
    *,
    batch_size: int,
    beam_width: int,
    session_length: int = 1,
    scoring: str = "full_softmax",
    temperature: float = 1.0,
    width_ramp: Sequence[int] = (),
    deny: Sequence[ArrayLike | None] | None = None,
    allow_tags: Sequence[int | None] | None = None,
    widths: Sequence[int] | None = None,
    num_threads: int | None = None,
) -> BeamResult:
    """Finds the best sessions of semantic ids that a model gives, and only legal ones.

    Args:
        step_fn: Called once a code as step_fn(tokens int64 [B, M, t], parents int64 [B, M]), it
            returns logits [B, M, K] on the CPU. `tokens` are the codes of each beam so far, over
            all its items (-1 on dead beams, whose rows are not read); `parents` tell which beam of
            the call before each one continues, so that caches can follow. At the first call t is
            0, only beam 0 of a request is live, and logits [B, 1, K] will do.
        trie: The allowed semantic ids.
        batch_size: Requests B.
        beam_width: Beams of a request M.
        session_length: Items of a session m; a session has no item twice.
        scoring: "full_softmax", "legal_softmax" or "raw", as in `onerec.ops.BeamSearch`.
        temperature: Divides the logits.
        width_ramp: Most beams after the first codes, as in `onerec.ops.BeamSearch`.
        deny: For each request leaf ids never to produce, or None.
        allow_tags: For each request a set of tags of which an item must have one, or None.
        widths: For each request its most beams, 0 to M.
        num_threads: Threads of the search; None asks torch.

    Returns:
        The sessions, best first. Fewer than `beam_width` of them if no more are legal.

    Raises:
        ValueError: A setting out of range, or logits of a wrong shape.
    """
    search = BeamSearch(
        trie,
        batch_size=batch_size,
        beam_width=beam_width,
        session_length=session_length,
        scoring=scoring,
        temperature=temperature,
        width_ramp=width_ramp,
        deny=deny,
        allow_tags=allow_tags,
        widths=widths,
        num_threads=num_threads,
    )
    parents = torch.zeros((batch_size, beam_width), dtype=torch.int64)
    tokens = torch.empty((batch_size, beam_width, 0), dtype=torch.int64)
    while not search.done:
        state = search.step(step_fn(tokens, parents))
        parents = state.parents
        kept = tokens.gather(1, parents.unsqueeze(-1).expand_as(tokens))
        kept = torch.where(state.tokens.unsqueeze(-1) >= 0, kept, -1)
        tokens = torch.cat([kept, state.tokens.unsqueeze(-1)], dim=-1)
    return search.result()
