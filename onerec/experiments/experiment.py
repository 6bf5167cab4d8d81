"""Trains a system of a preset; measures what was trained on valid and test, masked and unmasked."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from onerec.data import Samples, SessionSet
from onerec.evaluation.adapters import RecommenderRanker, ScoreRanker
from onerec.evaluation.baselines import Popularity, Ranker
from onerec.evaluation.metrics import FloatArray, pad_rows
from onerec.evaluation.watched import fast_recommender
from onerec.experiments.compare import CASES, DEPTH, METRICS, Run, session_scores
from onerec.experiments.ids import make_ids
from onerec.experiments.presets import System
from onerec.files import atomic_write
from onerec.inference import NextItems, Recommender
from onerec.model import OneRec, OneRecConfig, SASRec, SASRecConfig
from onerec.pipeline.settings import TokenizeConfig
from onerec.progress import Progress
from onerec.tokenizer import Catalog
from onerec.training import TrainConfig, pretrain
from onerec.training.batches import PrefixBatches, SessionBatches

WATCHED = 3000  # sessions of valid that choose the checkpoint
_BLOCK = 2048  # sessions measured between two saves
_WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))

Rankings = dict[str, dict[tuple[str, str], FloatArray]]


class Experiment:
    """A data set, and how systems are trained and measured on it.

    Args:
        data: Sessions of one item (the rule "next").
        max_users: A seeded sample of so many users is measured; all when None.
        levels: L of the generators' ids, without a collision digit.
        codebook_size: K.
        beam_width: Of generators.
        epochs: Of each training, instead of the system's own.
        device: "auto", "cpu" or "cuda".
        progress: Opens a bar with a title.

    Raises:
        ValueError: A split has no sessions.
    """

    def __init__(
        self,
        data: SessionSet,
        *,
        max_users: int | None,
        levels: int,
        codebook_size: int,
        beam_width: int,
        epochs: float | None,
        device: Literal["auto", "cpu", "cuda"],
        progress: Callable[[str], AbstractContextManager[Progress]],
    ) -> None:
        self.data = data
        self.levels, self.codebook_size = levels, codebook_size
        self.beam_width, self.epochs, self.device = beam_width, epochs, device
        self.progress = progress
        self.parts = {}
        for split in ("valid", "test"):
            samples = data.samples(split)
            if not len(samples):
                raise ValueError(f"the split {split} has no sessions")
            self.parts[split] = _some_users(samples, max_users)
        self.watched = self.parts["valid"].sample(WATCHED)
        self._seen = _histories(self.watched, range(len(self.watched)))

    def train(self, system: System, seed: int, folder: Path, title: str) -> dict[str, Any]:
        """Trains one network in `folder`/training, or goes on there; facts of the training."""
        if system.network == "popularity":
            return {"parameters": 0}
        if system.network == "sasrec":
            return self._train_sasrec(system, seed, folder, title)
        return self._train_onerec(system, seed, folder, title)

    def measure(
        self, system: System, seed: int, folder: Path, facts: dict[str, Any], title: str
    ) -> list[Run]:
        """The rows of a network that `train` left in `folder`, in every case.

        Args:
            system: What was trained.
            seed: Of the training.
            folder: Where it was trained; candidates are kept there, so that a stopped measurement
                goes on.
            facts: What `train` gave.
            title: Of the progress bars.
        """
        started = time.perf_counter()
        found: dict[str, Any] = {}
        if system.network == "popularity":
            counts = self.data.items["train_count"].to_numpy()
            rows = {system.row: self._measure(Popularity(counts), title)}
        elif system.network == "sasrec":
            sasrec = SASRec.from_pretrained(folder / "training" / "model")
            rows = {system.row: self._measure(self._score_ranker(self._placed(sasrec)), title)}
        else:
            model = self._placed(OneRec.from_pretrained(folder / "training" / "model"))
            sids = model.item_sids.cpu().numpy() if model.item_column else _load_ids(folder)[0]
            recommender = fast_recommender(model, self._catalog(sids, model.config.codebook_size))
            if model.config.item_loss:
                rows, found["dense_weight"] = self._measure_fused(
                    recommender, system, folder, title
                )
            else:
                ranker = RecommenderRanker(
                    recommender, self._item_ids(), beam_width=self.beam_width
                )
                rows = {system.row: self._measure(ranker, title)}
        if system.network != "popularity":
            found["evaluate_seconds"] = time.perf_counter() - started
        return [
            Run(row, system.name, seed, cases, {**facts, **found}) for row, cases in rows.items()
        ]

    def flops(self, system: System, facts: dict[str, Any]) -> float:
        """Floating-point operations of a training step a target item, forward and backward.

        Counted on one batch as wide as training's, its products and attentions.
        """
        if system.network == "popularity":
            return 0.0
        generator = np.random.default_rng(0)
        settings = facts["settings"]
        if system.network == "sasrec":
            model: SASRec | OneRec = SASRec(SASRecConfig(**settings))
            sids = self._rows()
        else:
            config = OneRecConfig(**settings)
            model = OneRec(config)
            sids = generator.integers(config.codebook_size, size=(self.data.n_items, config.levels))
            if config.n_items:
                model.set_catalog(sids, self.data.embeddings if config.vector_dim else None)
        return training_flops(model, self.data.samples("train"), sids, system.train["batch_size"])

    def _train(
        self,
        model: Any,
        sids: npt.NDArray[np.integer],
        system: System,
        seed: int,
        folder: Path,
        title: str,
        score: Callable[[Any], float],
    ) -> dict[str, Any]:
        """Trains with the checkpoint chosen by NDCG@10 on valid; facts of the training."""
        train = self.data.samples("train")
        fields = dict(system.train)
        if self.epochs is not None:
            fields["epochs"] = self.epochs
        samples = len(np.unique(train.user_row)) if model.prefixes else len(train)
        per_epoch = -(-samples // fields["batch_size"])
        every = max(1, round(system.eval_epochs * per_epoch))
        config = TrainConfig(
            **fields,
            max_steps=None,
            seed=seed,
            device=self.device,
            eval_every=every,
            checkpoint_every=every,
        )
        with self.progress(title) as report:
            result = pretrain(
                model,
                train,
                self.watched,
                sids,
                config,
                folder / "training",
                score=score,
                progress=report,
            )
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_seconds": result.seconds,
            "epochs": config.epochs,
            "selected_epoch": result.selected_step / per_epoch,
            "valid_score": result.valid_score,
            "settings": dataclasses.asdict(model.config),
        }

    def _train_sasrec(self, system: System, seed: int, folder: Path, title: str) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = SASRec(SASRecConfig(self.data.n_items, **system.model))

        def score(network: SASRec) -> float:
            return self._ndcg(self._score_ranker(network).rank(self._seen, DEPTH, self._seen))

        return self._train(model, self._rows(), system, seed, folder, title, score)

    def _train_onerec(self, system: System, seed: int, folder: Path, title: str) -> dict[str, Any]:
        data = self.data
        levels, size = self.levels, self.codebook_size
        if system.model.get("node_outputs"):
            levels, size = TokenizeConfig().shape_for(data.n_items)
        if not (folder / "training" / "ids.npz").is_file():
            with self.progress(f"{title}: semantic ids") as report:
                quantizer = make_ids(system.ids, data.embeddings, levels, size, seed, report)
            _save_ids(folder, quantizer.sids_, {**quantizer.report_, "tokenizer": system.ids})
        sids, ids_report = _load_ids(folder)
        dense = system.model.get("item_loss", 0.0) > 0
        sizes = {"n_items": data.n_items, "vector_dim": data.embeddings.shape[1]} if dense else {}
        torch.manual_seed(seed)
        config = OneRecConfig(
            codebook_size=size,
            levels=sids.shape[1],
            session_length=1,
            **system.model,
            **sizes,
        )
        model = OneRec(config)
        if dense:
            model.set_catalog(sids, data.embeddings)
        catalog = self._catalog(sids, size)

        def score(network: OneRec) -> float:
            recommender = fast_recommender(network, catalog)
            if dense:
                found = recommender.next_items(
                    [catalog.item_ids[h].tolist() for h in self._seen], beam_width=20, dense_top=20
                )
                return self._ndcg(_padded([c.best(DEPTH, 0.5) for c in found]))
            ranker = RecommenderRanker(recommender, self._item_ids(), beam_width=20)
            return self._ndcg(ranker.rank(self._seen, DEPTH, self._seen), ranker.groups)

        facts = self._train(model, sids, system, seed, folder, title, score)
        return {**facts, "active_parameters": model.num_parameters(active=True), "ids": ids_report}

    def _rows(self) -> npt.NDArray[np.int64]:
        """What SASRec reads instead of semantic ids: the items' own indices, [N, 1]."""
        return np.arange(self.data.n_items)[:, None]

    def _item_ids(self) -> list[Any]:
        ids: list[Any] = self.data.items["item_id"].to_pylist()
        return ids

    def _catalog(self, sids: npt.NDArray[np.integer], codebook_size: int) -> Catalog:
        return Catalog.build(self._item_ids(), sids, codebook_size)

    def _placed(self, model: Any) -> Any:
        """The network where it is measured, in evaluation mode."""
        cuda = self.device != "cpu" and torch.cuda.is_available()
        return model.to("cuda" if cuda else "cpu").eval()

    def _score_ranker(self, network: SASRec) -> ScoreRanker:
        length = network.config.history_length
        return ScoreRanker(network.scores, self._rows(), length, device=network.items.weight.device)

    def _ndcg(self, ranked: npt.NDArray[np.int64], groups: Any = None) -> float:
        """NDCG@10 of rankings of the sessions that choose the checkpoint, masked."""
        targets = self.watched.targets(np.arange(len(self.watched)), 1).astype(np.int64)
        scores = session_scores(ranked, targets, groups=groups, exclude=pad_rows(self._seen))
        return float(scores[:, METRICS.index("ndcg@10")].mean())

    def _measure(self, ranker: Ranker, title: str) -> dict[tuple[str, str], FloatArray]:
        """The METRICS of a ranker in each case."""
        found = {}
        for split, history in CASES:
            samples = self.parts[split]
            rows = []
            with self.progress(f"{title}: {split}, {history}") as report:
                for begin in range(0, len(samples), 1024):
                    part = range(begin, min(begin + 1024, len(samples)))
                    seen = _histories(samples, part)
                    hidden = seen if history == "masked" else None
                    ranked = ranker.rank(seen, DEPTH, hidden)
                    rows.append(
                        session_scores(
                            ranked,
                            samples.targets(np.arange(part.start, part.stop), 1).astype(np.int64),
                            groups=ranker.groups,
                            exclude=None if hidden is None else pad_rows(hidden),
                        )
                    )
                    report(part.stop, len(samples), "")
            found[split, history] = np.concatenate(rows)
        return found

    def _measure_fused(
        self, recommender: Recommender, system: System, folder: Path, title: str
    ) -> tuple[Rankings, float]:
        """Generator alone, dense head alone and both, the weight chosen on valid by NDCG@10."""
        ids = recommender.catalog.item_ids
        names = [f"{system.row}, {part}" for part in ("generator", "dense head", "fused")]
        rows: Rankings = {name: {} for name in names}
        weight = 0.0
        for split, history in CASES:
            samples = self.parts[split]
            targets = samples.targets(np.arange(len(samples)), 1).astype(np.int64)
            seen = _histories(samples, range(len(samples)))
            masked = history == "masked"
            found: list[NextItems] = []
            with self.progress(f"{title}: {split}, {history}") as report:
                for begin in range(0, len(samples), _BLOCK):
                    path = folder / "training" / f"candidates-{split}-{history}-{begin}.npz"
                    if not path.is_file():
                        made = recommender.next_items(
                            [ids[h].tolist() for h in seen[begin : begin + _BLOCK]],
                            beam_width=self.beam_width,
                            dense_top=2 * DEPTH,
                            exclude_history=masked,
                        )
                        _save_next_items(path, made)
                    found += _load_next_items(path)
                    report(len(found), len(samples), "")
            hidden = pad_rows(seen) if masked else None

            def scored(
                ranked: list[npt.NDArray[np.int64]], targets: Any = targets, hidden: Any = hidden
            ) -> FloatArray:
                return session_scores(_padded(ranked), targets, exclude=hidden)

            if (split, history) == CASES[0]:
                place = METRICS.index("ndcg@10")
                tried = [
                    scored([c.best(DEPTH, w) for c in found])[:, place].mean() for w in _WEIGHTS
                ]
                weight = _WEIGHTS[int(np.argmax(tried))]
            generated = [
                c.items[c.beamed][np.argsort(-c.generator[c.beamed], kind="stable")[:DEPTH]]
                for c in found
            ]
            rows[names[0]][split, history] = scored(generated)
            rows[names[1]][split, history] = scored([c.best(DEPTH, 1.0) for c in found])
            rows[names[2]][split, history] = scored([c.best(DEPTH, weight) for c in found])
        return rows, weight


