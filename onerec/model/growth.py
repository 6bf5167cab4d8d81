"""A network that knows its items, for a catalogue with more of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from onerec.model.onerec import OneRec


@torch.no_grad()
def grown(model: OneRec, sids: npt.NDArray[np.integer[Any]], vectors: Any) -> OneRec:
    """The same network with items behind those that it knows.

    A new item is told by its codes and its vector; its own embedding is zero, which training made
    the network ready for (`item_dropout`).

    Args:
        model: The network; it is returned itself where it knows no items.
        sids: int [N, L], semantic ids of all items, those of the network first.
        vectors: Floats [N, d] of all items; read only with `vector_dim`.

    Raises:
        ValueError: There are fewer items than the network knows, or others.
    """
    config = model.config
    if not config.n_items:
        return model
    if len(sids) < config.n_items or not np.array_equal(
        sids[: config.n_items], model.item_sids.cpu().numpy()
    ):
        raise ValueError(
            f"sids: wanted those of the network's {config.n_items} items first, got "
            f"{len(sids)} with others"
        )
    larger = OneRec(replace(config, n_items=len(sids)))
    state, room = model.state_dict(), larger.state_dict()
    for name, value in state.items():
        if room[name].shape == value.shape:
            room[name] = value
        else:
            room[name] = torch.cat([value, value.new_zeros(len(sids) - len(value), value.shape[1])])
    larger.load_state_dict(room, assign=True)
    larger.set_catalog(sids, vectors if config.vector_dim else None)
    return larger.train(model.training)
