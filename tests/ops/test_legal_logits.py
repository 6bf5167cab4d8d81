"""Gathered products against the dense one, and the search that uses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from onerec import SidTrie
from onerec._native import core
from onerec.ops import BeamSearch, LegalCodes, legal_logits


def random_legal(beams: int, codes: int, seed: int) -> LegalCodes:
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random((2, beams, codes)) < 0.2)
    mask[1, beams // 2 :] = False
    counts = mask.sum(-1)
    rows, found = mask.flatten(0, 1).nonzero(as_tuple=True)
    return LegalCodes(rows, found.int(), counts)


@pytest.mark.parametrize("size", [1, 15, 16, 31, 33, 100])
@pytest.mark.parametrize("codes", [1, 50])
def test_equals_the_dense_product(size: int, codes: int) -> None:
    legal = random_legal(9, codes, size)
    hidden, head = torch.randn(2, 12, size + 3)[:, ::1, :size], torch.randn(codes, size)
    dense = legal_logits(hidden, head, legal, backend="reference")
    before, made = core().isa(), []
    for isa in core().isas():
        core().set_isa(isa)
        made += [legal_logits(hidden, head, legal, num_threads=n, backend="native") for n in (1, 2)]
    core().set_isa(before)
    assert all(torch.equal(made[0], other) for other in made[1:])
    torch.testing.assert_close(made[0], dense)
    torch.testing.assert_close(legal_logits(hidden, head, legal), dense)


@pytest.mark.parametrize("scoring", ["legal_softmax", "raw"])
def test_a_search_finds_the_same_items(scoring: str) -> None:
    rng = np.random.default_rng(0)
    trie = SidTrie.build(rng.integers(0, 40, (500, 3)), 40)
    head = torch.randn(40, 16)
    dense, sparse = (
        BeamSearch(trie, batch_size=2, beam_width=7, session_length=2, scoring=scoring)
        for _ in range(2)
    )
    while not dense.done:
        hidden = torch.randn(2, dense.rows, 16)
        a = dense.step(hidden @ head.T)
        b = sparse.step_legal(legal_logits(hidden, head, sparse.legal(), backend="native"))
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(a.scores, b.scores)
    assert torch.equal(dense.result().items, sparse.result().items)


def test_bad_arguments() -> None:
    legal = random_legal(4, 5, 0)
    hidden, head = torch.zeros(2, 4, 3), torch.zeros(5, 3)
    with pytest.raises(TypeError, match=r"head: wanted float32, got torch\.float64"):
        legal_logits(hidden, head.double(), legal)
    with pytest.raises(ValueError, match=r"hidden: wanted shape \[2, 4, 3\], got \[2, 4, 2\]"):
        legal_logits(hidden[..., :2], head, legal)
    with pytest.raises(ValueError, match="hidden: wanted a row for each live beam, got 1 rows"):
        legal_logits(hidden[:, :1], head, legal)
    with pytest.raises(ValueError, match=r"head: wanted more than \d rows, got 1"):
        legal_logits(hidden, head[:1], legal)
    with pytest.raises(ValueError, match="head: wanted a last stride of 1, got 5"):
        legal_logits(torch.zeros(2, 4, 5), torch.zeros(5, 5).T, legal)
    with pytest.raises(ValueError, match="backend: wanted 'auto', 'native' or 'reference'"):
        legal_logits(hidden, head, legal, backend="x")
