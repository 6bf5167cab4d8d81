"""The trie inside `transformers`' generate(): a logits processor and an allowed-tokens function.

Both let a model of any vocabulary write only semantic ids that exist. They do not know which items
a session has already: for sessions without repetition and for deny lists use
`onerec.constrained_beam_search`, which is also much faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from onerec.trie import SidTrie


class SidLogitsProcessor:
    """Sets the logits of every token that continues no semantic id to -inf.

    For `generate(logits_processor=LogitsProcessorList([...]))`, greedy, sampling or beams alike.

    Args:
        trie: The allowed semantic ids.
        token_offset: Token id of code 0: one number for all levels, or one a level.
        prompt_length: Tokens before the first code: the prompt's length of a decoder-only model
            (padded to the left), 1 (the start token) of an encoder-decoder.
        session_length: Items to write.
        end_token: Token to write after them, and on a row whose codes are no semantic id, such as a
            finished one that is being padded. Without it such a row is an error.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        trie: SidTrie,
        *,
        prompt_length: int,
        token_offset: int | Sequence[int] = 0,
        session_length: int = 1,
        end_token: int | None = None,
    ) -> None:
        offsets = [token_offset] * trie.levels if isinstance(token_offset, int) else token_offset
        if len(offsets) != trie.levels or min(offsets) < 0:
            raise ValueError(
                f"token_offset: wanted {trie.levels} numbers from 0, got {token_offset}"
            )
        if prompt_length < 0:
            raise ValueError(f"prompt_length: wanted 0 or more, got {prompt_length}")
        if session_length < 1:
            raise ValueError(f"session_length: wanted 1 or more, got {session_length}")
        self.trie = trie
        self.offsets = torch.tensor(list(offsets))
        self.prompt_length, self.session_length = prompt_length, session_length
        self.end_token = end_token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Scores [R, V] after the tokens [R, t]: unchanged where legal, -inf elsewhere.

        Raises:
            ValueError: Fewer tokens than the prompt has, a vocabulary without room for the codes,
                or a row that cannot go on and has no end token.
        """
        return scores.masked_fill(~self.legal(input_ids, scores.shape[-1]), float("-inf"))

    def legal(self, input_ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """Whether each token may follow, bool [R, V]."""
        written = input_ids.shape[-1] - self.prompt_length
        if written < 0:
            raise ValueError(
                f"input_ids: wanted {self.prompt_length} tokens or more, got {input_ids.shape[-1]}"
            )
        levels, size = self.trie.levels, self.trie.codebook_size
        level = written % levels
        first = int(self.offsets[level])
        if first + size > vocabulary:
            raise ValueError(
                f"scores: wanted {first + size} tokens or more for token_offset {first} and "
                f"codebook_size {size}, got {vocabulary}"
            )
        legal = torch.zeros((len(input_ids), vocabulary), dtype=torch.bool)
        if written < levels * self.session_length:
            prefixes = input_ids[:, input_ids.shape[-1] - level :].cpu() - self.offsets[:level]
            words = self.trie.bitmask(prefixes)
            bits = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
            legal[:, first : first + size] = bits.flatten(1)[:, :size].bool()
        stuck = ~legal.any(dim=-1)
        if stuck.any():
            if self.end_token is None:
                row = int(stuck.nonzero()[0])
                raise ValueError(f"row {row}: nothing may follow {input_ids[row].tolist()}")
            legal[stuck, self.end_token] = True
        return legal.to(input_ids.device)


def prefix_allowed_tokens_fn(
    trie: SidTrie,
    *,
    prompt_length: int,
    token_offset: int | Sequence[int] = 0,
    session_length: int = 1,
    end_token: int | None = None,
) -> Callable[[int, torch.Tensor], list[int]]:
    """The function that `generate(prefix_allowed_tokens_fn=...)` wants.

    The arguments are those of `SidLogitsProcessor`, which does the same for all rows at once and is
    the faster way.
    """
    processor = SidLogitsProcessor(
        trie,
        prompt_length=prompt_length,
        token_offset=token_offset,
        session_length=session_length,
        end_token=end_token,
    )
    room = int(processor.offsets.max()) + trie.codebook_size
    vocabulary = max(room, 0 if end_token is None else end_token + 1)

    def allowed(batch_id: int, input_ids: torch.Tensor) -> list[int]:
        legal = processor.legal(input_ids.unsqueeze(0), vocabulary)
        return [int(token) for token in legal[0].nonzero().flatten()]

    return allowed
