"""The functional step against its reference, and as an operation of torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onerec import LiveTrie, SidTrie
from onerec._native import core
from onerec.ops import BeamSearch, BeamStep, beam_step
from onerec.trie import EVERY_TAG

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCORINGS = ("full_softmax", "legal_softmax", "raw")


def random_trie(n: int, levels: int, codebook_size: int) -> SidTrie:
    rng = np.random.default_rng(0)
    return SidTrie.build(rng.integers(0, codebook_size, (n, levels)), codebook_size)


def step_on(
    device: str,
    logits: torch.Tensor,
    scores: torch.Tensor,
    nodes: torch.Tensor,
    trie: SidTrie,
    **settings: object,
) -> BeamStep:
    """`beam_step` on a device, its result on the CPU."""
    where = trie if device == "cpu" else trie.to(device)
    moved = [tensor.to(device) for tensor in (logits, scores, nodes)]
    return BeamStep(*(tensor.cpu() for tensor in beam_step(*moved, where, **settings)))  # type: ignore[arg-type]


def assert_same(a: BeamStep, b: BeamStep) -> None:
    for name in ("parents", "tokens", "nodes", "valid"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=2e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("rows", [0, 1, 31, 33])
@pytest.mark.parametrize("codebook_size", [1, 31, 3000])
def test_steps_equal_the_reference(
    scoring: str, rows: int, codebook_size: int, device: str
) -> None:
    trie = random_trie(2000, 3, codebook_size)
    nodes = torch.zeros(2, rows, dtype=torch.int64)
    scores = -torch.rand(2, rows, dtype=torch.float64)
    nodes[1, rows // 2 :] = -1
    for level in range(3):
        logits = torch.randn(2, nodes.shape[1], codebook_size)
        settings = {"level": level, "beam_width": 20, "scoring": scoring, "temperature": 0.7}
        native = step_on(device, logits, scores, nodes, trie, **settings)
        plain = beam_step(logits, scores, nodes, trie, backend="reference", **settings)  # type: ignore[arg-type]
        assert_same(native, plain)
        scores, nodes = native.scores, native.nodes
    live = nodes >= 0
    sids = trie.leaf_sids(nodes[live])
    assert (trie.lookup(sids) == nodes[live].numpy()).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(6))
def test_filters_equal_the_reference(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    size, batch = 6, 3
    plain = random_trie(80, 3, size).with_tags(
        rng.integers(0, 4, random_trie(80, 3, size).n_leaves)
    )
    live = LiveTrie(plain)
    live.remove(plain.leaf_sids(rng.choice(plain.n_leaves, 15 * (seed % 2), replace=False)))
    trie = live.pin().trie
    deny = [rng.choice(trie.n_leaves, 20, replace=False), None, [0]]
    settings = {
        "beam_width": 9,
        "widths": [9, 4, 0],
        "deny": deny if seed < 4 else None,
        "allow_tags": [1, 2, None] if seed > 1 else None,
    }
    nodes = torch.zeros(batch, 1, dtype=torch.int64)
    scores = torch.zeros(batch, 1, dtype=torch.float64)
    for level in range(3):
        logits = torch.randn(batch, nodes.shape[1], size)
        native = step_on(device, logits, scores, nodes, trie, level=level, **settings)
        plain_step = beam_step(
            logits,
            scores,
            nodes,
            trie,
            level=level,
            backend="reference",
            **settings,  # type: ignore[arg-type]
        )
        assert_same(native, plain_step)
        scores, nodes = native.scores, native.nodes
    assert native.valid[2] == 0
    reached = set(nodes[nodes >= 0].tolist())
    assert reached
    assert not reached & set(trie.removed.tolist())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beam_width", [1, 600, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_many_candidates_and_ties(dtype: torch.dtype, beam_width: int, device: str) -> None:
    """More than are sorted at once, in whole numbers, so that most scores are many times there."""
    trie = SidTrie.build(torch.arange(700).unsqueeze(1), 700)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (2, 37, 701), generator=generator).to(dtype)[..., 1:]
    scores = torch.randint(-2, 3, (2, 37), generator=generator).double()
    nodes = torch.zeros(2, 37, dtype=torch.int64)
    settings = {"level": 0, "beam_width": beam_width, "scoring": "raw"}
    native = step_on(device, logits, scores, nodes, trie, **settings)
    assert_same(
        native,
        beam_step(logits, scores, nodes, trie, backend="reference", **settings),  # type: ignore[arg-type]
    )


@pytest.mark.gpu
def test_a_captured_step_follows_a_swap() -> None:
    first, second = random_trie(500, 1, 64), SidTrie.build([[3], [5]], 64)
    on_device = first.to("cuda")
    logits = torch.randn(2, 4, 64, device="cuda")
    scores = torch.zeros(2, 4, dtype=torch.float64, device="cuda")
    nodes = torch.zeros(2, 4, dtype=torch.int64, device="cuda")
    settings = {"level": 0, "beam_width": 8}
    beam_step(logits, scores, nodes, on_device, **settings)  # type: ignore[arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = beam_step(logits, scores, nodes, on_device, **settings)  # type: ignore[arg-type]
    for trie in (first, second):
        on_device.swap(trie)
        graph.replay()
        torch.cuda.synchronize()
        plain = beam_step(logits.cpu(), scores.cpu(), nodes.cpu(), trie, **settings)  # type: ignore[arg-type]
        assert_same(BeamStep(*(tensor.cpu() for tensor in out)), plain)


@pytest.mark.gpu
def test_a_request_does_not_depend_on_its_neighbours_on_cuda() -> None:
    trie = random_trie(20_000, 2, 1000).to("cuda")
    logits = torch.randn(5, 33, 1000, device="cuda")
    scores = -torch.rand(5, 33, dtype=torch.float64, device="cuda")
    nodes = torch.arange(33, device="cuda").expand(5, 33)
    settings = {"level": 1, "beam_width": 33}
    together = beam_step(logits, scores, nodes, trie, **settings)  # type: ignore[arg-type]
    for b in range(5):
        part = slice(b, b + 1)
        alone = beam_step(logits[part], scores[part], nodes[part], trie, **settings)  # type: ignore[arg-type]
        assert all(torch.equal(x[part], y) for x, y in zip(together, alone, strict=True))


def test_norm_is_exact_to_float_precision() -> None:
    trie = random_trie(100, 1, 8192)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 8.0, 300.0) * 8:
        logits = torch.randn(1, 4, 8192, generator=generator) * scale
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
    extra = (torch.tensor([3, 5]), torch.tensor([1]), torch.tensor([0, 1, 1]))
    torch.library.opcheck(torch.ops.onerec.beam_step.default, (*arguments, *extra))


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
    with pytest.raises(ValueError, match=r"widths: wanted 1 numbers 0 to 1, got \[2\]"):
        beam_step(logits, scores, nodes, trie, level=0, beam_width=1, widths=[2])
    with pytest.raises(ValueError, match="backend: wanted 'native' or 'reference', got 'x'"):
        beam_step(logits, scores, nodes, trie, level=0, beam_width=1, backend="x")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("seed", range(4))
def test_steps_with_paths_equal_a_session(seed: int, scoring: str, device: str) -> None:
    """The operation with the items of the beams so far, against the search that keeps them."""
    rng = np.random.default_rng(seed)
    size, levels, items, batch, width = 4, int(rng.integers(1, 4)), 3, 3, int(rng.choice([5, 40]))
    live = LiveTrie(random_trie(int(rng.integers(4, 40)), levels, size))
    live.remove(live.pin().trie.leaf_sids([0, 2]))
    trie = live.pin().trie
    trie = trie.with_tags(rng.integers(0, 4, trie.n_leaves))
    allow = np.array([1, EVERY_TAG, 2] if seed % 2 else [EVERY_TAG] * 3, dtype=np.uint64)
    leaves = [np.sort(rng.choice(trie.n_leaves, n, replace=False)) for n in (2, 0, trie.n_leaves)]
    search = BeamSearch(
        trie,
        batch_size=batch,
        beam_width=width,
        session_length=items,
        scoring=scoring,
        deny=leaves,
        allow_tags=[None if tags == EVERY_TAG else int(tags) for tags in allow],
        widths=[width, 4, width],
    )
    lists = [
        [
            trie.native.dead_edges(level, int(tags), d.ctypes.data, len(d))
            for d, tags in zip(leaves, allow, strict=True)
        ]
        for level in range(levels)
    ]
    dead = torch.from_numpy(np.concatenate([edges for level in lists for edges in level]))
    counts = np.array([[len(edges) for edges in level] for level in lists])
    ends = counts.cumsum().reshape(levels, batch)
    offsets = torch.from_numpy(np.concatenate([ends[:, :1] - counts[:, :1], ends], axis=1))
    dead, offsets = dead.to(device), offsets.to(device)
    on_device = trie.to(device)
    masks = torch.from_numpy(allow.view(np.int64)).to(device)
    widths = torch.tensor([width, 4, width], device=device)
    nodes = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    scores = torch.zeros(batch, 1, dtype=torch.float64, device=device)
    past = torch.zeros(batch, 1, items * levels, dtype=torch.int64, device=device)
    while not search.done:
        level, item, step = search.level, search.item, search.item * search.trie.levels
        logits = torch.from_numpy(rng.normal(size=(batch, past.shape[1], size)) * 3).float()
        logits[torch.rand(logits.shape) < 0.1] = float("-inf")
        state = search.step(logits)
        parents, tokens, nodes, scores, valid = torch.ops.onerec.beam_step(
            logits.to(device),
            scores,
            nodes,
            on_device.data if device == "cpu" else on_device.address,
            level,
            width,
            SCORINGS.index(scoring),
            1.0,
            1,
            widths,
            dead,
            offsets[level],
            on_device.tags[level],
            masks,
            past,
            item,
            offsets[-1],
            on_device.tags[-1],
        )
        past = past.gather(1, parents.unsqueeze(-1).expand(-1, -1, past.shape[2]))
        past[..., step + level] = nodes
        if level + 1 == levels:
            nodes = nodes.clamp(max=0)
        assert torch.equal(parents.cpu(), state.parents)
        assert torch.equal(tokens.cpu(), state.tokens)
        assert torch.equal(valid.cpu(), state.valid)
        torch.testing.assert_close(scores.float().cpu(), state.scores, rtol=1e-5, atol=1e-5)
    found = torch.where(
        scores.cpu()[..., None] > float("-inf"), past.cpu()[..., levels - 1 :: levels], -1
    )
    assert torch.equal(found, search.result().items)


def test_paths_with_allow_want_the_tags_of_the_leaves() -> None:
    trie = random_trie(9, 2, 4).with_tags([1] * random_trie(9, 2, 4).n_leaves)
    one, on_device = torch.ones(1, 1, dtype=torch.int64), trie.to("cpu")
    with pytest.raises(ValueError, match="paths: with allow, wanted the tags of the leaves too"):
        torch.ops.onerec.beam_step(
            torch.zeros(1, 1, 4),
            torch.zeros(1, 1, dtype=torch.float64),
            0 * one,
            on_device.data,
            0,
            1,
            0,
            1.0,
            1,
            tags=on_device.tags[0],
            allow=one[0],
            paths=torch.zeros(1, 1, 4, dtype=torch.int64),
            items=1,
        )
