"""Never updated, updated daily, retrained daily: a simulated world with churn, day after day.

    python benchmarks/every_day.py OUT --seeds 2

prints a line a day and system, and writes OUT/every_day.json: of the lists of ten of the evening,
on the world of the next day, the true expected seconds of an item, Recall@10 of what was really
taken, the share of items that are new, the seconds of these, and what the day's work cost.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data import SessionConfig, SessionSet, SimulatorConfig
from onerec.data.simulator.days import ChangingWorld, Churn, write_items
from onerec.inference import Mixture, Recommender
from onerec.model import OneRec
from onerec.pipeline import Settings, make_stage
from onerec.pipeline.update import UpdateConfig, update
from onerec.tokenizer import Catalog

STAGES = ("sessions", "tokenize", "pretrain", "mixture")


def settings(data: Path, steps: int) -> Settings:
    found = Settings.of_preset("items", data=str(data))
    # Nearly all rows are learned: the systems are measured on the day after.
    found.sessions = SessionConfig(rule="next", length=1, valid_fraction=0.05, test_fraction=0.01)
    found.model.update(
        history_length=30, d_model=32, encoder_layers=1, d_ff=64, dropout=0.2, item_negatives=0
    )
    found.train = replace(found.train, steps=steps, eval_every=100, num_threads=1)
    return found


def whole_log(world: ChangingWorld, folders: list[Path], out: Path) -> Path:
    """A folder with all rows and items of some days."""
    out.mkdir(parents=True)
    rows = pa.concat_tables([pq.read_table(one / "interactions.parquet") for one in folders])
    pq.write_table(rows, out / "interactions.parquet")
    write_items(world, np.flatnonzero(world.born < len(folders)), out)
    return out


def made(run: Path) -> Recommender:
    """What a finished folder serves."""
    return Recommender(
        OneRec.from_pretrained(run / "pretrain/model"),
        Catalog.load(run / "tokenize"),
        mixture=Mixture.load(run / "mixture/whole"),
    )


def measure(
    recommender: Recommender, world: ChangingWorld, day: int, folders: list[Path]
) -> dict[str, float]:
    """The lists of ten on the evening of `day`, on the world of the day after."""
    past = pa.concat_tables([pq.read_table(f / "interactions.parquet") for f in folders[: day + 1]])
    past = past.sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    good = past.filter(pa.array(past["long_view"].to_numpy() == 1))
    users = np.arange(1, world.config.n_users + 1)
    ids, owner = good["item_id"].to_numpy(), good["user_id"].to_numpy()
    bounds = np.searchsorted(owner, [users, users + 1])
    histories = [ids[a:b].tolist() for a, b in bounds.T]
    shown_ids, shown_by = past["item_id"].to_numpy(), past["user_id"].to_numpy()
    bounds = np.searchsorted(shown_by, [users, users + 1])
    exclude = [shown_ids[a:b].tolist() for a, b in bounds.T]
    catalog = recommender.catalog
    dead = world.item_ids[world.gone <= day + 1]
    dead = dead[catalog.find(dead) >= 0].tolist()
    lists = recommender.rank(histories, 10, beam_width=20, exclude=[e + dead for e in exclude])
    tomorrow = world.world(day + 1)
    alive = world.items(day + 1)
    rows = np.array([world.item_ids.searchsorted(row) for row in lists])
    place = np.searchsorted(alive, rows)
    seconds = tomorrow.expected_watch_time(users[:, None] - 1, place)
    new = world.born[rows] == day
    nextday = pq.read_table(folders[day + 1] / "interactions.parquet")
    nextday = nextday.filter(pa.array(nextday["long_view"].to_numpy() == 1))
    taken = set(zip(nextday["user_id"].to_pylist(), nextday["item_id"].to_pylist(), strict=True))
    hits: dict[int, list[bool]] = {}
    shown = {(int(u), int(i)) for u, row in zip(users, lists, strict=True) for i in row}
    for user, item in taken:
        hits.setdefault(user, []).append((user, item) in shown)
    best = np.sort(tomorrow.expected_watch_time(users[:, None] - 1, np.arange(len(alive))[None]))
    return {
        "seconds": float(seconds.mean()),
        "best": float(best[:, -10:].mean()),
        "recall@10": float(np.mean([np.mean(one) for one in hits.values()])),
        "new_shown": float(new.mean()),
        "new_seconds": float((seconds * new).sum() / seconds.sum()),
    }


def one_world(out: Path, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    config = SimulatorConfig(
        n_users=args.users,
        n_items=args.items,
        n_creators=60,
        days=args.base + args.days + 1,
        requests_per_user=args.requests * (args.base + args.days + 1),
        seed=seed,
    )
    world = ChangingWorld(config, Churn(args.churn, args.drift))
    folders = world.write(out / "log")
    found: list[dict[str, Any]] = []

    def trained(name: str, last: int) -> tuple[Path, float]:
        run = out / name
        data = whole_log(world, folders[: last + 1], out / f"{name}-log")
        chosen = settings(data, args.steps)
        began = time.process_time()
        for stage in STAGES:
            make_stage(stage, chosen, run)
        return run, time.process_time() - began

    base, cost = trained("base", args.base - 1)
    counted = SessionSet.load(base / "sessions").funnel["sessions"]
    print(f"seed {seed}: base in {cost:.0f} s, sessions {counted}", flush=True)
    never = made(base)
    for day in range(args.base, args.base + args.days):
        config_of = UpdateConfig(epochs=args.epochs, lr=args.lr, replay=args.replay, guard=1.0)
        systems: dict[str, tuple[Recommender, float]] = {"never updated": (never, 0.0)}
        began = time.process_time()
        line = update(
            base,
            folders[day],
            remove=folders[day] / "removed.txt",
            config=config_of,
        )
        assert line is not None
        spent = time.process_time() - began
        systems["updated"] = made(base / "updates" / line["version"]), spent
        if args.retrain:
            run, spent = trained(f"retrained-{day}", day)
            systems["retrained"] = made(run), spent
            shutil.rmtree(run)
        for name, (recommender, cost) in systems.items():
            row = {"seed": seed, "day": day, "system": name, "cost": cost}
            row |= measure(recommender, world, day, folders)
            found.append(row)
            print(
                " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items())
            )
        print(
            "   ",
            line["measure"]["ndcg@10"],
            line["measure"]["held_out"],
            line["check"],
            line["pretrain"],
            line["seconds"],
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--users", type=int, default=600)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--base", type=int, default=4)
    parser.add_argument("--days", type=int, default=4)
    parser.add_argument("--requests", type=float, default=2.0)
    parser.add_argument("--churn", type=float, default=0.05)
    parser.add_argument("--drift", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--epochs", type=float, default=UpdateConfig.epochs)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--replay", type=float, default=UpdateConfig.replay)
    parser.add_argument("--retrain", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    rows = [row for seed in args.seeds for row in one_world(args.out / f"seed{seed}", seed, args)]
    (args.out / "every_day.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
