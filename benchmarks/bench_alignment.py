"""What alignment does to the users of a simulated world, whose true watch time is known.

    onerec bench alignment                              # every policy, three worlds; the ablations
    python benchmarks/bench_alignment.py --seeds 0 --only ipa   # a part, as a table

One world a seed: its log trains the generator, the reward model and every policy; what a policy
shows to held-out users is valued by the world itself. The world's parameters are those of `WORLD`,
fixed before any policy was compared; the shares of the fused reward were chosen on the world of
seed 0. ONEREC_BENCH_SEEDS names other worlds. A policy's result is kept in --cache (or
ONEREC_BENCH_CACHE) and not made again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from onerec.data import (
    Samples,
    SessionConfig,
    SessionSet,
    SimulatorConfig,
    World,
    build_sessions,
    open_log,
    simulate,
)
from onerec.inference import Recommender
from onerec.inference.decoding import TorchDecoder
from onerec.model import OneRec, OneRecConfig, RewardModel
from onerec.ops import BeamSearch, BeamState
from onerec.tokenizer import Catalog, ResidualQuantizer
from onerec.training import AlignmentConfig, RewardConfig, TrainConfig, align, pretrain
from onerec.training.reward.train import train_reward

Floats = npt.NDArray[np.float64]

SEEDS = tuple(int(n) for n in os.environ.get("ONEREC_BENCH_SEEDS", "1,2,3").split(","))
FEWER_SEEDS = SEEDS[:1]  # of the ablations
WORLD: dict[str, Any] = {
    "n_users": 1500,
    "n_items": 800,
    "n_creators": 120,
    "requests_per_user": 20.0,
}
EFFECTS = ("fatigue", "repetition", "leaving")
LENGTH = 5
# Sessions worth learning from: whole requests of more than the mean watch time (section 2.1 of
# arXiv 2502.18965 names such a threshold without its value).
SESSIONS: dict[str, Any] = {"length": LENGTH, "min_watch_seconds": 150.0}
CODES = 16
MODEL: dict[str, Any] = {
    "history_length": 30,
    "history_tokens": "items",
    "d_model": 48,
    "n_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "d_ff": 128,
    "n_experts": 4,
    "expert_d_ff": 96,
}
PRETRAIN: dict[str, Any] = {"steps": 600, "batch_size": 128, "lr": 3e-3, "eval_every": 150}
# The next-item model learns every good exposure (as TIGER does, arXiv 2305.05065), as many items a
# step as the sessions of one have.
NEXT_ITEM: dict[str, Any] = {**PRETRAIN, "batch_size": 448}
REWARD: dict[str, Any] = {
    "targets": ("swt", "vtr", "long_view", "like", "follow"),
    "max_steps": 500,
    "d_model": 48,
    "judge": False,
}
# Shares of the reward model's targets in the fused score, chosen on the world of seed 0 by the best
# of the generator's own 128 sessions.
WEIGHTS: dict[str, float] = {"swt": 1.0, "vtr": 0.7, "like": 0.5}
# What every alignment shares; a policy changes what its name says.
ALIGN: dict[str, Any] = {
    "iterations": 3,
    "steps": 30,
    "rate": 0.05,
    "candidates": 32,
    "lr": 1e-3,
    "max_drift": 100.0,
    "max_winner_drop": 100.0,
    "max_legality_drop": 1.0,
    "monitor": 32,
    "checkpoint_every": 0,
}
ONE = {"iterations": 1, "steps": 90}
POLICIES: dict[str, dict[str, Any]] = {
    "IPA": {},
    "IPA, asynchronous": {"asynchronous": True},
    "NTP, trained on": {"method": "ntp"},
    "DPO, one iteration": {**ONE},
    "IPO": {**ONE, "method": "ipo"},
    "conservative DPO": {**ONE, "method": "conservative_dpo"},
    "robust DPO": {**ONE, "method": "robust_dpo"},
    "CPO": {**ONE, "method": "cpo", "winner_nll": 1.0},
    "SimPO": {**ONE, "method": "simpo"},
    "S-DPO": {**ONE, "method": "softmax_dpo"},
    "critical DPO": {**ONE, "method": "critical_dpo", "gamma": 0.1},
    "CEM": {"method": "cem"},
    "ECPO": {"method": "ecpo"},
    "GBPO": {"method": "gbpo"},
    "ECPO, format reward": {"method": "ecpo", "format_samples": 5},
    "GBPO, format reward": {"method": "gbpo", "format_samples": 5},
}
MAIN = ("IPA", "NTP, trained on")
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "rate": {f"r = {r:.0%}": {"rate": r} for r in (0.01, 0.02, 0.03, 0.04, 0.05)},
    "candidates": {f"N = {n}": {"candidates": n} for n in (8, 16, 32, 64, 128)},
    "iterations": {f"T = {t}": {"iterations": t, "steps": 90 // t} for t in (1, 2, 3, 5)},
    "beta": {f"beta = {b:g}": {"beta": b} for b in (0.02, 0.1, 0.5, 1.0)},
    "gradient share": {f"share = {s:g}": {"gradient_share": s} for s in (0.25, 0.5, 1.0, 2.0)},
}
# Why a session is worth more or less than a list: what the logging policy shows together, and which
# sessions are learned.
CAUSES: dict[str, dict[str, dict[str, Any]]] = {
    "coherence": {f"coherence = {c:g}": {"world": {"coherence": c}} for c in (-4.0, 0.0, 2.0)},
    "sessions": {
        f"at least {s:g} s": {"sessions": {"min_watch_seconds": s}} for s in (60.0, 150.0, 250.0)
    },
}
USERS = 300
BEAM = 20
# Searches that are kept from one kind of item: no two items of a session begin with one code; a
# single beam is left at the end of every item (the widths of all steps but the last), so that a
# session is made item by item.
ITEM_BY_ITEM = (([BEAM] * 2 + [1]) * LENGTH)[:-1]
DECODINGS: dict[str, dict[str, Any]] = {
    "NTP, distinct first codes": {"distinct": True},
    "NTP, item by item": {"ramp": ITEM_BY_ITEM},
    "NTP, item by item, distinct first codes": {"distinct": True, "ramp": ITEM_BY_ITEM},
}


def default_cache() -> Path:
    return Path(os.environ.get("ONEREC_BENCH_CACHE", tempfile.gettempdir())) / "onerec-alignment"


class Lab:
    """One world, its log, the generator and the reward model that were trained on it.

    Args:
        seed: Of the world and of everything trained.
        effects: Whether fatigue, repetition and leaving are on.
        cache: Where trained models and measured policies are kept.
        world: Other values than those of `WORLD`.
        sessions: Other values than those of `SESSIONS`.
    """

    def __init__(
        self,
        seed: int,
        effects: bool,
        cache: Path,
        *,
        world: dict[str, Any] | None = None,
        sessions: dict[str, Any] | None = None,
    ) -> None:
        self.seed = seed
        torch.set_num_threads(1)
        switches = dict.fromkeys(EFFECTS, effects)
        simulator = SimulatorConfig(**{**WORLD, **switches, **(world or {}), "seed": seed})
        self.world = simulate(simulator)
        kept = {**SESSIONS, **(sessions or {})}
        settings = json.dumps(
            [dataclasses.asdict(simulator), kept, CODES, MODEL, PRETRAIN, NEXT_ITEM, REWARD]
        )
        name = hashlib.blake2b(settings.encode(), digest_size=6).hexdigest()
        self.folder = cache / f"seed{seed}-{'on' if effects else 'off'}-{name}"
        if not (self.folder / "sessions" / "funnel.json").is_file():
            self.world.write(self.folder / "world")
            with open_log(self.folder / "world", threads=1) as log:
                singles = SessionConfig(rule="next", length=1)
                build_sessions(log, singles, self.folder / "singles")
                build_sessions(log, SessionConfig(**kept), self.folder / "sessions")
        self.data = SessionSet.load(self.folder / "sessions")
        quantizer = ResidualQuantizer(3, CODES, distinct="distinct", random_state=seed)
        quantizer.fit(self.data.embeddings)
        ids = self.data.items["item_id"].to_pylist()
        self.catalog = Catalog.build(ids, quantizer.sids_, CODES)
        self.train, self.valid = self.data.samples("train"), self.data.samples("valid")
        self.generator = self._pretrained("generator", self.train, self.valid, PRETRAIN)
        self.reward = self._reward()
        self.fused = self.reward_of(WEIGHTS)
        test = self.data.samples("test")
        _, first = np.unique(test.user_row, return_index=True)
        rng = np.random.default_rng([seed, 9])
        self.test = test.take(np.sort(rng.permutation(first)[:USERS]))
        users = np.array(self.data.sequences["user_id"].to_pylist())[self.test.user_row]
        self.users = np.searchsorted(self.world.user_ids, users)
        self.histories = [
            self.catalog.item_ids[self.test.history(n)].tolist() for n in range(len(self.test))
        ]

    def _pretrained(
        self, name: str, train: Samples, valid: Samples, settings: dict[str, Any]
    ) -> OneRec:
        folder = self.folder / name
        if not (folder / "model" / "config.json").is_file():
            torch.manual_seed(self.seed)
            length = int(np.diff(train.target_offsets).max())
            shape = OneRecConfig(codebook_size=CODES, levels=3, session_length=length, **MODEL)
            config = TrainConfig(**settings, seed=self.seed, num_threads=1)
            pretrain(OneRec(shape), train, valid, self.catalog.sids, config, folder)
        return OneRec.from_pretrained(folder / "model")

    def _reward(self) -> RewardModel:
        folder = self.folder / "reward"
        if not (folder / "model" / "config.json").is_file():
            found = train_reward(self.data, RewardConfig(**REWARD, seed=self.seed))
            found.model.save_pretrained(folder / "model")
            (folder / "metrics.json").write_text(json.dumps(found.metrics))
        return RewardModel.from_pretrained(folder / "model")

    def reward_of(self, weights: dict[str, float]) -> RewardModel:
        """The reward model with other shares of its targets in the fused score."""
        model = copy.deepcopy(self.reward)
        shares = tuple(weights.get(target, 0.0) for target in model.config.targets)
        model.config = dataclasses.replace(model.config, weights=shares)
        return model

    def _kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """What `make` gave for these users and shares, of the cache where it is there."""
        path = self.folder / "policies" / f"{name}-{USERS}-{_short(WEIGHTS)}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(make(), default=lambda value: value.tolist()))
        found: dict[str, dict[str, Any]] = json.loads(path.read_text())
        for one in found.values():
            one["users"] = {k: np.array(v) for k, v in one["users"].items()}
        return found

    # Policies

    def aligned(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Aligns the generator and measures the result; from the cache where it is there."""
        settings = {**ALIGN, "weights": WEIGHTS, **settings}
        weights = settings.pop("weights")
        reward = self.reward_of(weights)
        config = AlignmentConfig(**settings, seed=self.seed, num_threads=1)
        key = json.dumps([weights, WEIGHTS, USERS, dataclasses.asdict(config)], sort_keys=True)
        name = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        path = self.folder / "policies" / f"{name}.json"
        if path.is_file():
            return self._read(path)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            model = OneRec.from_pretrained(self.folder / "generator" / "model")
            result = align(model, reward, self.train, self.valid, self.catalog, config, folder)
        seconds = time.perf_counter() - began
        rounds = result.record["iterations"]
        assert rounds, result.stopped
        measured = self.measured(model)
        measured["seconds"] = seconds
        measured["rounds"] = [{k: v for k, v in r.items() if k != "rewards"} for r in rounds]
        measured["settings"] = dataclasses.asdict(config)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(measured, default=lambda value: value.tolist()))
        return self._read(path)

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(path.read_text())
        found["users"] = {k: np.array(v) for k, v in found["users"].items()}
        return found

    def measured(self, model: OneRec) -> dict[str, Any]:
        """What a generator shows to the held-out users."""
        recommender = Recommender(model.eval(), self.catalog, batching=True)
        native = Recommender(model, self.catalog, backend="native")
        found = native.candidates(self.histories, beam_width=BEAM)
        shown = np.stack([each.items[0] for each in found])
        beams = self._scores([each.items for each in found])
        measured = self.valued(shown)
        measured["users"]["reward mean"] = np.array([row.mean() for row in beams])
        measured["users"]["reward max"] = np.array([row.max() for row in beams])
        measured["legality"] = recommender.legality(self.histories)
        return measured

    def valued(self, shown: npt.NDArray[np.int64]) -> dict[str, Any]:
        """The world's own value of sessions [users, m], and what they are made of."""
        assert (shown >= 0).all()
        assert all(len(set(row)) == LENGTH for row in shown.tolist()), "an item twice"
        taken = [np.isin(row, self.test.history(n)).any() for n, row in enumerate(shown)]
        assert not any(taken), "an item of the history"
        feedback = self.world.session_feedback(self.users, shown)
        creators = self.world.arrays["item_creator"][shown]
        return {
            "users": {
                "watch": np.asarray(self.world.session_value(self.users, shown)),
                "likes": feedback["like"],
                "follows": feedback["follow"],
                "repetition": np.array([1 - len(set(row)) / LENGTH for row in creators.tolist()]),
                "reward": np.array([row[0] for row in self._scores(list(shown[:, None]))]),
                "seconds": self.world.arrays["item_seconds"][shown].mean(axis=1),
            },
            "coverage": len(np.unique(shown)) / self.world.config.n_items,
        }

    def _scores(self, sessions: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float32]]:
        scores = []
        with torch.inference_mode():
            for n, each in enumerate(sessions):
                history = self.test.histories([n], self.reward.config.history_length)
                history = history[:, : max(1, int((history >= 0).sum()))].astype(np.int64)
                found = self.fused.score(
                    torch.from_numpy(history), torch.from_numpy(np.ascontiguousarray(each))[None]
                )
                scores.append(found[0].numpy())
        return scores

    def baselines(self) -> dict[str, dict[str, Any]]:
        """Policies without preferences, by name."""
        return self._kept("baselines", self._baselines)

    def decodings(self) -> dict[str, dict[str, Any]]:
        """Other searches of the generator's sessions, by name."""
        return self._kept("decodings", self._decodings)

    def _decodings(self) -> dict[str, dict[str, Any]]:
        decoder = TorchDecoder(self.generator.eval(), self.catalog.trie, torch.device("cpu"))
        known = self.generator.config.history_length
        found = {}
        for name, settings in DECODINGS.items():
            shown = []
            began = time.perf_counter()
            for begin in range(0, len(self.test), 100):
                rows = range(begin, min(begin + 100, len(self.test)))
                past = [self.test.history(n) for n in rows]
                beams = BeamSearch(
                    self.catalog.trie,
                    batch_size=len(past),
                    beam_width=BEAM,
                    session_length=LENGTH,
                    deny=[np.unique(self.catalog.leaf_of_item[each]) for each in past],
                    width_ramp=settings.get("ramp", ()),
                )
                decoder.run(
                    [self.catalog.sids[each[-known:]] for each in past],
                    Distinct(beams) if settings.get("distinct") else beams,
                    BEAM,
                    LENGTH,
                )
                leaves = beams.result().items[:, 0].numpy()
                shown.append(self.catalog.leaf_item_indices[self.catalog.leaf_offsets[leaves]])
            seconds = time.perf_counter() - began
            found[name] = {**self.valued(np.concatenate(shown)), "seconds": seconds}
        return found

    def _baselines(self) -> dict[str, dict[str, Any]]:
        rng = np.random.default_rng([self.seed, 10])
        counts = self.data.items["train_count"].to_numpy()
        lists: dict[str, list[npt.NDArray[np.int64]]] = {"random": [], "popularity": []}
        for n in range(len(self.test)):
            free = np.setdiff1d(np.arange(len(counts)), self.test.history(n))
            lists["random"].append(rng.permutation(free)[:LENGTH])
            lists["popularity"].append(free[np.argsort(-counts[free], kind="stable")[:LENGTH]])
        singles = SessionSet.load(self.folder / "singles")
        model = self._pretrained(
            "next", singles.samples("train"), singles.samples("valid"), NEXT_ITEM
        )
        next_item = Recommender(model, self.catalog, batching=True)
        ranked = next_item.rank(self.histories, LENGTH, beam_width=BEAM)
        lists["next-item list"] = [self.catalog.index_of(row) for row in ranked]
        found = {name: self.valued(np.stack(rows)) for name, rows in lists.items()}
        found["next-item list"]["legality"] = next_item.legality(self.histories)
        began = time.perf_counter()
        found["session-wise NTP"] = self.measured(self.generator)
        recommender = Recommender(self.generator, self.catalog, batching=True)
        ranked = recommender.rank(self.histories, LENGTH, beam_width=BEAM)
        firsts = [self.catalog.index_of(row) for row in ranked]
        found["session-wise NTP, first items as a list"] = self.valued(np.stack(firsts))
        beams = [each.items for each in recommender.candidates(self.histories, beam_width=128)]
        best = [items[row.argmax()] for items, row in zip(beams, self._scores(beams), strict=True)]
        found["NTP, best of 128 by reward"] = self.valued(np.stack(best))
        oracle = self.world.oracle(
            self.users, LENGTH, [self.test.history(n) for n in range(len(self.test))]
        )
        found["oracle"] = self.valued(oracle)
        for one in found.values():
            one["seconds"] = time.perf_counter() - began
        return found


