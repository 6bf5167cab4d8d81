"""The adapters inside generate() of small models with random weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from onerec import SidTrie
from onerec.integrations.huggingface import SidLogitsProcessor, prefix_allowed_tokens_fn

transformers = pytest.importorskip("transformers")

PAD, START, END, FIRST, SIZE, LEVELS, ITEMS = 0, 1, 2, 3, 11, 3, 2
OFFSETS = [FIRST + level * SIZE for level in range(LEVELS)]
VOCABULARY = FIRST + LEVELS * SIZE


@pytest.fixture(scope="module")
def trie() -> SidTrie:
    rng = np.random.default_rng(0)
    return SidTrie.build(rng.integers(0, SIZE, (30, LEVELS)), SIZE)


def encoder_decoder() -> tuple[torch.nn.Module, torch.Tensor, int]:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        pad_token_id=PAD,
        decoder_start_token_id=START,
        eos_token_id=END,
    )
    prompt = torch.randint(FIRST, VOCABULARY, (3, 5))
    return transformers.T5ForConditionalGeneration(config).eval(), prompt, 1


def decoder_only() -> tuple[torch.nn.Module, torch.Tensor, int]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    prompt = torch.randint(FIRST, VOCABULARY, (3, 5))
    return transformers.GPT2LMHeadModel(config).eval(), prompt, 5


@pytest.mark.parametrize("make", [encoder_decoder, decoder_only])
@pytest.mark.parametrize("way", ["processor", "function"])
@pytest.mark.parametrize("beams", [1, 4])
def test_generates_only_items(
    trie: SidTrie,
    make: Callable[[], tuple[torch.nn.Module, torch.Tensor, int]],
    way: str,
    beams: int,
) -> None:
    model, prompt, prompt_length = make()
    settings = {
        "prompt_length": prompt_length,
        "token_offset": OFFSETS,
        "session_length": ITEMS,
        "end_token": END,
    }
    if way == "processor":
        processor = SidLogitsProcessor(trie, **settings)  # type: ignore[arg-type]
        how = {"logits_processor": transformers.LogitsProcessorList([processor])}
    else:
        how = {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn(trie, **settings)}  # type: ignore[arg-type]
    written = model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=LEVELS * ITEMS + 1,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        **how,
    )[:, prompt_length:]
    assert written.shape == (3 * beams, LEVELS * ITEMS + 1)
    assert (written[:, -1] == END).all()
    codes = written[:, :-1].reshape(-1, LEVELS) - torch.tensor(OFFSETS)
    assert (trie.lookup(codes) >= 0).all()


def test_scores_of_legal_tokens_stay(trie: SidTrie) -> None:
    processor = SidLogitsProcessor(trie, prompt_length=1, token_offset=OFFSETS)
    sid = trie.leaf_sids([4])[0]
    row = torch.tensor([[START, FIRST + int(sid[0])]])
    scores = torch.randn(1, VOCABULARY)
    out = processor(row, scores)
    sids = trie.leaf_sids(range(trie.n_leaves))
    legal = {OFFSETS[1] + int(s[1]) for s in sids if s[0] == sid[0]}
    assert set(torch.isfinite(out[0]).nonzero().flatten().tolist()) == legal
    kept = torch.isfinite(out)
    assert torch.equal(out[kept], scores[kept])


def test_mistakes_are_told(trie: SidTrie) -> None:
    with pytest.raises(ValueError, match="token_offset: wanted 3 numbers from 0"):
        SidLogitsProcessor(trie, prompt_length=1, token_offset=[0, 1])
    with pytest.raises(ValueError, match="prompt_length: wanted 0 or more, got -1"):
        SidLogitsProcessor(trie, prompt_length=-1)
    processor = SidLogitsProcessor(trie, prompt_length=2)
    with pytest.raises(ValueError, match="input_ids: wanted 2 tokens or more, got 1"):
        processor(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, SIZE))
    with pytest.raises(ValueError, match="scores: wanted 11 tokens or more"):
        processor(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, SIZE - 1))
    with pytest.raises(ValueError, match="row 0: nothing may follow"):
        processor(torch.full((1, 3), SIZE + 5), torch.zeros(1, SIZE))
