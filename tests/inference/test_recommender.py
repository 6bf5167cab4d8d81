"""Recommender: exact sessions, legality, rules for histories and exclusions, batching, threads."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from onerec import OneRec, OneRecConfig, Recommender
from onerec.inference import Mixture
from onerec.inference.exported import export
from onerec.inference.native import NativeModel
from onerec.model.counting import CountRanker, popularity, transition
from onerec.tokenizer import Catalog

K, LEVELS = 5, 2
# Nine semantic ids; items 20 and 21 share one, 30, 31 and 32 another.
ITEMS = {
    10: (0, 1),
    11: (0, 3),
    12: (1, 1),
    13: (2, 0),
    14: (2, 2),
    15: (2, 4),
    16: (4, 4),
    20: (3, 3),
    21: (3, 3),
    30: (4, 0),
    31: (4, 0),
    32: (4, 0),
}
UNKNOWN = 99


@pytest.fixture
def catalog() -> Catalog:
    return Catalog.build(list(ITEMS), list(ITEMS.values()), K)


def build(seed: int = 0, **overrides: Any) -> OneRec:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "codebook_size": K,
        "levels": LEVELS,
        "session_length": 3,
        "history_length": 4,
        "d_model": 16,
        "d_ff": 16,
        "n_experts": 4,
        "expert_d_ff": 8,
        "init_std": 0.5,
    }
    return OneRec(OneRecConfig.preset("paper-tiny", **{**fields, **overrides})).eval()


def session_score(
    model: OneRec, history: Sequence[int], session: Sequence[tuple[int, int]]
) -> float:
    """log p of a session given a history of known items, by one full forward pass in float64."""
    codes = torch.tensor([ITEMS[i] for i in history], dtype=torch.int64).view(1, -1, LEVELS)
    target = torch.tensor([session])
    logits = model.session_logits(codes, target)
    return float(logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).sum().detach())


def every_session(
    model: OneRec, history: Sequence[int], allowed: set[tuple[int, int]], length: int
) -> list[tuple[float, tuple[tuple[int, int], ...]]]:
    """All sessions of distinct allowed ids, best first."""
    found = [
        (session_score(model, history, session), session)
        for session in itertools.permutations(sorted(allowed), length)
    ]
    return sorted(found, key=lambda pair: -pair[0])


@pytest.mark.parametrize("history", [[], [10], [13, 20, 12, 16]], ids=str)
def test_sessions_equal_brute_force(catalog: Catalog, history: list[int]) -> None:
    model = build().double()
    recommender = Recommender(model, catalog, backend="torch")
    want = every_session(model, history, set(ITEMS.values()), 2)
    # 9 * 8 = 72 sessions: a beam of 80 keeps every prefix, so the search is exhaustive.
    (got,) = recommender.recommend(
        [history], session_length=2, beam_width=80, num_sessions=80, exclude_history=False
    )
    assert len(got.item_ids) == len(want) == 72
    assert [tuple(map(tuple, s)) for s in got.sids.tolist()] == [s for _, s in want]
    np.testing.assert_allclose(got.scores, [score for score, _ in want], rtol=0, atol=2e-5)


def test_narrow_beam_equals_a_plain_beam_in_float64(catalog: Catalog) -> None:
    model = build(seed=3).double()
    history, width, length = [11, 14], 4, 3
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    codes = torch.tensor([[ITEMS[i] for i in history]])
    for step in range(length * LEVELS):
        grown = []
        for score, prefix in beams:
            target = torch.zeros(length * LEVELS, dtype=torch.int64)
            target[: len(prefix)] = torch.tensor(prefix)
            logits = model.session_logits(codes, target.view(1, length, LEVELS))
            logs = logits.log_softmax(-1).flatten(1, 2)[0, step].tolist()
            done = [prefix[i : i + LEVELS] for i in range(0, step - step % LEVELS, LEVELS)]
            begun = prefix[step - step % LEVELS :]
            for code in range(K):
                longer = (*begun, code)
                if any(s[: len(longer)] == longer and s not in done for s in ITEMS.values()):
                    grown.append((score + logs[code], (*prefix, code)))
        beams = sorted(grown, key=lambda pair: -pair[0])[:width]
    (got,) = Recommender(model, catalog, backend="torch").recommend(
        [history], beam_width=width, num_sessions=width, exclude_history=False
    )
    assert [tuple(s.flatten()) for s in got.sids] == [prefix for _, prefix in beams]
    np.testing.assert_allclose(got.scores, [score for score, _ in beams], rtol=0, atol=2e-5)


@pytest.mark.parametrize("batching", [False, True])
@pytest.mark.parametrize("width", [1, 3, 16])
def test_all_legal_none_twice_none_excluded(catalog: Catalog, width: int, batching: bool) -> None:
    rng = np.random.default_rng(0)
    ids = list(ITEMS)
    histories = [rng.choice(ids, size=n).tolist() for n in (0, 1, 2, 3, 4, 4, 2)]
    exclude = [rng.choice(ids, size=3).tolist() for _ in histories]
    recommender = Recommender(build(), catalog, batching=batching, backend="torch")
    found = recommender.recommend(histories, beam_width=width, num_sessions=width, exclude=exclude)
    for history, hidden, one in zip(histories, exclude, found, strict=True):
        assert 1 <= len(one.item_ids) <= width
        assert len(one.scores) == len(one.item_ids) == len(one.sids)
        assert one.scores == sorted(one.scores, reverse=True)
        for session, sids in zip(one.item_ids, one.sids.tolist(), strict=True):
            assert [ITEMS[item] for item in session] == [tuple(s) for s in sids]
            assert len(session) == 3
            assert len({tuple(s) for s in sids}) == 3
            assert not set(session) & {*history, *hidden}
        assert len({str(s) for s in one.sids.tolist()}) == len(one.sids)


def test_shared_ids_show_the_first_item_that_is_not_excluded(catalog: Catalog) -> None:
    recommender = Recommender(build(), catalog, backend="torch")

    def shown(**options: Any) -> set[int]:
        (one,) = recommender.recommend(
            [[]], session_length=1, beam_width=16, num_sessions=16, **options
        )
        return {session[0] for session in one.item_ids}

    assert shown() == {10, 11, 12, 13, 14, 15, 16, 20, 30}
    assert shown(exclude=[[20, 30]]) == {10, 11, 12, 13, 14, 15, 16, 21, 31}
    assert shown(exclude=[[20, 21, 30, 31, 32, 10]]) == {11, 12, 13, 14, 15, 16}


def test_rank_orders_all_items_by_next_item_probability(catalog: Catalog) -> None:
    model = build(seed=2).double()
    history = [12, 15]
    want = [
        item
        for _, (sid,) in every_session(model, history, set(ITEMS.values()), 1)
        for item, own in ITEMS.items()
        if own == sid
    ]
    recommender = Recommender(model, catalog, backend="torch")
    (got,) = recommender.rank([history], 20, exclude_history=False)
    assert got == want
    (some,) = recommender.rank([history], 4, beam_width=16, exclude_history=False)
    assert some == want[:4]
    (masked,) = recommender.rank([history], 20, exclude=[[31, 20]])
    assert masked == [item for item in want if item not in (12, 15, 31, 20)]


def test_candidates_are_the_sessions_of_the_beam_as_item_indices(catalog: Catalog) -> None:
    recommender = Recommender(build(), catalog, backend="torch")
    # 20 and 30 are taken, so that their ids are shown by 21 and 31.
    histories = [[10, 20], [30], []]
    found = recommender.candidates(histories, beam_width=600)
    wanted = recommender.recommend(histories, beam_width=600, num_sessions=600)
    for mine, other in zip(found, wanted, strict=True):
        assert catalog.item_ids[mine.items].tolist() == other.item_ids
        assert mine.scores.tolist() == other.scores
    assert {21, 31} <= set(catalog.item_ids[np.concatenate([f.items for f in found])].flat)
    many = [int(n) for n in ITEMS if n not in (10, 11)]
    assert recommender.candidates([many], beam_width=4)[0].items.shape == (0, 3), "too few are left"


def test_empty_and_unknown_histories(catalog: Catalog) -> None:
    recommender = Recommender(build(), catalog, backend="torch")
    options: dict[str, Any] = {"beam_width": 4, "exclude_history": False}
    nobody, unknown, mixed, known = recommender.recommend(
        [[], [UNKNOWN, -5], [UNKNOWN, 10, 98], [10]], **options
    )
    assert nobody.scores == unknown.scores
    assert nobody.item_ids == unknown.item_ids
    assert mixed.scores == known.scores
    assert nobody.scores != known.scores
    assert recommender.recommend([]) == []
    assert recommender.rank([], 3) == []
    ignored = recommender.recommend([[]], beam_width=4, exclude=[[UNKNOWN]])
    assert ignored[0].scores == nobody.scores


def test_only_the_latest_items_are_read_but_all_are_excluded(catalog: Catalog) -> None:
    recommender = Recommender(build(), catalog, backend="torch")
    long, short = [16, 15, 10, 11, 12, 13], [10, 11, 12, 13]
    a, b = recommender.recommend([long, short], beam_width=4, exclude_history=False)
    assert a.scores == b.scores
    (masked,) = recommender.rank([long], 20)
    assert set(masked) == set(ITEMS) - set(long)


def test_sessions_shorten_to_what_is_left(catalog: Catalog) -> None:
    recommender = Recommender(build(), catalog, batching=True, backend="torch")
    all_but = [
        [i for i in ITEMS if i not in (10, 14)],
        list(ITEMS),
        [10],
        [i for i in ITEMS if i > 10],
    ]
    found = recommender.recommend([[]] * 4, beam_width=8, num_sessions=8, exclude=all_but)
    assert {tuple(s) for s in found[0].item_ids} == {(10, 14), (14, 10)}
    assert found[1].item_ids == []
    assert found[1].sids.shape == (0, 0, LEVELS)
    assert len(found[2].item_ids[0]) == 3
    assert found[3].item_ids == [[10]]
    assert recommender.rank([list(ITEMS)], 3) == [[]]


def histories_of_all_lengths() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.choice(list(ITEMS), size=n % 5).tolist() for n in range(12)]


def test_alone_and_together_are_the_same_bits_on_the_cpu(catalog: Catalog) -> None:
    recommender = Recommender(build(d_model=64), catalog, backend="torch")
    histories = histories_of_all_lengths()
    together = recommender.recommend(histories, beam_width=6, num_sessions=6)
    for history, want in zip(histories, together, strict=True):
        (alone,) = recommender.recommend([history], beam_width=6, num_sessions=6)
        assert alone.scores == want.scores
        assert alone.item_ids == want.item_ids


def test_batches_agree_to_rounding(catalog: Catalog) -> None:
    model = build(d_model=64)
    histories = histories_of_all_lengths()
    one = Recommender(model, catalog, backend="torch").recommend(
        histories, beam_width=80, num_sessions=20
    )
    for rows in (80, 240, 4096):
        batched = Recommender(model, catalog, batching=True, max_rows=rows, backend="torch")
        many = batched.recommend(histories, beam_width=80, num_sessions=20)
        for a, b in zip(one, many, strict=True):
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=0)


def test_max_rows_bounds_a_batch(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    seen: list[tuple[int, int]] = []
    make = model.new_cache

    def watch(batch_size: int, beam_width: int, session_length: int) -> Any:
        seen.append((batch_size, beam_width))
        return make(batch_size, beam_width, session_length)

    monkeypatch.setattr(model, "new_cache", watch)
    recommender = Recommender(model, catalog, batching=True, max_rows=20, backend="torch")
    recommender.recommend([[]] * 7, beam_width=6, exclude_history=False)
    assert seen == [(3, 6), (3, 6), (1, 6)]
    seen.clear()
    recommender.rank([[]] * 2, 2, beam_width=50)
    assert seen == [(1, 50), (1, 50)]


def test_threads_share_a_recommender(catalog: Catalog) -> None:
    recommender = Recommender(build(), catalog, backend="torch")
    histories = histories_of_all_lengths()
    want = [r.scores for r in recommender.recommend(histories, beam_width=4, num_sessions=4)]
    got: dict[int, list[list[float]]] = {}

    def work(number: int) -> None:
        found = recommender.recommend(histories, beam_width=4, num_sessions=4)
        got[number] = [r.scores for r in found]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[n] for n in range(4)] == [want] * 4


@pytest.mark.parametrize("width", [1, 30])
def test_unconstrained_is_the_best_of_all_codes(catalog: Catalog, width: int) -> None:
    model = build(seed=4).double()
    recommender = Recommender(model, catalog, backend="torch")
    history = [10, 16]
    sids = recommender.generate_unconstrained([history, []], session_length=1, beam_width=width)
    assert sids.shape == (2, 1, LEVELS)
    every = list(itertools.product(range(K), repeat=LEVELS))
    scores = {sid: session_score(model, history, [sid]) for sid in every}
    if width == 30:  # all 25 continuations are kept
        assert tuple(sids[0, 0]) == max(scores, key=scores.__getitem__)
    else:
        codes = torch.tensor([[ITEMS[i] for i in history]])
        first = int(model.session_logits(codes, torch.zeros(1, 1, 2).long())[0, 0, 0].argmax())
        rest = {sid: s for sid, s in scores.items() if sid[0] == first}
        assert tuple(sids[0, 0]) == max(rest, key=rest.__getitem__)
    legal = np.mean([tuple(s) in ITEMS.values() for s in sids[:, 0].tolist()])
    got = recommender.legality([history, []], session_length=1, beam_width=width)
    assert got == pytest.approx(legal)


def test_legality_lies_between_none_and_all() -> None:
    sids = [(a, b) for a in range(K) for b in range(K)]
    whole = Catalog.build(list(range(25)), sids, K)
    assert Recommender(build(), whole, backend="torch").legality([[], [3]]) == 1.0
    lone = Catalog.build([0], [(0, 0)], K)
    model = build()
    with torch.no_grad():
        model.codes.weight[0] = -100 * model.codes.weight[1]
    free = Recommender(model, lone, backend="torch").generate_unconstrained([[]])
    share = float(np.mean([(s == 0).all() for s in free[0]]))
    assert Recommender(model, lone, backend="torch").legality([[]]) == pytest.approx(share)


def test_text_ids_and_folders(tmp_path: Any) -> None:
    names = [f"item-{i}" for i in ITEMS]
    catalog = Catalog.build(names, list(ITEMS.values()), K)
    model = build()
    model.save_pretrained(tmp_path / "model")
    catalog.save(tmp_path / "catalog")
    recommender = Recommender.from_pretrained(tmp_path / "model", tmp_path / "catalog")
    recommender.warmup(beam_width=4)
    (one,) = recommender.recommend([["item-10", "nothing"]], beam_width=4)
    (same,) = Recommender.from_pretrained(model, catalog).recommend([["item-10"]], beam_width=4)
    assert one.item_ids == same.item_ids
    assert one.scores == same.scores
    assert set(one.item_ids[0]) < set(names) - {"item-10"}


def test_bfloat16_weights(catalog: Catalog) -> None:
    wide = Recommender(build(init_std=0.1), catalog, backend="torch").recommend(
        [[10]], beam_width=80
    )
    narrow = Recommender(build(init_std=0.1), catalog, dtype=torch.bfloat16, backend="torch")
    (one,) = narrow.recommend([[10]], beam_width=80)
    assert one.scores[0] == pytest.approx(wide[0].scores[0], abs=0.1)


def test_the_plain_call_takes_the_engine_where_it_runs_the_network(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    plain = Recommender(model, catalog)
    assert plain.backend == "native"
    named = {
        backend: Recommender(model, catalog, backend=backend) for backend in ("torch", "native")
    }
    (got,), (wanted,) = (r.recommend([[10, 13]], beam_width=9) for r in (plain, named["torch"]))
    assert got.item_ids == wanted.item_ids
    # What only torch does is done by the network, also after an exchange of the catalogue.
    free = named["torch"].generate_unconstrained([[10], []])
    for recommender in (plain, plain.with_catalog(catalog)):
        assert recommender.unconstrained
        np.testing.assert_array_equal(recommender.generate_unconstrained([[10], []]), free)
    for asked in (named["native"], Recommender(NativeModel.pack(model), catalog)):
        assert asked.backend == "native"
        assert not asked.unconstrained
        with pytest.raises(ValueError, match="under the trie only"):
            asked.generate_unconstrained([[10]])
    assert Recommender(build().double(), catalog).backend == "torch"
    assert Recommender(model, catalog, dtype=torch.float16).backend == "torch"
    monkeypatch.setattr("onerec.inference.backends.unsupported", lambda config: ["rotary=True"])
    assert Recommender(build(), catalog).backend == "torch"


def test_mistakes(catalog: Catalog) -> None:
    recommender = Recommender(build(), catalog, backend="torch")
    for words, call in [
        ("session_length", lambda: recommender.recommend([[]], session_length=4)),
        ("session_length", lambda: recommender.recommend([[]], session_length=0)),
        ("beam_width", lambda: recommender.recommend([[]], beam_width=0)),
        ("num_sessions", lambda: recommender.recommend([[]], beam_width=2, num_sessions=3)),
        ("exclude", lambda: recommender.recommend([[]], exclude=[[], []])),
        ("k must", lambda: recommender.rank([[]], 0)),
        ("scoring", lambda: recommender.rank([[]], 1, scoring="best")),
        ("backend", lambda: Recommender(build(), catalog, backend="magic")),
        ("max_rows", lambda: Recommender(build(), catalog, max_rows=0, backend="torch")),
        ("catalog", lambda: Recommender(build(codebook_size=6), catalog, backend="torch")),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="histories\\[0\\]"):
        recommender.recommend(["item-10"])
    with pytest.raises(TypeError, match=r"histories\[1\]: .*integers"):
        recommender.recommend([[], ["item-10"]])


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_ranking_longer_than_the_catalogue_is_all_of_it(backend: str, catalog: Catalog) -> None:
    recommender = Recommender(build(), catalog, backend=backend)
    (ranked,) = recommender.rank([[]], 10**12)
    assert sorted(ranked) == sorted(catalog.item_ids.tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_on_gpu(catalog: Catalog, dtype: torch.dtype | None) -> None:
    histories = histories_of_all_lengths()
    options: dict[str, Any] = {"beam_width": 80, "num_sessions": 5}
    want = Recommender(build(init_std=0.2), catalog, backend="torch").recommend(
        histories, **options
    )
    there = Recommender(build(init_std=0.2), catalog, device="cuda", dtype=dtype, backend="torch")
    for got, expected in zip(there.recommend(histories, **options), want, strict=True):
        tolerance = 1e-3 if dtype is None else 0.3
        np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=tolerance)


def fused_model(**overrides: Any) -> OneRec:
    fields = {
        "encoder": "causal",
        "n_items": len(ITEMS),
        "item_loss": 1.0,
        "legal_softmax": True,
        "n_experts": 0,
    }
    model = build(**{**fields, **overrides})
    model.set_catalog(np.array(list(ITEMS.values())))
    return model


@pytest.mark.parametrize("batching", [False, True], ids=["single", "batched"])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_fused_ranking_weighs_both_heads(catalog: Catalog, weight: float, batching: bool) -> None:
    model = fused_model()
    recommender = Recommender(model, catalog, batching=batching, backend="torch")
    histories = [[], [10, 20], [13, 12, 16, 31]]
    ids = np.array(list(ITEMS))
    with torch.no_grad():
        for history, ranked in zip(
            histories,
            recommender.rank(histories, 5, dense_weight=weight, dense_top=12),
            strict=True,
        ):
            at = torch.tensor([list(ITEMS).index(i) for i in history], dtype=torch.int64)
            rows = torch.cat([model.item_sids[at], at[:, None]], dim=1)[None]
            dense = model.item_scores(rows).log_softmax(-1)
            generator = model.item_log_probs(rows, torch.arange(12)[None])
            score = ((1 - weight) * generator + weight * dense)[0]
            score[at] = -torch.inf
            assert ranked == ids[score.topk(5).indices].tolist()


def test_candidates_are_scored_exactly_and_never_excluded(catalog: Catalog) -> None:
    recommender = Recommender(fused_model(), catalog, backend="torch")
    (found,) = recommender.next_items([[10, 20, 30]], beam_width=2, dense_top=1, exclude=[[12]])
    items = np.array(list(ITEMS))[found.items]
    assert not set(items.tolist()) & {10, 20, 30, 12}
    assert found.beamed.sum() in (len(items), len(items) - 1)
    (alone,) = recommender.rank([[10, 20, 30]], 3, beam_width=2, exclude=[[12]])
    best = items[found.beamed][np.argsort(-found.generator[found.beamed], kind="stable")]
    assert set(alone) <= set(best.tolist())
    # Everything excluded: nothing is left.
    (empty,) = recommender.next_items([list(ITEMS)], beam_width=2)
    assert len(empty.items) == 0


def test_a_mixture_ranks_what_beam_dense_head_and_counts_find(catalog: Catalog) -> None:
    sequences, offsets = np.array([0, 5, 1, 0, 5, 9, 3, 9]), np.array([0, 3, 8])
    seen = np.bincount(sequences, minlength=12)
    counts = CountRanker([transition(sequences, offsets, 12), popularity(seen)], seen)
    masked, unmasked = np.array([0.0, 0.0, 1.0, 0.1]), np.array([1.0, 0.5, 0.0, 0.0])
    mixture = Mixture(counts, masked, unmasked)
    recommender = Recommender(fused_model(), catalog, backend="torch", mixture=mixture)
    ids = np.array(list(ITEMS))
    history = [ids[0]]
    # Without the history only counts weigh: what followed item 0, then the popular ones.
    (ranked,) = recommender.rank([history], 3, beam_width=2, dense_top=4)
    assert ranked[0] == ids[5]
    expected = counts.with_weights([1.0, 0.1]).rank([[0]], 3, [[0]])[0]
    assert ranked == ids[expected].tolist()
    # With the history the two heads weigh, by the other weights.
    (ranked,) = recommender.rank([history], 12, exclude_history=False, dense_top=12)
    (both,) = recommender.rank(
        [history], 12, exclude_history=False, dense_top=12, dense_weight=1 / 3
    )
    assert ranked == both
    # A weight of the dense head, and none of it, keep their meaning.
    plain = Recommender(fused_model(), catalog, backend="torch")
    assert recommender.rank([history], 5, dense_weight=0.0) == plain.rank([history], 5)
    assert pickle.loads(pickle.dumps(recommender)).rank([history], 5) == recommender.rank(
        [history], 5
    )


def test_a_mixture_of_other_items_is_refused(catalog: Catalog) -> None:
    counts = CountRanker([popularity(np.ones(11))], np.ones(11))
    mixture = Mixture(counts, np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="mixture: wanted counts of the model's 12 items, got 11"):
        Recommender(fused_model(), catalog, mixture=mixture)
    with pytest.raises(ValueError, match="mixture: wanted a model with a dense head"):
        Recommender(build(), catalog, mixture=mixture)


def test_fusion_needs_a_dense_head_and_the_catalogue_of_the_model(catalog: Catalog) -> None:
    with pytest.raises(ValueError, match="dense head"):
        Recommender(build(), catalog, backend="torch").rank([[10]], 3, dense_weight=0.5)
    with pytest.raises(ValueError, match="dense_weight"):
        Recommender(fused_model(), catalog, backend="torch").rank([[10]], 3, dense_weight=1.5)
    other = Catalog.build(list(ITEMS)[::-1], list(ITEMS.values())[::-1], K)
    with pytest.raises(ValueError, match="in order"):
        Recommender(fused_model(), other, backend="torch")


@pytest.fixture
def tiny_pair(catalog: Catalog) -> tuple[OneRec, Catalog]:
    return build(), catalog


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_iterators_are_read_once_and_not_eaten(tiny_pair, backend: str) -> None:
    model, catalog = tiny_pair
    recommender = Recommender(model, catalog, backend=backend)
    lists = [[10, 11], [], [12]]
    wanted = recommender.recommend(lists, beam_width=4, exclude=[[13], [], [14]])
    for histories in ((one for one in lists), map(iter, lists), tuple(lists)):
        exclude = (iter(one) for one in ([13], [], [14]))
        got = recommender.recommend(histories, beam_width=4, exclude=exclude)
        assert [one.item_ids for one in got] == [one.item_ids for one in wanted]
    assert recommender.rank(iter(lists), 3) == recommender.rank(lists, 3)
    assert len(recommender.candidates(iter(lists), beam_width=4)) == 3
    for wrong in ("ab", b"ab", 5, None):
        with pytest.raises(TypeError, match="histories"):
            recommender.recommend(wrong)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beam_width", {"beam_width": 2**40}),
        ("beam_width", {"beam_width": 2**70}),
        ("beam_width", {"beam_width": 4.5}),
        ("beam_width", {"beam_width": True}),
        ("num_sessions", {"num_sessions": 1.5}),
        ("num_sessions", {"num_sessions": True}),
        ("session_length", {"session_length": 1.0}),
        ("temperature", {"temperature": float("nan")}),
        ("scoring", {"scoring": "best"}),
        ("allow_tags", {"allow_tags": [[True]]}),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_before_any_work(tiny_pair, monkeypatch, name, options) -> None:
    model, catalog = tiny_pair
    tagged = catalog.with_tags([1] * len(catalog))
    recommender = Recommender(model, tagged, backend="torch")
    monkeypatch.setattr(recommender, "_decoder", None)
    with pytest.raises((ValueError, TypeError), match=name):
        recommender.recommend([[10]], **options)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_are_a_number_of_threads(tiny_pair, threads) -> None:
    with pytest.raises((ValueError, TypeError), match="num_threads"):
        Recommender(*tiny_pair, backend="native", num_threads=threads)


def test_a_recommender_is_pickled_by_its_folder_or_says_how(tiny_pair, tmp_path) -> None:
    model, catalog = tiny_pair
    export(model, catalog, tmp_path / "e")
    loaded = Recommender.from_exported(tmp_path / "e", num_threads=1, max_rows=77)
    half = Catalog.build(catalog.item_ids[:6], catalog.sids[:6], catalog.codebook_size)
    made = [Recommender(model, catalog, backend=backend) for backend in (None, "torch")]
    for one in (loaded, loaded.with_catalog(half), *made):
        copy = pickle.loads(pickle.dumps(one))
        assert copy.recommend([[10, 11]], beam_width=4)[0].scores == pytest.approx(
            one.recommend([[10, 11]], beam_width=4)[0].scores
        )
        assert (copy.num_threads, copy.max_rows) == (one.num_threads, one.max_rows)
        assert copy.lineage == one.lineage
    with pytest.raises(TypeError, match="from_exported"):
        pickle.dumps(Recommender(model, catalog, backend="native"))
