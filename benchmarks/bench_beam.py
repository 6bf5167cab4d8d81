"""The constrained beam step beside the ways that others take, and beside reading the logits once.

One call runs the L steps of an item; times are those of one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onerec import SidTrie
from onerec._native import core
from onerec.ops import BeamSearch, beam_step, legal_logits

# Levels, codes of a level; "wide" is the paper's.
SHAPES = {"wide": (3, 8192), "narrow": (4, 256)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BEAMS = 128


@functools.cache
def catalogue(shape: str, items: int) -> SidTrie:
    levels, codes = SHAPES[shape]
    rng = np.random.default_rng(0)
    return SidTrie.build(rng.integers(0, codes, (items, levels), dtype=np.int32), codes)


@functools.cache
def logits(shape: str, batch: int, beams: int, dtype: str) -> list[Tensor]:
    """For each step [B, M, K]; the first step's are [B, 1, K]."""
    levels, codes = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, 1 if level == 0 else beams, codes) for level in range(levels)]
    return [torch.randn(size, generator=generator).to(DTYPES[dtype]) for size in sizes]


Found = tuple[Tensor, Tensor]  # leaf ids [B, M] and scores [B, M], best first


class Ours:
    """The steps of one item; the start of the search is not timed."""

    def __init__(
        self, trie: SidTrie, steps: list[Tensor], scoring: str, threads: int, beams: int = BEAMS
    ) -> None:
        self.steps = steps
        self.filters: dict[str, Any] = {}
        self.search = BeamSearch(
            trie,
            batch_size=len(steps[0]),
            beam_width=beams,
            session_length=1,
            scoring=scoring,
            num_threads=threads,
        )

    def prepare(self) -> None:
        self.search.reset(**self.filters)

    def __call__(self) -> BeamSearch:
        for rows in self.steps:
            self.search.step(rows)
        return self.search


class Arrays:
    """Where the children of a node begin, and their codes, for the peers."""

    def __init__(self, trie: SidTrie) -> None:
        sids = trie.leaf_sids(np.arange(trie.n_leaves))
        self.codes = trie.codebook_size
        self.first: list[Tensor] = []
        self.token: list[Tensor] = []
        node = np.zeros(len(sids), dtype=np.int64)
        for level in range(trie.levels):
            changed = np.ones(len(sids), dtype=bool)
            changed[1:] = (node[1:] != node[:-1]) | (sids[1:, level] != sids[:-1, level])
            at = np.flatnonzero(changed)
            counts = np.bincount(node[at], minlength=node[-1] + 1)
            self.first.append(torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])))
            self.token.append(torch.from_numpy(sids[at, level].astype(np.int64)))
            node = np.cumsum(changed) - 1


arrays = functools.cache(Arrays)


