"""Trie-constrained beam search around a model of your own: `python examples/own_model.py`.

The model here is an untrained GRU over codes; what matters is the loop around it: the trie sees to
it that every answer is an item of the catalogue, and the parents say which states to carry on.
"""

import numpy as np
import torch

from onerec import SidTrie, constrained_beam_search

ITEMS, LEVELS, CODES = 10_000, 3, 256
REQUESTS, BEAMS, SESSION = 2, 8, 2


class Generator(torch.nn.Module):
    """Logits of the next code from the codes so far, one step a call."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.codes = torch.nn.Embedding(CODES + 1, width)  # the last one begins a sequence
        self.cell = torch.nn.GRUCell(width, width)
        self.head = torch.nn.Linear(width, CODES)
        self.state = torch.zeros(REQUESTS, BEAMS, width)  # yours: from the user's history

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Codes of every beam so far [B, M, t] and the beams they continue -> logits [B, M, K]."""
        index = parents.unsqueeze(-1).expand_as(self.state)
        state = self.state.gather(1, index).flatten(0, 1)
        last = tokens[..., -1] if tokens.shape[-1] else torch.full_like(parents, CODES)
        state = self.cell(self.codes(last.clamp(min=0).flatten()), state)  # -1: a dead beam
        self.state = state.unflatten(0, (REQUESTS, BEAMS))
        return self.head(self.state)


def main() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sids = rng.integers(CODES, size=(ITEMS, LEVELS), dtype=np.int32)
    trie = SidTrie.build(sids, CODES)
    print(f"{trie.n_leaves:,} semantic ids in {trie.nbytes:,} bytes")

    seen = trie.lookup(sids[:1000])  # leaf ids that the first user must not get
    result = constrained_beam_search(
        Generator().step,
        trie,
        batch_size=REQUESTS,
        beam_width=BEAMS,
        session_length=SESSION,
        deny=[np.unique(seen), None],
    )
    for request in range(REQUESTS):
        print(f"request {request}: score {float(result.scores[request, 0]):.3f}")
        for leaf, sid in zip(result.items[request, 0], result.sids[request, 0], strict=True):
            print(f"  leaf {int(leaf)}: semantic id {sid.tolist()}")


if __name__ == "__main__":
    main()
