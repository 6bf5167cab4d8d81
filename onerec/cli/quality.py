"""`onerec bench quality`: generator, dense head and baselines on one data set, as one table.

Nothing here knows a data set: sizes follow from the log. A trained row is kept in
OUT/<system>/seed-N and not trained again while its settings, the data and the release are the same;
an unfinished one goes on from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from onerec.cli import console, sessions
from onerec.cli.config import SECTIONS, Settings, section_class
from onerec.cli.env import collect
from onerec.cli.stage import data_digest, locked, run_stage, write_json
from onerec.errors import OneRecError
from onerec.files import atomic_write

if TYPE_CHECKING:
    from onerec.data import Samples, SessionSet
    from onerec.evaluation.quality import Run

REFERENCE = "SASRec, cross entropy"
RQVAE_EPOCHS = 100
_BLOCK = 2048  # sessions measured between two saves
_WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))


@dataclass(frozen=True)
class System:
    """A network of the table and how it is trained.

    Attributes:
        name: Folder of its runs.
        row: Name of its row; of a generator with a dense head, the beginning of three.
        network: What it is.
        model: Fields of its config, less those that the data decide.
        train: Fields of TrainConfig.
        ids: Tokenizer of a generator; "" for networks over items.
        eval_epochs: Epochs between two validations.
        seeds: Trainings, with seeds 0, 1, ...
    """

    name: str
    row: str
    network: Literal["popularity", "sasrec", "onerec"]
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    ids: str = ""
    eval_epochs: float = 1.0
    seeds: int = 1


_PLAIN_ADAM = {"warmup": 0.0, "min_lr": 1.0, "weight_decay": 0.0, "grad_clip": 0.0, "lr": 1e-3}
_ONEREC = {
    "history_tokens": "items",
    "encoder": "causal",
    "n_heads": 4,
    "n_experts": 0,
    "share_codes": False,
    "legal_softmax": True,
    "item_loss": 1.0,
    "item_dropout": 0.3,
    "vector_dropout": 0.5,
}
_TIGER = {
    "history_tokens": "codes",
    "history_length": 20,
    "n_heads": 4,
    "n_experts": 0,
    "activation": "relu",
    "dropout": 0.2,
}

PRESETS: dict[str, tuple[System, ...]] = {
    # Two cores, at most an hour of training.
    "cpu": (
        System("popularity", "popularity", "popularity"),
        System(
            "sasrec-ce",
            REFERENCE,
            "sasrec",
            {},
            {**_PLAIN_ADAM, "epochs": 18, "batch_size": 256, "grad_accumulation": 4},
            eval_epochs=3,
            seeds=3,
        ),
        System(
            "sasrec-bce",
            "SASRec, binary loss",
            "sasrec",
            {"loss": "bce", "negatives": 1},
            {**_PLAIN_ADAM, "epochs": 60, "batch_size": 256, "grad_accumulation": 4},
            eval_epochs=6,
        ),
        System(
            "onerec",
            "OneRec",
            "onerec",
            {
                **_ONEREC,
                "history_length": 50,
                "n_heads": 2,
                "d_model": 64,
                "d_ff": 128,
                "encoder_layers": 2,
                "decoder_layers": 1,
                "dropout": 0.3,
                "decoder_dropout": 0.1,
                "item_negatives": 1024,
            },
            {"lr": 2e-3, "epochs": 16, "batch_size": 256, "grad_accumulation": 8},
            ids="balanced",
            eval_epochs=4,
        ),
        System(
            "tiger",
            "TIGER",
            "onerec",
            {**_TIGER, "d_model": 64, "d_ff": 256, "encoder_layers": 2, "decoder_layers": 2},
            {"lr": 1e-3, "epochs": 6, "batch_size": 256, "weight_decay": 0.035},
            ids="rqvae",
            eval_epochs=1,
        ),
    ),
    # One H200.
    "gpu": (
        System("popularity", "popularity", "popularity"),
        System(
            "sasrec-ce",
            REFERENCE,
            "sasrec",
            {},
            {**_PLAIN_ADAM, "epochs": 30, "batch_size": 256},
            eval_epochs=2,
            seeds=5,
        ),
        System(
            "onerec",
            "OneRec",
            "onerec",
            {
                **_ONEREC,
                "history_length": 50,
                "d_model": 256,
                "d_ff": 512,
                "encoder_layers": 3,
                "decoder_layers": 3,
                "dropout": 0.4,
                "decoder_dropout": 0.1,
            },
            {"lr": 1e-3, "epochs": 120, "batch_size": 512},
            ids="balanced",
            eval_epochs=10,
            seeds=5,
        ),
        System(
            "tiger",
            "TIGER",
            "onerec",
            {**_TIGER, "d_model": 128, "d_ff": 1024, "encoder_layers": 4, "decoder_layers": 4},
            {"lr": 1e-3, "epochs": 40, "batch_size": 1024, "weight_decay": 0.035},
            ids="rqvae",
            eval_epochs=4,
            seeds=3,
        ),
    ),
}


_CPU = {system.name: system for system in PRESETS["cpu"]}
# One generator on the ids of each tokenizer.
PRESETS["tokenizers"] = (
    _CPU["sasrec-ce"],
    *(
        dataclasses.replace(_CPU["onerec"], name=f"onerec-{ids}", row=f"{ids} ids", ids=ids)
        for ids in ("balanced", "sequential", "faiss", "rqvae-unique")
    ),
)


@dataclass(frozen=True)
class Options:
    """What the command line chose.

    Attributes:
        data: Log to read.
        kind: Its reader.
        out: Folder of the runs.
        preset: Name in PRESETS.
        systems: Names to train and show; all when empty.
        seeds: Trainings of each system; those of the preset when None.
        epochs: Epochs of each system; those of the preset when None.
        max_users: A seeded sample of so many users is measured; all when None.
        levels: L of the generators' ids, without a collision digit.
        codebook_size: K.
        beam_width: Of generators.
        device: "auto", "cpu" or "cuda".
    """

    data: Path
    kind: str
    out: Path
    preset: str
    systems: tuple[str, ...]
    seeds: int | None
    epochs: float | None
    max_users: int | None
    levels: int
    codebook_size: int
    beam_width: int
    device: Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class _World:
    """The data as every system sees it.

    Attributes:
        data: The sessions.
        digest: Of everything that a trained network depends on.
        parts: The measured sessions of valid and test.
        watched: Sessions of valid that choose the checkpoint.
    """

    data: SessionSet
    digest: str
    parts: dict[str, Samples]
    watched: Samples


def run(options: Options) -> dict[str, Any]:
    """Trains and measures what is missing and makes the table.

    Returns:
        The record, as JSON values.

    Raises:
        OneRecError: An unknown system, or a log without sessions.
    """
    chosen = [
        s for s in PRESETS[options.preset] if s.name in options.systems or not options.systems
    ]
    if unknown := set(options.systems) - {s.name for s in chosen}:
        names = ", ".join(s.name for s in PRESETS[options.preset])
        raise OneRecError(f"no system {min(unknown)!r} in the preset; one of: {names}")
    with locked(options.out, "bench quality"):
        world = _prepare(options)
        jobs = [
            (s, seed)
            for s in chosen
            for seed in range(1 if s.network == "popularity" else options.seeds or s.seeds)
        ]
        runs = []
        for place, (system, seed) in enumerate(jobs):
            title = f"[{place + 1} of {len(jobs)}] {system.name}, seed {seed}"
            runs += _made(options, world, system, seed, title)
        record = _record(options, world, chosen, runs)
        write_json(options.out / "quality.json", record)
    return record


def _prepare(options: Options) -> _World:
    from onerec.data import SessionConfig, SessionSet, open_log

    if not options.data.exists():
        raise OneRecError(f"--data {options.data}: there is no such file or folder")
    with open_log(options.data, kind=options.kind) as log:
        names = [*log.vectors][:1]
    config = SessionConfig(rule="next", length=1, embeddings="+".join([*names, "cooccurrence"]))
    made = {name: section_class(name)() for name in SECTIONS if name != "model"}
    made["sessions"] = config
    settings = Settings(data=str(options.data), kind=options.kind, preset="tiny", model={}, **made)
    sessions.make(options.out, settings)
    data = SessionSet.load(options.out / "sessions")
    parts = {}
    for split in ("valid", "test"):
        samples = data.samples(split)
        if not len(samples):
            raise OneRecError(f"{options.data}: the split {split} has no sessions")
        parts[split] = _some(samples, options.max_users)
    return _World(data, data_digest(options.data), parts, _some(parts["valid"], 3000))


def _some(samples: Samples, users: int | None) -> Samples:
    """The sessions of a seeded sample of users; the same users whatever the split."""
    if users is None or users >= len(np.unique(samples.user_row)):
        return samples
    last = int(samples.user_row.max()) + 1
    order = np.random.default_rng(0).permutation(last)
    present = order[np.isin(order, samples.user_row)][:users]
    return samples.take(np.flatnonzero(np.isin(samples.user_row, present)))


def _made(options: Options, world: _World, system: System, seed: int, title: str) -> list[Run]:
    """The rows of one training, trained and measured now or found whole."""
    from onerec.evaluation.quality import CASES, Run

    folder = options.out / system.name
    folder.mkdir(exist_ok=True)
    described = dataclasses.asdict(system)
    described.pop("seeds")
    config = {
        **described,
        "seed": seed,
        **{
            name: getattr(options, name)
            for name in ("epochs", "max_users", "levels", "codebook_size", "beam_width", "device")
        },
    }
    run_stage(
        folder,
        f"seed-{seed}",
        config=config,
        inputs={"data": world.digest},
        # A change of the sources does not undo hours of training; a release does.
        code=[],
        build=partial(_build, options, world, system, seed, title),
        say=console.say,
        resumable=True,
        scratch=["training"],
    )
    from json import loads

    made = []
    for fact in loads((folder / f"seed-{seed}" / "facts.json").read_text()):
        with np.load(folder / f"seed-{seed}" / "scores.npz") as scores:
            by_case = {
                case: scores[f"{fact['row']}|{case[0]}|{case[1]}"].astype(np.float64)
                for case in CASES
            }
        facts = {k: v for k, v in fact.items() if k != "row"}
        made.append(Run(fact["row"], system.name, seed, by_case, facts))
    return made


_Rankings = dict[str, dict[tuple[str, str], npt.NDArray[np.float64]]]


def _build(
    options: Options, world: _World, system: System, seed: int, title: str, folder: Path
) -> dict[str, Any]:
    """Trains one network and writes scores.npz and facts.json."""
    if system.network == "popularity":
        rows, facts = _measure_popularity(world)
    elif system.network == "sasrec":
        rows, facts = _sasrec(options, world, system, seed, title, folder)
    else:
        rows, facts = _onerec(options, world, system, seed, title, folder)
    arrays = {
        f"{row}|{case[0]}|{case[1]}": values.astype(np.float32)
        for row, cases in rows.items()
        for case, values in cases.items()
    }
    np.savez_compressed(folder / "scores.npz", **arrays)  # type: ignore[arg-type]
    write_json(folder / "facts.json", [{"row": row, **facts} for row in rows])
    return facts


def _train(
    model: Any,
    world: _World,
    sids: npt.NDArray[np.integer],
    options: Options,
    system: System,
    seed: int,
    title: str,
    folder: Path,
    score: Any,
) -> dict[str, Any]:
    """Trains with the checkpoint chosen by NDCG@10 on valid; facts of the training."""
    from onerec.training import TrainConfig, pretrain

    train = world.data.samples("train")
    fields = dict(system.train)
    if options.epochs is not None:
        fields["epochs"] = options.epochs
    samples = len(np.unique(train.user_row)) if model.prefixes else len(train)
    per_epoch = -(-samples // fields["batch_size"])
    config = TrainConfig(
        **fields,
        max_steps=None,
        seed=seed,
        device=options.device,
        eval_every=max(1, round(system.eval_epochs * per_epoch)),
        checkpoint_every=max(1, round(system.eval_epochs * per_epoch)),
    )
    with console.progress(title) as report:
        result = pretrain(
            model,
            train,
            world.watched,
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


def _histories(samples: Samples, part: range) -> list[npt.NDArray[np.int32]]:
    return [samples.history(i) for i in part]


def _measure(ranker: Any, world: _World, title: str) -> dict[tuple[str, str], Any]:
    """The METRICS of a ranker in each case."""
    from onerec.evaluation.metrics import pad_rows
    from onerec.evaluation.quality import CASES, DEPTH, session_scores

    found = {}
    for split, history in CASES:
        samples = world.parts[split]
        rows = []
        with console.progress(f"{title}: {split}, {history}") as report:
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


def _measure_popularity(world: _World) -> tuple[_Rankings, dict[str, Any]]:
    from onerec.evaluation import Popularity

    counts = world.data.items["train_count"].to_numpy()
    return {"popularity": _measure(Popularity(counts), world, "popularity")}, {"parameters": 0}


def _sasrec(
    options: Options, world: _World, system: System, seed: int, title: str, folder: Path
) -> tuple[_Rankings, dict[str, Any]]:
    import torch

    from onerec.evaluation.adapters import ScoreRanker
    from onerec.model import SASRec, SASRecConfig

    torch.manual_seed(seed)
    model = SASRec(SASRecConfig(world.data.n_items, **system.model))
    table = np.arange(world.data.n_items)[:, None]

    def ranker(network: Any) -> ScoreRanker:
        length = model.config.history_length
        return ScoreRanker(network.scores, table, length, device=network.items.weight.device)

    def score(network: Any) -> float:
        return _ndcg(ranker(network).rank(*_watched(world)), world)

    facts = _train(model, world, table, options, system, seed, title, folder, score)
    started = time.perf_counter()
    rows = {system.row: _measure(ranker(model), world, title)}
    return rows, {**facts, "evaluate_seconds": time.perf_counter() - started}


def _watched(world: _World) -> tuple[list[Any], int, list[Any]]:
    """Arguments of `Ranker.rank` for the sessions that choose the checkpoint, masked."""
    from onerec.evaluation.quality import DEPTH

    seen = _histories(world.watched, range(len(world.watched)))
    return seen, DEPTH, seen


def _ndcg(ranked: npt.NDArray[np.int64], world: _World, groups: Any = None) -> float:
    """NDCG@10 of rankings of the sessions that choose the checkpoint."""
    from onerec.evaluation.metrics import pad_rows
    from onerec.evaluation.quality import METRICS, session_scores

    samples = world.watched
    hidden = pad_rows(_histories(samples, range(len(samples))))
    targets = samples.targets(np.arange(len(samples)), 1).astype(np.int64)
    scores = session_scores(ranked, targets, groups=groups, exclude=hidden)
    return float(scores[:, METRICS.index("ndcg@10")].mean())


def _onerec(
    options: Options, world: _World, system: System, seed: int, title: str, folder: Path
) -> tuple[_Rankings, dict[str, Any]]:
    import torch

    from onerec.evaluation.adapters import RecommenderRanker
    from onerec.inference import Recommender
    from onerec.model import OneRec, OneRecConfig
    from onerec.tokenizer import Catalog

    data = world.data
    quantizer = make_ids(system.ids, data.embeddings, options.levels, options.codebook_size, seed)
    sids = quantizer.sids_
    dense = system.model.get("item_loss", 0.0) > 0
    sizes = {"n_items": data.n_items, "vector_dim": data.embeddings.shape[1]} if dense else {}
    torch.manual_seed(seed)
    config = OneRecConfig(
        codebook_size=options.codebook_size,
        levels=sids.shape[1],
        session_length=1,
        **system.model,
        **sizes,
    )
    model = OneRec(config)
    if dense:
        model.set_catalog(sids, data.embeddings)
    item_ids = data.items["item_id"].to_pylist()
    catalog = Catalog.build(item_ids, sids, options.codebook_size)

    def recommender(network: OneRec) -> Recommender:
        return Recommender(network, catalog, device=network.start.device, batching=True)

    def score(network: OneRec) -> float:
        seen, depth, _ = _watched(world)
        if dense:
            found = recommender(network).next_items(
                [catalog.item_ids[h].tolist() for h in seen], beam_width=20, dense_top=20
            )
            return _ndcg(_padded([c.best(depth, 0.5) for c in found]), world)
        ranker = RecommenderRanker(recommender(network), item_ids, beam_width=20)
        return _ndcg(ranker.rank(seen, depth, seen), world, ranker.groups)

    facts = _train(model, world, sids, options, system, seed, title, folder, score)
    facts["active_parameters"] = model.num_parameters(active=True)
    facts["ids"] = {**quantizer.report_, "tokenizer": system.ids}
    started = time.perf_counter()
    if dense:
        rows, weight = _measure_fused(recommender(model), world, options, system, title, folder)
        facts["dense_weight"] = weight
    else:
        ranker = RecommenderRanker(recommender(model), item_ids, beam_width=options.beam_width)
        rows = {system.row: _measure(ranker, world, title)}
    return rows, {**facts, "evaluate_seconds": time.perf_counter() - started}


@dataclass(frozen=True)
class _Ids:
    """Ids that some other library's quantiser made.

    Attributes:
        sids_: int32 [N, L].
        report_: As that of `ResidualQuantizer`.
    """

    sids_: npt.NDArray[np.int32]
    report_: dict[str, Any]


def make_ids(
    name: str, vectors: npt.NDArray[np.float32], levels: int, codebook_size: int, seed: int
) -> Any:
    """A fitted tokenizer: what has `sids_` and `report_`.

    Args:
        name: "balanced" (unique ids of `ResidualQuantizer`), "sequential" (the same by the paper's
            Algorithm 1), "rqvae" (`RQVAE` with a collision digit, as TIGER has it), "rqvae-unique"
            (with its last codes moved apart), "faiss" (its residual quantiser, a collision digit).
        vectors: float32 [N, d].
        levels: L.
        codebook_size: K.
        seed: Of the tokenizer.

    Raises:
        OneRecError: faiss is asked for and not installed, or K is no power of two for it.
    """
    from onerec.tokenizer import RQVAE, ResidualQuantizer

    if name.startswith("rqvae"):
        distinct: Any = "rank" if name == "rqvae" else "distinct"
        rqvae = RQVAE(
            levels, codebook_size, epochs=RQVAE_EPOCHS, distinct=distinct, random_state=seed
        )
        with console.progress("RQ-VAE") as report:
            return rqvae.fit(vectors, report)
    if name == "faiss":
        return _faiss_ids(vectors, levels, codebook_size, seed)
    method: Any = {"balanced": "priced", "sequential": "sequential"}[name]
    return ResidualQuantizer(
        levels, codebook_size, method=method, distinct="distinct", random_state=seed
    ).fit(vectors)


def _faiss_ids(
    vectors: npt.NDArray[np.float32], levels: int, codebook_size: int, seed: int
) -> _Ids:
    from onerec.tokenizer.residual_quantizer import describe_ids, number_collisions

    try:
        import faiss
    except ImportError as problem:
        raise OneRecError(
            f"the system onerec-faiss needs faiss ({problem}): pip install 'onerec[bench]', or "
            "leave it out with --systems"
        ) from problem
    bits = codebook_size.bit_length() - 1
    if 2**bits != codebook_size:
        raise OneRecError(f"faiss: --codebook_size must be a power of two, got {codebook_size}")
    quantizer = faiss.ResidualQuantizer(vectors.shape[1], levels, bits)
    quantizer.cp.seed = seed
    quantizer.train(vectors)
    packed = quantizer.compute_codes(vectors)
    codes = faiss.unpack_bitstrings(packed, levels, bits).astype(np.int32)
    error = np.square(vectors - quantizer.decode(packed), dtype=np.float64).sum(axis=1).mean()
    # In random order: the items' own order may tell what a model should not know.
    order = np.random.default_rng(seed).permutation(len(codes))
    sids = np.empty((len(codes), levels + 1), np.int32)
    sids[order] = number_collisions(codes[order], codebook_size)
    report = {"n_items": len(codes), "mse": float(error), **describe_ids(sids, codebook_size)}
    return _Ids(sids, report)


def _padded(rows: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    from onerec.evaluation.metrics import pad_rows
    from onerec.evaluation.quality import DEPTH

    return pad_rows(rows, DEPTH)


def _save_next_items(path: Path, found: list[Any]) -> None:
    """Writes what `Recommender.next_items` found, so that a stopped measurement goes on."""
    columns = {
        name: np.concatenate([getattr(c, name) for c in found])
        for name in ("items", "beamed", "generator", "dense")
    }
    sizes = np.array([len(c.items) for c in found])
    with atomic_write(path) as temporary:
        np.savez(temporary, sizes=sizes, **columns)  # type: ignore[arg-type]


def _load_next_items(path: Path) -> list[Any]:
    from onerec.inference import NextItems

    with np.load(path) as file:
        names = ("items", "beamed", "generator", "dense")
        parts = [np.split(file[name], np.cumsum(file["sizes"])[:-1]) for name in names]
    return [NextItems(*row) for row in zip(*parts, strict=True)]


def _measure_fused(
    recommender: Any, world: _World, options: Options, system: System, title: str, folder: Path
) -> tuple[_Rankings, float]:
    """Generator alone, dense head alone and both, the weight chosen on valid by NDCG@10."""
    from onerec.evaluation.metrics import pad_rows
    from onerec.evaluation.quality import CASES, DEPTH, METRICS, session_scores

    ids = recommender.catalog.item_ids
    names = [f"{system.row}, {part}" for part in ("generator", "dense head", "fused")]
    rows: _Rankings = {name: {} for name in names}
    weight = 0.0
    for split, history in CASES:
        samples = world.parts[split]
        targets = samples.targets(np.arange(len(samples)), 1).astype(np.int64)
        seen = _histories(samples, range(len(samples)))
        masked = history == "masked"
        found: list[Any] = []
        with console.progress(f"{title}: {split}, {history}") as report:
            for begin in range(0, len(samples), _BLOCK):
                path = folder / "training" / f"candidates-{split}-{history}-{begin}.npz"
                if not path.is_file():
                    made = recommender.next_items(
                        [ids[h].tolist() for h in seen[begin : begin + _BLOCK]],
                        beam_width=options.beam_width,
                        dense_top=2 * DEPTH,
                        exclude_history=masked,
                    )
                    _save_next_items(path, made)
                found += _load_next_items(path)
                report(len(found), len(samples), "")
        hidden = pad_rows(seen) if masked else None

        def scored(ranked: list[Any], targets: Any = targets, hidden: Any = hidden) -> Any:
            return session_scores(_padded(ranked), targets, exclude=hidden)

        if (split, history) == CASES[0]:
            place = METRICS.index("ndcg@10")
            tried = [scored([c.best(DEPTH, w) for c in found])[:, place].mean() for w in _WEIGHTS]
            weight = _WEIGHTS[int(np.argmax(tried))]
        generated = [
            c.items[c.beamed][np.argsort(-c.generator[c.beamed], kind="stable")[:DEPTH]]
            for c in found
        ]
        rows[names[0]][split, history] = scored(generated)
        rows[names[1]][split, history] = scored([c.best(DEPTH, 1.0) for c in found])
        rows[names[2]][split, history] = scored([c.best(DEPTH, weight) for c in found])
    return rows, weight


def _record(
    options: Options, world: _World, systems: list[System], runs: list[Run]
) -> dict[str, Any]:
    from datetime import UTC, datetime

    from onerec.evaluation.quality import compare

    test = world.parts["test"]
    counts = world.data.items["train_count"].to_numpy()
    targets = test.targets(np.arange(len(test)), 1)[:, 0]
    rows = compare(
        runs,
        reference=REFERENCE if any(run.row == REFERENCE for run in runs) else None,
        users={split: samples.user_row for split, samples in world.parts.items()},  # type: ignore[misc]
        train_counts=counts[targets],
    )
    train = world.data.samples("train")
    return {
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": options.preset,
        "data": {
            "name": options.data.name,
            "items": world.data.n_items,
            "users": world.data.sequences.num_rows,
            "train_sessions": len(train),
            "sessions": {split: len(samples) for split, samples in world.parts.items()},
            "vectors": world.data.funnel["embeddings"]["about"],
        },
        "options": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in dataclasses.asdict(options).items()
            if k not in ("data", "out")
        },
        "systems": {s.name: dataclasses.asdict(s) for s in systems},
        "reference": REFERENCE,
        "environment": collect(),
        "rows": rows,
    }


def show(record: dict[str, Any]) -> None:
    """Prints the table."""
    from rich.markup import escape
    from rich.table import Table

    from onerec.evaluation.quality import cell

    table = Table("row", "seeds", box=None, pad_edge=False)
    for column in ("valid R@10", "R@10", "N@10", "R@10 unmasked", "minutes", "R@10 - SASRec"):
        table.add_column(column, justify="right")
    for row in record["rows"]:
        main = cell(row, "test", "masked", "recall@10")
        minutes = row["cost"].get("train_seconds", 0.0) / 60
        table.add_row(
            escape(row["row"]),
            str(len(row["seeds"])),
            f"{cell(row, 'valid', 'masked', 'recall@10')['value']:.4f}",
            f"{main['value']:.4f}",
            f"{cell(row, 'test', 'masked', 'ndcg@10')['value']:.4f}",
            f"{cell(row, 'test', 'unmasked', 'recall@10')['value']:.4f}",
            f"{minutes:.1f}",
            ""
            if main["difference"] is None
            else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*main["difference"]),
        )
    console.stdout().print(table)


def main(argv: list[str]) -> None:
    """`onerec bench quality`; called by the verb `bench`."""
    from onerec.cli.options import Parser

    parser = Parser(
        "bench quality",
        "Trains the generator and its baselines on a log and compares them under one protocol "
        "(docs/quality.md).",
        usage="--data DIR [options]",
    )
    parser.add_argument("--data", type=str, required=True, help="folder of the log")
    parser.add_argument(
        "--kind",
        type=Literal["auto", "kuairand", "amazon", "parquet"],
        default="auto",
        help="reader of the log",
    )
    parser.add_argument(
        "--preset",
        type=Literal["cpu", "gpu", "tokenizers"],
        default="cpu",
        help="sizes of the networks; tokenizers: the generator of cpu on the ids of each",
    )
    parser.add_argument(
        "--out", type=str, default=None, help="folder of the runs; runs/quality-DATA-PRESET"
    )
    parser.add_argument(
        "--systems", nargs="*", default=[], help="systems of the preset; all by default"
    )
    optional = {
        "seeds": (int, "trainings of each system instead of the preset's"),
        "epochs": (float, "epochs of each training instead of the preset's"),
        "max_users": (int, "measure a seeded sample of so many users"),
    }
    for name, (kind, text) in optional.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help=text)
    parser.add_argument("--levels", type=int, default=3, help="codes of a semantic id, L")
    parser.add_argument("--codebook_size", type=int, default=256, help="codes of a level, K")
    parser.add_argument("--beam_width", type=int, default=50, help="beams of the generators")
    parser.add_argument(
        "--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to train"
    )
    given = parser.parse(argv)
    for name in ("seeds", "epochs", "max_users", "levels", "codebook_size", "beam_width"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: wanted more than 0, got {value}")
    data = Path(given.data)
    out = given.out or f"runs/quality-{data.resolve().name}-{given.preset}"
    record = run(
        Options(
            data=data,
            kind=given.kind,
            out=Path(out),
            preset=given.preset,
            systems=tuple(given.systems),
            seeds=given.seeds,
            epochs=given.epochs,
            max_users=given.max_users,
            levels=given.levels,
            codebook_size=given.codebook_size,
            beam_width=given.beam_width,
            device=given.device,
        )
    )
    if given.json:
        console.print_json(record)
    else:
        show(record)
