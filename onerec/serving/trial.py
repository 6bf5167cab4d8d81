"""What the page `/` asks: users and items to choose from, and recommendations with their reasons.

The routes lie below `/try/` and are the page's own; programs take those below `/v1/`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field

from onerec.errors import DataError
from onerec.inference import Recommender
from onerec.serving.config import ServeConfig
from onerec.serving.versions import Versions

_USERS = 1000  # of the run's log, that can be chosen
_SHOWN = 20  # matches of a search
_OTHERS = 3  # items shown beside one that shares its prefix
_WAITING = 4  # requests of pages; one more is told to come back
_SESSIONS = 3
_Result = TypeVar("_Result")


class TryRequest(BaseModel):
    """A history, and what is wanted."""

    model_config = ConfigDict(extra="forbid")
    history: list[str] = Field(max_length=10_000)
    k: int = Field(default=10, ge=1, le=100)
    exclude_history: bool = True
    allow_tags: list[str] | None = None


class Trial:
    """Texts and users of a run beside what is served.

    Args:
        versions: What is served.
        config: `beam_width` and `run` of it.
        source: The folder that is served; where it lies in a run, texts and users are that run's.

    Raises:
        DataError: `config.run` is not a run, or its files are damaged.
    """

    def __init__(self, versions: Versions, config: ServeConfig, source: str) -> None:
        self._versions, self._config = versions, config
        self._texts: dict[str, str] = {}
        self._users: dict[str, list[str]] = {}
        self._tree: tuple[int, Tree] | None = None
        self._words: tuple[int, list[str], list[str]] | None = None
        self._one = asyncio.Semaphore(1)
        self._waiting = 0
        run = Path(source).resolve().parent if config.run is None else Path(config.run)
        known = (run / "sessions" / "sequences.parquet").is_file()
        if known and (source or config.run):
            self._read(run / "sessions")
        elif config.run is not None:
            raise DataError(f"run: wanted the folder of a run with sessions, got {run}")

    def _read(self, folder: Path) -> None:
        items = pq.read_table(folder / "items.parquet", columns=["item_id", "text"])
        ids = [str(item) for item in items["item_id"].to_pylist()]
        self._texts = {
            item: text for item, text in zip(ids, items["text"].to_pylist(), strict=True) if text
        }
        file = pq.ParquetFile(folder / "sequences.parquet")
        batch = next(file.iter_batches(_USERS, columns=["user_id", "items"]), None)
        if batch is not None:
            for user, taken in zip(batch["user_id"], batch["items"], strict=True):
                self._users[str(user.as_py())] = [ids[item] for item in taken.as_py()]

    def about(self) -> dict[str, Any]:
        """What the page begins with."""
        recommender = self._versions.now.recommender
        return {
            "items": len(recommender.catalog),
            "users": list(self._users),
            "tags": list(recommender.catalog.tag_words),
            "baseline": recommender.mixture is not None,
            "ranks": recommender.mixture is not None or recommender.config.session_length == 1,
            "length": recommender.config.session_length,
            "source": self._versions.now.source,
        }

    def history(self, user: str) -> list[dict[str, Any]]:
        """The items that a user of the run's log took, oldest first.

        Raises:
            KeyError: There is no such user.
        """
        return [self._item(item) for item in self._users[user]]

    def search(self, words: str) -> list[dict[str, Any]]:
        """Items whose id is `words`, then those whose text or id has all of its words."""
        version = self._versions.now
        if self._words is None or self._words[0] != version.number:
            ids = list(map(str, version.recommender.catalog.item_ids.tolist()))
            texts = [f"{item} {self._texts.get(item, '')}".lower() for item in ids]
            self._words = (version.number, ids, texts)
        _, ids, texts = self._words
        wanted = words.lower().split()
        exact = [str(item) for item in _ids(version.recommender, [words])]
        like = (
            item
            for item, text in zip(ids, texts, strict=True)
            if all(word in text for word in wanted)
        )
        found = dict.fromkeys([*exact, *itertools.islice(like, _SHOWN)])
        return [self._item(item) for item in list(found)[:_SHOWN]]

    async def recommend(self, body: TryRequest) -> dict[str, Any]:
        """Lists with scores and paths, and the counting baseline's list.

        Raises:
            HTTPException: Too many pages ask, or a tag is unknown.
        """
        try:
            return await self._alone(lambda: self._recommend(body))
        except (TypeError, ValueError) as error:
            raise HTTPException(422, str(error)) from None

    async def _alone(self, work: Callable[[], _Result]) -> _Result:
        """Runs one piece of work at a time beside the engine's own thread."""
        if self._waiting > _WAITING:
            raise HTTPException(429, "too many pages ask at once", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            async with self._one:
                return await asyncio.to_thread(work)
        finally:
            self._waiting -= 1

    def _recommend(self, body: TryRequest) -> dict[str, Any]:
        version = self._versions.now
        recommender = version.recommender
        begin = time.perf_counter()
        history = _ids(recommender, body.history)
        lists = self._lists(recommender, history, body)
        seconds = time.perf_counter() - begin
        if self._tree is None or self._tree[0] != version.number:
            self._tree = (version.number, Tree(recommender.catalog.sids))
        tree = self._tree[1]
        ids = recommender.catalog.item_ids
        for one in lists:
            for item in one["items"]:
                item["path"] = [
                    {**step, "others": [self._item(str(ids[i])) for i in step["others"]]}
                    for step in tree.path(item.pop("index"))
                ]
        return {
            "milliseconds": round(1000 * seconds, 1),
            "known": len(history),
            "lists": lists,
            "baseline": self._counted(recommender, history, body),
        }

    def _lists(
        self, recommender: Recommender, history: list[Any], body: TryRequest
    ) -> list[dict[str, Any]]:
        common: dict[str, Any] = {
            "exclude_history": body.exclude_history,
            "allow_tags": None if body.allow_tags is None else [body.allow_tags],
        }
        width = max(self._config.beam_width, body.k)
        catalog, mixture = recommender.catalog, recommender.mixture
        if mixture is not None:
            (found,) = recommender.next_items(
                [history], beam_width=width, counts=mixture.counts, **common
            )
            items, scores = mixture.best(found, body.k, exclude_history=body.exclude_history)
            return [self._list(recommender, items, scores.tolist(), None)]
        single = recommender.config.session_length == 1
        (best,) = recommender.recommend(
            [history], beam_width=width, num_sessions=body.k if single else _SESSIONS, **common
        )
        sessions = [np.asarray(catalog.find(items)) for items in best.item_ids]
        if single:
            items = np.concatenate([np.empty(0, np.int64), *sessions]).astype(np.int64)
            return [self._list(recommender, items, best.scores, None)]
        return [
            self._list(recommender, items, [None] * len(items), float(score))
            for items, score in zip(sessions, best.scores, strict=True)
        ]

    def _list(
        self,
        recommender: Recommender,
        items: npt.NDArray[np.int64],
        scores: Any,
        score: float | None,
    ) -> dict[str, Any]:
        ids = recommender.catalog.item_ids
        rows = [
            {**self._item(str(ids[index])), "index": int(index), "score": value}
            for index, value in zip(items, scores, strict=True)
        ]
        return {"score": score, "items": rows}

    def _counted(
        self, recommender: Recommender, history: list[Any], body: TryRequest
    ) -> list[dict[str, Any]] | None:
        """The count ranker's list for the same request; None where the export has no counts."""
        if recommender.mixture is None:
            return None
        catalog = recommender.catalog
        found = np.asarray(catalog.find(history), dtype=np.int64)
        hidden = set(found.tolist()) if body.exclude_history else set()
        if body.allow_tags is not None and catalog.tags is not None:
            bits = catalog.tag_bits(body.allow_tags)
            hidden |= set(np.flatnonzero((catalog.tags & bits) == 0).tolist())
        (ranked,) = recommender.mixture.counts.rank([found], body.k, [sorted(hidden)])
        return [self._item(str(catalog.item_ids[item])) for item in ranked if item >= 0]

    def _item(self, item: str) -> dict[str, Any]:
        return {"item": item, "text": self._texts.get(item, "")}


class Tree:
    """Which items share the prefixes of an item's semantic id.

    Args:
        sids: int32 [N, L].
    """

    def __init__(self, sids: npt.NDArray[np.int32]) -> None:
        self._sids = sids
        self._order = np.lexsort(sids.T[::-1])
        self._place = np.empty(len(sids), dtype=np.int64)
        self._place[self._order] = np.arange(len(sids))
        ordered = sids[self._order]
        self._bounds = []
        for level in range(sids.shape[1]):
            head = ordered[:, : level + 1]
            starts = np.flatnonzero((head[1:] != head[:-1]).any(axis=1)) + 1
            self._bounds.append(np.concatenate([[0], starts, [len(sids)]]))

    def path(self, item: int) -> list[dict[str, Any]]:
        """For each level the item's code, how many items lie below the prefix, and some others."""
        at = int(self._place[item])
        steps = []
        for level, bounds in enumerate(self._bounds):
            part = int(np.searchsorted(bounds, at, side="right"))
            low, high = int(bounds[part - 1]), int(bounds[part])
            others = [int(i) for i in self._order[low : min(high, low + _OTHERS + 1)] if i != item][
                :_OTHERS
            ]
            steps.append(
                {"code": int(self._sids[item, level]), "items": high - low, "others": others}
            )
        return steps


def _ids(recommender: Recommender, history: list[str]) -> list[Any]:
    """The ids of the catalogue for a history; those that it lacks are left out."""
    catalog = recommender.catalog
    if catalog.item_ids.dtype == object:
        ids: list[Any] = list(history)
    else:
        ids = [int(item) for item in history if item.lstrip("-").isdecimal() and len(item) < 19]
    found = np.asarray(catalog.find(ids))
    return [item for item, at in zip(ids, found, strict=True) if at >= 0]


def add_page(app: FastAPI, trial: Trial) -> None:
    """Adds the page and what it asks."""
    page = (Path(__file__).parent / "try.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show() -> str:
        return page

    @app.get("/try/about", include_in_schema=False)
    async def about() -> dict[str, Any]:
        return trial.about()

    @app.get("/try/history", include_in_schema=False)
    async def history(user: str) -> list[dict[str, Any]]:
        try:
            return trial.history(user)
        except KeyError:
            raise HTTPException(404, f"user: {user!r} is not among those of the page") from None

    @app.get("/try/items", include_in_schema=False)
    async def items(words: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(trial.search, words[:200])

    @app.post("/try/recommend", include_in_schema=False)
    async def recommend(body: TryRequest) -> dict[str, Any]:
        return await trial.recommend(body)
