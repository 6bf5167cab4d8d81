"""Session search against a search that lists every legal continuation in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec import LiveTrie, SidTrie
from onerec._native import core
from onerec.ops import BeamSearch, BeamState

ISAS = core().isas()
SCORINGS = ("full_softmax", "legal_softmax", "raw")


def random_trie(n: int, levels: int, codebook_size: int, seed: int = 0) -> SidTrie:
    rng = np.random.default_rng(seed)
    return SidTrie.build(rng.integers(0, codebook_size, (n, levels)), codebook_size)


class BruteForce:
    """Beams as tuples of codes; the set of sessions is asked what may follow. Shares no code."""

    def __init__(
        self, trie: SidTrie, width: int, scoring: str, temperature: float, deny: set[int]
    ) -> None:
        self.sids = [tuple(sid) for sid in trie.leaf_sids(range(trie.n_leaves)).tolist()]
        self.levels, self.width = trie.levels, width
        self.scoring, self.temperature, self.deny = scoring, temperature, deny
        self.beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] if width > 0 else []

    def items(self, codes: tuple[int, ...]) -> list[int]:
        whole = range(0, len(codes) - self.levels + 1, self.levels)
        return [self.sids.index(codes[i : i + self.levels]) for i in whole]

    def legal(self, codes: tuple[int, ...]) -> list[int]:
        start = len(codes) - len(codes) % self.levels
        prefix = codes[start:]
        banned = self.deny | set(self.items(codes[:start]))
        depth = len(prefix)
        return sorted(
            {
                sid[depth]
                for leaf, sid in enumerate(self.sids)
                if leaf not in banned and sid[:depth] == prefix
            }
        )

    def step(self, logits: np.ndarray) -> list[tuple[float, int, int]]:
        found = []
        for parent, (score, codes) in enumerate(self.beams):
            row = [
                -math.inf if math.isnan(x) else float(x) / self.temperature for x in logits[parent]
            ]
            legal = self.legal(codes)
            among = {
                "full_softmax": row,
                "legal_softmax": [row[c] for c in legal],
                "raw": [],
            }[self.scoring]
            finite = [x for x in among if x > -math.inf]
            top = max(finite, default=0.0)
            norm = top + math.log(math.fsum(math.exp(x - top) for x in finite)) if finite else 0.0
            found += [(score + (row[c] - norm), parent, c) for c in legal if row[c] > -math.inf]
        found.sort(key=lambda f: (-f[0], f[1], f[2]))
        found = found[: self.width]
        self.beams = [(score, (*self.beams[parent][1], c)) for score, parent, c in found]
        return found


def check_step(state: BeamState, b: int, expected: list[tuple[float, int, int]]) -> None:
    count = len(expected)
    assert int(state.valid[b]) == count
    assert state.parents[b, :count].tolist() == [parent for _, parent, _ in expected]
    assert state.tokens[b, :count].tolist() == [token for _, _, token in expected]
    np.testing.assert_allclose(
        state.scores[b, :count].numpy(), [s for s, _, _ in expected], rtol=1e-5, atol=1e-5
    )
    assert (state.parents[b, count:] == 0).all()
    assert (state.tokens[b, count:] == -1).all()
    assert (state.scores[b, count:] == -math.inf).all()


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force_in_set_and_order(isa: str, scoring: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, levels = int(rng.choice([1, 3, 17, 40])), int(rng.integers(1, 5))
    trie = random_trie(int(rng.integers(1, 80)), levels, size, seed)
    batch, width, items = 3, int(rng.choice([1, 7, 33])), 2
    temperature = float(rng.choice([1.0, 0.3, 2.5]))
    deny = [
        np.sort(rng.choice(trie.n_leaves, int(rng.integers(0, trie.n_leaves + 1)), replace=False))
        for _ in range(batch)
    ]
    search = BeamSearch(
        trie,
        batch_size=batch,
        beam_width=width,
        session_length=items,
        scoring=scoring,
        temperature=temperature,
        deny=deny,
        num_threads=1,
    )
    oracles = [BruteForce(trie, width, scoring, temperature, set(d.tolist())) for d in deny]
    while not search.done:
        logits = rng.normal(size=(batch, width, size)).astype(np.float32) * 3
        logits[rng.random(logits.shape) < 0.1] = -np.inf
        logits[rng.random(logits.shape) < 0.1] = np.nan
        state = search.step(torch.from_numpy(logits))
        for b, oracle in enumerate(oracles):
            check_step(state, b, oracle.step(logits[b]))
    result = search.result()
    for b, oracle in enumerate(oracles):
        expected = [oracle.items(codes) for _, codes in oracle.beams]
        assert result.items[b, : len(expected)].tolist() == expected
        assert (result.items[b, len(expected) :] == -1).all()
        flat = result.items[b, : len(expected)].flatten()
        sids = result.sids[b, : len(expected)].flatten(0, 1)
        np.testing.assert_array_equal(sids.numpy(), trie.leaf_sids(flat))


def random_filters(rng: np.random.Generator, trie: SidTrie, batch: int) -> tuple[SidTrie, list]:
    """A trie with tags and removed leaves, and for each request (deny, allow, banned leaves)."""
    shift = int(rng.integers(0, 60))
    tags = rng.integers(0, 8, trie.n_leaves) << shift
    removed = rng.random(trie.n_leaves) < rng.choice([0.0, 0.2, 0.9])
    live = LiveTrie(trie.with_tags(tags))
    live.remove(trie.leaf_sids(np.flatnonzero(removed)))
    requests = []
    for _ in range(batch):
        deny = np.flatnonzero(rng.random(trie.n_leaves) < rng.choice([0.0, 0.3, 0.9]))
        allow = None if rng.random() < 0.3 else int(rng.integers(0, 8)) << shift
        allowed = (tags & allow) != 0 if allow is not None else np.ones(trie.n_leaves, bool)
        banned = set(deny.tolist()) | set(np.flatnonzero(removed | ~allowed).tolist())
        requests.append((deny, allow, banned))
    return live.pin().trie, requests


@pytest.mark.parametrize("scoring", ["full_softmax", "legal_softmax"])
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("way", ["native", "legal", "reference"])
def test_filters_widths_and_ramp_equal_brute_force(scoring: str, seed: int, way: str) -> None:
    if way == "legal" and scoring == "full_softmax":
        scoring = "raw"
    rng = np.random.default_rng(seed)
    size, levels, items = int(rng.choice([2, 5, 17])), int(rng.integers(1, 5)), 2
    plain = random_trie(int(rng.integers(1, 120)), levels, size, seed)
    batch, width = 4, int(rng.choice([3, 20]))
    trie, requests = random_filters(rng, plain, batch)
    widths = [width, 0, *rng.integers(1, width + 1, batch - 2).tolist()]
    ramp = rng.integers(1, width + 1, int(rng.integers(0, levels * items + 1))).tolist()
    search = BeamSearch(
        trie,
        batch_size=batch,
        beam_width=width,
        session_length=items,
        scoring=scoring,
        width_ramp=ramp,
        deny=[deny for deny, _, _ in requests],
        allow_tags=[allow for _, allow, _ in requests],
        widths=widths,
        backend="reference" if way == "reference" else "native",
    )
    oracles = [
        BruteForce(plain, most, scoring, 1.0, banned)
        for most, (_, _, banned) in zip(widths, requests, strict=True)
    ]
    for step in range(levels * items):
        logits = rng.normal(size=(batch, search.rows, size)).astype(np.float32)
        if way == "legal":
            legal = search.legal()
            expected = [[oracle.legal(codes) for _, codes in oracle.beams] for oracle in oracles]
            assert [len(codes) for beams in expected for codes in beams] == [
                n for b in range(batch) for n in legal.counts[b, : len(expected[b])].tolist()
            ]
            assert legal.codes.tolist() == [c for beams in expected for x in beams for c in x]
            rows = torch.from_numpy(logits)[legal.rows // width, legal.rows % width]
            values = rows[torch.arange(len(rows)), legal.codes.long()]
            # What a single legal code's logit is does not matter under legal softmax.
            if scoring == "legal_softmax":
                values[legal.counts.flatten()[legal.rows] == 1] = 0.0
            state = search.step_legal(values)
        else:
            state = search.step(torch.from_numpy(logits))
        for b, oracle in enumerate(oracles):
            oracle.width = min(widths[b], [*ramp, *[width] * 99][step])
            check_step(state, b, oracle.step(logits[b]))
    found = {b: set(search.result().items[b].flatten().tolist()) - {-1} for b in range(batch)}
    assert all(not found[b] & requests[b][2] for b in range(batch))


def test_a_search_goes_on_with_another_epoch() -> None:
    sids = np.array(list(itertools.product(range(3), repeat=2)))
    live = LiveTrie(SidTrie.build(sids, 3))
    search = BeamSearch(live.pin().trie, batch_size=1, beam_width=9, session_length=1)
    live.remove(sids[:4])
    logits = torch.randn(1, 9, 3)
    assert [int(search.step(logits).valid[0]) for _ in range(2)] == [3, 9]  # as it was pinned
    search.reset(trie=live.pin().trie)
    assert [int(search.step(logits).valid[0]) for _ in range(2)] == [2, 5]
    with pytest.raises(ValueError, match="trie: wanted 2 levels of 3 codes, got 1 of 3"):
        search.reset(trie=SidTrie.build([[0]], 3))


def test_legal_codes_want_their_order_and_scoring() -> None:
    trie = random_trie(20, 2, 4)
    search = BeamSearch(trie, batch_size=1, beam_width=3, session_length=1, scoring="raw")
    with pytest.raises(ValueError, match="Legal was not called for this step"):
        search.step_legal(torch.zeros(4))
    n = len(search.legal().codes)
    with pytest.raises(ValueError, match=f"count: wanted {n}, got {n + 1}"):
        search.step_legal(torch.zeros(n + 1))
    with pytest.raises(TypeError, match="logits: wanted float32"):
        search.step_legal(torch.zeros(n, dtype=torch.float64))
    full = BeamSearch(trie, batch_size=1, beam_width=3, session_length=1)
    full.legal()
    with pytest.raises(ValueError, match="full softmax needs the logits of all codes"):
        full.step_legal(torch.zeros(n))


def run(trie: SidTrie, logits: list[torch.Tensor], **settings: object) -> list[BeamState]:
    batch, width, _ = logits[0].shape
    search = BeamSearch(trie, batch_size=batch, beam_width=width, **settings)  # type: ignore[arg-type]
    return [search.step(x) for x in logits]


def tensors(states: list[BeamState]) -> list[torch.Tensor]:
    return [t for s in states for t in (s.parents, s.tokens, s.scores, s.valid)]


def same(a: list[BeamState], b: list[BeamState]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    scoring: str, dtype: torch.dtype
) -> None:
    trie = random_trie(20_000, 3, 1000)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 64, 1000, generator=generator).to(dtype) for _ in range(6)]
    before = core().isa()
    runs = []
    for isa, threads in itertools.product(ISAS, (1, 2, 3)):
        core().set_isa(isa)
        runs.append(run(trie, logits, session_length=2, scoring=scoring, num_threads=threads))
    core().set_isa(before)
    assert all(same(runs[0], other) for other in runs[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    trie = random_trie(500, 2, 100)
    logits = [torch.randn(2, 16, 100).to(dtype) * 4 for _ in range(2)]
    logits[0][0, 0, :3] = torch.tensor([1e-7, -0.0, 6e-8], dtype=dtype)  # subnormal in float16
    widened = [x.float() for x in logits]
    half = run(trie, logits, session_length=1, num_threads=1)
    assert same(half, run(trie, widened, session_length=1, num_threads=1))


def test_rows_may_be_strided(isa: str) -> None:
    trie = random_trie(200, 2, 30)
    wide = torch.randn(3, 16, 50)
    view = wide[:, ::2, 7:37]
    assert not view.is_contiguous()
    strided = run(trie, [view, view], session_length=1)
    assert same(strided, run(trie, [view.contiguous()] * 2, session_length=1))


def test_first_step_takes_one_row() -> None:
    trie = random_trie(200, 2, 30)
    logits = torch.randn(2, 8, 30)
    settings = {"batch_size": 2, "beam_width": 8, "session_length": 1}
    one, all_rows = BeamSearch(trie, **settings), BeamSearch(trie, **settings)  # type: ignore[arg-type]
    assert same([one.step(logits[:, :1])], [all_rows.step(logits)])


def test_ties_go_by_parent_then_code(isa: str) -> None:
    trie = SidTrie.build(list(itertools.product(range(4), repeat=2)), 4)
    states = run(trie, [torch.zeros(1, 6, 4)] * 2, session_length=1, scoring="raw")
    assert states[0].tokens[0].tolist() == [0, 1, 2, 3, -1, -1]
    assert states[1].parents[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert states[1].tokens[0].tolist() == [0, 1, 2, 3, 0, 1]


def test_a_single_legal_code_costs_nothing_under_legal_softmax(isa: str) -> None:
    trie = SidTrie.build([[0, 2, 1], [3, 0, 0]], 4)
    search = BeamSearch(trie, batch_size=1, beam_width=2, session_length=1, scoring="legal_softmax")
    first = search.step(torch.randn(1, 2, 4))
    second = search.step(torch.randn(1, 2, 4))
    third = search.step(torch.randn(1, 2, 4))
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.scores, third.scores)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_infinite_logits(isa: str, scoring: str) -> None:
    trie = SidTrie.build([[0], [1], [2], [3]], 4)
    logits = torch.tensor([[[0.0, math.inf, -math.inf, math.nan]]])
    search = BeamSearch(trie, batch_size=1, beam_width=4, session_length=1, scoring=scoring)
    state = search.step(logits)
    assert int(state.valid[0]) == 2
    assert state.tokens[0].tolist() == [1, 0, -1, -1]
    if scoring != "raw":
        assert float(state.scores[0, 0]) == 0.0


def test_a_row_without_a_finite_logit_dies(isa: str) -> None:
    trie = SidTrie.build([[0], [1]], 2)
    for value in (math.nan, -math.inf):
        search = BeamSearch(trie, batch_size=1, beam_width=2, session_length=1)
        state = search.step(torch.full((1, 1, 2), value))
        assert state.valid.tolist() == [0]
        assert search.result().items.tolist() == [[[-1], [-1]]]


def test_no_dead_ends_when_a_deny_list_covers_whole_subtrees(isa: str) -> None:
    sids = np.array(list(itertools.product(range(3), repeat=3)))
    trie = SidTrie.build(sids, 3)
    deny = [leaf for leaf, sid in enumerate(sids.tolist()) if sid[0] == 0 or sid[:2] == [1, 2]]
    search = BeamSearch(trie, batch_size=1, beam_width=40, session_length=1, deny=[deny])
    logits = torch.randn(1, 40, 3)
    assert search.step(logits).tokens[0, :2].sort().values.tolist() == [1, 2]
    assert int(search.step(logits).valid[0]) == 5
    assert int(search.step(logits).valid[0]) == 15
    found = search.result().items[0, :15, 0].sort().values.tolist()
    assert found == sorted(set(range(27)) - set(deny))


def test_a_session_longer_than_what_is_left_dies_and_no_item_comes_twice(isa: str) -> None:
    trie = SidTrie.build([[0, 0], [0, 1], [1, 0], [1, 1]], 2)
    search = BeamSearch(trie, batch_size=2, beam_width=30, session_length=3, deny=[[3], [1, 2, 3]])
    while not search.done:
        state = search.step(torch.randn(2, 30, 2))
    assert state.valid.tolist() == [6, 0]  # the orders of three items; one item is too few
    sessions = {tuple(s) for s in search.result().items[0, :6].tolist()}
    assert sessions == set(itertools.permutations(range(3)))


def test_wide_enough_beams_are_the_exhaustive_search(isa: str) -> None:
    trie = random_trie(12, 3, 5)
    table = torch.randn(2, 3, 5)  # logits by item and level, whatever came before
    count = trie.n_leaves * (trie.n_leaves - 1)
    search = BeamSearch(trie, batch_size=1, beam_width=count, session_length=2)
    while not search.done:
        row = table[search.item, search.level]
        search.step(row.expand(1, count, 5).contiguous())
    logp = table.double().log_softmax(-1)
    sids = trie.leaf_sids(range(trie.n_leaves))

    def score(session: tuple[int, ...]) -> float:
        return sum(
            float(logp[i, level, sids[leaf, level]])
            for i, leaf in enumerate(session)
            for level in range(3)
        )

    sessions = sorted(itertools.permutations(range(trie.n_leaves), 2), key=score, reverse=True)
    result = search.result()
    assert result.valid.tolist() == [count]
    assert {tuple(s) for s in result.items[0].tolist()} == set(sessions)
    np.testing.assert_allclose(result.scores[0].numpy(), [score(s) for s in sessions], rtol=1e-5)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_empty_trie_and_empty_batch(backend: str) -> None:
    empty = SidTrie.build(np.zeros((0, 2), np.int32), 4)
    search = BeamSearch(empty, batch_size=1, beam_width=2, session_length=1, backend=backend)
    assert search.step(torch.randn(1, 2, 4)).valid.tolist() == [0]
    assert search.step(torch.randn(1, 2, 4)).valid.tolist() == [0]
    trie = random_trie(10, 2, 4)
    search = BeamSearch(trie, batch_size=0, beam_width=2, session_length=1, backend=backend)
    assert search.step(torch.randn(0, 2, 4)).tokens.shape == (0, 2)
    search.step(torch.randn(0, 2, 4))
    assert search.result().sids.shape == (0, 2, 1, 2)


def test_reset_starts_anew_with_other_deny_lists() -> None:
    trie = random_trie(60, 2, 9)
    logits = [torch.randn(2, 5, 9) for _ in range(4)]
    search = BeamSearch(trie, batch_size=2, beam_width=5, session_length=2, deny=[[1, 2], None])
    first = [search.step(x) for x in logits]
    copies = [tensor.clone() for tensor in tensors(first)]
    search.reset([None, [0, 4, 7]])
    again = [search.step(x) for x in logits]
    assert same(again, run(trie, logits, session_length=2, deny=[None, [0, 4, 7]]))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), copies, strict=True))


def test_position_is_told() -> None:
    trie = random_trie(60, 2, 9)
    search = BeamSearch(trie, batch_size=1, beam_width=3, session_length=2)
    assert (search.item, search.level, search.done) == (0, 0, False)
    states = [search.step(torch.randn(1, 3, 9)) for _ in range(4)]
    told = [(state.item, state.level, state.done) for state in states]
    assert told == [(0, 1, False), (1, 0, False), (1, 1, False), (2, 0, True)]
    with pytest.raises(ValueError, match="session of 2 items is finished"):
        search.step(torch.randn(1, 3, 9))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_catalogue_equals_the_reference(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6), "codebook_size")
    levels = data.draw(st.integers(1, 4), "levels")
    code = st.integers(0, size - 1)
    sids = data.draw(st.lists(st.tuples(*[code] * levels), max_size=30), "sids")
    trie = SidTrie.build(np.array(sids, dtype=np.int32).reshape(-1, levels), size)
    batch, width = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 9))
    leaves = st.sets(st.integers(0, max(trie.n_leaves - 1, 0)), max_size=trie.n_leaves)
    settings = {
        "batch_size": batch,
        "beam_width": width,
        "session_length": data.draw(st.integers(1, 3)),
        "scoring": data.draw(st.sampled_from(SCORINGS)),
        "deny": [sorted(data.draw(leaves)) if trie.n_leaves else None for _ in range(batch)],
    }
    native = BeamSearch(trie, num_threads=data.draw(st.integers(1, 3)), **settings)  # type: ignore[arg-type]
    reference = BeamSearch(trie, backend="reference", **settings)  # type: ignore[arg-type]
    # Halves of whole numbers, so that ties are many and raw sums exact.
    values = st.sampled_from([0.0, 0.5, 1.0, -2.0, -math.inf, math.nan])
    while not native.done:
        flat = data.draw(st.lists(values, min_size=width * size, max_size=width * size))
        logits = torch.tensor(flat).reshape(1, width, size).expand(batch, -1, -1)
        a, b = native.step(logits), reference.step(logits)
        assert torch.equal(a.valid, b.valid)
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-5, atol=1e-5)
        if settings["scoring"] != "raw":
            # Sums that only rounding tells apart may change places; do not go on from there.
            if not (torch.equal(a.parents, b.parents) and torch.equal(a.tokens, b.tokens)):
                return
        else:
            assert torch.equal(a.parents, b.parents)
            assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(native.result().items, reference.result().items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": -1}, "batch_size: wanted 0 or more, got -1"),
        ({"beam_width": 0}, "beam_width: wanted 1 or more, got 0"),
        ({"session_length": 0}, "session_length: wanted 1 or more, got 0"),
        ({"scoring": "best"}, "scoring: wanted one of"),
        ({"temperature": 0.0}, "temperature: wanted a positive finite number, got 0.0"),
        ({"temperature": math.nan}, "temperature: wanted a positive finite number"),
        ({"backend": "cuda"}, "backend: wanted 'native' or 'reference', got 'cuda'"),
        ({"deny": [[1]]}, "deny: wanted a list for each of 2 requests, got 1"),
        ({"deny": [None, [10]]}, r"deny\[1\]: wanted leaf ids in \[0, 10\), got 10"),
        ({"width_ramp": [4]}, "width_ramp: wanted 1 to 3, got 4"),
        ({"widths": [1]}, "widths: wanted one for each of 2, got 1"),
        ({"widths": [1, 4]}, "widths: wanted 0 to 3, got 4"),
        ({"allow_tags": [1]}, "allow_tags: wanted 2 sets of tags, got 1"),
        ({"allow_tags": [1, None]}, "allow_tags: the trie has no tags"),
        ({"allow_tags": 1}, "allow_tags: wanted a set of tags as bits"),
        ({"allow_tags": [[1], None]}, "allow_tags: wanted a set of tags as bits"),
        (
            {"allow_tags": [None, 1 << 63]},
            "allow_tags: wanted bits 0 to 62, got 0x8000000000000000",
        ),
        ({"beam_width": 2.5}, "beam_width: wanted an integer, got 2.5"),
        ({"deny": [[-1], None]}, r"deny\[0\]: wanted leaf ids in \[0, 10\), got -1"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    trie = SidTrie.build(np.arange(10).reshape(10, 1), 10)
    settings: dict[str, object] = {"batch_size": 2, "beam_width": 3, "session_length": 1}
    with pytest.raises((TypeError, ValueError), match=message):
        BeamSearch(trie, **{**settings, **change})  # type: ignore[arg-type]


def test_bad_logits() -> None:
    trie = random_trie(10, 2, 4)
    search = BeamSearch(trie, batch_size=2, beam_width=3, session_length=1)
    with pytest.raises(TypeError, match="logits: wanted float32, float16 or bfloat16"):
        search.step(torch.zeros(2, 3, 4, dtype=torch.float64))
    for other in (np.zeros((2, 3, 4), np.float32), [[[0.0]]], None):
        with pytest.raises(
            TypeError, match=f"logits: wanted a torch tensor, got {type(other).__name__}"
        ):
            search.step(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"logits: wanted shape \[2, 3, 4\] or \[2, 1, 4\], got"):
        search.step(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="logits: wanted a last stride of 1, got 2"):
        search.step(torch.zeros(2, 3, 8)[:, :, ::2])
    with pytest.raises(ValueError, match="logits: wanted them on cpu, got meta"):
        search.step(torch.zeros(2, 3, 4, device="meta"))
    search.step(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"logits: wanted shape \[2, 3, 4\], got \[2, 1, 4\]"):
        search.step(torch.zeros(2, 1, 4))
