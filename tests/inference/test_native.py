"""The native engine: the same items as PyTorch, alone as in a batch, from memory and from files."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onerec import OneRec, OneRecConfig, Recommendation, Recommender
from onerec.errors import DataError
from onerec.inference import Mixture
from onerec.inference.decoding import TorchDecoder
from onerec.inference.exported import export
from onerec.inference.native import NativeDecoder, NativeModel, refuse_unsupported
from onerec.model.counting import (
    CountPart,
    CountRanker,
    co_consumption,
    personal_frequency,
    popularity,
    transition,
)
from onerec.tokenizer import Catalog
from onerec.trie import LiveTrie, SidTrie

K = 40  # codes of a level: two panels and a half
N = 300


def build(seed: int = 0, **overrides: Any) -> OneRec:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "codebook_size": K,
        "session_length": 3,
        "history_length": 6,
        "d_model": 24,
        "n_heads": 3,
        "d_ff": 40,
        "n_experts": 5,
        "expert_d_ff": 20,
        "init_std": 0.4,
    }
    return OneRec(OneRecConfig.preset("paper-tiny", **{**fields, **overrides})).eval()


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    sids = np.random.default_rng(0).integers(0, K, (N, 3))
    sids[10:14] = sids[9]  # a semantic id of five items
    return Catalog.build([f"v{i}" for i in range(N)], sids, K)


HISTORIES = [
    [],
    ["v1"],
    ["unknown", "v9", "v2", "nobody"],
    [f"v{i}" for i in range(20, 30)],  # longer than the model reads
    ["v3", "v3", "v12", "v13"],
]


def same(got: list[Recommendation], wanted: list[Recommendation], atol: float = 2e-4) -> None:
    for one, other in zip(got, wanted, strict=True):
        assert one.item_ids == other.item_ids
        assert np.array_equal(one.sids, other.sids)
        np.testing.assert_allclose(one.scores, other.scores, atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {"history_tokens": "items"},
        {"history_tokens": "codes", "normalize_gates": True, "share_codes": False},
        {"n_experts": 0, "activation": "geglu", "tie_heads": False, "history_tokens": "codes"},
        {"activation": "gelu", "n_heads": 4, "experts_per_token": 3},
        {"activation": "relu", "encoder_layers": 1, "decoder_layers": 3},
    ],
    ids=["items", "codes", "dense", "gelu", "relu"],
)
def test_gives_the_items_of_torch(catalog: Catalog, overrides: dict[str, Any], isa: str) -> None:
    model = build(**overrides)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("selection_bias"):
                buffer.uniform_(-0.1, 0.1)
    torch_, native = (Recommender(model, catalog, backend=b) for b in ("torch", "native"))
    options: dict[str, Any] = {"beam_width": 33, "num_sessions": 20, "exclude": [["v5"]] * 5}
    same(native.recommend(HISTORIES, **options), torch_.recommend(HISTORIES, **options))
    assert native.rank(HISTORIES, 25, beam_width=30) == torch_.rank(HISTORIES, 25, beam_width=30)


@pytest.mark.parametrize("scoring", ["legal_softmax", "raw"])
@pytest.mark.parametrize("items", [300, 40, 12])
def test_legal_heads_and_forced_codes_change_nothing(scoring: str, items: int) -> None:
    sids = np.random.default_rng(1).integers(0, K, (items, 3))
    if items == 12:
        sids[:, 0] = np.arange(12)  # every later code is the only one
    if items == 40:
        sids[:, 0] = np.arange(40) // 2 * 2  # few beams have a choice, and that at the last code
        sids[1::2, 1] = sids[::2, 1]
        sids[5::2, 0] += 1
    catalog = Catalog.build(list(range(items)), sids, K)
    model = build(history_tokens="codes")
    histories = [[], [1, 2], [3]]
    options: dict[str, Any] = {"beam_width": 10, "num_sessions": 10, "scoring": scoring}
    native = Recommender(model, catalog, backend="native").recommend(histories, **options)
    same(native, Recommender(model, catalog, backend="torch").recommend(histories, **options))


@pytest.mark.parametrize("nodes", [False, True], ids=["codes", "nodes"])
@pytest.mark.parametrize("scoring", ["full_softmax", "legal_softmax"])
def test_a_result_is_the_same_alone_in_a_batch_and_with_more_threads(
    catalog: Catalog, scoring: str, nodes: bool
) -> None:
    model = knowing(catalog, node_outputs=True, decoder_start="state") if nodes else build()
    native = Recommender(model, catalog, backend="native", num_threads=1)
    options: dict[str, Any] = {"beam_width": 40, "num_sessions": 40, "scoring": scoring}
    together = native.recommend(HISTORIES * 3, **options)
    threaded = Recommender(model, catalog, backend="native", num_threads=3)
    for other in (
        [native.recommend([history], **options)[0] for history in HISTORIES] * 3,
        threaded.recommend(HISTORIES * 3, **options),
    ):
        for one, two in zip(together, other, strict=True):
            assert one.item_ids == two.item_ids
            assert one.scores == two.scores


def test_threads_may_share_it(catalog: Catalog) -> None:
    native = Recommender(build(), catalog, backend="native", num_threads=2)
    wanted = [native.recommend([history], beam_width=8)[0].scores for history in HISTORIES]
    wrong: list[int] = []

    def work(place: int) -> None:
        for _ in range(20):
            if native.recommend([HISTORIES[place]], beam_width=8)[0].scores != wanted[place]:
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(HISTORIES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_beams_than_sessions_and_more_items_than_are_left() -> None:
    catalog = Catalog.build([0, 1, 2], [[1, 2, 3], [1, 2, 4], [7, 7, 7]], K)
    model = build()
    for history, count in (([], 6), ([0], 2), ([0, 1], 1), ([0, 1, 2], 0)):
        backends = (Recommender(model, catalog, backend=b) for b in ("native", "torch"))
        native, wanted = (b.recommend([history], beam_width=9, num_sessions=9) for b in backends)
        same(native, wanted)
        assert len(native[0].item_ids) == count


def test_bfloat16_keeps_most_of_the_best(catalog: Catalog, isa: str) -> None:
    model = build(init_std=0.1, d_model=48)
    exact, rounded = (
        Recommender(model, catalog, backend="native", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    overlap = [
        len(set(a) & set(b)) / 20
        for a, b in zip(exact.rank(HISTORIES, 20), rounded.rank(HISTORIES, 20), strict=True)
    ]
    assert np.mean(overlap) >= 0.9
    # Weights that bfloat16 holds exactly give float32's results, but where activations are rounded.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    same(
        Recommender(model, catalog, backend="native", dtype=torch.bfloat16).recommend(HISTORIES),
        Recommender(model, catalog, backend="native").recommend(HISTORIES),
        atol=0.05 if isa == "avx512_bf16" else 1e-6,
    )


def test_exported_folder_gives_the_same_and_refuses_damage(
    catalog: Catalog, tmp_path: Path
) -> None:
    model = build()
    folder = tmp_path / "exported"
    export(model, catalog, folder)
    loaded = Recommender.from_exported(folder)
    wanted = Recommender(model, catalog, backend="native").recommend(HISTORIES, beam_width=10)
    same(loaded.recommend(HISTORIES, beam_width=10), wanted, atol=0)
    engine = (folder / "engine.bin").read_bytes()
    export(model, catalog, folder)
    assert (folder / "engine.bin").read_bytes() == engine
    for place in (3, 9, 17, 100, 250, 300, len(engine) - 1):
        damaged = bytearray(engine)
        damaged[place] ^= 0x40
        (folder / "engine.bin").write_bytes(damaged)
        with pytest.raises(DataError, match=r"engine\.bin: not a valid engine model"):
            Recommender.from_exported(folder)
    (folder / "engine.bin").write_bytes(engine[:-64])
    with pytest.raises(DataError, match="size in bytes"):
        Recommender.from_exported(folder)
    NativeModel.pack(build(history_length=7)).save(folder / "engine.bin")
    with pytest.raises(DataError, match="history_length must be 6 as in the config, got 7"):
        Recommender.from_exported(folder)
    (folder / "engine.bin").unlink()
    with pytest.raises(
        DataError, match=r"wanted a folder of `onerec export` with .*; engine\.bin missing"
    ):
        Recommender.from_exported(folder)
    catalog.save(tmp_path / "tokenize")
    wanted = (
        r"/tokenize: .* config\.json, engine\.bin missing, found catalog\.parquet, trie\.bin; "
        r"make one from a run with `onerec export RUN`"
    )
    with pytest.raises(DataError, match=wanted):
        Recommender.from_exported(tmp_path / "tokenize")
    export(model, catalog, tmp_path / "export")
    with pytest.raises(DataError, match=r"found export, exported, tokenize; take .*/export$"):
        Recommender.from_exported(tmp_path)


def test_refuses_what_it_cannot_do_by_name(catalog: Catalog) -> None:
    config = build().config
    object.__setattr__(config, "dropout", 0.5)  # training's alone
    refuse_unsupported(config)

    @dataclasses.dataclass(frozen=True)
    class Later(OneRecConfig):
        rotary: bool = False

    refuse_unsupported(Later())
    with pytest.raises(ValueError, match="backend 'native' has no rotary=True"):
        refuse_unsupported(Later(rotary=True))
    native = Recommender(build(), catalog, backend="native")
    with pytest.raises(ValueError, match="under the trie only"):
        native.generate_unconstrained([[]])
    with pytest.raises(ValueError, match="dtype must be"):
        Recommender(build(), catalog, backend="native", dtype=torch.float16)
    with pytest.raises(ValueError, match="runs on the CPU"):
        Recommender(build(), catalog, backend="native", device="cuda")
    with pytest.raises(ValueError, match="backend must be"):
        Recommender(build(), catalog, backend="fast")
    with pytest.raises(ValueError, match="needs a OneRec network"):
        Recommender(NativeModel.pack(build()), catalog, backend="torch")


def knowing(catalog: Catalog, **overrides: Any) -> OneRec:
    """The recipe of docs/quality.md: a causal encoder over items that the network knows."""
    fields: dict[str, Any] = {
        "history_tokens": "items",
        "encoder": "causal",
        "n_items": len(catalog),
        "vector_dim": 5,
        "item_loss": 1.0,
        "legal_softmax": True,
    }
    model = build(**{**fields, **overrides})
    vectors = np.random.default_rng(2).normal(size=(len(catalog), 5))
    model.set_catalog(catalog.sids, vectors if model.config.vector_dim else None)
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"n_experts": 0, "vector_dim": 0, "legal_softmax": False},
        {"encoder": "bidirectional", "share_codes": False},
        {"decoder_start": "state", "legal_softmax": False},
        {"node_outputs": True},
        {"node_outputs": True, "decoder_start": "state", "n_experts": 0, "tie_heads": False},
    ],
    ids=["recipe", "full-softmax", "bidirectional", "state-start", "nodes", "nodes-state"],
)
def test_networks_that_know_their_items(
    catalog: Catalog, overrides: dict[str, Any], isa: str, tmp_path: Path
) -> None:
    model = knowing(catalog, **overrides)
    torch_, native = (Recommender(model, catalog, backend=b) for b in ("torch", "native"))
    options: dict[str, Any] = {"beam_width": 33, "num_sessions": 20, "exclude": [["v5"]] * 5}
    same(native.recommend(HISTORIES, **options), torch_.recommend(HISTORIES, **options))
    for weight in (0.0, 0.4, 1.0):
        fused: dict[str, Any] = {"beam_width": 30, "dense_weight": weight, "exclude": [["v5"]] * 5}
        assert native.rank(HISTORIES, 25, **fused) == torch_.rank(HISTORIES, 25, **fused)
    for one, other in zip(
        native.next_items(HISTORIES), torch_.next_items(HISTORIES, beam_width=128), strict=True
    ):
        assert np.array_equal(one.items, other.items)
        np.testing.assert_allclose(one.generator, other.generator, atol=2e-4, rtol=1e-5)
        np.testing.assert_allclose(one.dense, other.dense, atol=2e-4, rtol=1e-5)
    # Alone and together, from a file and with more threads.
    export(model, catalog, tmp_path / "exported")
    loaded = Recommender.from_exported(tmp_path / "exported", num_threads=3)
    for history, found in zip(HISTORIES, native.next_items(HISTORIES), strict=True):
        (alone,) = loaded.next_items([history])
        assert np.array_equal(alone.items, found.items)
        assert np.array_equal(alone.generator, found.generator)
        assert np.array_equal(alone.dense, found.dense)


def test_an_export_ranks_by_its_mixture(catalog: Catalog, tmp_path: Path) -> None:
    model, rng = knowing(catalog, node_outputs=True), np.random.default_rng(7)
    n = len(catalog)
    walks, offsets = rng.integers(0, n, 900), np.arange(0, 901, 9)
    seen = np.bincount(walks, minlength=n)
    parts = [
        transition(walks, offsets, n),
        together := co_consumption(walks, offsets, n),
        CountPart(together.lists, np.ones(3)),
        popularity(seen),
        personal_frequency(n),
    ]
    counts = CountRanker(parts, seen)
    weights = rng.uniform(0.1, 1.0, (2, 7))
    mixture = Mixture(counts, weights[0], weights[1])
    made = Recommender(model, catalog, backend="native", mixture=mixture)
    folder = tmp_path / "exported"
    export(model, catalog, folder, mixture=mixture)
    loaded = Recommender.from_exported(folder)
    for masked in (True, False):
        options: dict[str, Any] = {"beam_width": 30, "exclude_history": masked}
        found = loaded.rank(HISTORIES, 20, **options)
        assert found == made.rank(HISTORIES, 20, **options)
        assert found != made.rank(HISTORIES, 20, dense_weight=0.0, **options)
    assert pickle.loads(pickle.dumps(loaded)).rank(HISTORIES, 20) == loaded.rank(HISTORIES, 20)
    # The parts belong to each other: another file, one too many and one too few are refused.
    other = tmp_path / "other"
    export(model, catalog, other)
    assert Recommender.from_exported(other).mixture is None
    shutil.copy(folder / "mixture.json", other)
    with pytest.raises(DataError, match=r"mixture.json: wanted the file that was exported with"):
        Recommender.from_exported(other)
    (folder / "counts.npz").unlink()
    with pytest.raises(DataError, match=r"counts.npz: there is no such file"):
        Recommender.from_exported(folder)


@pytest.mark.parametrize("scoring", ["full_softmax", "legal_softmax", "raw"])
@pytest.mark.parametrize("shape", ["wide", "narrow", "forced"])
def test_node_outputs_give_the_items_of_torch(shape: str, scoring: str) -> None:
    sids = np.random.default_rng(4).integers(0, K, (N, 3))
    if shape == "narrow":
        sids[:, 0] = 3 + sids[:, 0] // 8 * 7  # a first level of five codes, panels of siblings
        sids[:, 1] //= 2
    if shape == "forced":
        sids = sids[:30]
        sids[:, 0] = np.arange(30) // 2
    catalog = Catalog.build(list(range(len(sids))), sids, K)
    model = knowing(catalog, node_outputs=True, decoder_start="state")
    catalog = catalog.with_tags(np.random.default_rng(3).integers(0, 4, len(sids)))
    histories = [[], [1, 2], [3]]
    options: dict[str, Any] = {
        "beam_width": 10,
        "num_sessions": 10,
        "scoring": scoring,
        "temperature": 0.7,
        "exclude": [[0, 4, 9]] * 3,
        "allow_tags": [None, [0], [1]],
    }
    torch_, native = (Recommender(model, catalog, backend=b) for b in ("torch", "native"))
    same(native.recommend(histories, **options), torch_.recommend(histories, **options))


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_trie_under_node_outputs_holds_items_of_the_network(
    catalog: Catalog, backend: str
) -> None:
    model = knowing(catalog, node_outputs=True, decoder_start="state")

    def decoder(trie: SidTrie) -> TorchDecoder | NativeDecoder:
        if backend == "torch":
            return TorchDecoder(model, trie, torch.device("cpu"))
        return NativeDecoder(NativeModel.pack(model), trie)

    history = [np.column_stack([catalog.sids[:3], np.arange(3)]).astype(np.int64)]
    options: dict[str, Any] = {"beam_width": 40, "session_length": 2, "scoring": "legal_softmax"}
    some = catalog.sids[20:120]
    found = decoder(SidTrie.build(some, K)).search(history, [np.empty(0, np.int64)], **options)
    others = np.setdiff1d(np.arange(catalog.trie.n_leaves), catalog.trie.lookup(some))
    wanted = decoder(catalog.trie).search(history, [others], **options)
    np.testing.assert_array_equal(found.sids, wanted.sids)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1.3e-6, atol=1e-5)
    unknown = [[1, 2, 3]]
    assert catalog.trie.lookup(unknown)[0] < 0
    live = LiveTrie(SidTrie.build(np.concatenate([some, unknown]), K))
    with pytest.raises(ValueError, match=r"trie: wanted .* network's items, .* got \[1, 2, 3\]"):
        decoder(live.pin().trie)
    live.remove(unknown)
    again = decoder(live.pin().trie).search(history, [np.empty(0, np.int64)], **options)
    np.testing.assert_array_equal(again.sids, found.sids)
    np.testing.assert_allclose(again.scores, found.scores, rtol=1.3e-6, atol=1e-5)


def test_a_network_that_knows_its_items_takes_no_other_ones(
    catalog: Catalog, tmp_path: Path
) -> None:
    model = knowing(catalog)
    turned = Catalog.build(catalog.item_ids[::-1], catalog.sids[::-1], K)
    for use in (
        lambda: Recommender(model, turned, backend="native"),
        lambda: Recommender(model, catalog, backend="native").with_catalog(turned),
        lambda: export(model, turned, tmp_path / "exported"),
    ):
        with pytest.raises(ValueError, match="in order"):
            use()
    with pytest.raises(ValueError, match="dense head"):
        Recommender(knowing(catalog, item_loss=0.0), catalog, backend="native").next_items([[]])


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_allowed_tags_are_a_filter_of_items(catalog: Catalog, backend: str, tmp_path: Path) -> None:
    tags = np.random.default_rng(3).integers(0, 8, len(catalog))
    tags[9:14] = [1, 2, 2, 4, 1]  # items that share a semantic id
    tags[:2] = 16
    # The full softmax, for the legal one is over the allowed codes alone.
    model, tagged = knowing(catalog, legal_softmax=False), catalog.with_tags(tags)
    plain = Recommender(model, catalog, backend=backend)
    recommender = Recommender(model, tagged, backend=backend)
    bits = dict(zip(catalog.item_ids.tolist(), tags.tolist(), strict=True))
    options: dict[str, Any] = {"beam_width": 300, "exclude": [["v9"]]}
    (everything,) = plain.rank([["v12"]], 300, **options)
    for allow in (1, 6, 16, 32):
        wanted = [item for item in everything if bits[item] & allow]
        names = [t for t in range(6) if allow >> t & 1]
        assert recommender.rank([["v12"]], 300, **options, allow_tags=[names]) == [wanted]
        (found,) = recommender.recommend([["v12"]], **options, allow_tags=[names])
        assert all(bits[item] & allow for session in found.item_ids for item in session)
        # A session is as long as the tags allow: 16 has two items, 32 none.
        assert [len(s) for s in found.item_ids] == {16: [2], 32: []}.get(allow, [3])
    (fused,) = recommender.next_items([["v12"]], beam_width=9, dense_top=300, allow_tags=[[1, 2]])
    assert all(bits[item] & 6 for item in catalog.item_ids[fused.items])
    both = recommender.rank([["v12"]] * 2, 9, exclude=[["v9"]] * 2, allow_tags=[None, [0]])
    assert both[0] == plain.rank([["v12"]], 9, exclude=[["v9"]])[0]
    assert both[1] == [item for item in everything if bits[item] & 1][:9]
    export(model, tagged, tmp_path / "exported")  # files keep the tags
    (kept,) = Recommender.from_exported(tmp_path / "exported").rank(
        [["v12"]], 9, allow_tags=[[2, 1]]
    )
    assert kept == recommender.rank([["v12"]], 9, allow_tags=[[1, 2]])[0]
    with pytest.raises(ValueError, match=r"allow_tags\[0\]: the catalogue has no tags"):
        plain.recommend([[]], allow_tags=[[1]])
    with pytest.raises(ValueError, match=r"allow_tags must have .* each of 1 histories, got 2"):
        recommender.recommend([[]], allow_tags=[[1], [1]])
    for wrong in (6, "film"):  # bits, and a word without its list
        with pytest.raises(TypeError, match=rf"allow_tags\[0\]: wanted a list .* got '?{wrong}"):
            recommender.recommend([[]], allow_tags=[wrong])
