"""Whole sessions on CUDA: one captured graph beside the torch backend, with the floor of both.

One call is a lone request, from history codes to the best sessions on the host: 256 items of
history and a million to choose from, beam 128, bfloat16. The floor is the time that this device
takes to read the weights of each step once, or to multiply by them, whichever is longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from onerec import OneRec, OneRecConfig, SidTrie
from onerec.inference.decoding import TorchDecoder
from onerec.inference.graph import GraphDecoder, GraphModel
from onerec.ops import BeamResult

K, LEVELS, BEAMS, HISTORY, ITEMS = 8192, 3, 128, 256, 1_000_000


@cache
def rates() -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), operations a second of a large product."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    return (
        2 * source.nbytes / seconds(lambda: target.copy_(source)),
        2 * 8192**3 / seconds(lambda: a @ b),
    )


def seconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the GPU."""
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[2:])[5]


def floor(model: OneRec, items: int) -> float:
    """Seconds that a session cannot go below; attention and search not counted."""
    bandwidth, rate = rates()
    config = model.config
    count = {name: p.numel() for name, p in model.named_parameters()}
    encoder = sum(n for name, n in count.items() if name.startswith("encoder."))
    decoder = sum(n for name, n in count.items() if name.startswith("decoder."))
    experts = sum(n for name, n in count.items() if name.endswith((".w13", ".w2")))
    share = config.experts_per_token / max(config.n_experts, 1)
    head = K * config.d_model

    def step(rows: int) -> float:
        met = 1 - (1 - share) ** rows  # of the experts, were they chosen evenly
        read = decoder - experts + met * experts + head
        done = rows * (decoder - experts + share * experts + head)
        return max(2 * read / bandwidth, 2 * done / rate)

    begin = max(2 * encoder / bandwidth, 2 * encoder * HISTORY * LEVELS / rate)
    pairs = (items - 1) * step(2 * BEAMS)
    return begin + step(1) + pairs + (items * (LEVELS - 1)) * step(BEAMS)


def kernels(call: Callable[[], Any]) -> int:
    """Kernels that a call runs on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in profile.events()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("items", [1, 5])
@pytest.mark.parametrize("preset", ["0.1b", "1b"])
def test_session_on_gpu(compare: Any, preset: str, items: int) -> None:
    torch.manual_seed(0)
    config = OneRecConfig.preset(
        preset, codebook_size=K, levels=LEVELS, history_length=HISTORY, init_std=0.05
    )
    with torch.device("cuda"):
        model = OneRec(config).to(torch.bfloat16).eval()
    rng = np.random.default_rng(0)
    trie = SidTrie.build(rng.integers(0, K, (ITEMS, LEVELS)), K)
    graph = GraphDecoder(GraphModel(model, device="cuda"), trie)
    plain = TorchDecoder(model, trie, torch.device("cuda"))
    codes, deny = [rng.integers(0, K, (HISTORY, LEVELS))], [np.empty(0, dtype=np.int64)]

    def search(decoder: TorchDecoder, length: int = items) -> BeamResult:
        return decoder.search(codes, deny, beam_width=BEAMS, session_length=length)

    expected = search(plain)

    def overlap(result: BeamResult) -> float:
        found, wanted = ({*map(tuple, r.items[0].tolist())} for r in (result, expected))
        return len(found & wanted) / BEAMS

    def check(result: BeamResult, wanted: BeamResult) -> None:
        assert torch.equal(result.valid, wanted.valid)
        assert overlap(result) > 0.5

    assert (search(graph).sids >= 0).all()  # compiles and captures
    for length in (1, 2):
        search(graph, length)
    more = kernels(lambda: search(graph, 2)) - kernels(lambda: search(graph, 1))
    compare(
        {"graph": lambda: search(graph), "torch": lambda: search(plain)},
        check=check,
        expected=expected,
        facts={
            "floor_s": floor(model, items),
            "kernels": kernels(lambda: search(graph)),
            "kernels a step": more / LEVELS,
            "overlap": overlap(search(graph)),
        },
        device="cuda",
    )
