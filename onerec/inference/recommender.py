"""Sessions and rankings for users, from a trained model and a catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from onerec.inference.decoding import FreeBeams, TorchDecoder
from onerec.inference.exported import check_items, load_exported
from onerec.inference.graph import GraphDecoder, GraphModel
from onerec.inference.native import NativeDecoder, NativeModel
from onerec.model.onerec import OneRec
from onerec.ops import BeamResult
from onerec.tokenizer import Catalog

ItemId = Any  # int or str, as in the catalogue
Tags = Sequence[str | int]  # words, or numbers
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Recommendation:
    """Sessions for one request, best first; fewer than asked when the beam found fewer.

    Attributes:
        item_ids: For each session its items in order.
        scores: For each session the sum of the log-probabilities of its codes.
        sids: int32 [sessions, items, L], semantic ids.
    """

    item_ids: list[list[ItemId]]
    scores: list[float]
    sids: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Candidates:
    """All sessions that a beam found for one request, best first, as arrays.

    Attributes:
        items: int64 [n, m], item indices of the catalogue.
        scores: float32 [n], sums of the log-probabilities of the codes.
    """

    items: _Ints
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class NextItems:
    """Items that the beam or the dense head found for one request, and what each head thinks.

    Attributes:
        items: int64 [c], indices of the catalogue, none excluded, ascending.
        beamed: bool [c], whether the beam found it; the others are the dense head's.
        generator: float32 [c], log-probability of the item's semantic id.
        dense: float32 [c], log-probability under the dense head's softmax over all items.
    """

    items: _Ints
    beamed: npt.NDArray[np.bool_]
    generator: npt.NDArray[np.float32]
    dense: npt.NDArray[np.float32]

    def best(self, k: int, dense_weight: float) -> _Ints:
        """The k best by (1 - dense_weight) * generator + dense_weight * dense, best first."""
        score = (1 - dense_weight) * self.generator + dense_weight * self.dense
        return self.items[np.argsort(-score, kind="stable")[:k]]


@dataclass(frozen=True)
class _Request:
    """One history as the model sees it, and what it must not get.

    Attributes:
        place: Position in the caller's list.
        codes: int64 [S, L], or [S, L + 1] with the item's index last.
        excluded: Item indices, sorted.
        denied: Leaves with an excluded item and none that it may get, sorted.
        allow: Tags of which an item must have one, or None.
        items: Items that its session can have.
    """

    place: int
    codes: _Ints
    excluded: _Ints
    denied: _Ints
    allow: int | None
    items: int


class Recommender:
    """Writes sessions for users: encoder, cached decoder, beam search under the catalogue's trie.

    Rules:
    - A history holds item ids, oldest first. Ids that the catalogue lacks are left out; of the rest
      the model reads the latest `history_length`. With none left it reads its start token alone, so
      that a new user gets what the model thinks of nobody in particular.
    - Items are excluded by id (`exclude`, and the whole history with `exclude_history`). A semantic
      id is out of the search when all of its items are excluded.
    - Where several items share a semantic id, a session shows the first that is not excluded, and a
      ranking shows all that are not, one after another, in the catalogue's order.
    - No semantic id comes twice in a session. A session is as long as asked, or as there are
      semantic ids left to a request.

    A call holds all its state itself, so threads may share one object.

    Backends: "torch" is the reference, on any device. "native" is the engine in C++ on the CPU: the
    same items on the same float32 weights, several times faster, and a result that does not depend,
    not even in its last bit, on who else is in the call. With "torch" on the CPU that takes
    decoding a request by itself, which is what it does unless `batching` says otherwise. "graph" is
    "torch" on CUDA with a session as one captured graph (compiled, not yet run).

    Args:
        model: Put into evaluation mode and moved to `device`; for "native" it is packed and left as
            it is, and may also be a `NativeModel`. For "graph" it may also be a `GraphModel`.
        catalog: Items and semantic ids; levels and codebook size must be the model's, and for a
            model with items of its own (`OneRecConfig.n_items`) all ids, in their order.
        device: "cpu", "cuda", ...; "cpu" for "native", a CUDA device for "graph".
        backend: "torch", "native" or "graph".
        dtype: Type to cast the weights to, e.g. `torch.bfloat16`; None leaves them.
        batching: Decode several requests together; None: always, but not with "torch" on the CPU.
        max_rows: Most beams (requests times width) decoded at once, which bounds memory; a single
            request may exceed it.
        num_threads: Threads of a "native" call; None asks torch. "torch" has its own setting.

    Raises:
        ValueError: A catalogue of other levels or codebook size, an unknown backend, or one that
            cannot run this network or device.
    """

    def __init__(
        self,
        model: OneRec | NativeModel | GraphModel,
        catalog: Catalog,
        *,
        device: str | torch.device = "cpu",
        backend: str = "torch",
        dtype: torch.dtype | None = None,
        batching: bool | None = None,
        max_rows: int = 4096,
        num_threads: int | None = None,
    ) -> None:
        config = model.config
        if (config.levels, config.codebook_size) != (catalog.levels, catalog.codebook_size):
            raise ValueError(
                f"catalog must have {config.levels} levels of {config.codebook_size} codes as the "
                f"model, got {catalog.levels} of {catalog.codebook_size}"
            )
        if backend not in ("torch", "native", "graph"):
            raise ValueError(f"backend must be 'torch', 'native' or 'graph', got {backend!r}")
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        check_items(model.network if isinstance(model, GraphModel) else model, catalog)
        self.config, self.catalog, self.backend = config, catalog, backend
        # Empty where there are no tags: a request with some is refused then.
        trie = catalog.trie
        self._leaf_tags = trie.tags.astype(np.int64) if trie.has_tags else np.empty(0, np.int64)
        self._item_tags = self._leaf_tags
        if trie.has_tags:
            given = catalog.tags
            self._item_tags = self._leaf_tags[catalog.leaf_of_item] if given is None else given
        self.device = torch.device(device)
        if self.device.type == "cpu":
            self.device = torch.device("cpu")  # to "cpu:0", as torchrun has it, all would be copied
        self.max_rows, self.num_threads = max_rows, num_threads
        self._decoder: TorchDecoder | NativeDecoder
        if backend == "native":
            if self.device.type != "cpu":
                raise ValueError(f"backend 'native' runs on the CPU, got device {str(device)!r}")
            if isinstance(model, GraphModel):
                raise ValueError("backend 'native' needs a network, got one's graphs")
            if isinstance(model, OneRec):
                model = NativeModel.pack(model, dtype=dtype, num_threads=num_threads)
            elif dtype not in (None, model.dtype):
                raise ValueError(f"dtype must be None or {model.dtype}, as packed, got {dtype}")
            self._decoder = NativeDecoder(model, catalog.trie, num_threads)
            self.batching = batching is None or batching
        else:
            if isinstance(model, NativeModel):
                raise ValueError(f"backend {backend!r} needs a OneRec network, got a packed one")
            if isinstance(model, GraphModel) and backend == "torch":
                raise ValueError("backend 'torch' needs a network, got one's graphs")
            if backend == "graph" and self.device.type != "cuda":
                raise ValueError(f"backend 'graph' needs a CUDA device, got {str(device)!r}")
            if backend == "graph" and isinstance(model, OneRec):
                model = GraphModel(model, device=device, dtype=dtype)
            if isinstance(model, GraphModel):
                self._decoder = GraphDecoder(model, catalog.trie)
            else:
                model = model.to(device=self.device, dtype=dtype).eval()
                self._decoder = TorchDecoder(model, catalog.trie, self.device)
            self.batching = self.device.type != "cpu" if batching is None else batching
        self._model = model

    @classmethod
    def from_pretrained(
        cls, model: str | Path | OneRec, catalog: str | Path | Catalog, **options: Any
    ) -> Self:
        """Loads what is given as a folder; `options` are those of the class.

        Args:
            model: Folder of `OneRec.save_pretrained`, a Hub repository's name, or a model.
            catalog: Folder of `Catalog.save`, or a catalogue.

        Raises:
            DataError: A file is missing or broken.
        """
        if not isinstance(model, OneRec):
            model = OneRec.from_pretrained(model)
        if not isinstance(catalog, Catalog):
            catalog = Catalog.load(catalog)
        return cls(model, catalog, **options)

    @classmethod
    def from_exported(
        cls, folder: str | Path, *, num_threads: int | None = None, max_rows: int = 4096
    ) -> Self:
        """Loads a folder that `onerec export` wrote, for backend "native".

        Raises:
            DataError: A file is missing or broken, or does not fit the others.
        """
        model, catalog = load_exported(folder)
        return cls(model, catalog, backend="native", num_threads=num_threads, max_rows=max_rows)

    def with_catalog(self, catalog: Catalog) -> Self:
        """The same network, shared and not copied, with another catalogue.

        Raises:
            ValueError: A catalogue of other levels or codebook size.
        """
        return type(self)(
            self._model,
            catalog,
            device=self.device,
            backend=self.backend,
            batching=self.batching,
            max_rows=self.max_rows,
            num_threads=self.num_threads,
        )

    def recommend(
        self,
        histories: Sequence[Sequence[ItemId]],
        *,
        session_length: int | None = None,
        beam_width: int = 128,
        num_sessions: int = 1,
        exclude: Sequence[Sequence[ItemId]] | None = None,
        exclude_history: bool = True,
        allow_tags: Sequence[Tags | None] | None = None,
        scoring: str | None = None,
        temperature: float = 1.0,
    ) -> list[Recommendation]:
        """The best sessions of each user.

        Args:
            histories: Item ids, oldest first; may be empty.
            session_length: Items of a session; None is the model's own, which is also the most.
            beam_width: Sessions followed at once (arXiv 2502.18965 serves with 128).
            num_sessions: Sessions returned, at most `beam_width`.
            exclude: For each request item ids never to show; ids unknown to the catalogue are
                ignored.
            exclude_history: Show nothing from the history.
            allow_tags: For each request a list of tags, by word or by number, or None; an item must
                have one of them. Needs a catalogue `with_tags`.
            scoring: As for `onerec.ops.BeamSearch`; None is the softmax that the model was trained
                with.
            temperature: As for `onerec.ops.BeamSearch`.

        Raises:
            ValueError: An argument out of range.
            TypeError: Item ids of another kind than the catalogue's.
        """
        length = self.config.session_length if session_length is None else session_length
        self._check_search(length, beam_width)
        if not 1 <= num_sessions <= beam_width:
            raise ValueError(
                f"num_sessions must lie in 1..beam_width = {beam_width}, got {num_sessions}"
            )
        results: list[Recommendation] = [self._nothing() for _ in histories]

        def keep(request: _Request, result: BeamResult, row: int) -> None:
            found = min(int(result.valid[row]), num_sessions)
            leaves = result.items[row, :found].numpy()
            results[request.place] = Recommendation(
                [[self._first_item(leaf, request) for leaf in session] for session in leaves],
                result.scores[row, :found].tolist(),
                result.sids[row, :found].numpy(),
            )

        self._search(
            self._requests(histories, exclude, exclude_history, length, allow_tags),
            beam_width,
            {"scoring": scoring, "temperature": temperature},
            keep,
        )
        return results

    def rank(
        self,
        histories: Sequence[Sequence[ItemId]],
        k: int,
        *,
        beam_width: int | None = None,
        exclude: Sequence[Sequence[ItemId]] | None = None,
        exclude_history: bool = True,
        allow_tags: Sequence[Tags | None] | None = None,
        scoring: str | None = None,
        temperature: float = 1.0,
        dense_weight: float = 0.0,
        dense_top: int = 50,
    ) -> list[list[ItemId]]:
        """The next items of each user, best first: a beam search for one item, for Recall@k.

        Args:
            histories: As for `recommend`.
            k: Most items of a ranking; it is shorter when the beam finds fewer.
            beam_width: Semantic ids followed at once; None is max(k, 128).
            exclude: As for `recommend`.
            exclude_history: As for `recommend`.
            allow_tags: As for `recommend`.
            scoring: As for `recommend`.
            temperature: As for `recommend`.
            dense_weight: Above 0, rank what the beam or the dense head finds by both heads, see
                `next_items` and `NextItems.best`; `scoring` and `temperature` then steer the beam
                alone.
            dense_top: As for `next_items`.

        Raises:
            ValueError: An argument out of range.
            TypeError: Item ids of another kind than the catalogue's.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not 0 <= dense_weight <= 1:
            raise ValueError(f"dense_weight must lie in [0, 1], got {dense_weight}")
        width = max(k, 128) if beam_width is None else beam_width
        self._check_search(1, width)
        if dense_weight:
            found = self.next_items(
                histories,
                beam_width=width,
                dense_top=dense_top,
                exclude=exclude,
                exclude_history=exclude_history,
                allow_tags=allow_tags,
                scoring=scoring,
                temperature=temperature,
            )
            return [self.catalog.item_ids[c.best(k, dense_weight)].tolist() for c in found]
        results: list[list[ItemId]] = [[] for _ in histories]

        def keep(request: _Request, result: BeamResult, row: int) -> None:
            leaves = result.items[row, : int(result.valid[row]), 0].numpy()
            results[request.place] = self._all_items(leaves, request, k)

        self._search(
            self._requests(histories, exclude, exclude_history, 1, allow_tags),
            width,
            {"scoring": scoring, "temperature": temperature},
            keep,
        )
        return results

    def candidates(
        self,
        histories: Sequence[Sequence[ItemId]],
        *,
        beam_width: int = 128,
        exclude_history: bool = True,
    ) -> list[Candidates]:
        """Every session of the beam, for a reward model to choose among (arXiv 2502.18965, alg. 2).

        A request with too few items left for a whole session gets none.

        Args:
            histories: As for `recommend`.
            beam_width: Sessions wanted; a small catalogue may give fewer.
            exclude_history: As for `recommend`.

        Raises:
            ValueError: An argument out of range.
            TypeError: Item ids of another kind than the catalogue's.
        """
        length = self.config.session_length
        self._check_search(length, beam_width)
        nothing = Candidates(np.empty((0, length), np.int64), np.empty(0, np.float32))
        results = [nothing for _ in histories]

        def keep(request: _Request, result: BeamResult, row: int) -> None:
            found = int(result.valid[row])
            leaves = result.items[row, :found].numpy()
            if leaves.shape[1] < length:
                return
            items = self.catalog.leaf_item_indices[self.catalog.leaf_offsets[leaves]]
            for at in np.argwhere(np.isin(items, request.excluded)):
                items[tuple(at)] = self._free(int(leaves[tuple(at)]), request)[0]
            results[request.place] = Candidates(items, result.scores[row, :found].numpy())

        self._search(self._requests(histories, None, exclude_history, length), beam_width, {}, keep)
        return results

    @torch.inference_mode()
    def next_items(
        self,
        histories: Sequence[Sequence[ItemId]],
        *,
        beam_width: int = 128,
        dense_top: int = 50,
        exclude: Sequence[Sequence[ItemId]] | None = None,
        exclude_history: bool = True,
        allow_tags: Sequence[Tags | None] | None = None,
        scoring: str | None = None,
        temperature: float = 1.0,
    ) -> list[NextItems]:
        """The next items that the beam or the dense head finds, each scored exactly by both.

        Args:
            histories: As for `recommend`.
            beam_width: Semantic ids followed at once.
            dense_top: Best items of the dense head that join the beam's.
            exclude: As for `recommend`.
            exclude_history: As for `recommend`.
            allow_tags: As for `recommend`.
            scoring: Of the beam, as for `recommend`.
            temperature: Of the beam.

        Raises:
            ValueError: An argument out of range, or a model without a dense head
                (`OneRecConfig.item_loss`).
            TypeError: Item ids of another kind than the catalogue's.
        """
        if not self.config.item_loss:
            raise ValueError("model must have a dense head (item_loss above 0) for fused ranking")
        if dense_top < 0:
            raise ValueError(f"dense_top must be at least 0, got {dense_top}")
        self._check_search(1, beam_width)
        none = np.empty(0)
        empty = NextItems(none.astype(np.int64), none > 0, *[none.astype(np.float32)] * 2)
        results = [empty for _ in histories]
        beamed: dict[int, _Ints] = {}

        def keep(request: _Request, result: BeamResult, row: int) -> None:
            leaves = result.items[row, : int(result.valid[row]), 0].numpy()
            items = [self._free(int(leaf), request) for leaf in leaves]
            beamed[request.place] = np.concatenate([*items, np.empty(0, np.int64)])

        requests = self._requests(histories, exclude, exclude_history, 1, allow_tags)
        options = {"scoring": scoring, "temperature": temperature}
        self._search(requests, beam_width, options, keep)
        for chunk in self._chunks([r for r in requests if r.items], beam_width):
            codes = [request.codes for request in chunk]
            dense = self._decoder.item_scores(codes).log_softmax(dim=-1)
            rows = []
            for request, scores in zip(chunk, dense.clone(), strict=True):
                scores[request.excluded] = float("-inf")
                if request.allow is not None:
                    lacking = self._item_tags & request.allow == 0
                    scores[torch.from_numpy(lacking)] = float("-inf")
                best = scores.topk(min(dense_top, len(scores)))
                found = best.indices[best.values > float("-inf")].numpy()
                rows.append(np.union1d(beamed[request.place], found))
            items = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            for row, found in enumerate(rows):
                items[row, : len(found)] = torch.from_numpy(found)
            generator = self._decoder.item_log_probs(codes, items)
            for row, (request, found) in enumerate(zip(chunk, rows, strict=True)):
                results[request.place] = NextItems(
                    found,
                    np.isin(found, beamed[request.place]),
                    generator[row, : len(found)].numpy(),
                    dense[row][torch.from_numpy(found)].numpy(),
                )
        return results

    def generate_unconstrained(
        self,
        histories: Sequence[Sequence[ItemId]],
        *,
        session_length: int | None = None,
        beam_width: int = 1,
    ) -> npt.NDArray[np.int32]:
        """The best session without the trie, legal or not: int32 [B, m, L].

        Args:
            histories: As for `recommend`.
            session_length: As for `recommend`.
            beam_width: 1 takes the likeliest code each time.

        Raises:
            ValueError: An argument out of range, or backend "native", which knows legal codes only.
        """
        if isinstance(self._decoder, NativeDecoder):
            raise ValueError("backend 'native' decodes under the trie only; use backend 'torch'")
        length = self.config.session_length if session_length is None else session_length
        self._check_search(length, beam_width)
        sids = np.zeros((len(histories), length, self.catalog.levels), dtype=np.int32)
        for chunk in self._chunks(self._requests(histories, None, False, length), beam_width):
            beams = FreeBeams(
                self.catalog.levels,
                batch_size=len(chunk),
                beam_width=beam_width,
                session_length=length,
            )
            self._decoder.run([request.codes for request in chunk], beams, beam_width, length)
            best = beams.sids()[:, 0].numpy()
            for row, request in enumerate(chunk):
                sids[request.place] = best[row]
        return sids

    def legality(
        self,
        histories: Sequence[Sequence[ItemId]],
        *,
        session_length: int | None = None,
        beam_width: int = 1,
    ) -> float:
        """Share of the items of `generate_unconstrained` that are in the catalogue, 0 to 1.

        With the trie it is 1 by construction.
        """
        sids = self.generate_unconstrained(
            histories, session_length=session_length, beam_width=beam_width
        )
        leaves = self.catalog.trie.lookup(sids.reshape(-1, self.catalog.levels))
        return float((leaves >= 0).mean()) if leaves.size else 1.0

    def warmup(self, *, beam_width: int = 128) -> None:
        """Runs an empty and a full history once, so that the first user does not pay for set-up.

        Backend "graph" also captures the graphs of a lone request with any history; those of other
        beam widths, session lengths and batches are captured when they are first met.
        """
        full = np.resize(self.catalog.item_ids, self.config.history_length).tolist()
        self.recommend([[], full], beam_width=beam_width, exclude_history=False)
        if isinstance(self._decoder, GraphDecoder):
            for size in self._decoder.graphs.history_sizes():
                self.recommend([full[:size]], beam_width=beam_width, exclude_history=False)

    # Requests

    def _requests(
        self,
        histories: Sequence[Sequence[ItemId]],
        exclude: Sequence[Sequence[ItemId]] | None,
        exclude_history: bool,
        length: int,
        allow_tags: Sequence[Tags | None] | None = None,
    ) -> list[_Request]:
        if exclude is not None and len(exclude) != len(histories):
            raise ValueError(
                f"exclude must have a list for each of {len(histories)} histories, "
                f"got {len(exclude)}"
            )
        if allow_tags is not None and len(allow_tags) != len(histories):
            raise ValueError(
                f"allow_tags must have a list of tags, or None, for each of {len(histories)} "
                f"histories, got {len(allow_tags)}"
            )
        requests = []
        for place, history in enumerate(histories):
            known = self._known("histories", place, history)
            excluded = known if exclude_history else known[:0]
            if exclude is not None:
                excluded = np.concatenate([excluded, self._known("exclude", place, exclude[place])])
            excluded = np.unique(excluded)
            allow = None
            if allow_tags is not None and (tags := allow_tags[place]) is not None:
                try:
                    allow = self.catalog.tag_bits(tags)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"allow_tags[{place}]: {error}") from None
            denied = self._exhausted(excluded, allow)
            window = known[-self.config.history_length :]
            codes = self.catalog.sids[window].astype(np.int64)
            if self.config.n_items:
                codes = np.concatenate([codes, window[:, None]], axis=1)
            requests.append(
                _Request(
                    place,
                    codes,
                    excluded,
                    denied,
                    allow,
                    self._left(denied, allow, length),
                )
            )
        return requests

    def _known(self, name: str, place: int, ids: Sequence[ItemId]) -> _Ints:
        if isinstance(ids, str):
            raise TypeError(f"{name}[{place}] must be a list of item ids, got the string {ids!r}")
        found = self.catalog.find(ids)
        return found[found >= 0]

    def _exhausted(self, excluded: _Ints, allow: int | None) -> _Ints:
        """Leaves that have an item in `excluded` (distinct) and none that may be shown, sorted."""
        leaves, counts = np.unique(self.catalog.leaf_of_item[excluded], return_counts=True)
        offsets = self.catalog.leaf_offsets
        out = counts == offsets[leaves + 1] - offsets[leaves]
        if allow is not None:  # a shared leaf may lack the tags among the items that are left
            for i in np.flatnonzero(~out):
                items = self.catalog.leaf_items(int(leaves[i]))
                free = items[self._item_tags[items] & allow != 0]
                out[i] = np.isin(free, excluded).all()
        exhausted: _Ints = leaves[out]
        return exhausted

    def _left(self, denied: _Ints, allow: int | None, most: int) -> int:
        """How many leaves a request may still get, at most `most`."""
        leaves = self.catalog.trie.n_leaves
        if allow is None:
            return min(most, leaves - len(denied))
        left, block = 0, 4096
        for start in range(0, leaves, block):
            tagged = np.flatnonzero(self._leaf_tags[start : start + block] & allow) + start
            left += len(np.setdiff1d(tagged, denied))
            if left >= most:
                return most
        return left

    def _chunks(self, requests: list[_Request], beam_width: int) -> Iterator[list[_Request]]:
        """Requests to decode together: of one session length, of similar history lengths."""
        size = max(1, self.max_rows // beam_width) if self.batching else 1
        ordered = sorted(requests, key=lambda r: (r.items, len(r.codes)))
        start = 0
        while start < len(ordered):
            end = start + 1
            while (
                end < min(start + size, len(ordered)) and ordered[end].items == ordered[start].items
            ):
                end += 1
            yield ordered[start:end]
            start = end

    # Search

    def _search(
        self,
        requests: list[_Request],
        beam_width: int,
        options: dict[str, Any],
        keep: Callable[[_Request, BeamResult, int], None],
    ) -> None:
        if options.get("scoring") is None:
            trained = "legal_softmax" if self.config.legal_softmax else "full_softmax"
            options = {**options, "scoring": trained}
        for chunk in self._chunks(requests, beam_width):
            length = chunk[0].items
            if length == 0:
                continue
            result = self._decoder.search(
                [request.codes for request in chunk],
                [request.denied for request in chunk],
                [request.allow for request in chunk],
                beam_width=beam_width,
                session_length=length,
                **options,
            )
            for row, request in enumerate(chunk):
                keep(request, result, row)

    def _check_search(self, session_length: int, beam_width: int) -> None:
        longest = self.config.session_length
        if not 1 <= session_length <= longest:
            raise ValueError(
                f"session_length must lie in 1..{longest} (the model's), got {session_length}"
            )
        if beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {beam_width}")

    # Items

    def _free(self, leaf: int, request: _Request) -> _Ints:
        """Items of a leaf that the search found that the request may get, ascending."""
        items = self.catalog.leaf_items(leaf)
        if len(items) == 1:  # or the search would not have found it
            return items
        if request.allow is not None:
            items = items[self._item_tags[items] & request.allow != 0]
        return items[~np.isin(items, request.excluded)]

    def _first_item(self, leaf: int, request: _Request) -> ItemId:
        return self._all_items([leaf], request, 1)[0]

    def _all_items(self, leaves: Iterable[int], request: _Request, most: int) -> list[ItemId]:
        """Ids of the items of `leaves` that the request may get, at most `most`."""
        found: list[ItemId] = []
        for leaf in leaves:
            found += self.catalog.item_ids[self._free(int(leaf), request)].tolist()
            if len(found) >= most:
                break
        return found[:most]

    def _nothing(self) -> Recommendation:
        return Recommendation([], [], np.empty((0, 0, self.catalog.levels), dtype=np.int32))
