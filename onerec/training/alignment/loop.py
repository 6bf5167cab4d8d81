"""Iterative preference alignment: generate, judge by the reward model, prefer, repeat.

Algorithm 2 of arXiv 2502.18965. An iteration begins with a snapshot M_t of the model. Each of its
samples is taken with probability r_dpo; for those M_t generates N sessions by beam search through
the trie, and the reward model names winner and loser. Then one pass over the samples minimises

    L = L_NTP + lambda / (r_dpo B) * sum over the pairs among the step's B samples of L_DPO

with M_t as the reference; what comes out is M_{t+1}. Asynchronously the sessions and the reference
of all iterations but the first are of M_{t-1}, whose sessions were written while M_t was trained.
The paper adds a sample's L_DPO to its L_NTP;
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
from onerec.files import atomic_directory, atomic_write
from onerec.inference import Recommender
from onerec.model.onerec import OneRec
from onerec.model.reward import RewardModel
from onerec.progress import Progress
from onerec.tokenizer import Catalog
from onerec.training.alignment.candidates import CHUNK, Ahead, Candidates, Found
from onerec.training.alignment.config import FREE_ON_RESUME, PAIRED, AlignmentConfig
from onerec.training.alignment.preferences import Groups, preference_loss
from onerec.training.batches import Batch, OrderedBatches
from onerec.training.loop import (
    Run,
    TrainingInterrupted,
    TrainResult,
    stop_on_signal,
    writing,
)
from onerec.training.metrics import Record

logger = logging.getLogger(__name__)

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

    With `asynchronous` each process has another one beside it, which writes and judges the next
    iteration's sessions. It starts from the snapshot that the present iteration started from, which
    does not depend on how fast either is: the result is the same in every run, and after a stop.
    Only the times that are written down differ. The second process is spawned: a script that calls
    this needs `if __name__ == "__main__":`. When it fails the next iteration raises its traceback.

    It ends before its time when the unconstrained legality, the winners' log-probability or the
    divergence from the seed model break their bounds, or when no sample of an iteration gets a
    preference; the snapshot before that iteration, or the seed model, is then the result, and a
    warning says why. The reward model's own score never decides: it is what is being pushed.

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
        OneRecError: Where `out_dir` holds another run, or the second process failed.
    """
    if reward.config.n_items != len(catalog):
        raise ValueError(
            f"reward: wanted a model of the {len(catalog)} items of the catalogue, got "
            f"{reward.config.n_items}"
        )
    length = model.config.session_length
    if reward.config.session_length < length:
        raise ValueError(
            f"reward: wanted a model of sessions of {length} items, got "
            f"{reward.config.session_length}"
        )
    if config.iterations < 1:
        raise ValueError(f"iterations: wanted at least 1, got {config.iterations}")
    if not len(held_out):
        raise ValueError("held_out: wanted at least one sample, got none")
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
        if model.prefixes:
            raise ValueError("model: wanted a bidirectional encoder, got a causal one")
        whole = -(-len(train) // config.batch_size)
        steps = min(config.steps or whole, config.max_steps or whole)
        self.steps = steps
        self.align = config
        self.catalog = catalog
        self.stack = stack
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
        self.candidates = Candidates(reward, train, self.batches, catalog, config, device)
        self.ahead: Ahead | None = None
        rng = np.random.default_rng([config.seed, 5])
        watched = rng.permutation(len(held_out))[: config.monitor]
        self.held_out = held_out.take(np.sort(watched))
        self.watched = OrderedBatches(
            self.held_out,
            catalog.sids,
            history_length=self.module.config.history_length,
            session_length=self.module.config.session_length,
            batch_size=CHUNK,
            item_column=model.item_column,
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
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            state["iterations"] = [r for r in state["iterations"] if r["step"] <= self.step]
            last = state["iterations"][-1] if state["iterations"] else {"broken": None}
            state["stopped"] = last["broken"]
            return state
        return {
            "method": self.align.method,
            "steps_per_iteration": self.steps,
            "weight": self.align.weight,
            "generated": {},
            "iterations": [],
            "stopped": None,
            "chosen": 0,
            "seed": None,
        }

    def _write_state(self) -> None:
        if self.main:
            path = self.out_dir / "alignment.json"
            with writing(path), atomic_write(path) as temporary:
                temporary.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()

    def _snapshot(self, iteration: int) -> Path:
        return self.out_dir / "snapshots" / f"iteration_{iteration:02d}"

    # The loop

    def _more(self) -> bool:
        if super()._more() and self.groups is None:
            self._begin(self.step // self.steps)
        return super()._more()

    def _train_step(self) -> None:
        super()._train_step()
        if self.step % self.steps == 0:
            self._end(self.step // self.steps)

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
            policy = self.candidates.log_probabilities(self.module, rows, groups.items)
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

    # The beginning of an iteration: candidates, preferences

    def _begin(self, iteration: int) -> None:
        inside = self.step > iteration * self.steps
        writer = max(0, iteration - self.align.asynchronous)
        self.reference = self.seed
        if writer > 0:
            self.reference = copy.deepcopy(self.seed)
            load_model(self.reference, self._snapshot(writer) / "model.safetensors")
        if self.state["seed"] is None:
            self.state["seed"] = self._watch(self.seed)
        path = self.out_dir / "pairs" / f"iteration_{iteration + 1:02d}.parquet"
        shape = self.module.config
        if inside and path.is_file():
            self.groups = Groups.load(path, shape.session_length, shape.levels)
        else:
            self.groups = self._generate(iteration)
            if self.state["stopped"]:
                self.window.settle()
                if self.window.steps:
                    self._record(self.window.record(self.step, self.seconds))
                self._write_state()
                return
            if self.main:
                with writing(path):
                    self.groups.save(path)
            self.accelerator.wait_for_everyone()
        if self.align.asynchronous:
            self._generate_ahead(iteration + 1)
        self.place[:] = -1
        self.place[self.groups.samples] = np.arange(len(self.groups))
        if self.state["weight"] is None:
            self.state["weight"] = self._balanced_weight()
        self._write_state()

    def _generate(self, iteration: int) -> Groups:
        """The groups of an iteration, the same in every process; ends the run without any."""
        shape = self.module.config
        if self.align.method == "ntp":
            return Groups.of([], shape.session_length, shape.levels)
        rows = self._drawn(iteration)
        waited = 0.0
        if self.ahead is not None and self.ahead.iteration == iteration:
            started = time.perf_counter()
            mine = self.ahead.result(self._check_stop)
            waited = time.perf_counter() - started
        else:

            def after(done: int) -> None:
                self._check_stop()
                if self.progress is not None and self.main:
                    share = len(rows[:: self.world])
                    self.progress(self.step, self.total, f"candidates of {done}/{share} users")

            mine = self.candidates.generate(self.reference, self._share(rows), iteration, after)
        parts: list[tuple[Found, float]] = gather_object([(mine, waited)])
        every = [part for part, _ in parts]
        found = sorted((group for part in every for group in part.groups), key=lambda each: each[0])
        made = sum(part.made for part in every)
        seconds = sum(part.seconds for part in every)
        facts = {
            "samples": len(rows),
            "groups": len(found),
            "candidates": made,
            "candidates_per_s": made * self.world / seconds if seconds else 0.0,
            "reward_spread": sum(part.spread for part in every) / max(len(found), 1),
        }
        if self.align.asynchronous:
            facts["stale_steps"] = self.steps if iteration else 0
            facts["waited_s"] = sum(waited for _, waited in parts) / self.world
        self.state["generated"][str(iteration + 1)] = facts
        groups = Groups.of(found, shape.session_length, shape.levels)
        if found:
            self.candidates.refer(self.reference, groups)
        else:
            widest = max(part.widest for part in every)
            self._stop(self._nothing_found(iteration + 1, len(rows), widest))
        return groups

    def _nothing_found(self, iteration: int, samples: int, widest: float) -> str:
        """Why an iteration has no preferences, and what to change."""
        otherwise = "; --align.iterations 0 leaves alignment out"
        if not samples:
            return (
                f"iteration {iteration} drew no sample at rate {self.align.rate:g}; raise "
                f"--align.rate or --align.steps{otherwise}"
            )
        return (
            f"iteration {iteration} found nothing to prefer: of {samples} samples 0 have sessions "
            f"whose rewards differ by min_gap {self.align.min_gap:g}, the widest gap is "
            f"{widest:.3g}; raise --align.rate, --align.steps or --align.candidates, or lower "
            f"--align.min_gap{otherwise}"
        )

    def _generate_ahead(self, iteration: int) -> None:
        """Begins a coming iteration's candidates, by the newest snapshot, in another process."""
        if iteration == self.align.iterations or self.align.method == "ntp":
            return
        snapshot = self._snapshot(iteration - 1)
        if iteration == 1:
            if self.main:
                with writing(snapshot), atomic_directory(snapshot) as folder:
                    self.seed.save_pretrained(folder)
            self.accelerator.wait_for_everyone()
        if self.ahead is None:
            self.ahead = Ahead(self.candidates)
            self.stack.callback(self.ahead.close)
        self.ahead.start(snapshot, self._share(self._drawn(iteration)), iteration)

    def _drawn(self, iteration: int) -> npt.NDArray[np.int64]:
        """The samples of an iteration that get candidates."""
        steps = range(iteration * self.steps, (iteration + 1) * self.steps)
        rows = np.unique(np.concatenate([self.batches.rows(step) for step in steps]))
        rng = np.random.default_rng([self.align.seed, 3, iteration])
        return rows[rng.random(len(rows)) < self.align.rate]

    def _share(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of the samples that this process generates for."""
        return rows[self.accelerator.process_index :: self.world]

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
            torch.manual_seed(self.align.seed)  # of dropout
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
            **self.state["generated"].get(str(iteration), {}),
            "winner_change": winner,
            "loser_change": loser,
            **watched,
            "broken": broken[0],
        }
        self.state["iterations"].append(record)
        if broken[0] is None:
            self.state["chosen"] = iteration
        else:
            self._stop(broken[0])
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
        now = self.candidates.log_probabilities(self.module, groups.samples, items).cpu().numpy()
        change = (now - groups.reference[:, :2]).sum(axis=-1) / items.shape[2]
        return float(change[:, 0].mean()), float(change[:, 1].mean())

    @torch.inference_mode()
    def _watch(self, model: OneRec) -> dict[str, Any]:
        """What the model does on the held-out sessions.

        Returns:
            loss: Next-token loss, nats an item.
            drift_seed, drift_last: KL(model || seed, or || the reference) of the codes along the
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
            sids = batch.target[..., : self.catalog.levels]
            real = sids >= 0
            logs = [
                each.session_logits(batch.history, batch.target).log_softmax(dim=-1)
                for each in (model, self.seed, self.reference)
            ]
            wanted = logs[0].gather(-1, sids.clamp(min=0)[..., None]).squeeze(-1)
            sums[0] -= float(torch.where(real, wanted, 0).sum())
            possible = logs[0].isfinite()
            for place, other in enumerate(logs[1:], start=1):
                apart = torch.where(possible, logs[0].exp() * (logs[0] - other), 0)
                divergence = apart.sum(dim=-1)
                sums[place] += float(torch.where(real, divergence, 0).sum())
            sums[3] += batch.items
        recommender = self.candidates.recommender(model)
        rows = np.arange(len(self.held_out))
        histories = self.candidates.histories(self.held_out, rows)
        found = recommender.candidates(
            histories,
            beam_width=self.align.monitor_beam,
            exclude_history=self.align.exclude_history,
        )
        rewards = self.candidates.rewards(self.held_out, rows, [each.items for each in found])
        filled = [reward for reward in rewards if len(reward)]
        best = [float(reward[0]) for reward in filled]
        shown = [each.items[0] for each in found if len(each.items)]
        if not shown:
            raise ValueError(
                f"no session of {self.module.config.session_length} items is left for any of the "
                f"{len(rows)} held-out sessions that are watched: their histories hold nearly the "
                "whole catalogue; --align.exclude_history false, or --align.iterations 0, which "
                "leaves alignment out"
            )
        places = np.concatenate(shown)
        before = self.state["seed"]["rewards"] if self.state["seed"] else best
        better = np.sign(np.array(best) - np.array(before))
        return {
            "loss": sums[0] / sums[3],
            "drift_seed": sums[1] / sums[3],
            "drift_last": sums[2] / sums[3],
            "legality": Recommender(
                model, self.catalog, device=device, backend="torch", batching=True
            ).legality(histories),
            "reward_mean": float(np.mean([reward.mean() for reward in filled])),
            "reward_max": float(np.mean([reward.max() for reward in filled])),
            "reward_best": float(np.mean(best)),
            "rewards": best,
            "win_rate": float((0.5 + 0.5 * better).mean()),
            "coverage": len(np.unique(places)) / len(places),
        }

    # Small things

    def _stop(self, reason: str) -> None:
        """Ends the run with the model that it has."""
        self.state["stopped"] = reason
        self.total = self.step
        if self.main:
            chosen = self.state["chosen"]
            kept = f"of iteration {chosen}" if chosen else "before alignment"
            logger.warning("alignment ended early with the model %s: %s", kept, reason)

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