def best(logp: Tensor, scores: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, parents and codes of the best continuations, [B, M] each."""
    total = (scores.unsqueeze(-1) + logp).flatten(1)
    top = total.topk(min(beams, total.shape[1]))
    return top.values, top.indices // logp.shape[-1], top.indices % logp.shape[-1]


def dense_mask(trie: SidTrie, steps: list[Tensor], beams: int = BEAMS) -> Callable[[], Found]:
    """log_softmax, a mask of the whole vocabulary scattered from the children, one top-k."""
    table = arrays(trie)

    def run() -> Found:
        batch = len(steps[0])
        nodes = torch.zeros(batch, 1, dtype=torch.int64)
        scores = torch.zeros(batch, 1)
        for level, rows in enumerate(steps):
            first, last = table.first[level][nodes], table.first[level][nodes + 1]
            counts = (last - first).flatten()
            row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
            within = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
            edges = first.flatten()[row] + within
            mask = torch.full((counts.numel(), table.codes), float("-inf"))
            mask[row, table.token[level][edges]] = 0.0
            logp = rows.float().log_softmax(-1) + mask.view(*nodes.shape, -1)
            scores, parents, codes = best(logp, scores, beams)
            # The child's id is its edge: its place among the parent's children.
            begin, end = first.gather(1, parents), last.gather(1, parents)
            token = table.token[level]
            nodes = torch.stack(
                [
                    b + torch.searchsorted(token[b:e], c)
                    for b, e, c in zip(
                        begin.flatten().tolist(),
                        end.flatten().tolist(),
                        codes.flatten(),
                        strict=True,
                    )
                ]
            ).view_as(codes)
        return nodes, scores

    return run


def dictionaries(trie: SidTrie) -> dict[int, Any]:
    root: dict[int, Any] = {}
    for leaf, sid in enumerate(trie.leaf_sids(np.arange(trie.n_leaves)).tolist()):
        node = root
        for code in sid[:-1]:
            node = node.setdefault(code, {})
        node[sid[-1]] = leaf
    return root


nested = functools.cache(dictionaries)


def dictionary(trie: SidTrie, steps: list[Tensor], beams: int = BEAMS) -> Callable[[], Found]:
    """`transformers`' PrefixConstrainedLogitsProcessor over nested dictionaries, one top-k."""
    from transformers import PrefixConstrainedLogitsProcessor

    root = nested(trie)

    def walk(codes: list[int]) -> Any:
        node: Any = root
        for code in codes:
            node = node[code]
        return node

    def run() -> Found:
        batch = len(steps[0])
        written = torch.empty(batch, 1, 0, dtype=torch.int64)
        scores = torch.zeros(batch, 1)
        for rows in steps:
            width = rows.shape[1]
            allow = PrefixConstrainedLogitsProcessor(
                lambda _, codes: list(walk(codes.tolist())), num_beams=width
            )
            logp = allow(written.flatten(0, 1), rows.flatten(0, 1).float().log_softmax(-1))
            scores, parents, codes = best(logp.view(*rows.shape), scores, beams)
            kept = written.gather(1, parents.unsqueeze(-1).expand(-1, -1, written.shape[-1]))
            written = torch.cat([kept, codes.unsqueeze(-1)], dim=-1)
        leaves = [walk(codes) for codes in written.flatten(0, 1).tolist()]
        return torch.tensor(leaves).view(batch, -1), scores

    return run


def read_once(steps: list[Tensor]) -> Callable[[], None]:
    """The floor: every logit is read, nothing else is done."""
    words = [rows.view(torch.int32).flatten() for rows in steps]
    out = torch.empty((), dtype=torch.int32)

    def run() -> None:
        for row in words:
            torch.amax(row, 0, out=out)

    return run


def same(found: BeamSearch | Found | None, expected: Found) -> None:
    """The same items but for those whose scores only rounding tells apart."""
    if found is None:  # the floor
        return
    if isinstance(found, BeamSearch):
        result = found.result()
        found = result.items[..., 0], result.scores
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=2e-4)
    for mine, theirs in zip(found[0].tolist(), expected[0].tolist(), strict=True):
        assert len(set(mine) & set(theirs)) >= len(mine) - 2


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_step(compare: Any, shape: str, batch: int, threads: int) -> None:
    """Full softmax, float32, a million items: the step that everybody takes.

    On several threads nothing of torch is timed in between: its workers poll for a while after an
    operation, on the cores that ours would use.
    """
    trie, steps = catalogue(shape, 1_000_000), logits(shape, batch, BEAMS, "fp32")
    floor = {"logits read once": read_once(steps)} if threads == 1 else {}
    compare(
        {"onerec": Ours(trie, steps, "full_softmax", threads), **floor},
        check=same,
        expected=dense_mask(trie, steps)(),
        steps=len(steps),
        facts={"items": trie.n_leaves, "beams": BEAMS, "codes": trie.codebook_size},
        seconds=1.5,
    )