def training_flops(
    model: Any, train: Samples, sids: npt.NDArray[np.integer], batch_size: int
) -> float:
    """Floating-point operations of forward and backward a target item, counted on one batch.

    Args:
        model: As for `onerec.training.pretrain`; its gradients are left as they were.
        train: Training samples.
        sids: int [N, L].
        batch_size: Samples of the batch, the first of a seeded order.
    """
    batches = (PrefixBatches if model.prefixes else SessionBatches)(
        train,
        sids,
        history_length=model.config.history_length,
        session_length=model.config.session_length,
        batch_size=batch_size,
        item_column=model.item_column,
    )
    batch = batches.batch(0)
    # The counter knows neither the fused attention of CPUs, nor the product in place, nor experts.
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.addmm_: _addmm_flop,
            torch.ops.onerec.moe_experts: _experts_flop,
            torch.ops.onerec.moe_experts_backward: _experts_backward_flop,
        },
    )
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = model(batch.history, batch.target).loss
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return counter.get_total_flops() / batch.items


# What a count is made from are the shapes of an operation's arguments.


def _addmm_flop(_: Any, a: Any, b: Any, **__: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


def _experts_flop(*shapes: Any, **_: Any) -> int:
    _x, order, _inverse, _ends, _gates, w13, w2 = shapes[:7]
    return int(2 * order[0] * (w13[1] * w13[2] + w2[1] * w2[2]))


def _experts_backward_flop(*shapes: Any, **_: Any) -> int:
    return 2 * _experts_flop(*shapes[1:])


def _histories(samples: Samples, part: range) -> list[npt.NDArray[np.int32]]:
    return [samples.history(i) for i in part]


def _save_ids(folder: Path, sids: npt.NDArray[np.integer], report: dict[str, Any]) -> None:
    """Keeps the ids and what is known of them beside the training that reads them."""
    with atomic_write(folder / "training" / "ids.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, sids=sids, report=np.array(json.dumps(report)))


def _load_ids(folder: Path) -> tuple[npt.NDArray[np.int32], dict[str, Any]]:
    """What `_save_ids` wrote."""
    with np.load(folder / "training" / "ids.npz") as file:
        return file["sids"], json.loads(str(file["report"]))


def _padded(rows: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return pad_rows(rows, DEPTH)


def _save_next_items(path: Path, found: list[NextItems]) -> None:
    """Writes what `Recommender.next_items` found, so that a stopped measurement goes on."""
    columns = {
        name: np.concatenate([getattr(c, name) for c in found])
        for name in ("items", "beamed", "generator", "dense")
    }
    sizes = np.array([len(c.items) for c in found])
    with atomic_write(path) as temporary:
        np.savez(temporary, sizes=sizes, **columns)  # type: ignore[arg-type]


def _load_next_items(path: Path) -> list[NextItems]:
    with np.load(path) as file:
        names = ("items", "beamed", "generator", "dense")
        parts = [np.split(file[name], np.cumsum(file["sizes"])[:-1]) for name in names]
    return [
        NextItems(items, beamed, generator, dense, np.empty((0, len(items)), np.float32))
        for items, beamed, generator, dense in zip(*parts, strict=True)
    ]


def _some_users(samples: Samples, users: int | None) -> Samples:
    """The sessions of a seeded sample of users; the same users whatever the split."""
    if users is None or users >= len(np.unique(samples.user_row)):
        return samples
    last = int(samples.user_row.max()) + 1
    order = np.random.default_rng(0).permutation(last)
    present = order[np.isin(order, samples.user_row)][:users]
    return samples.take(np.flatnonzero(np.isin(samples.user_row, present)))
