"""Semantic ids of Amazon Beauty by every quantizer: error, balance and collisions.

The peers: FAISS residual k-means without balance, and Algorithm 1 of OneRec (arXiv 2502.18965)
level by level; "rank" numbers the items of an id as MiniOneRec (arXiv 2510.24431) does.
"""

from __future__ import annotations

import importlib.util
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from onerec.tokenizer import ResidualQuantizer
from onerec.tokenizer.residual_quantizer import describe_ids


def coded(name: str, x: NDArray[np.float32], levels: int, size: int) -> dict[str, float]:
    """Semantic ids of real items: processor seconds, error and collisions."""
    begin = time.process_time()
    if name == "faiss":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        residual, columns = x.copy(), []
        for level in range(levels):
            found = faiss.Kmeans(x.shape[1], size, niter=10, seed=level + 1)
            found.cp.max_points_per_centroid = len(x)
            found.train(residual)
            columns.append(found.index.search(residual, 1)[1][:, 0])
            residual -= found.centroids[columns[-1]]
        sids = np.stack(columns, axis=1).astype(np.int32)
        mse = float((residual.astype(np.float64) ** 2).sum(1).mean())
    else:
        method, distinct = ("sequential", "none") if name == "sequential" else ("priced", name)
        quantizer = ResidualQuantizer(
            levels, size, method=method, distinct=distinct, random_state=0
        ).fit(x)
        sids, mse = quantizer.sids_, quantizer.report_["mse"]
    report = describe_ids(sids, size)
    if name in ("distinct", "rank"):
        assert report["unique_share"] == 1
    return {
        "seconds": time.process_time() - begin,
        "MSE": mse,
        "unique share": report["unique_share"],
        "collision rate": report["collision_rate"],
        "largest collision": report["largest_collision"],
        "bits at the last level": report["entropy"][levels - 1],
        "used at the last level": report["utilisation"][levels - 1],
    }


def test_semantic_ids(compare: Any) -> None:
    """3 x 256 ids of the 12,101 items of Amazon Beauty, 384-d text vectors; wants ONEREC_DATA."""
    folder = os.environ.get("ONEREC_DATA")
    path = Path(folder or "") / "amazon2014_beauty" / "item_embeddings_minilm.npy"
    if folder is None or not path.exists():
        pytest.skip("wants ONEREC_DATA with amazon2014_beauty/item_embeddings_minilm.npy")
    x = np.load(path).astype(np.float32)
    names = ["distinct", "none", "cap", "rank", "sequential"]
    if importlib.util.find_spec("faiss"):
        names.append("faiss")
    compare.alone(
        {name: partial(coded, name, x, 3, 256) for name in names},
        facts={"times": "processor seconds of all threads"},
    )
