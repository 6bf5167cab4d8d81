"""Whole sessions on the CPU: the native engine, the torch backend, transformers' generate().

One call is a batch of requests from history codes to the best sessions, a million items, beam 128.
`torch, network alone` runs the torch backend's network over the same steps with the beams given,
so without any search. transformers gets a T5 of the same widths whose dense feed-forward layers are
as wide as the experts that a token meets: about the same products, not the same weights; its
results are checked to be items. `transformers, model alone` is what generate() asks of the model
without what it does besides: the encoder, and a decoder pass a code for all beams with its caches.

`floor ms` is the time below which no session can come: its products at the measured rate of a large
matrix product (of bfloat16 where the CPU multiplies it), or the decoder's weights, read once a
pass, at the measured rate of reading. Of the last layer, a token whose logits nobody reads has keys
and values alone. Under the legal softmax the last code's pass and the products with codes that are
not legal are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from roofs import roofs

from onerec import OneRec, OneRecConfig, SidTrie
from onerec._native import core
from onerec.inference.decoding import TorchDecoder
from onerec.inference.native import NativeDecoder, NativeModel
from onerec.integrations.huggingface import SidLogitsProcessor, prefix_allowed_tokens_fn
from onerec.ops import BeamResult

K, LEVELS, BEAMS, ITEMS = 8192, 3, 128, 1_000_000
SIZES = {
    "tiny": {
        "d_model": 128,
        "n_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "d_ff": 512,
        "n_experts": 8,
        "expert_d_ff": 512,
    },
    "small": {
        "d_model": 512,
        "n_heads": 8,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "d_ff": 2048,
        "n_experts": 24,
        "expert_d_ff": 2048,
    },
}


@cache
def trie() -> SidTrie:
    return SidTrie.build(np.random.default_rng(0).integers(0, K, (ITEMS, LEVELS)), K)


@cache
def network(size: str) -> OneRec:
    torch.manual_seed(0)
    config = OneRecConfig(codebook_size=K, levels=LEVELS, init_std=0.05, **SIZES[size])
    return OneRec(config).eval()


class Native(NativeDecoder):
    """The engine, with tensors for the arrays that it gives."""

    def search(self, *arguments: Any, **options: Any) -> BeamResult:
        return BeamResult(*map(torch.from_numpy, super().search(*arguments, **options)))

    def item_scores(self, codes: Any) -> torch.Tensor:
        return torch.from_numpy(super().item_scores(codes))


@cache
def native(size: str, dtype: torch.dtype) -> Native:
    return Native(NativeModel.pack(network(size), dtype=dtype), trie())


@torch.inference_mode()
def network_alone(model: OneRec, codes: list[np.ndarray], session_length: int) -> torch.Tensor:
    """The network's share of a search: the same encoding and steps, each beam its own parent."""
    batch = len(codes)
    memory = model.encode(torch.from_numpy(np.stack(codes)))
    caches = model.new_cache(batch, BEAMS, session_length)
    logits = model.decode(torch.zeros(batch, 1, 1, dtype=torch.int64), caches, memory)
    parents = torch.zeros(batch, BEAMS, dtype=torch.int64)
    for step in range(1, session_length * LEVELS):
        caches.choose(parents)
        new = 2 if step % LEVELS == 0 else 1
        tokens = torch.zeros(batch, BEAMS, new, dtype=torch.int64)
        logits = model.decode(tokens, caches, memory)
        parents = torch.arange(BEAMS).expand(batch, BEAMS)
    return logits


