"""Iterative preference alignment: generate, judge by the reward model, prefer, repeat.

Algorithm 2 of arXiv 2502.18965. An iteration begins with a snapshot M_t of the model. Each of its
samples is taken with probability r_dpo; for those M_t generates N sessions by beam search through
the trie, and the reward model names winner and loser. Then one pass over the samples minimises

    L = L_NTP + lambda / (r_dpo B) * sum over the pairs among the step's B samples of L_DPO

with M_t as the reference; what comes out is M_{t+1}. The paper adds a sample's L_DPO to its L_NTP;
the sum over a step is the same but for the constant, which keeps the weight of preferences apart
from how many samples have any.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import time
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_model
from torch import Tensor, nn

from onerec.data.session_set import Samples
from onerec.errors import OneRecError
from onerec.files import atomic_directory, atomic_write
from onerec.inference import Recommender
from onerec.inference.decoding import FreeBeams, decode_sessions
from onerec.model.onerec import OneRec
from onerec.model.reward import RewardModel
from onerec.model.trie_mask import TrieMask
from onerec.tokenizer import Catalog
from onerec.training.alignment_config import FREE_ON_RESUME, PAIRED, AlignmentConfig
from onerec.training.batches import Batch, OrderedBatches
from onerec.training.loop import (
    Progress,
    Run,
    TrainingInterrupted,
    TrainResult,
    stop_on_signal,
    writing,
)
from onerec.training.losses import contrastive_token_scores
from onerec.training.metrics import Record
from onerec.training.preferences import Groups, choose, preference_loss

logger = logging.getLogger(__name__)

_CHUNK = 64  # users whose candidates are held at once
_WATCHED_GROUPS = 256  # groups that the change of winners is measured on
_WEIGHT_STEPS = 8  # steps with preferences that the automatic weight is measured on


@dataclass(frozen=True)
class AlignmentResult:
    """What an alignment leaves.

    Attributes:
        model_dir: Folder of the chosen weights.
        iterations: Iterations that were run.
        chosen: Iteration whose snapshot was chosen, 0 for the seed model itself.
        stopped: Why it ended early, or None.
        seconds: Time in the loop, over all parts of a run that was stopped in between.
        record: Contents of alignment.json.
    """

    model_dir: Path
    iterations: int
    chosen: int
    stopped: str | None
    seconds: float
    record: dict[str, Any]


def align(
    model: OneRec,
    reward: RewardModel,
    train: Samples,
    held_out: Samples,
    catalog: Catalog,
    config: AlignmentConfig,
    out_dir: str | Path,
    *,
    progress: Progress | None = None,
) -> AlignmentResult:
    """Aligns `model` with what the reward model says users want.

    Runs in one process or in each of `accelerate launch` / `torchrun`, as `pretrain` does, and goes
    on from its newest checkpoint in the same way. Each process generates for its share of the
    samples. Log-probabilities under the snapshot are computed once a group.

    It ends before its time when the unconstrained legality, the winners' log-probability or the
    divergence from the seed model break their bounds; the snapshot before that iteration is then
    the result. The reward model's own score never decides: it is what is being pushed.

    Args:
        model: The pretrained model; afterwards it has the chosen weights.
        reward: Scores sessions of item indices.
        train: Samples to align on.
        held_out: Samples that the bounds are watched on.
        catalog: Items and semantic ids; rows are item indices.
        config: Settings.
        out_dir: Gets model/, snapshots/, pairs/, alignment.json, metrics.jsonl and checkpoints/.
        progress: Called in the main process as `progress(steps done, all steps, note)`.

    Raises:
        ValueError: On settings, samples or models that do not fit together.
        TrainingInterrupted: After Ctrl-C or SIGTERM; the same call goes on.
        TrainingDiverged: On a loss or gradient that is not finite.
        OneRecError: Where `out_dir` holds another run, or no sample got a preference.
    """
    if reward.config.n_items != len(catalog):
        raise ValueError(
            f"reward must know the {len(catalog)} items of the catalogue, got "
            f"{reward.config.n_items}"
        )
    length = model.config.session_length
    if reward.config.session_length < length:
        raise ValueError(
            f"reward must score sessions of {length} items, got {reward.config.session_length}"
        )
    if config.iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {config.iterations}")
    if not len(held_out):
        raise ValueError("held_out must hold at least one sample; got none")
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(config.num_threads or threads)
        stop = stack.enter_context(stop_on_signal())
        run = _Alignment(
            model, reward, train, held_out, catalog, config, Path(out_dir), stack, stop, progress
        )
        run.loop(stop, progress)
        return run.finish()


class _Alignment(Run):
    """The state of one call of `align`."""

    def __init__(
        self,
        model: OneRec,
        reward: RewardModel,
        train: Samples,
        held_out: Samples,
        catalog: Catalog,
        config: AlignmentConfig,
        out_dir: Path,
        stack: ExitStack,
        stop: list[str],
        progress: Progress | None,
    ) -> None:
        if model.prefixes or model.item_column:
            raise ValueError(
                "model must have a bidirectional encoder and no items of its own (n_items = 0)"
            )
        whole = -(-len(train) // config.batch_size)
        steps = min(config.steps or whole, config.max_steps or whole)
        self.steps = steps
        self.align = config
        self.catalog = catalog
        self.train = train
        self.stop = stop
        self.progress = progress
        seed = copy.deepcopy(model)
        fixed = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_ON_RESUME}
        super().__init__(
            model,
            train,
            None,
            catalog.sids,
            config.train_config(steps * config.iterations),
            out_dir,
            stack,
            identity={
                "alignment": fixed,
                "weights": _checksum(seed),
                "reward": _checksum(reward),
            },
        )
        device = self.accelerator.device
        self.seed = _frozen(seed, device)
        self.reward = reward.to(device).eval()
        self.legal = TrieMask(
            torch.from_numpy(catalog.sids.astype(np.int64)), catalog.codebook_size
        )
        rng = np.random.default_rng([config.seed, 5])
        watched = rng.permutation(len(held_out))[: config.monitor]
        self.held_out = held_out.take(np.sort(watched))
        self.watched = OrderedBatches(
            self.held_out,
            catalog.sids,
            history_length=self.module.config.history_length,
            session_length=self.module.config.session_length,
            batch_size=_CHUNK,
        )
        self.groups: Groups | None = None
        self.place = np.full(len(train), -1, dtype=np.int64)
        self.reference: OneRec = self.seed
        self.sums = {"loss": 0.0, "margin": 0.0, "right": 0.0, "groups": 0}
        self.state = self._read_state()
        if self.state["stopped"]:
            self.total = self.step

    # What is kept between parts of a run

    def _read_state(self) -> dict[str, Any]:
        """alignment.json as of the checkpoint that was restored, or a new one."""
        path = self.out_dir / "alignment.json"
        if self.step and path.is_file():
            state: dict[str, Any] = json.loads(path.read_text())
            state["iterations"] = [r for r in state["iterations"] if r["step"] <= self.step]
            last = state["iterations"][-1] if state["iterations"] else {"broken": None}
            state["stopped"] = last["broken"]
            return state
        return {
            "method": self.align.method,
            "steps_per_iteration": self.steps,
            "weight": self.align.weight,
            "iterations": [],
            "stopped": None,
            "chosen": 0,
            "seed": None,
        }

    def _write_state(self) -> None:
        if self.main:
            path = self.out_dir / "alignment.json"
            with writing(path), atomic_write(path) as temporary:
                temporary.write_text(json.dumps(self.state, indent=1) + "\n")
        self.accelerator.wait_for_everyone()

    def _snapshot(self, iteration: int) -> Path:
        return self.out_dir / "snapshots" / f"iteration_{iteration:02d}"

    # The loop

    def _train_step(self) -> None:
        iteration = self.step // self.steps
        if self.groups is None:
            self._begin(iteration)
        super()._train_step()
        if self.step % self.steps == 0:
            self._end(iteration + 1)

    def _record(self, record: Record) -> None:
        if record["kind"] == "train" and self.sums["groups"]:
            count = self.sums["groups"]
            record = {
                **record,
                "groups": count,
                "preference_loss": self.sums["loss"] / count,
                "margin": self.sums["margin"] / count,
                "pair_accuracy": self.sums["right"] / count,
            }
            self.sums = dict.fromkeys(self.sums, 0)
        super()._record(record)

    def _extra_loss(self, rows: npt.NDArray[np.int64]) -> Tensor | None:
        assert self.groups is not None
        at = self.place[rows]
        rows, at = rows[at >= 0], at[at >= 0]
        if not len(at):
            return None
        losses, policy = self._losses(rows, self.groups.take(at))
        total = losses.sum()
        self._note(losses, policy.detach(), self.groups.take(at))
        share = max(1.0, self.align.rate * self.align.batch_size)
        # DDP takes the mean of the gradients over processes.
        return total * (float(self.state["weight"]) / share * self.world)

    def _losses(self, rows: npt.NDArray[np.int64], groups: Groups) -> tuple[Tensor, Tensor]:
        """The preference loss of each group [P], and the policy's log-probabilities."""
        device = self.accelerator.device
        # Without dropout, as the reference was computed.
        self.module.eval()
        with self.accelerator.autocast():
            policy = self._log_probabilities(self.module, rows, groups.items)
        self.module.train()
        losses = preference_loss(
            policy,
            torch.from_numpy(groups.reference).to(device),
            torch.from_numpy(groups.items[:, :, 0] >= 0).to(device),
            torch.from_numpy(groups.advantages).to(device),
            torch.from_numpy(groups.token_scores).to(device),
            self.align,
        )
        return losses, policy

    def _note(self, losses: Tensor, policy: Tensor, groups: Groups) -> None:
        """Adds to the means that metrics.jsonl gets."""
        self.sums["groups"] += len(groups)
        self.sums["loss"] += float(losses.detach().sum())
        if self.align.method in PAIRED:
            gain = (policy.float().cpu() - torch.from_numpy(groups.reference)).sum(dim=-1)
            margin = gain[:, 0] - gain[:, 1]
            self.sums["margin"] += float(margin.sum())
            self.sums["right"] += int((margin > 0).sum())

    def _log_probabilities(
        self, model: OneRec, rows: npt.NDArray[np.int64], items: npt.NDArray[np.int64]
    ) -> Tensor:
        """Log-probability of each code of sessions `items` [P, G, m] of samples `rows` [P].

        Returns:
            float32 [P, G, m * L], 0 where there is no session.
        """
        history = self.batches.take(rows).history.to(self.accelerator.device)
        sids = self._codes(items)
        logits = model.session_logits(history, sids.flatten(0, 1), copies=items.shape[1])
        if self.align.normalize == "legal":
            logits = logits.masked_fill(~self.legal.mask(sids.flatten(0, 1)), float("-inf"))
        codes = sids.flatten(0, 1).clamp(min=0)
        chosen = logits.float().log_softmax(dim=-1).gather(-1, codes[..., None]).squeeze(-1)
        chosen = chosen.view(*sids.shape)
        return torch.where(sids >= 0, chosen, 0).flatten(2)

    def _codes(self, items: npt.NDArray[np.int64]) -> Tensor:
        """Item indices of any shape as semantic ids [..., L] on the device, -1 where -1."""
        sids = self.catalog.sids[np.maximum(items, 0)].astype(np.int64)
        sids[items < 0] = -1
        return torch.from_numpy(sids).to(self.accelerator.device)

    # The beginning of an iteration: snapshot, candidates, preferences

    def _begin(self, iteration: int) -> None:
        inside = self.step > iteration * self.steps
        if not inside:
            self.reference = _frozen(copy.deepcopy(self.module), self.accelerator.device)
        elif iteration > 0:
            self.reference = copy.deepcopy(self.seed)
            load_model(self.reference, self._snapshot(iteration) / "model.safetensors")
        if self.state["seed"] is None:
            self.state["seed"] = self._watch(self.seed)
        path = self.out_dir / "pairs" / f"iteration_{iteration + 1:02d}.parquet"
        shape = self.module.config
        if inside and path.is_file():
            self.groups = Groups.load(path, shape.session_length, shape.levels)
        else:
            self.groups = self._generate(iteration)
            if self.main:
                with writing(path):
                    self.groups.save(path)
            self.accelerator.wait_for_everyone()
        self.place[:] = -1
        self.place[self.groups.samples] = np.arange(len(self.groups))
        if self.state["weight"] is None:
            self.state["weight"] = self._balanced_weight()
        self._write_state()

    def _generate(self, iteration: int) -> Groups:
        """The groups of an iteration, the same in every process."""
        config = self.align
        shape = self.module.config
        if config.method == "ntp":
            return Groups.of([], shape.session_length, shape.levels)
        steps = range(iteration * self.steps, (iteration + 1) * self.steps)
        rows = np.unique(np.concatenate([self.batches.rows(step) for step in steps]))
        rng = np.random.default_rng([config.seed, 3, iteration])
        rows = rows[rng.random(len(rows)) < config.rate]
        mine = rows[self.accelerator.process_index :: self.world]
        recommender = self._recommender(self.reference)
        found: list[tuple[int, Any, Any, Any]] = []
        spent, made, spread = 0.0, 0, 0.0
        for begin in range(0, len(mine), _CHUNK):
            part = mine[begin : begin + _CHUNK]
            started = time.perf_counter()
            candidates = recommender.candidates(
                self._histories(self.train, part),
                beam_width=config.candidates,
                exclude_history=config.exclude_history,
            )
            spent += time.perf_counter() - started
            made += sum(len(each.items) for each in candidates)
            rewards = self._rewards(self.train, part, [each.items for each in candidates])
            legal = self._unconstrained(part) if config.method in ("ecpo", "gbpo") else None
            for row, (sample, each, reward) in enumerate(
                zip(part.tolist(), candidates, rewards, strict=True)
            ):
                draw = np.random.default_rng([config.seed, 4, iteration, sample])
                chosen = choose(each.items, reward, config, draw)
                if chosen is None:
                    continue
                spread += float(reward.max() - reward.min())
                items, reward, advantage = each.items[chosen[0]], reward[chosen[0]], chosen[1]
                if legal is not None:
                    extra = legal[row][draw.permutation(len(legal[row]))[: config.format_samples]]
                    extra = extra[(extra >= 0).all(axis=1)]
                    items = np.concatenate([items, extra])
                    reward = np.append(reward, np.full(len(extra), np.nan, np.float32))
                    advantage = np.append(advantage, np.ones(len(extra), np.float32))
                found.append((sample, items, reward, advantage))
            self._check_stop()
            if self.progress is not None and self.main:
                done = min(begin + _CHUNK, len(mine))
                self.progress(self.step, self.total, f"candidates of {done}/{len(mine)} users")
        totals = self.accelerator.reduce(
            torch.tensor([made, spread, spent], device=self.accelerator.device), "sum"
        ).tolist()
        found = sorted(gather_object(found), key=lambda each: each[0])
        self.state["generation"] = {
            "samples": len(rows),
            "groups": len(found),
            "candidates": int(totals[0]),
            "candidates_per_s": totals[0] * self.world / totals[2] if totals[2] else 0.0,
            "reward_spread": totals[1] / max(len(found), 1),
        }
        if not found:
            raise OneRecError(
                f"no sample of iteration {iteration + 1} got a preference ({len(rows)} were drawn; "
                "rewards of all others were within min_gap): raise --align.rate, --align.steps or "
                "--align.candidates, or lower --align.min_gap"
            )
        groups = Groups.of(found, shape.session_length, shape.levels)
        with torch.inference_mode():
            for begin in range(0, len(groups), _CHUNK):
                at = slice(begin, begin + _CHUNK)
                logs = self._log_probabilities(self.reference, groups.samples[at], groups.items[at])
                groups.reference[at] = logs.cpu().numpy()
        if config.method == "critical_dpo":
            self._score_tokens(groups)
        return groups

    def _unconstrained(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sessions of the search without the trie: item indices [b, N, m], -1 for illegal ids."""
        shape = self.module.config
        beams = FreeBeams(
            shape.levels,
            batch_size=len(rows),
            beam_width=self.align.candidates,
            session_length=shape.session_length,
        )
        decode_sessions(
            self.reference,
            self.batches.take(rows).history.to(self.accelerator.device),
            beams,
            beam_width=self.align.candidates,
            session_length=shape.session_length,
        )
        sids = beams.sids().numpy()
        leaves = self.catalog.trie.lookup(sids.reshape(-1, shape.levels)).reshape(sids.shape[:3])
        first = self.catalog.leaf_item_indices[self.catalog.leaf_offsets[np.maximum(leaves, 0)]]
        return np.where(leaves >= 0, first, -1)

    def _score_tokens(self, groups: Groups) -> None:
        """s_t of the losers, from copies of the snapshot tuned on winners and on losers."""
        good, bad = (self._tuned(groups, member) for member in (0, 1))
        with torch.inference_mode():
            for begin in range(0, len(groups), _CHUNK):
                part = groups.take(np.arange(begin, min(begin + _CHUNK, len(groups))))
                history = self.batches.take(part.samples).history.to(self.accelerator.device)
                sids = self._codes(part.items[:, 1])
                illegal = ~self.legal.mask(sids)
                pair = [
                    model.session_logits(history, sids).masked_fill(illegal, float("-inf"))
                    for model in (good, bad)
                ]
                beta: dict[str, Any] = {} if self.align.beta is None else {"beta": self.align.beta}
                scores = contrastive_token_scores(pair[0], pair[1], sids.clamp(min=0), **beta)
                rows = slice(begin, begin + _CHUNK)
                groups.token_scores[rows, 1] = scores.flatten(1).cpu().numpy()

    def _tuned(self, groups: Groups, member: int) -> OneRec:
        """A copy of the snapshot after one pass over the groups' winners (0) or losers (1)."""
        model = copy.deepcopy(self.reference).requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.align.lr, weight_decay=0.0)
        order = np.random.default_rng([self.align.seed, 6, member]).permutation(len(groups))
        for begin in range(0, len(order), 32):
            rows = order[begin : begin + 32]
            history = self.batches.take(groups.samples[rows]).history.to(self.accelerator.device)
            optimizer.zero_grad(set_to_none=True)
            model(history, self._codes(groups.items[rows, member])).loss.backward()
            optimizer.step()
        return _frozen(model, self.accelerator.device)

    def _balanced_weight(self) -> float:
        """lambda such that the preferences' gradient is `gradient_share` of the next-token one's.

        Norms are means over the first steps with preferences of the main process.
        """
        assert self.groups is not None
        norms: list[tuple[float, float]] = []
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        share = max(1.0, self.align.rate * self.align.batch_size)
        for step in range(self.step, self.step + self.steps):
            rows = self.batches.share(step)
            at = self.place[rows]
            if not (at >= 0).any():
                continue
            batch = self.batches.take(rows)
            device = self.accelerator.device
            own = self.module(batch.history.to(device), batch.target.to(device)).loss
            losses, _ = self._losses(rows[at >= 0], self.groups.take(at[at >= 0]))
            norms.append((_norm(own, parameters), _norm(losses.sum() / share, parameters)))
            if len(norms) == _WEIGHT_STEPS:
                break
        found = [1.0]
        if norms and sum(b for _, b in norms) > 0:
            found = [
                self.align.gradient_share * sum(a for a, _ in norms) / sum(b for _, b in norms)
            ]
        return float(broadcast_object_list(found)[0])

    # The end of an iteration: what changed, and whether to go on

    def _end(self, iteration: int) -> None:
        """Keeps the snapshot M_iteration and decides whether it is the last."""
        path = self._snapshot(iteration)
        self.module.eval()
        if self.main:
            with writing(path), atomic_directory(path) as folder:
                self.module.save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        watched = self._watch(self.module)
        winner, loser = self._changes()
        broken = [self._broken(watched, winner)]
        broadcast_object_list(broken)
        record = {
            "iteration": iteration,
            "step": self.step,
            **self.state.get("generation", {}),
            "winner_change": winner,
            "loser_change": loser,
            **watched,
            "broken": broken[0],
        }
        self.state["iterations"].append(record)
        self.state["stopped"] = broken[0]
        if broken[0] is None:
            self.state["chosen"] = iteration
        else:
            self.total = self.step
            self._tell("iteration %d is not taken and ends the run: %s", iteration, broken[0])
        self._write_state()
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        self._record({"kind": "iteration", **numbers})
        self.module.train()
        self.groups = None

    def _broken(self, watched: dict[str, Any], winner: float | None) -> str | None:
        """Which bound an iteration broke; the reward model's score is none of them."""
        config = self.align
        fallen = self.state["seed"]["legality"] - watched["legality"]
        if fallen > config.max_legality_drop:
            return (
                f"unconstrained legality fell by {fallen:.3f} to {watched['legality']:.3f} "
                f"(max_legality_drop {config.max_legality_drop})"
            )
        if winner is not None and winner < -config.max_winner_drop:
            return (
                f"winners lost {-winner:.3f} nats an item (max_winner_drop "
                f"{config.max_winner_drop})"
            )
        if watched["drift_seed"] > config.max_drift:
            return (
                f"divergence from the seed model is {watched['drift_seed']:.3f} nats an item "
                f"(max_drift {config.max_drift})"
            )
        return None

    @torch.inference_mode()
    def _changes(self) -> tuple[float | None, float | None]:
        """Mean change of the log-probability of winners and of losers, nats an item."""
        groups = self.groups
        if groups is None or not len(groups) or self.align.method not in PAIRED:
            return None, None
        groups = groups.take(np.arange(min(len(groups), _WATCHED_GROUPS)))
        items = groups.items[:, :2]
        now = self._log_probabilities(self.module, groups.samples, items).cpu().numpy()
        change = (now - groups.reference[:, :2]).sum(axis=-1) / items.shape[2]
        return float(change[:, 0].mean()), float(change[:, 1].mean())

    @torch.inference_mode()
    def _watch(self, model: OneRec) -> dict[str, Any]:
        """What the model does on the held-out sessions.

        Returns:
            loss: Next-token loss, nats an item.
            drift_seed, drift_last: KL(model || seed, or || last snapshot) of the codes along the
                held-out sessions, nats an item.
            legality: Share of legal ids without the trie, by greedy search.
            reward_mean, reward_max: Of the beam's sessions by the reward model, means over users.
            rewards: Of each user's best session by the generator's own score.
            win_rate: Share of users for whom that reward is above the seed's, ties one half.
            coverage: Distinct items of these sessions over all their places.
        """
        model.eval()
        device = self.accelerator.device
        sums = np.zeros(4)
        for index in range(len(self.watched)):
            batch = _on(self.watched[index], device)
            real = batch.target >= 0
            logs = [
                each.session_logits(batch.history, batch.target).log_softmax(dim=-1)
                for each in (model, self.seed, self.reference)
            ]
            wanted = logs[0].gather(-1, batch.target.clamp(min=0)[..., None]).squeeze(-1)
            sums[0] -= float(torch.where(real, wanted, 0).sum())
            for place, other in enumerate(logs[1:], start=1):
                divergence = (logs[0].exp() * (logs[0] - other)).sum(dim=-1)
                sums[place] += float(torch.where(real, divergence, 0).sum())
            sums[3] += batch.items
        recommender = self._recommender(model)
        rows = np.arange(len(self.held_out))
        histories = self._histories(self.held_out, rows)
        found = recommender.candidates(
            histories,
            beam_width=self.align.monitor_beam,
            exclude_history=self.align.exclude_history,
        )
        rewards = self._rewards(self.held_out, rows, [each.items for each in found])
        filled = [reward for reward in rewards if len(reward)]
        best = [float(reward[0]) for reward in filled]
        shown = [each.items[0] for each in found if len(each.items)]
        places = np.concatenate(shown)
        before = self.state["seed"]["rewards"] if self.state["seed"] else best
        better = np.sign(np.array(best) - np.array(before))
        return {
            "loss": sums[0] / sums[3],
            "drift_seed": sums[1] / sums[3],
            "drift_last": sums[2] / sums[3],
            "legality": Recommender(model, self.catalog, device=device, batching=True).legality(
                histories
            ),
            "reward_mean": float(np.mean([reward.mean() for reward in filled])),
            "reward_max": float(np.mean([reward.max() for reward in filled])),
            "reward_best": float(np.mean(best)),
            "rewards": best,
            "win_rate": float((0.5 + 0.5 * better).mean()),
            "coverage": len(np.unique(places)) / len(places),
        }

    # Small things

    def _recommender(self, model: OneRec) -> Recommender:
        """Generates under the trie with the fastest engine of the device."""
        device = self.accelerator.device
        backend = "native" if device.type == "cpu" else "torch"
        return Recommender(model, self.catalog, device=device, backend=backend, batching=True)

    def _histories(self, samples: Samples, rows: npt.NDArray[np.int64]) -> list[list[Any]]:
        ids = self.catalog.item_ids
        return [ids[samples.history(int(row))].tolist() for row in rows]

    @torch.inference_mode()
    def _rewards(
        self,
        samples: Samples,
        rows: npt.NDArray[np.int64],
        sessions: Sequence[npt.NDArray[np.int64]],
    ) -> list[npt.NDArray[np.float32]]:
        """Rewards [n] of each user's sessions [n, m]."""
        found: list[npt.NDArray[np.float32]] = []
        device = self.accelerator.device
        for begin in range(0, len(rows), _CHUNK):
            part = sessions[begin : begin + _CHUNK]
            width = max(1, *(len(each) for each in part))
            padded = np.full((len(part), width, self._length), -1, dtype=np.int64)
            for row, each in enumerate(part):
                padded[row, : len(each)] = each
            history = samples.histories(
                rows[begin : begin + _CHUNK], self.reward.config.history_length
            )
            history = history[:, : max(1, int((history >= 0).sum(axis=1).max()))]
            scores = self.reward.score(
                torch.from_numpy(history.astype(np.int64)).to(device),
                torch.from_numpy(padded).to(device),
            )
            values = scores.float().cpu().numpy()
            found += [values[row, : len(each)] for row, each in enumerate(part)]
        return found

    @property
    def _length(self) -> int:
        return int(self.module.config.session_length)

    def _check_stop(self) -> None:
        if self.stop and self.world == 1:
            raise TrainingInterrupted(
                f"stopped by {self.stop[0]} while generating candidates after step {self.step}. "
                "The same command goes on from the newest checkpoint."
            )

    def finish(self) -> AlignmentResult:
        """Takes the chosen snapshot into the model and writes model/."""
        chosen = int(self.state["chosen"])
        if chosen == 0:
            self.module.load_state_dict(self.seed.state_dict())
        else:
            load_model(self.module, self._snapshot(chosen) / "model.safetensors")
        published: TrainResult = self.publish()
        return AlignmentResult(
            published.model_dir,
            len(self.state["iterations"]),
            chosen,
            self.state["stopped"],
            self.seconds,
            self.state,
        )


def _frozen(model: OneRec, device: torch.device) -> OneRec:
    return model.to(device).eval().requires_grad_(False)


def _on(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.history.to(device), batch.target.to(device), batch.items)


def _norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return math.sqrt(sum(float(g.square().sum()) for g in found if g is not None))


def _checksum(model: nn.Module) -> str:
    """CRC-32 of all weights, in the order of their names."""
    checksum = 0
    for name, value in sorted(model.state_dict().items()):
        checksum = zlib.crc32(name.encode(), checksum)
        data = value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        checksum = zlib.crc32(data.data, checksum)
    return f"{checksum:08x}"
