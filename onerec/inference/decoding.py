"""The decode loop: the model writes, a beam decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from onerec.model.onerec import OneRec
from onerec.ops import BeamResult, BeamSearch, BeamState
from onerec.trie import SidTrie


class Beams(Protocol):
    """What the loop asks of a beam: `onerec.ops.BeamSearch` and `FreeBeams` have it."""

    def step(self, logits: Tensor) -> BeamState:
        """Extends every beam by one code, given float32 logits [B, M, K] on the CPU."""
        ...


@torch.inference_mode()
def decode_sessions(
    model: OneRec, history: Tensor, beams: Beams, *, beam_width: int, session_length: int
) -> None:
    """Runs `beams` to the end of its sessions on the model's logits.

    The history is encoded once; a step feeds the codes just chosen (an item's last code together
    with the next BOS, so that a BOS costs no step of its own): session_length * L steps in all.

    Args:
        model: In evaluation mode.
        history: int64 [B, S, L] on the model's device, as for `OneRec.forward`.
        beams: Fresh, for B requests.
        beam_width: Its M.
        session_length: Its m.
    """
    memory = model.encode(history)
    cache = model.new_cache(len(history), beam_width, session_length)
    tokens = torch.zeros(len(history), 1, 1, dtype=torch.int64, device=history.device)
    while True:
        state = beams.step(model.decode(tokens, cache, memory).float().cpu())
        if state.done:
            return
        cache.choose(state.parents.to(history.device))
        tokens = state.tokens.clamp(min=0).unsqueeze(-1).to(history.device)
        if state.level == 0:
            tokens = F.pad(tokens, (0, 1))


class FreeBeams:
    """Beam search over all K^L codes, legal or not: what the model would say without the trie.

    Scores are sums of log-softmax; order: score descending, ties as `torch.topk` leaves them. Items
    may come twice in a session.

    Args:
        levels: L.
        batch_size: B.
        beam_width: M.
        session_length: m.
    """

    def __init__(
        self, levels: int, *, batch_size: int, beam_width: int, session_length: int
    ) -> None:
        self.levels, self.width, self.items = levels, beam_width, session_length
        self.codes = torch.zeros(batch_size, 1, 0, dtype=torch.int64)
        self.scores = torch.zeros(batch_size, 1)

    def step(self, logits: Tensor) -> BeamState:
        """Extends every beam by the codes with the best sums."""
        beams, size = logits.shape[1:]
        total = self.scores.unsqueeze(-1) + logits.log_softmax(dim=-1)
        kept = min(self.width, beams * size)
        scores, best = total.flatten(1).topk(kept, dim=1)
        # Fewer continuations than beams (a tiny codebook's first step): dead rows, as in a trie.
        scores = F.pad(scores, (0, self.width - kept), value=float("-inf"))
        best = F.pad(best, (0, self.width - kept))
        parents, tokens = best // size, best % size
        history = self.codes.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.codes.shape[2]))
        self.codes = torch.cat([history, tokens.unsqueeze(-1)], dim=-1)
        self.scores = scores
        done = self.codes.shape[2]
        return BeamState(
            parents=parents,
            tokens=tokens,
            scores=scores,
            valid=(scores > float("-inf")).sum(dim=1, dtype=torch.int32),
            level=done % self.levels,
            item=done // self.levels,
            done=done == self.levels * self.items,
        )

    def sids(self) -> Tensor:
        """int32 [B, M, m, L], best session first."""
        shape = (*self.codes.shape[:2], -1, self.levels)
        return self.codes.reshape(shape).to(torch.int32)


class TorchDecoder:
    """Sessions of a PyTorch network under a trie, on any device.

    Args:
        model: In evaluation mode, on `device`.
        trie: The allowed semantic ids.
        device: Where the network lies; the beams are kept on the CPU.

    Raises:
        ValueError: With `node_outputs`, a semantic id that is none of the network's items'.
    """

    def __init__(self, model: OneRec, trie: SidTrie, device: torch.device) -> None:
        if model.config.node_outputs:
            _check_known(model.item_sids.cpu().numpy(), trie)
        self.model, self.trie, self.device = model, trie, device

    def search(
        self,
        codes: Sequence[npt.NDArray[np.int64]],
        deny: Sequence[npt.NDArray[np.int64]],
        allow_tags: Sequence[int | None] | None = None,
        *,
        beam_width: int,
        session_length: int,
        **options: Any,
    ) -> BeamResult:
        """The best sessions of each request.

        Args:
            codes: For each request its history, int64 [S, L], or [S, L + 1] (`item_column`).
            deny: For each request leaf ids never to give.
            allow_tags: As for `onerec.ops.BeamSearch`.
            beam_width: M.
            session_length: m.
            options: `scoring` and `temperature` of `onerec.ops.BeamSearch`.
        """
        beams = BeamSearch(
            self.trie,
            batch_size=len(codes),
            beam_width=beam_width,
            session_length=session_length,
            deny=deny,
            allow_tags=allow_tags,
            **options,
        )
        self.run(codes, beams, beam_width, session_length)
        return beams.result()

    def run(
        self,
        codes: Sequence[npt.NDArray[np.int64]],
        beams: Beams,
        beam_width: int,
        session_length: int,
    ) -> None:
        """Runs fresh `beams` to the end on these histories."""
        decode_sessions(
            self.model,
            self.padded(codes),
            beams,
            beam_width=beam_width,
            session_length=session_length,
        )

    @torch.inference_mode()
    def item_scores(self, codes: Sequence[npt.NDArray[np.int64]]) -> Tensor:
        """Logits float32 [B, n_items] of every item as the next one, on the CPU."""
        return self.model.item_scores(self.padded(codes)).float().cpu()

    @torch.inference_mode()
    def item_log_probs(
        self, codes: Sequence[npt.NDArray[np.int64]], items: npt.NDArray[np.int64]
    ) -> Tensor:
        """Log-probabilities float32 [B, C] of items int64 [B, C] by their codes, on the CPU."""
        wanted = torch.from_numpy(items).to(self.device)
        scores = self.model.item_log_probs(self.padded(codes), wanted)
        return scores.float().cpu()

    def padded(self, codes: Sequence[npt.NDArray[np.int64]]) -> torch.Tensor:
        """Histories [S, L], or [S, L + 1] with the item's index last, as one int64 batch."""
        columns = self.trie.levels + self.model.item_column
        history = np.full((len(codes), max(map(len, codes)), columns), -1, dtype=np.int64)
        for row, known in enumerate(codes):
            history[row, : len(known)] = known
        return torch.from_numpy(history).to(self.device)


def _check_known(sids: npt.NDArray[np.int64], trie: SidTrie) -> None:
    """Refuses live leaves that are none of the network's items, which have no output vectors."""
    live = trie.leaf_sids(np.setdiff1d(np.arange(trie.n_leaves), trie.removed))
    unknown = live[SidTrie.build(sids, trie.codebook_size).lookup(live) < 0]
    if len(unknown):
        raise ValueError(
            "trie: wanted semantic ids of the network's items, which alone have output vectors, "
            f"got {unknown[0].tolist()}"
        )