def generate(
    size: str, codes: list[np.ndarray], session_length: int, way: str
) -> Callable[[], Any]:
    """A call of transformers' generate(), which gives the codes [B * M, m * L], or its model's."""
    from transformers import LogitsProcessorList, T5Config, T5ForConditionalGeneration

    shape = SIZES[size]
    offsets = [2 + level * K for level in range(LEVELS)]
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=2 + LEVELS * K,
        d_model=shape["d_model"],
        d_kv=shape["d_model"] // shape["n_heads"],
        d_ff=2 * shape["expert_d_ff"],
        num_layers=shape["encoder_layers"],
        num_decoder_layers=shape["decoder_layers"],
        num_heads=shape["n_heads"],
        feed_forward_proj="gated-silu",
        pad_token_id=0,
        decoder_start_token_id=1,
        eos_token_id=None,
    )
    model = T5ForConditionalGeneration(config).eval()
    prompt = torch.from_numpy(np.stack(codes) + np.array(offsets)).flatten(1)
    if way == "model alone":
        return lambda: t5_alone(model, prompt, LEVELS * session_length)
    settings: dict[str, Any] = {
        "prompt_length": 1,
        "token_offset": offsets,
        "session_length": session_length,
    }
    how: dict[str, Any] = (
        {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn(trie(), **settings)}
        if way == "callback"
        else {"logits_processor": LogitsProcessorList([SidLogitsProcessor(trie(), **settings)])}
    )

    def call() -> torch.Tensor:
        with torch.inference_mode():
            written = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=LEVELS * session_length,
                num_beams=BEAMS,
                num_return_sequences=BEAMS,
                do_sample=False,
                **how,
            )
        return written[:, 1:] - torch.tensor(offsets * session_length)

    return call


