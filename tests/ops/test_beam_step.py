"""The functional step against its reference, and as an operation of torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onerec import SidTrie
from onerec._native import core
from onerec.ops import BeamStep, beam_step

SCORINGS = ("full_softmax", "legal_softmax", "raw")


def random_trie(n: int, levels: int, codebook_size: int) -> SidTrie:
    rng = np.random.default_rng(0)
    return SidTrie.build(rng.integers(0, codebook_size, (n, levels)), codebook_size)


def assert_same(a: BeamStep, b: BeamStep) -> None:
    for name in ("parents", "tokens", "nodes", "valid"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("rows", [0, 1, 31, 33])
@pytest.mark.parametrize("codebook_size", [1, 31, 1000])
def test_steps_equal_the_reference(scoring: str, rows: int, codebook_size: int) -> None:
    trie = random_trie(2000, 3, codebook_size)
    nodes = torch.zeros(2, rows, dtype=torch.int64)
    scores = -torch.rand(2, rows, dtype=torch.float64)
    nodes[1, rows // 2 :] = -1
    for level in range(3):
        logits = torch.randn(2, nodes.shape[1], codebook_size)
        settings = {"level": level, "beam_width": 20, "scoring": scoring, "temperature": 0.7}
        native = beam_step(logits, scores, nodes, trie, **settings)  # type: ignore[arg-type]
        plain = beam_step(logits, scores, nodes, trie, backend="reference", **settings)  # type: ignore[arg-type]
        assert_same(native, plain)
        scores, nodes = native.scores, native.nodes
    live = nodes >= 0
    sids = trie.leaf_sids(nodes[live])
    assert (trie.lookup(sids) == nodes[live].numpy()).all()


def test_norm_is_exact_to_float_precision() -> None:
    trie = random_trie(100, 1, 8192)
    for scale in (0.0, 1.0, 8.0, 300.0):
        logits = torch.randn(1, 4, 8192) * scale
        out = beam_step(
            logits,
            torch.zeros(1, 4, dtype=torch.float64),
            torch.zeros(1, 4, dtype=torch.int64),
            trie,
            level=0,
            beam_width=50,
        )
        exact = logits.double().log_softmax(-1)[0, out.parents[0], out.tokens[0]]
        torch.testing.assert_close(out.scores[0], exact, rtol=0, atol=1e-6)


def test_dead_and_infinite_beams_are_not_read() -> None:
    trie = random_trie(50, 1, 8)
    logits = torch.full((1, 3, 8), math.nan)
    logits[0, 1] = 0.0
    scores = torch.tensor([[0.0, -1.0, -math.inf]], dtype=torch.float64)
    out = beam_step(logits, scores, torch.tensor([[-1, 0, 0]]), trie, level=0, beam_width=4)
    assert out.parents.tolist() == [[1, 1, 1, 1]]


def test_opcheck() -> None:
    trie = random_trie(50, 3, 8)
    arguments = (
        torch.randn(2, 4, 8),
        torch.zeros(2, 4, dtype=torch.float64),
        torch.zeros(2, 4, dtype=torch.int64),
        trie.data,
        0,
        5,
        0,
        1.0,
        1,
    )
    torch.library.opcheck(torch.ops.onerec.beam_step.default, arguments)


def test_bytes_that_are_no_trie_are_refused() -> None:
    trie = random_trie(50, 3, 8)
    scores, nodes = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64)
    for data in (trie.data[:100], trie.data[:-64], torch.zeros(300, dtype=torch.uint8)):
        with pytest.raises(core().TrieFormatError, match="not a valid trie"):
            torch.ops.onerec.beam_step(
                torch.zeros(1, 1, 8), scores, nodes, data.clone(), 0, 1, 0, 1.0, 1
            )


def test_bad_arguments() -> None:
    trie = random_trie(50, 3, 8)
    logits = torch.zeros(1, 2, 8)
    scores, nodes = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="level: wanted 0 to 2, got 3"):
        beam_step(logits, scores, nodes, trie, level=3, beam_width=1)
    with pytest.raises(ValueError, match="beam_width: wanted 1 or more, got 0"):
        beam_step(logits, scores, nodes, trie, level=0, beam_width=0)
    with pytest.raises(ValueError, match="nodes: wanted -1 or a node of the level, got 1"):
        beam_step(logits, scores, nodes + 1, trie, level=0, beam_width=1)
    with pytest.raises(TypeError, match=r"scores: wanted torch\.float64, got torch\.float32"):
        beam_step(logits, scores.float(), nodes, trie, level=0, beam_width=1)
    with pytest.raises(ValueError, match=r"nodes: wanted shape \[1, 2\], got \[1, 1\]"):
        beam_step(logits, scores, nodes[:, :1], trie, level=0, beam_width=1)
    with pytest.raises(ValueError, match=r"logits: wanted shape \[1, 2, 8\], got \[1, 2, 9\]"):
        beam_step(torch.zeros(1, 2, 9), scores, nodes, trie, level=0, beam_width=1)
    with pytest.raises(ValueError, match="backend: wanted 'native' or 'reference', got 'x'"):
        beam_step(logits, scores, nodes, trie, level=0, beam_width=1, backend="x")
