"""A world whose items come and go and whose users' interests drift, day by day."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from onerec.data.config import SimulatorConfig
from onerec.data.simulator.population import simulate
from onerec.data.simulator.texts import TOPICS
from onerec.data.simulator.world import World
from onerec.files import atomic_write

Ints = npt.NDArray[np.int64]
_DAY = 86_400_000

# Arrays of a world with a row an item.
_OF_ITEMS = (
    "item_vectors",
    "item_quality",
    "item_seconds",
    "item_topic",
    "item_creator",
    "popularity",
    "embeddings",
)


@dataclass(frozen=True)
class Churn:
    """How a world changes from one day to the next.

    Args:
        items: Share of the items of a day that are new, and that are withdrawn before the next.
        drift: How far a user's interests move in a day, in [0, 1): the cosine of the interests of
            two days in a row is `sqrt(1 - drift ** 2)`.
    """

    items: float = 0.05
    drift: float = 0.1

    def __post_init__(self) -> None:
        for name in ("items", "drift"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted a share in [0, 1), got {getattr(self, name)}")


class ChangingWorld:
    """A simulated world of `config.days` days, of `config.n_items` items a day.

    Args:
        config: Of each day, with `days` of them; `requests_per_user` is of all days.
        churn: What changes.

    Attributes:
        config: As given.
        item_ids: int64 [items of all days].
        born: int64 [items], the first day of each item; those of the beginning have day 0.
        gone: int64 [items], the first day without it.
    """

    def __init__(self, config: SimulatorConfig, churn: Churn) -> None:
        self.config = config
        new = round(churn.items * config.n_items)
        total = config.n_items + new * (config.days - 1)
        self._all = simulate(replace(config, n_items=total))
        self.item_ids = self._all.item_ids
        self.born = np.zeros(total, np.int64)
        self.born[config.n_items :] = 1 + np.arange(total - config.n_items) // max(new, 1)
        self.gone = np.full(total, config.days, np.int64)
        rng = np.random.default_rng([config.seed, 3])
        self._users = [self._all.arrays["user_vectors"]]
        for day in range(1, config.days):
            alive = np.flatnonzero((self.born < day) & (self.gone > day))
            self.gone[rng.choice(alive, new, replace=False)] = day
            before = self._users[-1]
            noise = rng.standard_normal(before.shape)
            noise *= np.linalg.norm(before, axis=1, keepdims=True) / np.linalg.norm(
                noise, axis=1, keepdims=True
            )
            self._users.append(np.sqrt(1 - churn.drift**2) * before + churn.drift * noise)
        self._counts = rng.multinomial(
            self._all.arrays["user_requests"], np.full(config.days, 1 / config.days)
        )

    def items(self, day: int) -> Ints:
        """Rows of `item_ids` that there are on a day, ascending."""
        return np.flatnonzero((self.born <= day) & (self.gone > day))

    def world(self, day: int) -> World:
        """The world of a day; its item i is `items(day)[i]`, its `item_ids` mean nothing."""
        rows = self.items(day)
        arrays: dict[str, Any] = dict(self._all.arrays)
        arrays |= {name: arrays[name][rows] for name in _OF_ITEMS}
        arrays["popularity"] = arrays["popularity"] / arrays["popularity"].sum()
        arrays["user_vectors"] = self._users[day]
        arrays["user_requests"] = self._counts[:, day]
        config = replace(
            self.config,
            n_items=len(rows),
            days=1,
            start_ms=self.config.start_ms + day * _DAY,
            seed=self.config.seed * 1000 + day,
        )
        return World(config, arrays, [self._all.texts[row] for row in rows])

    def days(self) -> Iterator[pa.Table]:
        """The log of each day; nobody is shown an item twice."""
        seen = np.zeros((self.config.n_users, len(self.item_ids)), np.bool_)
        for day in range(self.config.days):
            rows = self.items(day)
            log = pa.concat_tables(self.world(day).log())
            items = rows[log["item_id"].to_numpy() - self.item_ids[0]]
            users = log["user_id"].to_numpy() - 1
            fresh = ~seen[users, items]
            seen[users, items] = True
            place = log.schema.get_field_index("item_id")
            log = log.set_column(place, "item_id", pa.array(self.item_ids[items]))
            last = self.config.start_ms + (day + 1) * _DAY
            inside = log["timestamp"].to_numpy() < last  # what reaches into the night is lost
            yield log.filter(pa.array(fresh & inside))

    def write(self, folder: str | Path) -> list[Path]:
        """Writes a folder a day: interactions.parquet, items.parquet and embeddings.npy of the new
        items, and removed.txt, the items that the day no longer has.

        Returns:
            The folders, in order.
        """
        made = []
        for day, log in enumerate(self.days()):
            target = Path(folder) / f"day={day:02d}"
            rows = np.flatnonzero(self.born == day)
            with atomic_write(target / "interactions.parquet") as path:
                pq.write_table(log, path, compression="zstd")
            write_items(self, rows, target)
            gone = self.item_ids[self.gone == day]
            with atomic_write(target / "removed.txt") as path:
                path.write_text("".join(f"{item}\n" for item in gone), encoding="utf-8")
            made.append(target)
        return made


def write_items(world: ChangingWorld, rows: Ints, folder: Path) -> None:
    """Writes items.parquet and embeddings.npy of some rows of a world's items."""
    arrays, topics = world._all.arrays, list(TOPICS)
    table = pa.table(
        {
            "item_id": world.item_ids[rows],
            "text": [world._all.texts[row] for row in rows],
            "tags": [[topics[k]] for k in arrays["item_topic"][rows]],
            "duration_ms": np.rint(arrays["item_seconds"][rows] * 1000).astype(np.int64),
        }
    )
    with atomic_write(folder / "items.parquet") as path:
        pq.write_table(table, path, compression="zstd")
    with atomic_write(folder / "embeddings.npy") as path, path.open("wb") as file:
        np.save(file, arrays["embeddings"][rows])
