"""Sessions and rankings for users, from a trained model and a catalogue."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from onerec.errors import DataError
from onerec.inference.backends import (
    Model,
    decoder_of,
    device_type,
    fastest,
    is_graph,
    network_of,
    prepared,
)
from onerec.inference.exported import (
    check_catalog,
    check_finite,
    check_mixture,
    load_exported,
)
from onerec.inference.lineage import Lineage
from onerec.inference.mixture import Mixture
from onerec.inference.native import NativeDecoder, NativeModel
from onerec.inference.results import Candidates, NextItems, Recommendation
from onerec.inference.rules import ItemId, Request, Rules, Tags
from onerec.model.counting import CountRanker, best_places
from onerec.tokenizer import Catalog
from onerec.trie import check_scoring

if TYPE_CHECKING:
    import torch

    from onerec.model.onerec import OneRec

_Ints = npt.NDArray[np.int64]
_MOST_BEAMS = 1 << 20


class _Found(NamedTuple):
    """Sessions that the beam found for a request, best first.

    Attributes:
        request: The request.
        leaves: int64 [n, m].
        sids: int32 [n, m, L].
        scores: float32 [n].
    """

    request: Request
    leaves: _Ints
    sids: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]


class Recommender:
    """Writes sessions for users: encoder, cached decoder, beam search under the catalogue's trie.

    Rules:
    - A history holds item ids, oldest first. Ids that the catalogue lacks are left out; of the rest
      the model reads the latest `history_length`. With none left it reads its start token alone, so
      that a new user gets what the model thinks of nobody in particular.
    - Items are excluded by id (`exclude`, and the whole history with `exclude_history`). A semantic
      id is out of the search when all of its items are excluded.
    - Retired items of the catalogue are read in a history and never shown.
    - Where several items share a semantic id, a session shows the first that is not excluded, and a
      ranking shows all that are not, one after another, in the catalogue's order.
    - No semantic id comes twice in a session. A session is as long as asked, or as there are
      semantic ids left to a request.

    A call holds all its state itself, so threads may share one object.

    Backends: "torch" is the reference, on any device. "native" is the engine in C++ on the CPU: the
    same items on the same float32 weights, several times faster, and a result that does not depend,
    not even in its last bit, on who else is in the call. With "torch" on the CPU that takes
    decoding a request by itself, which is what it does unless `batching` says otherwise. "graph" is
    "torch" on CUDA with a session as one captured graph (compiled, not yet run). Where none is
    named it is "native" on the CPU for a network that the engine runs, and else "torch"; what a
    search without the trie needs of "torch" is then done by the network itself. A backend that is
    named is never replaced.

    Args:
        model: Put into evaluation mode and moved to `device`; for "native" it is packed as it is
            now and left so, and may also be a `NativeModel`. For "graph" it may also be a
            `GraphModel`.
        catalog: Items and semantic ids; levels and codebook size must be the model's, and for a
            model with items of its own (`OneRecConfig.n_items`) all ids, in their order.
        device: "cpu", "cuda", ...; "cpu" for "native", a CUDA device for "graph".
        backend: "torch", "native" or "graph"; None takes the fastest that runs the model.
        dtype: Type to cast the weights to, e.g. `torch.bfloat16`; None leaves them.
        batching: Decode several requests together; None: always, but not with "torch" on the CPU.
        max_rows: Most beams (requests times width) decoded at once, which bounds memory; a single
            request may exceed it.
        num_threads: Threads of a "native" call; None asks torch. "torch" has its own setting.
        mixture: How `rank` weighs generator, dense head and counts; None: by the generator.
        export: Fingerprint of the export that the network came from, for `lineage`.

    Attributes:
        lineage: Fingerprints of what it was made from.

    Raises:
        ValueError: A catalogue of other levels or codebook size, an unknown backend, one that
            cannot run this network or device, or a mixture of other items or for a network without
            a dense head.
        DataError: Weights that are not finite.
    """

    def __init__(
        self,
        model: Model,
        catalog: Catalog,
        *,
        device: str | torch.device = "cpu",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        batching: bool | None = None,
        max_rows: int = 4096,
        num_threads: int | None = None,
        mixture: Mixture | None = None,
        export: str = "",
    ) -> None:
        _check_integer("max_rows", max_rows, 1)
        if num_threads is not None:
            _check_integer("num_threads", num_threads, 1, 4096)
        network = network_of(model)
        check_catalog(network, catalog)
        if mixture is not None:
            check_mixture(network, mixture)
        if not isinstance(network, NativeModel):
            check_finite(network)
        # To "cpu:0", as torchrun has it, all would be copied.
        self._device = "cpu" if device_type(str(device)) == "cpu" else str(device)
        # The network for searches without the trie, where the caller did not ask for the engine.
        free = backend is None and not is_graph(model) and not isinstance(network, NativeModel)
        self._network: OneRec | None = network if free else None  # type: ignore[assignment]
        if backend is None:
            backend = fastest(model, self._device, dtype)
        self.config, self.catalog, self.backend = model.config, catalog, backend
        self.max_rows, self.num_threads, self.mixture = max_rows, num_threads, mixture
        if batching is None:
            batching = backend == "native" or self._device != "cpu"
        self.batching = batching
        self._rules = Rules(catalog, model.config)
        self._model = prepared(
            model, backend, device=self._device, dtype=dtype, num_threads=num_threads
        )
        self._decoder = decoder_of(self._model, catalog.trie, self._device, num_threads)
        self.lineage = Lineage(export, catalog.quantizer, catalog.fingerprint)

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        import torch

        return torch.device(self._device)

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
        from onerec.model.onerec import OneRec

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
        model, catalog, mixture, export = load_exported(folder)
        made = cls(
            model,
            catalog,
            backend="native",
            num_threads=num_threads,
            max_rows=max_rows,
            mixture=mixture,
            export=export,
        )
        made._folder = Path(folder).resolve()
        return made

    # The folder of `from_exported`, by which a copy is made in another process.
    _folder: Path | None = None

    def __reduce__(self) -> Any:
        """Pickles as its folder or as the network; a packed network itself cannot travel."""
        if not isinstance(self._model, NativeModel):
            return super().__reduce__()
        if self._folder is None and self._network is not None:
            options = {
                "dtype": self._model.dtype,
                "batching": self.batching,
                "max_rows": self.max_rows,
                "num_threads": self.num_threads,
                "mixture": self.mixture,
                "export": self.lineage.export,
            }
            return _remade, (type(self), self._network, self.catalog, options)
        if self._folder is None:
            raise TypeError(
                "a Recommender with backend 'native' is pickled by the folder that it was loaded "
                "from: wanted one of Recommender.from_exported, got one made in memory; write it "
                "with onerec.inference.exported.export"
            )
        return _reopened, (type(self), self._folder, self.num_threads, self.max_rows, self._own)

    # A catalogue that took the place of the folder's.
    _own: Catalog | None = None

    def with_catalog(self, catalog: Catalog) -> Self:
        """The same network, shared and not copied, with another catalogue.

        Raises:
            ValueError: A catalogue of other levels or codebook size.
        """
        made = type(self)(
            self._model,
            catalog,
            device=self._device,
            backend=self.backend,
            batching=self.batching,
            max_rows=self.max_rows,
            num_threads=self.num_threads,
            mixture=self.mixture,
            export=self.lineage.export,
        )
        made._folder, made._own = self._folder, catalog
        made._network = self._network
        return made

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
        self._check_search(length, beam_width, scoring, temperature)
        _check_integer("num_sessions", num_sessions, 1)
        if num_sessions > beam_width:
            raise ValueError(
                f"num_sessions must lie in 1..beam_width = {beam_width}, got {num_sessions}"
            )
        histories = _each("histories", histories)
        nothing = Recommendation([], [], np.empty((0, 0, self.catalog.levels), dtype=np.int32))
        results = [nothing for _ in histories]
        requests = self._rules.requests(histories, exclude, exclude_history, length, allow_tags)
        for found in self._search(requests, beam_width, scoring, temperature):
            leaves = found.leaves[:num_sessions]
            results[found.request.place] = Recommendation(
                self.catalog.item_ids[self._rules.first(leaves, found.request)].tolist(),
                found.scores[:num_sessions].tolist(),
                found.sids[:num_sessions],
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
        dense_weight: float | None = None,
        dense_top: int = 50,
    ) -> list[list[ItemId]]:
        """The next items of each user, best first.

        With a `mixture` they are what the beam, the dense head or counts find, ranked by all of
        them; otherwise what a beam search for one item finds.

        Args:
            histories: As for `recommend`.
            k: Most items of a ranking; it is shorter when the beam finds fewer.
            beam_width: Semantic ids followed at once; None is max(k, 128), or all that there are if
                k is more.
            exclude: As for `recommend`.
            exclude_history: As for `recommend`.
            allow_tags: As for `recommend`.
            scoring: As for `recommend`.
            temperature: As for `recommend`.
            dense_weight: None ranks by the mixture where there is one. 0 ranks by the generator.
                Above 0 ranks what the beam or the dense head finds by both heads, see `next_items`
                and `NextItems.best`; `scoring` and `temperature` then steer the beam only.
            dense_top: As for `next_items`.

        Raises:
            ValueError: An argument out of range.
            TypeError: Item ids of another kind than the catalogue's.
        """
        _check_integer("k", k, 1)
        mixture = self.mixture if dense_weight is None else None
        weight = dense_weight or 0.0
        if not 0 <= weight <= 1:
            raise ValueError(f"dense_weight must lie in [0, 1], got {weight}")
        width = max(min(k, self.catalog.trie.n_leaves), 128) if beam_width is None else beam_width
        self._check_search(1, width, scoring, temperature)
        histories = _each("histories", histories)
        if weight or mixture is not None:
            fused = self.next_items(
                histories,
                beam_width=width,
                dense_top=dense_top,
                counts=None if mixture is None else mixture.counts,
                exclude=exclude,
                exclude_history=exclude_history,
                allow_tags=allow_tags,
                scoring=scoring,
                temperature=temperature,
            )
            best = (
                [found.best(k, weight) for found in fused]
                if mixture is None
                else [mixture.best(f, k, exclude_history=exclude_history)[0] for f in fused]
            )
            return [self.catalog.item_ids[items].tolist() for items in best]
        results: list[list[ItemId]] = [[] for _ in histories]
        requests = self._rules.requests(histories, exclude, exclude_history, 1, allow_tags)
        for found in self._search(requests, width, scoring, temperature):
            ids: list[ItemId] = []
            for leaf in found.leaves[:, 0].tolist():
                ids += self.catalog.item_ids[self._rules.free(leaf, found.request)].tolist()
                if len(ids) >= k:
                    break
            results[found.request.place] = ids[:k]
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
        histories = _each("histories", histories)
        nothing = Candidates(np.empty((0, length), np.int64), np.empty(0, np.float32))
        results = [nothing for _ in histories]
        requests = self._rules.requests(histories, None, exclude_history, length)
        for found in self._search(requests, beam_width):
            if found.leaves.shape[1] == length:
                items = self._rules.first(found.leaves, found.request)
                results[found.request.place] = Candidates(items, found.scores)
        return results

    def next_items(
        self,
        histories: Sequence[Sequence[ItemId]],
        *,
        beam_width: int = 128,
        dense_top: int = 50,
        counts: CountRanker | None = None,
        exclude: Sequence[Sequence[ItemId]] | None = None,
        exclude_history: bool = True,
        allow_tags: Sequence[Tags | None] | None = None,
        scoring: str | None = None,
        temperature: float = 1.0,
    ) -> list[NextItems]:
        """The next items that the beam, the dense head or counts find, each scored exactly by all.

        Args:
            histories: As for `recommend`.
            beam_width: Semantic ids followed at once.
            dense_top: Best items of the dense head that join the beam's, and of each part of
                `counts` that has evidence for them.
            counts: Over the items of the catalogue, in its order; None for none.
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
        _check_integer("dense_top", dense_top, 0)
        self._check_search(1, beam_width, scoring, temperature)
        histories = _each("histories", histories)
        parts = 0 if counts is None else len(counts.parts)
        none = np.empty(0, np.float32)
        empty = NextItems(
            none.astype(np.int64), none > 0, none, none, np.empty((parts, 0), np.float32)
        )
        results = [empty for _ in histories]
        beamed: dict[int, _Ints] = {}
        requests = self._rules.requests(histories, exclude, exclude_history, 1, allow_tags)
        for found in self._search(requests, beam_width, scoring, temperature):
            free = [self._rules.free(leaf, found.request) for leaf in found.leaves[:, 0].tolist()]
            beamed[found.request.place] = np.concatenate([*free, np.empty(0, np.int64)])
        every = np.arange(len(self.catalog))
        for chunk in self._chunks([r for r in requests if r.items], beam_width):
            codes = [request.codes for request in chunk]
            dense = _log_softmax(np.asarray(self._decoder.item_scores(codes)))
            counted = self._counted(counts, chunk)
            rows = []
            for request, row, more in zip(chunk, dense, counted, strict=True):
                allowed = self._rules.allowed(every, request.excluded, request.allow)
                scores = np.where(allowed, row, -np.inf)
                top = np.argpartition(-scores, min(dense_top, len(scores) - 1))[:dense_top]
                likely = [beamed[request.place], top[scores[top] > -np.inf]]
                for values in more[1]:
                    likely.append(more[0][best_places(values, dense_top)])
                rows.append(np.unique(np.concatenate(likely)))
            items = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
            for row, mine in enumerate(rows):
                items[row, : len(mine)] = mine
            generator = np.asarray(self._decoder.item_log_probs(codes, items))
            for row, (request, mine) in enumerate(zip(chunk, rows, strict=True)):
                known, values = counted[row]
                evidence = np.zeros((parts, len(mine)), np.float32)
                place = np.minimum(np.searchsorted(known, mine), max(len(known) - 1, 0))
                if len(known):
                    evidence = np.where(known[place] == mine, values[:, place], evidence)
                results[request.place] = NextItems(
                    mine,
                    np.isin(mine, beamed[request.place]),
                    generator[row, : len(mine)],
                    dense[row][mine],
                    evidence,
                )
        return results

    def _counted(
        self, counts: CountRanker | None, chunk: list[Request]
    ) -> list[tuple[_Ints, npt.NDArray[np.float32]]]:
        """For each request the items [c], ascending, that counts know and it may get, and the
        evidence [parts, c]."""
        if counts is None:
            return [(np.empty(0, np.int64), np.empty((0, 0), np.float32))] * len(chunk)
        found = []
        for begin, bounds, items, values in counts.evidence(
            [r.history for r in chunk], [r.excluded for r in chunk]
        ):
            for row, (low, high) in enumerate(itertools.pairwise(bounds)):
                mine, request = items[low:high], chunk[begin + row]
                order = np.argsort(mine)
                order = order[self._rules.allowed(mine[order], request.excluded, request.allow)]
                found.append((mine[order], values[:, low:high][:, order].astype(np.float32)))
        return found

    @property
    def unconstrained(self) -> bool:
        """Whether `generate_unconstrained` can leave the trie.

        Backend "native" by name and networks with `node_outputs` know legal codes only.
        """
        engine = isinstance(self._decoder, NativeDecoder) and self._network is None
        return not engine and not self.config.node_outputs

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
            ValueError: An argument out of range, or backend "native" by name, which knows legal
                codes only.
        """
        from onerec.inference.decoding import FreeBeams, TorchDecoder

        decoder = self._decoder
        if isinstance(decoder, NativeDecoder):
            if self._network is None:
                raise ValueError(
                    "backend 'native' decodes under the trie only; use backend 'torch'"
                )
            decoder = TorchDecoder(
                self._network.to(self.device).eval(), self.catalog.trie, self.device
            )
        length = self.config.session_length if session_length is None else session_length
        self._check_search(length, beam_width)
        histories = _each("histories", histories)
        sids = np.zeros((len(histories), length, self.catalog.levels), dtype=np.int32)
        requests = self._rules.requests(histories, None, False, length)
        for chunk in self._chunks(requests, beam_width):
            beams = FreeBeams(
                self.catalog.levels,
                batch_size=len(chunk),
                beam_width=beam_width,
                session_length=length,
            )
            decoder.run([request.codes for request in chunk], beams, beam_width, length)
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

        Raises:
            DataError: It finds no session, or one whose score is not finite: the catalogue is
                empty, or the network is broken.
        """
        if not len(self.catalog):
            raise DataError("catalog: wanted items, got none")
        full = np.resize(self.catalog.item_ids, self.config.history_length).tolist()
        found = self.recommend([[], full], beam_width=beam_width, exclude_history=False)
        for name, one in zip(("an empty history", "a full history"), found, strict=True):
            if not one.item_ids or not np.isfinite(one.scores).all():
                got = "none" if not one.item_ids else f"the score {one.scores[0]}"
                raise DataError(f"model: wanted a session for {name}, got {got}")
        if is_graph(self._model):
            graphs: Any = self._model
            for size in graphs.history_sizes():
                self.recommend([full[:size]], beam_width=beam_width, exclude_history=False)

    def _chunks(self, requests: list[Request], beam_width: int) -> Iterator[list[Request]]:
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

    def _search(
        self,
        requests: list[Request],
        beam_width: int,
        scoring: str | None = None,
        temperature: float = 1.0,
    ) -> Iterator[_Found]:
        """What the beam finds for each request that can have a session, in no order."""
        if scoring is None:
            scoring = "legal_softmax" if self.config.legal_softmax else "full_softmax"
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
                scoring=scoring,
                temperature=temperature,
            )
            for row, request in enumerate(chunk):
                count = int(result.valid[row])
                leaves, sids, scores = (
                    np.asarray(of_all[row, :count])
                    for of_all in (result.items, result.sids, result.scores)
                )
                yield _Found(request, leaves, sids, scores)

    def _check_search(
        self,
        session_length: int,
        beam_width: int,
        scoring: str | None = None,
        temperature: float = 1.0,
    ) -> None:
        _check_integer("session_length", session_length, 1)
        if session_length > self.config.session_length:
            raise ValueError(
                f"session_length must lie in 1..{self.config.session_length} (the model's), "
                f"got {session_length}"
            )
        _check_integer("beam_width", beam_width, 1, _MOST_BEAMS)
        check_scoring("full_softmax" if scoring is None else scoring, temperature)


def _log_softmax(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of each row."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    total = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
    made: npt.NDArray[np.float32] = shifted - np.log(total).astype(np.float32)
    return made


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):  # type: ignore[operator]
        wanted = f"be at least {least}" if most is None else f"lie in {least}..{most}"
        raise ValueError(f"{name} must {wanted}, got {value}")


def _each(name: str, rows: Iterable[Any]) -> list[Any]:
    """A list of lists, each iterator read once."""
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise TypeError(f"{name} must be a list of lists of item ids, got {rows!r}")
    return [list(row) if isinstance(row, Iterator) else row for row in rows]


def _remade(
    kind: type[Recommender], network: OneRec, catalog: Catalog, options: dict[str, Any]
) -> Recommender:
    """What a pickle of a recommender made from a network, without a named backend, makes."""
    return kind(network, catalog, **options)


def _reopened(
    kind: type[Recommender],
    folder: Path,
    num_threads: int | None,
    max_rows: int,
    catalog: Catalog | None,
) -> Recommender:
    """What `Recommender.__reduce__` pickles."""
    made = kind.from_exported(folder, num_threads=num_threads, max_rows=max_rows)
    return made if catalog is None else made.with_catalog(catalog)
