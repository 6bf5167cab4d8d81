"""The graph backend: its program run eagerly on the CPU, and its graphs where there is a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from onerec import LiveTrie, OneRec, OneRecConfig, Recommender, SidTrie
from onerec.inference.decoding import TorchDecoder
from onerec.inference.graph import GraphDecoder, GraphModel
from onerec.ops import BeamResult, BeamSearch
from onerec.tokenizer import Catalog

K, LEVELS = 12, 3
NETWORKS: dict[str, dict[str, Any]] = {
    "experts": {},
    "dense": {
        "n_experts": 0,
        "activation": "gelu",
        "share_codes": False,
        "tie_heads": False,
        "history_tokens": "codes",
    },
    "causal with items": {"encoder": "causal", "n_items": 300},
}


def network(seed: int = 0, **overrides: Any) -> OneRec:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "codebook_size": K,
        "levels": LEVELS,
        "session_length": 4,
        "history_length": 40,
        "init_std": 0.3,
        "n_experts": 4,
    }
    model = OneRec(OneRecConfig.preset("paper-tiny", **{**fields, **overrides})).eval()
    if model.item_column:
        model.set_catalog(sids(model.config.n_items))
    return model


def sids(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, K, (n, LEVELS))


def histories(model: OneRec, lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    made = []
    for length in lengths:
        codes = rng.integers(0, K, (length, LEVELS))
        if model.item_column:
            items = rng.integers(0, model.config.n_items, length)
            codes = np.concatenate([model.item_sids[items].numpy(), items[:, None]], axis=1)
        made.append(codes)
    return made


def assert_same(got: BeamResult, want: BeamResult) -> None:
    assert torch.equal(got.valid, want.valid)
    assert torch.equal(got.items, want.items)
    assert torch.equal(got.sids, want.sids)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scoring", ["full_softmax", "legal_softmax"])
@pytest.mark.parametrize("name", NETWORKS)
def test_program_gives_the_items_of_torch(name: str, scoring: str) -> None:
    """Ragged histories, three requests in four places, denied and removed items, wide beams."""
    model = network(**NETWORKS[name])
    full = SidTrie.build(sids(300), K)
    live = LiveTrie(full.with_tags(np.arange(full.n_leaves) % 4))
    live.remove(sids(300)[::9])
    trie = live.pin().trie
    codes = histories(model, [0, 40, 7])
    deny = [np.empty(0, np.int64), np.arange(0, 200), np.array([3, 5, 17])]
    options: dict[str, Any] = {"scoring": scoring, "temperature": 0.8}
    cpu = torch.device("cpu")
    graph = GraphDecoder(GraphModel(model, device=cpu), trie)
    for width, length in ((24, 3), (1, 4)):
        sizes = {"beam_width": width, "session_length": length}
        got = graph.search(codes, deny, **sizes, **options)
        assert_same(got, TorchDecoder(model, trie, cpu).search(codes, deny, **sizes, **options))
    beams = BeamSearch(
        trie, batch_size=3, beam_width=24, session_length=2, allow_tags=[1, None, 2], **options
    )
    sizes = {"beam_width": 24, "session_length": 2}
    TorchDecoder(model, trie, cpu).run(codes, beams, **sizes)
    nobody = [np.empty(0, np.int64)] * 3
    assert_same(graph.search(codes, nobody, [1, None, 2], **sizes, **options), beams.result())


def test_a_session_takes_every_item_there_is() -> None:
    """Beams whose own items use up whole prefixes, and fewer sessions than beams."""
    model = network()
    trie = SidTrie.build([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 0, 1]], K)
    cpu, deny = torch.device("cpu"), [np.array([4])]
    sizes = {"beam_width": 64, "session_length": 4}
    got = GraphDecoder(GraphModel(model, device=cpu), trie).search([sids(5)], deny, **sizes)
    assert int(got.valid) == 24
    assert {tuple(sorted(items)) for items in got.items[0, :24].tolist()} == {(0, 1, 2, 3)}
    assert_same(got, TorchDecoder(model, trie, cpu).search([sids(5)], deny, **sizes))


def test_mistakes() -> None:
    model = network()
    catalog = Catalog.build(list(range(50)), sids(50).tolist(), K)
    with pytest.raises(ValueError, match="'graph' needs a CUDA device, got 'cpu'"):
        Recommender(model, catalog, backend="graph")
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        GraphModel(model, device="cpu", dtype=torch.float64)
    decoder = GraphDecoder(GraphModel(model, device="cpu"), catalog.trie)
    with pytest.raises(ValueError, match=r"session_length must lie in 1..4"):
        decoder.search([sids(1)], [np.empty(0, np.int64)], beam_width=2, session_length=5)


def recommenders(**options: Any) -> tuple[Recommender, Recommender, Catalog]:
    """A network under two backends on the GPU, and another catalogue."""
    model = network(**options.pop("fields", {}))
    catalogs = [Catalog.build(list(range(300)), sids(300, seed).tolist(), K) for seed in (0, 1)]
    plain, graph = (
        Recommender(model, catalogs[0], device="cuda", backend=backend, **options)
        for backend in ("torch", "graph")
    )
    return plain, graph, catalogs[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_graph_gives_the_items_of_torch_on_gpu(name: str) -> None:
    plain, graph, other = recommenders(fields=NETWORKS[name])
    requests = [[[]], [[1, 2, 3], list(range(200, 290)), [7]], [[5] * 3]]
    options: dict[str, Any] = {"beam_width": 24, "num_sessions": 24, "session_length": 3}

    def compare(one: Recommender, two: Recommender) -> None:
        for histories in requests:
            for a, b in zip(
                one.recommend(histories, **options),
                two.recommend(histories, **options),
                strict=True,
            ):
                assert a.item_ids == b.item_ids
                np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4, atol=1e-3)

    compare(graph, plain)
    compare(graph, plain)  # replayed
    if not plain.config.n_items:
        captured = len(graph._model._programs)
        compare(graph.with_catalog(other), plain.with_catalog(other))
        assert len(graph._model._programs) == captured
        compare(graph, plain)


@pytest.mark.gpu
def test_bfloat16_and_threads_on_gpu() -> None:
    plain, graph, _ = recommenders(dtype=torch.bfloat16)
    graph.warmup(beam_width=32)
    options: dict[str, Any] = {"beam_width": 32, "num_sessions": 32}
    histories = [[i, 2 * i, 3 * i] for i in range(24)]
    alone = [graph.recommend([history], **options)[0] for history in histories]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda history: graph.recommend([history], **options)[0], histories))
    assert [a.item_ids for a in again] == [a.item_ids for a in alone]
    # Sessions of one item: the more items, the more beams are chosen by rounding alone.
    one, other = (way.recommend(histories, session_length=1, **options) for way in (graph, plain))
    shared = [
        len({*map(tuple, a.item_ids)} & {*map(tuple, b.item_ids)}) / 32
        for a, b in zip(one, other, strict=True)
    ]
    assert np.mean(shared) > 0.8
