"""The scale ladder: sizes, experts and sessions against the true watch time of a simulated world.

arXiv 2502.18965 claims that larger generators, mixtures of experts and session-wise generation
help. Every rung is trained on one log for the same number of target items, and its sessions are
valued by the world's closed-form expectation, session effects included.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from onerec import environment
from onerec.data import SessionConfig, SessionSet, SimulatorConfig, World
from onerec.errors import OneRecError
from onerec.evaluation import metrics as m
from onerec.evaluation.adapters import WorldRows
from onerec.evaluation.metrics import FloatArray
from onerec.evaluation.watched import fast_recommender
from onerec.experiments.experiment import training_flops
from onerec.model import OneRec, OneRecConfig
from onerec.pipeline import Inputs, Settings, sessions, world
from onerec.pipeline.stage import locked, run_stage, write_json
from onerec.progress import SILENT, Listener, Progress
from onerec.tokenizer import Catalog, ResidualQuantizer
from onerec.training import TrainConfig, pretrain

SESSION = 5
BEAM = 32
EXPERTS = 8


@dataclass(frozen=True)
class Rung:
    """One network of the ladder.

    Attributes:
        size: Its name.
        width: d_model.
        layers: Of the encoder and of the decoder.
        experts: 0 for dense layers; else experts of half the dense width, two for each token, so
            that a token meets as many weights as in the dense network.
        target: What it is trained to write: the whole "session" or the "next" item.
    """

    size: str
    width: int
    layers: int
    experts: int
    target: Literal["session", "next"]

    @property
    def name(self) -> str:
        """Folder of its runs."""
        return f"{self.size}-{'moe' if self.experts else 'dense'}-{self.target}"

    def config(self, codebook_size: int, levels: int) -> OneRecConfig:
        """The network."""
        hidden = 2 * self.width
        return OneRecConfig(
            codebook_size=codebook_size,
            levels=levels,
            session_length=SESSION if self.target == "session" else 1,
            history_length=20,
            history_tokens="items",
            d_model=self.width,
            n_heads=2,
            encoder_layers=self.layers,
            decoder_layers=self.layers,
            d_ff=hidden,
            n_experts=self.experts,
            expert_d_ff=hidden // 2,
            dropout=0.1,
        )


SIZES = (("small", 16, 1), ("medium", 32, 1), ("large", 64, 2))
TARGETS: tuple[Literal["session", "next"], ...] = ("session", "next")
RUNGS = tuple(
    Rung(*size, experts, target)
    for target, size, experts in itertools.product(TARGETS, SIZES, (0, EXPERTS))
)


class Ladder:
    """The simulated world and its log, as every rung sees them.

    Args:
        world: The truth, addressed by the rows of `sessions`.
        sessions: Sessions of requests (m up to 5), whose test split all rungs are measured on.
        nexts: Of the same log the sessions of the rule "next" with one item.
        epochs: Passes over the training sessions; next-item rungs see as many target items.
        seed: Of the semantic ids.
        device: "auto", "cpu" or "cuda".
    """

    def __init__(
        self,
        world: WorldRows,
        sessions: SessionSet,
        nexts: SessionSet,
        *,
        epochs: float,
        seed: int = 0,
        device: Literal["auto", "cpu", "cuda"] = "auto",
    ) -> None:
        self.world, self.epochs, self.device = world, epochs, device
        ids = sessions.items["item_id"].to_pylist()
        if nexts.items["item_id"].to_pylist() != ids:
            raise ValueError("sessions and nexts: wanted the same items in the same order")
        quantizer = ResidualQuantizer(3, 32, distinct="distinct", random_state=seed)
        self.sids = quantizer.fit(sessions.embeddings).sids_
        self.catalog = Catalog.build(ids, self.sids, 32)
        self.train = {"session": sessions.samples("train"), "next": nexts.samples("train")}
        self.valid = {"session": sessions.samples("valid"), "next": nexts.samples("valid")}
        self.test = sessions.samples("test")

    def climb(self, rung: Rung, seed: int, folder: Path, report: Progress) -> dict[str, Any]:
        """Trains a rung in `folder`, or goes on there, and values its sessions.

        Returns:
            Its cost, and "seconds", the true expected watch time of each test session.
        """
        torch.manual_seed(seed)
        model = OneRec(rung.config(32, self.sids.shape[1]))
        train = self.train[rung.target]
        batch = 64 if rung.target == "session" else 256
        # Equal target items in sum and, nearly, in a step.
        items = int(np.minimum(np.diff(self.train["session"].target_offsets), SESSION).sum())
        epochs = self.epochs
        if rung.target == "next":
            epochs *= items / len(train)
        per_epoch = -(-len(train) // batch)
        config = TrainConfig(
            epochs=epochs,
            max_steps=None,
            batch_size=batch,
            lr=3e-3,
            seed=seed,
            device=self.device,
            eval_every=0,
            checkpoint_every=per_epoch,
            select="last",
        )
        result = pretrain(
            model, train, self.valid[rung.target], self.sids, config, folder, progress=report
        )
        return {
            "parameters": model.num_parameters(),
            "active_parameters": model.num_parameters(active=True),
            "flops": training_flops(model, train, self.sids, batch),
            "train_items": epochs * (items if rung.target == "session" else len(train)),
            "train_seconds": result.seconds,
            "valid_loss": result.valid_loss,
            "seconds": self.value(model, rung).tolist(),
        }

    def value(self, model: OneRec, rung: Rung) -> FloatArray:
        """True expected seconds of the network's best five items for each test session.

        A next-item network gives the five best of its ranking, as the paper's baselines do.
        """
        recommender = fast_recommender(model, self.catalog)
        ids = self.catalog.item_ids
        seen = [ids[self.test.history(i)].tolist() for i in range(len(self.test))]
        if rung.target == "session":
            made = recommender.recommend(seen, beam_width=BEAM)
            best = [r.item_ids[0] if len(r.item_ids) else [] for r in made]
        else:
            best = recommender.rank(seen, SESSION, beam_width=BEAM)
        place = {item: index for index, item in enumerate(ids.tolist())}
        rows = m.pad_rows([[place[item] for item in row] for row in best], SESSION)
        return self.world.session_seconds(np.asarray(self.test.user_row), rows)


def summarise(
    found: list[tuple[Rung, int, dict[str, Any]]], users: Any, resamples: int = 1000
) -> dict[str, Any]:
    """The rows of the ladder and the three comparisons, as JSON values.

    Args:
        found: Rung, seed and what `Ladder.climb` gave.
        users: int [test sessions], the user of each; they are what is resampled.
        resamples: Bootstrap samples.
    """
    means: dict[Rung, FloatArray] = {}
    rows = []
    options: dict[str, Any] = {"clusters": np.asarray(users), "resamples": resamples}
    for rung in dict.fromkeys(rung for rung, _, _ in found):
        mine = [facts for other, _, facts in found if other == rung]
        means[rung] = np.mean([facts["seconds"] for facts in mine], axis=0)
        value = m.bootstrap(means[rung][:, None], **options)[0]
        costs = {
            key: float(np.mean([facts[key] for facts in mine]))
            for key in mine[0]
            if key != "seconds" and mine[0][key] is not None
        }
        rows.append(
            {
                **dataclasses.asdict(rung),
                "seeds": [seed for other, seed, _ in found if other == rung],
                "watch_seconds": [value.value, value.low, value.high],
                **costs,
            }
        )
    pairs = []
    for rung in means:
        place = [size[0] for size in SIZES].index(rung.size) + 1
        rivals = {
            "sessions": dataclasses.replace(rung, target="session"),
            "experts": dataclasses.replace(rung, experts=EXPERTS),
        }
        if place < len(SIZES):
            name, width, layers = SIZES[place]
            rivals["larger"] = dataclasses.replace(rung, size=name, width=width, layers=layers)
        for claim, rival in rivals.items():
            if rival == rung or rival not in means:
                continue
            difference = m.paired_bootstrap(means[rival][:, None], means[rung][:, None], **options)[
                0
            ]
            pairs.append(
                {
                    "claim": claim,
                    "first": rival.name,
                    "second": rung.name,
                    "difference": [difference.value, difference.low, difference.high],
                }
            )
    return {"rows": rows, "pairs": pairs}


@dataclass(frozen=True)
class Options:
    """What is compared, and how.

    Attributes:
        out: Folder of the world and of the runs.
        rungs: Names to train and show; all when empty.
        seeds: Trainings of each rung.
        users: Users of the world.
        epochs: Passes over the training sessions.
        device: "auto", "cpu" or "cuda".
    """

    out: Path
    rungs: tuple[str, ...] = ()
    seeds: int = 1
    users: int = 1000
    epochs: float = 4.0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def run(options: Options, listener: Listener = SILENT) -> dict[str, Any]:
    """Makes the world, trains and values the rungs that are missing, and makes the table.

    Args:
        options: The comparison.
        listener: Told of the work.

    Returns:
        The record, as JSON values.

    Raises:
        OneRecError: An unknown rung.
    """
    chosen = [rung for rung in RUNGS if rung.name in options.rungs or not options.rungs]
    if unknown := set(options.rungs) - {rung.name for rung in chosen}:
        names = ", ".join(rung.name for rung in RUNGS)
        raise OneRecError(f"no rung {min(unknown)!r}; one of: {names}")
    with locked(options.out, "bench ladder"):
        inputs = _make(options, listener)
        sets = [SessionSet.load(options.out / name / "sessions") for name in ("session", "next")]
        rows = WorldRows(
            World.load(options.out / "world"),
            sets[0].sequences["user_id"].to_pylist(),
            sets[0].items["item_id"].to_pylist(),
        )
        ladder = Ladder(rows, *sets, epochs=options.epochs, device=options.device)
        jobs = [(rung, seed) for rung in chosen for seed in range(options.seeds)]
        found = []
        for place, (rung, seed) in enumerate(jobs):
            title = f"[{place + 1} of {len(jobs)}] {rung.name}, seed {seed}"
            found.append((rung, seed, _made(options, ladder, inputs, listener, rung, seed, title)))
        record = {
            "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
            "preset": "ladder",
            "data": {
                "name": "simulated world",
                "users": options.users,
                "items": len(ladder.sids),
                "train_sessions": len(ladder.train["session"]),
                "test_sessions": len(ladder.test),
            },
            "options": {"seeds": options.seeds, "epochs": options.epochs},
            "environment": environment.published(),
            **summarise(found, ladder.test.user_row),
        }
        write_json(options.out / "ladder.json", record)
    return record


def _make(options: Options, listener: Listener) -> dict[str, str]:
    """World and both session sets; their fingerprints."""
    settings = Settings.of_preset(
        world=SimulatorConfig(
            n_users=options.users, n_items=1000, n_creators=100, requests_per_user=16.0
        )
    )
    world.make(settings, Inputs(options.out), listener)
    prints = {}
    rules: dict[str, Any] = {
        "session": {"rule": "request", "length": 5},
        "next": {"rule": "next", "length": 1},
    }
    for name, rule in rules.items():
        chosen = dataclasses.replace(
            settings,
            data=str(options.out / "world"),
            sessions=SessionConfig(**rule, exposed_sessions=0),
        )
        made = sessions.make(chosen, Inputs(options.out / name), listener)
        prints[name] = made.record.fingerprint
    return prints


def _made(
    options: Options,
    ladder: Ladder,
    inputs: dict[str, str],
    listener: Listener,
    rung: Rung,
    seed: int,
    title: str,
) -> dict[str, Any]:
    """What a rung's training left, trained now or found whole."""

    def build(folder: Path) -> dict[str, Any]:
        with listener.progress(title) as report:
            facts: dict[str, Any] = ladder.climb(rung, seed, folder / "training", report)
        write_json(folder / "facts.json", facts)
        return {key: value for key, value in facts.items() if key != "seconds"}

    folder = options.out / rung.name
    folder.mkdir(exist_ok=True)
    run_stage(
        folder,
        f"seed-{seed}",
        config={**dataclasses.asdict(rung), "seed": seed, "epochs": options.epochs},
        inputs=inputs,
        code=[],
        build=build,
        say=listener.say,
        resumable=True,
        scratch=["training"],
    )
    facts: dict[str, Any] = json.loads(
        (folder / f"seed-{seed}" / "facts.json").read_text(encoding="utf-8")
    )
    return facts