@torch.inference_mode()
def t5_alone(model: Any, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    """The forward passes of generate() with BEAMS beams; the last logits [B * M, 1, V]."""
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    mask = torch.ones_like(prompt)
    hidden = model.encoder(input_ids=prompt, attention_mask=mask).last_hidden_state
    memory = BaseModelOutput(last_hidden_state=hidden.repeat_interleave(BEAMS, dim=0))
    mask = mask.repeat_interleave(BEAMS, dim=0)
    caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
    tokens = torch.ones(len(mask), 1, dtype=torch.int64)
    for _ in range(steps):
        out = model(
            encoder_outputs=memory,
            attention_mask=mask,
            decoder_input_ids=tokens,
            past_key_values=caches,
            use_cache=True,
        )
    return out.logits


def floor(size: str, history: int, batch: int, m: int, legal: bool = False) -> dict[str, float]:
    """What a call must compute and read, and the least time for it."""
    c, tokens = network(size).config, 1 + LEVELS * history
    d, k = c.d_model, c.experts_per_token
    encoder = c.encoder_layers * (4 * d * d + 3 * d * c.d_ff + 2 * tokens * d)
    mixing = 6 * d * d + d * c.n_experts  # of a decoder layer, all but its experts
    expert = 3 * d * c.expert_d_ff
    rows = 1 + BEAMS * ((LEVELS - 1) + (m - 1) * (LEVELS + 1))
    codes = K * (1 + BEAMS * (m * LEVELS - 1))
    if legal:
        rows -= BEAMS
        codes = K * (1 + BEAMS * (m - 1)) + m * BEAMS * ITEMS // K
    layer = mixing + 2 * tokens * d + k * expert
    with_logits = 1 + BEAMS * (m * (LEVELS - legal) - 1)
    products = tokens * (encoder + 2 * c.decoder_layers * d * d) + codes * d
    products += rows * c.decoder_layers * layer
    products -= (rows - with_logits) * (layer - 2 * d * d)
    gflop = 2 * batch * products / 1e9
    passes = m * LEVELS - 1 - legal  # with all beams, which meet every expert
    weights = passes * c.decoder_layers * (mixing + c.n_experts * expert)
    facts: dict[str, float] = {"GFLOP": round(gflop, 2)}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        roof = roofs(dtype if core().isa() == "avx512_bf16" else torch.float32, "cpu")
        read = weights * dtype.itemsize / 1e9
        least = max(gflop / roof["roof GFLOP/s"], read / roof["roof GB/s"])
        facts |= {f"{what} {name}": value for what, value in roof.items()}
        facts |= {f"GB {name}": round(read, 3), f"floor ms {name}": round(1000 * least, 2)}
    return facts


# What one test runs: transformers' callback takes a second and more a call.
CASES = [
    ("tiny", 50, 1, 1, ("callback", "mask", "model alone")),
    ("tiny", 50, 1, 5, ("mask", "model alone")),
    ("tiny", 50, 8, 1, ()),
    ("tiny", 256, 1, 1, ()),
    ("tiny", 256, 8, 1, ()),
    ("small", 50, 1, 1, ("mask", "model alone")),
    ("small", 256, 1, 1, ()),
]


def overlap(one: BeamResult, other: BeamResult, beams: int = BEAMS) -> float:
    """Share of the sessions that two results have in common."""
    pairs = zip(one.items.tolist(), other.items.tolist(), strict=True)
    shared = [len({*map(tuple, a)} & {*map(tuple, b)}) / beams for a, b in pairs]
    return float(np.mean(shared))


@pytest.mark.parametrize(
    ("size", "history", "batch", "session_length", "peers"),
    CASES,
    ids=[f"{size}-S{3 * h}-B{b}-m{m}" for size, h, b, m, _ in CASES],
)
def test_session(
    compare: Any, size: str, history: int, batch: int, session_length: int, peers: tuple[str, ...]
) -> None:
    generator = np.random.default_rng(1)
    codes = list(generator.integers(0, K, (batch, history, LEVELS)))
    deny = [np.empty(0, dtype=np.int64)] * batch
    model = network(size)
    exact, rounded = (native(size, dtype) for dtype in (torch.float32, torch.bfloat16))
    plain = TorchDecoder(model, trie(), torch.device("cpu"))
    options: dict[str, Any] = {"beam_width": BEAMS, "session_length": session_length}

    expected = plain.search(codes, deny, **options)

    def check(result: Any, wanted: BeamResult) -> None:
        if isinstance(result, BeamResult):
            assert overlap(result, wanted) > 0.3
        elif result.dtype == torch.int64:
            assert (trie().lookup(result.reshape(-1, LEVELS)) >= 0).all()
        else:
            assert torch.isfinite(result).all()

    single, half = (decoder.search(codes, deny, **options) for decoder in (exact, rounded))
    assert overlap(single, expected) > 0.97
    torch.testing.assert_close(single.scores, expected.scores, atol=1e-3, rtol=1e-4)
    providers: dict[str, Callable[[], Any]] = {
        "native float32": lambda: exact.search(codes, deny, **options),
        "native bfloat16": lambda: rounded.search(codes, deny, **options),
        "torch": lambda: plain.search(codes, deny, **options),
        "torch, network alone": lambda: network_alone(model, codes, session_length),
        **{f"transformers, {way}": generate(size, codes, session_length, way) for way in peers},
    }
    compare(
        providers,
        check=check,
        expected=expected,
        facts={
            "threads": torch.get_num_threads(),
            "float32 overlap": round(overlap(single, expected), 4),
            "bfloat16 overlap": round(overlap(half, expected), 4),
            **floor(size, history, batch, session_length),
        },
        seconds=4.0,
    )


@pytest.mark.parametrize("session_length", [1, 5], ids=["m1", "m5"])
@pytest.mark.parametrize("size", list(SIZES))
def test_legal_softmax(compare: Any, size: str, session_length: int) -> None:
    """The softmax over the legal codes, for which most products are not needed."""
    history = 50
    codes = list(np.random.default_rng(1).integers(0, K, (1, history, LEVELS)))
    deny = [np.empty(0, dtype=np.int64)]
    options: dict[str, Any] = {"beam_width": BEAMS, "session_length": session_length}
    plain = TorchDecoder(network(size), trie(), torch.device("cpu"))
    expected = {
        scoring: plain.search(codes, deny, scoring=scoring, **options)
        for scoring in ("legal_softmax", "full_softmax")
    }

    def provider(scoring: str, dtype: torch.dtype) -> Callable[[], tuple[str, BeamResult]]:
        decoder = native(size, dtype)
        return lambda: (scoring, decoder.search(codes, deny, scoring=scoring, **options))

    legal = provider("legal_softmax", torch.float32)()[1]
    torch.testing.assert_close(legal.scores, expected["legal_softmax"].scores, atol=1e-3, rtol=1e-4)
    compare(
        {
            f"{scoring}, {name}": provider(scoring, dtype)
            for scoring in ("legal_softmax", "full_softmax")
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
        check=lambda result, wanted: check_overlap(result[1], wanted[result[0]]),
        expected=expected,
        facts={
            "threads": torch.get_num_threads(),
            "float32 overlap": round(overlap(legal, expected["legal_softmax"]), 4),
            **floor(size, history, 1, session_length, legal=True),
        },
        seconds=4.0,
    )


def check_overlap(result: BeamResult, wanted: BeamResult) -> None:
    assert overlap(result, wanted) > 0.3


# Items, codes a level, levels.
CATALOGS = [(10_000, 512, 2), (100_000, 2048, 2), (1_000_000, 1024, 3)]


def distinct_sids(items: int, codes: int, levels: int) -> np.ndarray:
    """[items, levels], random and distinct."""
    generator = np.random.default_rng(0)
    drawn = np.unique(generator.integers(0, codes**levels, items + items // 10))
    numbers = generator.permutation(drawn)[:items]
    assert len(numbers) == items
    return numbers[:, None] // codes ** np.arange(levels)[::-1] % codes


@pytest.mark.parametrize(
    ("items", "codes", "levels"), CATALOGS, ids=[f"{n}-{k}x{m}" for n, k, m in CATALOGS]
)
def test_node_outputs(compare: Any, items: int, codes: int, levels: int) -> None:
    """The next item by the generator with node outputs, and by scoring every item.

    The network is that of docs/quality.md: width 64, 50 items of history, beam 50, one request.
    `legal softmax` is the same network with output vectors of codes; `dense head` scores all items
    from the same encoder and takes the best 50.
    """
    beams, sids = 50, distinct_sids(items, codes, levels)
    trie = SidTrie.build(sids, codes)
    generator = np.random.default_rng(1)
    index = generator.integers(0, items, (1, 50))
    history = [np.column_stack([sids[row], row]).astype(np.int64) for row in index]
    deny = [np.empty(0, dtype=np.int64)]

    def network(node_outputs: bool) -> OneRec:
        torch.manual_seed(0)
        config = OneRecConfig(
            codebook_size=codes,
            levels=levels,
            session_length=1,
            history_length=50,
            history_tokens="items",
            encoder="causal",
            n_items=items,
            item_loss=1.0,
            legal_softmax=True,
            decoder_start="state",
            node_outputs=node_outputs,
            d_model=64,
            n_heads=2,
            encoder_layers=2,
            decoder_layers=1,
            d_ff=128,
            n_experts=0,
            init_std=0.1,
        )
        model = OneRec(config).eval()
        model.set_catalog(sids)
        return model

    def search(decoder: Native | TorchDecoder) -> BeamResult:
        return decoder.search(
            history, deny, beam_width=beams, session_length=1, scoring="legal_softmax"
        )

    expected: dict[str, BeamResult | torch.Tensor] = {}
    providers: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, float] = {}
    for node_outputs in (True, False):
        model = network(node_outputs)
        plain = TorchDecoder(model, trie, torch.device("cpu"))
        name = "node outputs" if node_outputs else "legal softmax"
        expected[name] = search(plain)
        if node_outputs:
            expected["dense head"] = plain.item_scores(history)
        for dtype in (torch.float32, torch.bfloat16):
            decoder = Native(NativeModel.pack(model, dtype=dtype), trie)
            kind = str(dtype).removeprefix("torch.")
            providers[f"{name}, {kind}"] = lambda d=decoder, name=name: (name, search(d))
            sizes[f"bytes an item, {name} {kind}"] = round(decoder.model.nbytes / items, 1)
            if node_outputs:
                providers[f"dense head, {kind}"] = lambda d=decoder: (
                    "dense head",
                    d.item_scores(history).topk(beams),
                )

    def check(result: tuple[str, Any], wanted: dict[str, Any]) -> None:
        name, found = result
        if isinstance(found, BeamResult):
            assert overlap(found, wanted[name], beams) > 0.8
        else:
            best = set(wanted[name].topk(beams).indices[0].tolist())
            assert len(best & set(found.indices[0].tolist())) > 0.8 * beams

    single = providers["node outputs, float32"]()[1]
    torch.testing.assert_close(single.scores, expected["node outputs"].scores, atol=1e-3, rtol=1e-4)
    assert overlap(single, expected["node outputs"], beams) > 0.97
    compare(
        providers,
        check=check,
        expected=expected,
        facts={"threads": torch.get_num_threads(), **sizes},
        seconds=4.0,
    )