class Distinct:
    """A beam search in which no two items of a session begin with the same code."""

    def __init__(self, beams: BeamSearch) -> None:
        self.beams = beams
        self.level = 0
        self.first = torch.empty(0)  # int64 [B, M, items so far]

    def step(self, logits: torch.Tensor) -> BeamState:
        begins = self.level == 0
        if begins and self.first.numel():
            logits = logits.scatter(2, self.first, float("-inf"))
        state = self.beams.step(logits)
        parents, tokens = state.parents.long(), state.tokens.long().clamp(min=0)[..., None]
        if self.first.numel():
            items = self.first.shape[2]
            self.first = self.first.gather(1, parents[..., None].expand(-1, -1, items))
        if begins:
            self.first = torch.cat([self.first, tokens], dim=2) if self.first.numel() else tokens
        self.level = state.level
        return state


def _short(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=4).hexdigest()


def interval(differences: list[Floats], resamples: int = 2000) -> tuple[float, float, float]:
    """Mean of paired differences, and a 95% bootstrap interval over worlds and users within."""
    rng = np.random.default_rng(0)
    means = np.empty(resamples)
    for n in range(resamples):
        chosen = rng.integers(0, len(differences), len(differences))
        parts = [differences[w][rng.integers(0, len(differences[w]), len(differences[w]))]
                 for w in chosen]  # fmt: skip
        means[n] = np.mean([part.mean() for part in parts])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([d.mean() for d in differences])), float(low), float(high)


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, float]:
    """Means over worlds, and the paired lead over `base` in watch time, likes and follows."""
    found: dict[str, float] = {}
    for name in runs[0]["users"]:
        found[name] = float(np.mean([run["users"][name].mean() for run in runs]))
    for name in ("watch", "likes", "follows"):
        pairs = [r["users"][name] - b["users"][name] for r, b in zip(runs, base, strict=True)]
        mean, low, high = interval(pairs)
        found |= {f"{name} lead": mean, f"{name} low": low, f"{name} high": high}
        if name == "watch" and len(pairs) > 1:
            found |= {f"watch lead, world {n}": float(p.mean()) for n, p in enumerate(pairs, 1)}
    for name in ("coverage", "legality"):
        if name in runs[0]:
            found[name] = float(np.mean([run[name] for run in runs]))
    found["drift"] = float(
        np.mean([r["rounds"][-1]["drift_seed"] if r.get("rounds") else 0.0 for r in runs])
    )
    return found