@pytest.mark.parametrize("threads", [1], ids=["1thread"], indirect=True)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_peers(compare: Any, shape: str, batch: int, threads: int) -> None:
    """The same step, the ways of others: a mask of the vocabulary, and dictionaries in Python.

    The dictionaries' time is proportional to the batch, and too long to be taken at the larger.
    """
    trie, steps = catalogue(shape, 1_000_000), logits(shape, batch, BEAMS, "fp32")
    peers: dict[str, Any] = {"dense mask": dense_mask(trie, steps)}
    if batch == 1:
        peers["dictionary (transformers)"] = dictionary(trie, steps)
    compare(
        {"onerec": Ours(trie, steps, "full_softmax", threads), **peers},
        check=same,
        expected=dense_mask(trie, steps)(),
        steps=len(steps),
        seconds=1.0,
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_half(compare: Any, shape: str, batch: int, dtype: str) -> None:
    """Held against the same numbers in float32: with so few digits, ties are many."""
    trie, steps = catalogue(shape, 1_000_000), logits(shape, batch, BEAMS, dtype)
    widened = Ours(trie, [rows.float() for rows in steps], "full_softmax", 1)().result()
    compare(
        {
            "onerec": Ours(trie, steps, "full_softmax", 1),
            "logits read once": read_once(steps),
        },
        check=same,
        expected=(widened.items[..., 0], widened.scores),
        steps=len(steps),
        seconds=0.4,
    )


class OnIsa(Ours):
    """The same on one of the processor's instruction sets."""

    def __init__(self, isa: str, trie: SidTrie, steps: list[Tensor]) -> None:
        super().__init__(trie, steps, "full_softmax", 1)
        self.isa = isa

    def prepare(self) -> None:
        core().set_isa(self.isa)
        super().prepare()


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """The widest first; bfloat16 products are none of the beam step's."""
    before = core().isa()
    yield [name for name in reversed(core().isas()) if name != "avx512_bf16"]
    core().set_isa(before)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_isas(compare: Any, shape: str, batch: int, isas: list[str]) -> None:
    """One thread on each instruction set of this processor; the same results, bit for bit."""
    trie, steps = catalogue(shape, 1_000_000), logits(shape, batch, BEAMS, "fp32")
    expected = Ours(trie, steps, "full_softmax", 1)
    expected.prepare()
    found = expected().result()

    def equal(search: BeamSearch, wanted: Found) -> None:
        torch.testing.assert_close(
            (search.result().items[..., 0], search.result().scores), wanted, rtol=0, atol=0
        )

    compare(
        {isa: OnIsa(isa, trie, steps) for isa in isas},
        check=equal,
        expected=(found.items[..., 0], found.scores),
        steps=len(steps),
        seconds=1.0,
    )


def constrained(trie: SidTrie, steps: list[Tensor], scoring: str) -> Found:
    """The search's other way, from the logits of the legal codes alone."""
    search = BeamSearch(
        trie, batch_size=len(steps[0]), beam_width=BEAMS, session_length=1, scoring=scoring
    )
    for rows in steps:
        legal = search.legal()
        values = rows[legal.rows // BEAMS, legal.rows % BEAMS, legal.codes.long()]
        state = search.step_legal(values.float().contiguous())
    return search.result().items[..., 0], state.scores


@pytest.mark.parametrize("scoring", ["legal_softmax", "raw"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_legal(compare: Any, shape: str, batch: int, scoring: str) -> None:
    trie, steps = catalogue(shape, 1_000_000), logits(shape, batch, BEAMS, "fp32")
    compare(
        {"onerec": Ours(trie, steps, scoring, 1)},
        check=same,
        expected=constrained(trie, steps, scoring),
        steps=len(steps),
        seconds=0.4,
    )


@pytest.mark.parametrize("level", [1, 2])
def test_sparse_head(compare: Any, level: int) -> None:
    """Output layer and step, width 512: gathered products for legal codes beside the dense one."""
    trie, beams = catalogue("wide", 1_000_000), BEAMS
    torch.manual_seed(0)
    head, hidden = torch.randn(trie.codebook_size, 512) / 512**0.5, torch.randn(1, beams, 512)
    rows = [hidden[:, :1] if at == 0 else hidden for at in range(level + 1)]
    search = BeamSearch(
        trie, batch_size=1, beam_width=beams, session_length=1, scoring="legal_softmax"
    )

    class Way:
        def __init__(self, backend: str) -> None:
            self.backend = backend

        def prepare(self) -> None:
            search.reset()
            for states in rows[:level]:
                search.step(states @ head.T)

        def __call__(self) -> tuple[Tensor, Tensor]:
            if self.backend == "dense":
                state = search.step(rows[level] @ head.T)
            else:
                state = search.step_legal(legal_logits(rows[level], head, search.legal()))
            return state.tokens, state.scores

    Way("dense").prepare()
    share = len(search.legal().codes) / (beams * trie.codebook_size)

    def near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)

    compare(
        {"legal codes": Way("sparse"), "all codes": Way("dense")},
        check=near,
        facts={"share of legal codes": f"{share:.2%}"},
        seconds=0.5,
    )


@pytest.mark.parametrize("filters", ["deny", "tags", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_filters(compare: Any, shape: str, filters: str) -> None:
    """A thousand denied items, tags that half of the items have, and both, beside neither."""
    plain, steps = catalogue(shape, 1_000_000), logits(shape, 1, BEAMS, "fp32")
    rng = np.random.default_rng(0)
    trie = plain.with_tags(rng.integers(1, 3, plain.n_leaves))
    deny = np.sort(rng.choice(trie.n_leaves, 1000, replace=False)) if filters != "tags" else None
    allow = 1 if filters != "deny" else None
    filtered, free = (Ours(trie, steps, "full_softmax", 1) for _ in range(2))
    filtered.filters = {"deny": [deny], "allow_tags": [allow]}

    def allowed(found: BeamSearch, _: object) -> None:
        items = found.result().items[0, :, 0].numpy()
        assert (items >= 0).all()
        if found is filtered.search:
            assert deny is None or not np.isin(items, deny).any()
            assert allow is None or (trie.tags[items] & np.uint64(allow)).all()

    compare(
        {f"onerec, {filters}": filtered, "onerec, no filter": free},
        check=allowed,
        expected=(),
        steps=len(steps),
        calls=5,
        seconds=0.5,
    )


class Captured:
    """The steps of one item in a CUDA graph."""

    def __init__(self, trie: SidTrie, steps: list[Tensor], scoring: str) -> None:
        self.trie = trie.to("cuda")
        self.steps = [rows.cuda() for rows in steps]
        self.scoring = scoring
        self.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.found = self.run()

    def run(self) -> Found:
        batch = len(self.steps[0])
        nodes = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
        scores = torch.zeros(batch, 1, dtype=torch.float64, device="cuda")
        for level, rows in enumerate(self.steps):
            _, _, nodes, scores, _ = beam_step(
                rows,
                scores,
                nodes,
                self.trie,
                level=level,
                beam_width=BEAMS,
                scoring=self.scoring,
            )
        return nodes, scores

    def __call__(self) -> Found:
        self.graph.replay()
        return self.found


@pytest.mark.gpu
@pytest.mark.parametrize("scoring", ["full_softmax", "legal_softmax"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_on_gpu(compare: Any, shape: str, batch: int, dtype: str, scoring: str) -> None:
    trie, steps = catalogue(shape, 1_000_000), logits(shape, batch, BEAMS, dtype)
    on_device = [rows.cuda() for rows in steps]
    out = torch.empty((), dtype=DTYPES[dtype], device="cuda")

    def read() -> None:
        for rows in on_device:
            torch.amax(rows, (0, 1, 2), out=out)

    search = Ours(trie, steps, scoring, 1)()
    result = search.result()

    def near(found: Found | None, _: object) -> None:
        if found is not None:
            same((found[0].cpu(), found[1].float().cpu()), (result.items[..., 0], result.scores))

    compare(
        {"onerec, in a graph": Captured(trie, steps, scoring), "logits read once": read},
        check=near,
        expected=(),
        work={"GB/s": sum(rows.nbytes for rows in steps) / len(steps) / 1e9},
        steps=len(steps),
        facts={"items": trie.n_leaves, "beams": BEAMS, "codes": trie.codebook_size},
        calls=10,
        seconds=0.5,
        device="cuda",
    )


def legal_and_ordered(found: BeamSearch | None, trie: SidTrie) -> None:
    """Whole, distinct items of the catalogue, best first, with the scores of their logits."""
    if found is None:  # the floor
        return
    result = found.result()
    assert (result.valid > 0).all()
    for items, scores, valid in zip(
        result.items[..., 0].tolist(), result.scores, result.valid.tolist(), strict=True
    ):
        assert len(set(items[:valid])) == valid
        assert scores[:valid].equal(scores[:valid].sort(descending=True).values)
        np.testing.assert_array_equal(trie.lookup(trie.leaf_sids(items[:valid])), items[:valid])


# One number at a time around a step of B = 4, M = 128, K = 8192, a million items.
SCALING = [
    *[("items", n, {"items": n}) for n in (10_000, 100_000, 1_000_000, 10_000_000)],
    *[("beams", m, {"beams": m}) for m in (16, 64, 128, 256, 512)],
    *[("batch", b, {"batch": b}) for b in (1, 2, 4, 8, 16)],
    *[("codes", k, {"codes": k}) for k in (256, 1024, 4096, 8192, 16384)],
]


@pytest.mark.parametrize(
    ("axis", "value", "change"), SCALING, ids=[f"{axis}-{value}" for axis, value, _ in SCALING]
)
def test_scaling(compare: Any, axis: str, value: int, change: dict[str, int]) -> None:
    setting = {"items": 1_000_000, "beams": 128, "batch": 4, "codes": 8192, **change}
    codes = setting["codes"]
    rng = np.random.default_rng(0)
    trie = SidTrie.build(rng.integers(0, codes, (setting["items"], 3), dtype=np.int32), codes)
    steps = [
        torch.randn(setting["batch"], 1 if level == 0 else setting["beams"], codes)
        for level in range(3)
    ]
    compare(
        {
            "full softmax": Ours(trie, steps, "full_softmax", 1, setting["beams"]),
            "legal softmax": Ours(trie, steps, "legal_softmax", 1, setting["beams"]),
            "logits read once": read_once(steps),
        },
        check=legal_and_ordered,
        expected=trie,
        steps=3,
        facts={"axis": axis, "value": value},
        seconds=0.2,
    )
