"""One process of test_streaming.py: fits a mapped file with others, saves the result."""

import sys

import numpy as np
import torch.distributed as dist

from onerec.tokenizer import BalancedKMeans, open_rows

rank, count, rendezvous, data, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
kmeans = BalancedKMeans(
    40, max_iter=2, random_state=0, num_threads=1, distributed=True, memory_budget=2 << 20
).fit(open_rows(data))
np.savez(
    f"{out}{rank}.npz",
    labels=kmeans.labels_,
    prices=kmeans.prices_,
    centers=kmeans.cluster_centers_,
    gap=kmeans.gap_,
)
dist.destroy_process_group()