def policies(
    seeds: tuple[int, ...], effects: bool, names: list[str], cache: Path
) -> dict[str, Any]:
    """Policy -> (summary, seconds of each world)."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        lab = Lab(seed, effects, cache)
        for name, one in lab.baselines().items():
            runs.setdefault(name, []).append(one)
        for name in names:
            runs.setdefault(name, []).append(lab.aligned(POLICIES[name]))
    base = runs["session-wise NTP"]
    return {
        name: (summary(found, base), [run["seconds"] for run in found])
        for name, found in runs.items()
    }


def ablation(seeds: tuple[int, ...], kind: str, cache: Path) -> dict[str, Any]:
    """Setting -> (summary, seconds of each world), of IPA."""
    labs = [Lab(seed, True, cache) for seed in seeds]
    base = [lab.baselines()["session-wise NTP"] for lab in labs]
    found = {}
    for name, settings in ABLATIONS[kind].items():
        runs = [lab.aligned(settings) for lab in labs]
        found[name] = (summary(runs, base), [run["seconds"] for run in runs])
    return found


def causes(seeds: tuple[int, ...], kind: str, cache: Path) -> dict[str, Any]:
    """Policies without preferences in other worlds or after other sessions, over their own NTP."""
    found = {}
    for name, settings in CAUSES[kind].items():
        runs = [Lab(seed, True, cache, **settings).baselines() for seed in seeds]
        base = [run["session-wise NTP"] for run in runs]
        for policy in runs[0]:
            each = [run[policy] for run in runs]
            found[f"{name}: {policy}"] = summary(each, base), [run["seconds"] for run in each]
    return found


def decodings(seeds: tuple[int, ...], cache: Path) -> dict[str, Any]:
    """Lists and other searches of the same two networks, over session-wise NTP."""
    labs = [Lab(seed, True, cache) for seed in seeds]
    runs = [{**lab.baselines(), **lab.decodings()} for lab in labs]
    base = [run["session-wise NTP"] for run in runs]
    return {
        name: (summary([run[name] for run in runs], base), [run[name]["seconds"] for run in runs])
        for name in runs[0]
    }


def _record(benchmark: Any, found: dict[str, Any], facts: dict[str, Any]) -> None:
    """What `onerec bench` keeps: figures of each policy, and the seconds that it took a world."""
    first = "IPA" if "IPA" in found else next(iter(found))
    providers = {}
    for name in [first, *(n for n in found if n != first)]:
        figures, seconds = found[name]
        low, middle, high = np.percentile(seconds, [20, 50, 80])
        providers[name] = {
            "median_s": middle, "p20_s": low, "p80_s": high,
            "rates": {
                "s watched": figures["watch"],
                "s over NTP": figures["watch lead"],
                "s over NTP low": figures["watch low"],
                "s over NTP high": figures["watch high"],
                **{f"s over NTP in {k.split(', ')[1]}": v for k, v in figures.items()
                   if k.startswith("watch lead, ")},
                "likes": figures["likes"],
                "likes over NTP": figures["likes lead"],
                "likes over NTP low": figures["likes low"],
                "likes over NTP high": figures["likes high"],
                "follows": figures["follows"],
                "follows over NTP": figures["follows lead"],
                "follows over NTP low": figures["follows low"],
                "follows over NTP high": figures["follows high"],
                "repetition": figures["repetition"],
                **({"legality": figures["legality"]} if "legality" in figures else {}),
                "reward": figures["reward"],
                **{k: figures[k] for k in ("reward mean", "reward max") if k in figures},
                "coverage": figures["coverage"],
                "drift": figures["drift"],
            },
        }  # fmt: skip
    benchmark.pedantic(lambda: None)
    benchmark.extra_info.update(device="cpu", rounds=1, facts=facts, providers=providers)


def _marginals(world: World) -> dict[str, str]:
    wanted = ("watch seconds, mean", "watched to the end (>= 0.95)", "long view", "like", "follow",
              "of it between users", "of it between items",
              "same topic, within a request over apart")  # fmt: skip
    return {
        f"{name} (KuaiRand {theirs:.3g})": f"{ours:.3g}"
        for name, ours, theirs in world.marginals(100_000)
        if name in wanted
    }


@pytest.mark.parametrize(
    ("seeds", "effects", "names"),
    [(SEEDS, True, tuple(POLICIES)), (SEEDS, False, MAIN)],
    ids=["session effects", "no session effects"],
)
def test_policies(
    benchmark: Any, seeds: tuple[int, ...], effects: bool, names: tuple[str, ...]
) -> None:
    found = policies(seeds, effects, list(names), default_cache())
    world = simulate(SimulatorConfig(**WORLD, **dict.fromkeys(EFFECTS, effects), seed=seeds[0]))
    _record(
        benchmark,
        found,
        {"worlds": ", ".join(map(str, seeds)), "users": USERS, **_marginals(world)},
    )


@pytest.mark.parametrize("kind", list(CAUSES))
def test_causes(benchmark: Any, kind: str) -> None:
    found = causes(FEWER_SEEDS, kind, default_cache())
    _record(benchmark, found, {"worlds": ", ".join(map(str, FEWER_SEEDS)), "users": USERS})


def test_decodings(benchmark: Any) -> None:
    found = decodings(SEEDS, default_cache())
    _record(benchmark, found, {"worlds": ", ".join(map(str, SEEDS)), "users": USERS})


@pytest.mark.parametrize("kind", list(ABLATIONS))
def test_ablation(benchmark: Any, kind: str) -> None:
    found = ablation(FEWER_SEEDS, kind, default_cache())
    _record(benchmark, found, {"worlds": ", ".join(map(str, FEWER_SEEDS)), "users": USERS})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="*", default=list(POLICIES), help="policies")
    parser.add_argument("--ablation", choices=[*ABLATIONS, *CAUSES, "decodings"])
    parser.add_argument("--no-effects", action="store_true")
    parser.add_argument("--settings", nargs="*", default=[], help="JSON of more policies")
    parser.add_argument("--cache", type=Path, default=default_cache())
    given = parser.parse_args()
    for settings in given.settings:
        POLICIES[settings] = json.loads(settings)
        given.only.append(settings)
    make: Callable[[], dict[str, Any]] = (
        (lambda: decodings(tuple(given.seeds), given.cache))
        if given.ablation == "decodings"
        else (lambda: causes(tuple(given.seeds), given.ablation, given.cache))
        if given.ablation in CAUSES
        else (lambda: ablation(tuple(given.seeds), given.ablation, given.cache))
        if given.ablation
        else (lambda: policies(tuple(given.seeds), not given.no_effects, given.only, given.cache))
    )
    columns = ("watch", "watch lead", "watch low", "watch high", "likes", "follows", "repetition",
               "legality", "reward", "reward mean", "reward max", "coverage", "drift")  # fmt: skip
    print(f"{'policy':28}", *(f"{c:>11}" for c in columns), "    seconds")
    for name, (figures, seconds) in make().items():
        cells = (f"{figures[c]:11.4f}" if c in figures else " " * 11 for c in columns)
        print(f"{name:28}", *cells, f"{np.median(seconds):8.1f}")


if __name__ == "__main__":
    main()
