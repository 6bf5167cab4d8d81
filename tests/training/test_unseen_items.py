"""Items that training never sees: ranked by their codes and content vectors."""

from __future__ import annotations

import numpy as np
import torch

from onerec import OneRec, OneRecConfig, Recommender
from onerec.tokenizer import Catalog

GROUPS, EACH = 5, 7  # any item of a group is followed by any of the next group
NEW = 2 * EACH  # of group 2, in no history and never a target


def trained(*, leave: bool) -> tuple[OneRec, Catalog]:
    """A small network of the default recipe that has learned to walk from group to group."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(GROUPS, 16)).repeat(EACH, axis=0)
    sids = [divmod(item, EACH) for item in range(GROUPS * EACH)]
    catalog = Catalog.build([*range(GROUPS * EACH)], sids, 8)
    config = OneRecConfig.preset(
        "items",
        levels=2,
        codebook_size=8,
        session_length=1,
        history_length=6,
        n_items=len(sids),
        vector_dim=16,
        item_negatives=0,
        d_model=32,
        encoder_layers=1,
        d_ff=32,
    )
    model = OneRec(config)
    model.set_catalog(catalog.sids, centers + 0.3 * rng.normal(size=centers.shape))
    if leave:
        model.leave_unseen(np.arange(len(sids)) == NEW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        groups = (rng.integers(GROUPS, size=(32, 1)) + np.arange(7)) % GROUPS
        within = rng.integers(EACH - (groups == 2), size=groups.shape) + (groups == 2)
        walks = torch.from_numpy(groups * EACH + within)
        rows = torch.cat([model.item_sids[walks], walks[..., None]], dim=-1)
        loss = model.train()(rows[:, :6], rows[:, 1:, None]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), catalog


def test_a_new_item_with_a_likely_vector_is_recommended() -> None:
    model, catalog = trained(leave=True)
    assert model.items is not None
    assert not model.items.weight[NEW].any()
    recommender, history = Recommender(model, catalog), [[3, EACH + 3]]
    for weight in (0.0, 1.0):  # of the dense head
        (ranked,) = recommender.rank(history, EACH, dense_weight=weight)
        assert sorted(ranked) == [*range(NEW, NEW + EACH)], "the next group, the new item with it"
    # An own vector learns only that the item is never taken.
    pushed = Recommender(trained(leave=False)[0], catalog)
    (found,), (other,) = (one.next_items(history, dense_top=40) for one in (recommender, pushed))
    new, same = found.items == NEW, other.items == NEW
    assert found.dense[new] > other.dense[same] + 1
    assert found.generator[new] > other.generator[same] + 0.2
