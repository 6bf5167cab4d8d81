"""From a log of your own to sessions, in Python: `python examples/own_log.py [NEW_FOLDER]`.

Makes a small log first, so that it runs by itself; everything after `make_log` is what you would
write for yours. The same in one command: `onerec run --data FOLDER --out runs/mine`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onerec import OneRec, OneRecConfig, Recommender
from onerec.data import SessionConfig, build_sessions, open_log
from onerec.tokenizer import Catalog, ResidualQuantizer
from onerec.training import TrainConfig, pretrain


def make_log(folder: Path) -> None:
    """300 users who each keep to one of ten topics; 400 videos; ten exposures a visit."""
    rng = np.random.default_rng(0)
    users, visits, shown, items = 300, 12, 10, 400
    rows = users * visits * shown
    user = np.repeat(np.arange(users), visits * shown)
    item = rng.integers(items, size=rows)
    item = np.where(rng.random(rows) < 0.4, item - item % 10 + user % 10, item)
    liked = item % 10 == user % 10
    # A visit every day, begun at the user's own time of the day; an exposure a minute.
    day = np.repeat(np.tile(np.arange(visits), users), shown)
    start = np.repeat(rng.integers(1440, size=users), visits * shown)
    minute = 1440 * day + start + np.tile(np.arange(shown), users * visits)
    interactions = {
        "user_id": user,
        "item_id": item,
        "timestamp": 1_700_000_000_000 + 60_000 * minute,
        "request_id": np.repeat(np.arange(users * visits), shown),
        "watch_time_ms": np.where(liked, 30_000, 2_000),
        "duration_ms": np.full(rows, 30_000),
        "like": (liked & (rng.random(rows) < 0.2)).astype(np.int64),
    }
    pq.write_table(pa.table(interactions), folder / "interactions.parquet")
    texts = [f"video {i} about topic {i % 10}" for i in range(items)]
    pq.write_table(pa.table({"item_id": np.arange(items), "text": texts}), folder / "items.parquet")
    topics = rng.normal(size=(10, 16))
    vectors = topics[np.arange(items) % 10] + 0.3 * rng.normal(size=(items, 16))
    np.save(folder / "embeddings.npy", vectors.astype(np.float32))


def main(folder: Path) -> None:
    make_log(folder)

    # Good sessions, split by time, and a vector for every item.
    with open_log(folder) as log:
        data = build_sessions(log, SessionConfig(), folder / "sessions")
    print(f"{len(data.samples('train')):,} sessions to train on")

    # Two codes an item, each code used equally often, no two items with the same pair.
    size = 32
    quantizer = ResidualQuantizer(2, size, distinct="distinct").fit(data.embeddings)
    catalog = Catalog.build(
        data.items["item_id"].to_pylist(),
        quantizer.sids_,
        size,
        quantizer=quantizer.fingerprint,
    )

    model = OneRec(
        OneRecConfig.preset(
            "paper-tiny", codebook_size=size, levels=2, session_length=data.session_length
        )
    )
    pretrain(
        model,
        data.samples("train"),
        data.samples("valid"),
        catalog.sids,
        TrainConfig(max_steps=40, batch_size=64),
        folder / "pretrain",
        progress=lambda done, total, note: print(f"step {done}/{total} {note}", end="\r"),
    )

    print()

    # Later, or in a server: Recommender.from_pretrained(model folder, catalogue folder).
    catalog.save(folder / "catalog")
    recommender = Recommender.from_pretrained(folder / "pretrain" / "model", folder / "catalog")
    texts = data.items["text"].to_pylist()
    watched = [3, 13, 23, 33]  # topic 3
    for session in recommender.recommend([watched], beam_width=20, num_sessions=2)[0].item_ids:
        print(*(texts[item] for item in session), sep=" | ")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
        target.mkdir(parents=True)  # fails where a folder is: its log would be overwritten
        main(target)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
