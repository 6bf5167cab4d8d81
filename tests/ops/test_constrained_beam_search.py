"""The whole search around a model given as a function."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from onerec import SidTrie, constrained_beam_search

SIZE, LEVELS, ITEMS = 5, 3, 2


def trie() -> SidTrie:
    rng = np.random.default_rng(0)
    return SidTrie.build(rng.integers(0, SIZE, (10, LEVELS)), SIZE)


def logits_after(codes: tuple[int, ...]) -> torch.Tensor:
    """A model: each history of codes has logits of its own."""
    seed = sum((code + 2) * 7**i for i, code in enumerate(codes))
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def test_finds_the_best_sessions_of_a_model() -> None:
    ids = trie()
    sids = [tuple(sid) for sid in ids.leaf_sids(range(ids.n_leaves)).tolist()]
    width = ids.n_leaves * (ids.n_leaves - 1)
    seen: list[torch.Tensor] = []

    def step(tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        assert tokens.shape == (1, width, len(seen))
        assert parents.shape == (1, width)
        if seen:  # the codes follow the ancestry
            live = tokens[0, :, -1] >= 0
            followed = seen[-1][0][parents[0]]
            assert torch.equal(tokens[0, live, :-1], followed[live])
            assert (tokens[0, ~live] == -1).all()
        seen.append(tokens)
        rows = tokens[0, :1] if len(seen) == 1 else tokens[0]
        return torch.stack([logits_after(tuple(row)) for row in rows.tolist()]).unsqueeze(0)

    result = constrained_beam_search(
        step, ids, batch_size=1, beam_width=width, session_length=ITEMS
    )

    def score(session: tuple[int, ...]) -> float:
        codes = [code for leaf in session for code in sids[leaf]]
        return sum(
            float(logits_after(tuple(codes[:i])).double().log_softmax(-1)[code])
            for i, code in enumerate(codes)
        )

    sessions = itertools.permutations(range(ids.n_leaves), ITEMS)
    expected = sorted(sessions, key=score, reverse=True)
    assert [tuple(s) for s in result.items[0].tolist()] == expected
    np.testing.assert_allclose(result.scores[0].numpy(), [score(s) for s in expected], rtol=1e-5)
    assert result.sids[0, 0].tolist() == [list(sids[leaf]) for leaf in expected[0]]


def test_denied_items_never_come() -> None:
    ids = trie()
    deny = list(range(0, ids.n_leaves, 2))
    result = constrained_beam_search(
        lambda tokens, parents: torch.zeros(*tokens.shape[:2], SIZE),
        ids,
        batch_size=2,
        beam_width=20,
        deny=[deny, None],
    )
    found = [set(result.items[b, : int(result.valid[b]), 0].tolist()) for b in range(2)]
    assert found == [set(range(ids.n_leaves)) - set(deny), set(range(ids.n_leaves))]
