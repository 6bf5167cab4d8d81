"""The network alone as an AOTInductor package, for processes that have libtorch and a beam."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from onerec.files import atomic_write
from onerec.model.feed_forward import FeedForward, MoE
from onerec.model.onerec import OneRec
from onerec.ops.moe.reference import activate

PACKAGE = "network.pt2"
_MOST_SESSIONS = 4096


class _AllExperts(nn.Module):
    """A mixture of plain products: every expert sees every row, unchosen ones count nothing.

    The library's own operation needs Python in the process. This costs `n_experts /
    experts_per_token` times its products.
    """

    def __init__(self, mixture: MoE) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        """y [..., d] of x [..., d]."""
        m, config = self.mixture, self.mixture.config
        odds = (x @ m.router.T).float().softmax(dim=-1)
        wanted = odds + m.selection_bias if config.loss_free_balancing else odds
        ids = wanted.topk(config.experts_per_token, dim=-1).indices
        gates = odds.gather(-1, ids)
        if config.normalize_gates:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(odds).scatter(-1, ids, gates).to(x.dtype)
        hidden = activate(torch.einsum("...d,efd->...ef", x, m.w13), config.activation)
        return torch.einsum("...ef,edf->...d", hidden * weights.unsqueeze(-1), m.w2)


class _Logits(nn.Module):
    def __init__(self, model: OneRec) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor, sessions: Tensor) -> Tensor:
        return self.model.session_logits(history, sessions, sessions.shape[0])


def export_network(model: OneRec, folder: str | Path) -> Path:
    """Compiles the network for this machine's CPU; needs a C++ compiler and takes minutes.

    The package (`network.pt2`) is one function:

    - history: int64 [1, history_length, L], codes oldest first, rows past the user's history -1;
      for a network that knows its items [1, history_length, L + 1], the item's index last.
    - sessions: int64 [M, m, L] with m = `session_length` and any M of 2 to 4096: the codes that
      each beam has so far, anything in range after them.
    - Result: logits float32 [M, m, L, K]; those of a code follow from the codes before it.

    It keeps no caches: a step costs what the whole session costs. The engine (`export`) is the fast
    way; this one is for programs that want the network in libtorch and do the search themselves
    (`onerec/beam_search.h`). On CUDA it is untested.

    Args:
        model: Put into evaluation mode; otherwise left as it is.
        folder: Where to.

    Returns:
        The package.
    """
    config = model.config
    network = copy.deepcopy(model.eval())
    for layer in network.decoder:
        if isinstance(layer.ffn, MoE):
            layer.ffn = cast("FeedForward", _AllExperts(layer.ffn))
    columns = config.levels + network.item_column
    history = torch.zeros(1, config.history_length, columns, dtype=torch.int64)
    sessions = torch.zeros(3, config.session_length, config.levels, dtype=torch.int64)
    beams = torch.export.Dim("beams", min=2, max=_MOST_SESSIONS)
    path = Path(folder) / PACKAGE
    with torch.no_grad(), atomic_write(path) as temporary:
        program = torch.export.export(
            _Logits(network), (history, sessions), dynamic_shapes=({}, {0: beams}), strict=False
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary))
    return path
