"""The ranking of held-out sessions that chooses a training's checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onerec.data.session_set import Samples
from onerec.evaluation import metrics as m
from onerec.inference import Recommender
from onerec.model.onerec import OneRec
from onerec.tokenizer import Catalog

WATCHED = 2000  # sessions of valid
_DEPTH = 10
_BEAMS = 20


def ranking_score(
    samples: Samples, catalog: Catalog, *, exclude_history: bool
) -> Callable[[OneRec], float]:
    """NDCG@10 of the generator's next items, as `onerec.training.pretrain` wants its score.

    Args:
        samples: Held-out sessions; every item of a session is a target.
        catalog: Of the network.
        exclude_history: Whether the history can be recommended.
    """
    histories = [samples.history(row) for row in range(len(samples))]
    targets = m.pad_rows([list(dict.fromkeys(samples.target(i))) for i in range(len(samples))])
    hidden = m.pad_rows(histories) if exclude_history else None

    def score(network: OneRec) -> float:
        recommender = fast_recommender(network, catalog)
        ranked = recommender.rank(
            [catalog.item_ids[history].tolist() for history in histories],
            _DEPTH,
            beam_width=_BEAMS,
            exclude_history=exclude_history,
        )
        found = m.pad_rows([catalog.index_of(row) for row in ranked], _DEPTH)
        groups = np.asarray(catalog.leaf_of_item, dtype=np.int64)
        ranks = m.target_ranks(found, targets, groups=groups, exclude=hidden)
        return float(np.nanmean(m.ndcg(ranks, _DEPTH)))

    return score


def fast_recommender(network: OneRec, catalog: Catalog) -> Recommender:
    """Searches where the network lies."""
    return Recommender(network, catalog, device=network.start.device, batching=True)
