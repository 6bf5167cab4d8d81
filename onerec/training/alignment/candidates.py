"""Candidates of preference alignment: what the model writes and the reward model thinks of it.

`Candidates` works in the trainer, or in a process beside it that `Ahead` keeps.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onerec.data.session_set import Samples
from onerec.errors import OneRecError
from onerec.inference import Recommender
from onerec.inference.decoding import FreeBeams, decode_sessions
from onerec.model.onerec import OneRec
from onerec.model.reward import RewardModel
from onerec.model.trie_mask import TrieMask
from onerec.tokenizer import Catalog
from onerec.training.alignment.config import AlignmentConfig
from onerec.training.alignment.losses import contrastive_token_scores
from onerec.training.alignment.preferences import Groups, choose, ranked
from onerec.training.batches import SessionBatches

CHUNK = 64  # users whose candidates are held at once

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Found(NamedTuple):
    """What was chosen from the candidates of some samples.

    Attributes:
        groups: Of each sample with a preference its number, its sessions' items [g, m], their
            rewards [g] and advantages [g].
        made: Candidates generated.
        spread: Sum over the groups of the difference between the best and the worst reward.
        widest: Largest difference of reward among the samples without a preference.
        seconds: Time in the search.
    """

    groups: list[tuple[int, Ints, Floats, Floats]]
    made: int
    spread: float
    widest: float
    seconds: float


class Candidates:
    """Writes sessions with a model, judges them, and chooses the groups to learn from.

    Args:
        reward: Scores sessions of item indices; moved to `device`.
        train: The samples that get candidates.
        batches: Of the same samples.
        catalog: Items and semantic ids.
        config: Settings.
        device: Where all of it runs.
    """

    def __init__(
        self,
        reward: RewardModel,
        train: Samples,
        batches: SessionBatches,
        catalog: Catalog,
        config: AlignmentConfig,
        device: torch.device,
    ) -> None:
        self.reward = reward.to(device).eval()
        self.train, self.batches = train, batches
        self.catalog, self.config, self.device = catalog, config, device
        sids = torch.from_numpy(catalog.sids.astype(np.int64))
        self.legal = TrieMask(sids, catalog.codebook_size)

    def generate(
        self, model: OneRec, rows: Ints, iteration: int, after: Callable[[int], None]
    ) -> Found:
        """Groups of samples `rows` from sessions that `model` writes.

        Args:
            model: In evaluation mode, on the device.
            rows: Samples.
            iteration: Of which what is drawn depends on it and the sample alone.
            after: Called after every chunk with the samples that are done.
        """
        config = self.config
        recommender = self.recommender(model)
        found = Found([], 0, 0.0, 0.0, 0.0)
        for begin in range(0, len(rows), CHUNK):
            part = rows[begin : begin + CHUNK]
            started = time.perf_counter()
            candidates = recommender.candidates(
                self.histories(self.train, part),
                beam_width=config.candidates,
                exclude_history=config.exclude_history,
            )
            spent, spread, widest = time.perf_counter() - started, 0.0, found.widest
            rewards = self.rewards(self.train, part, [each.items for each in candidates])
            free = config.method in ("ecpo", "gbpo") and config.format_samples
            legal = self._unconstrained(model, part) if free else None
            for row, (sample, each, reward) in enumerate(
                zip(part.tolist(), candidates, rewards, strict=True)
            ):
                draw = np.random.default_rng([config.seed, 4, iteration, sample])
                chosen = choose(each.items, reward, config, draw)
                if chosen is None:
                    widest = max(widest, ranked(each.items, reward)[1])
                    continue
                spread += float(reward.max() - reward.min())
                items, reward, advantage = each.items[chosen[0]], reward[chosen[0]], chosen[1]
                if legal is not None:
                    extra = legal[row][draw.permutation(len(legal[row]))[: config.format_samples]]
                    extra = extra[(extra >= 0).all(axis=1)]
                    items = np.concatenate([items, extra])
                    reward = np.append(reward, np.full(len(extra), np.nan, np.float32))
                    advantage = np.append(advantage, np.ones(len(extra), np.float32))
                found.groups.append((sample, items, reward, advantage))
            made = sum(len(each.items) for each in candidates)
            found = Found(
                found.groups,
                found.made + made,
                found.spread + spread,
                widest,
                found.seconds + spent,
            )
            after(begin + len(part))
        return found

    def recommender(self, model: OneRec) -> Recommender:
        """Generates under the trie with the fastest engine of the device."""
        return Recommender(model, self.catalog, device=self.device, batching=True)

    def histories(self, samples: Samples, rows: Ints) -> list[list[Any]]:
        """Item ids of the histories of samples."""
        ids = self.catalog.item_ids
        return [ids[samples.history(int(row))].tolist() for row in rows]

    @torch.inference_mode()
    def rewards(self, samples: Samples, rows: Ints, sessions: Sequence[Ints]) -> list[Floats]:
        """Rewards [n] of each user's sessions [n, m]."""
        found: list[Floats] = []
        length = max((each.shape[1] for each in sessions), default=1)
        for begin in range(0, len(rows), CHUNK):
            part = sessions[begin : begin + CHUNK]
            width = max(1, *(len(each) for each in part))
            padded = np.full((len(part), width, length), -1, dtype=np.int64)
            for row, each in enumerate(part):
                padded[row, : len(each)] = each
            history = samples.histories(
                rows[begin : begin + CHUNK], self.reward.config.history_length
            )
            history = history[:, : max(1, int((history >= 0).sum(axis=1).max()))]
            scores = self.reward.score(
                torch.from_numpy(history.astype(np.int64)).to(self.device),
                torch.from_numpy(padded).to(self.device),
            )
            values = scores.float().cpu().numpy()
            found += [values[row, : len(each)] for row, each in enumerate(part)]
        return found

    def log_probabilities(self, model: OneRec, rows: Ints, items: Ints) -> Tensor:
        """Log-probability of each code of sessions `items` [P, G, m] of samples `rows` [P].

        Returns:
            float32 [P, G, m * L], 0 where there is no session.
        """
        history = self.batches.take(rows).history.to(self.device)
        target = self._codes(items)
        logits = model.session_logits(history, target.flatten(0, 1), copies=items.shape[1])
        sids = target[..., : self.catalog.levels]
        if self.config.normalize == "legal" or model.config.legal_softmax:
            logits = logits.masked_fill(~self.legal.mask(sids.flatten(0, 1)), float("-inf"))
        codes = sids.flatten(0, 1).clamp(min=0)
        chosen = logits.float().log_softmax(dim=-1).gather(-1, codes[..., None]).squeeze(-1)
        chosen = chosen.view(*sids.shape)
        return torch.where(sids >= 0, chosen, 0).flatten(2)

    def refer(self, model: OneRec, groups: Groups) -> None:
        """Fills in the log-probabilities under `model`, and what else its losses need of it."""
        with torch.inference_mode():
            for begin in range(0, len(groups), CHUNK):
                at = slice(begin, begin + CHUNK)
                logs = self.log_probabilities(model, groups.samples[at], groups.items[at])
                groups.reference[at] = logs.cpu().numpy()
        if self.config.method == "critical_dpo":
            self._score_tokens(model, groups)

    def _codes(self, items: Ints) -> Tensor:
        """Item indices of any shape as the network reads items, [..., L] or [..., L + 1], on the
        device; -1 where -1."""
        rows = self.catalog.sids[np.maximum(items, 0)].astype(np.int64)
        rows[items < 0] = -1
        if self.batches.item_column:
            rows = np.concatenate([rows, items[..., None]], axis=-1)
        return torch.from_numpy(rows).to(self.device)

    def _unconstrained(self, model: OneRec, rows: Ints) -> Ints:
        """Sessions of the search without the trie: item indices [b, N, m], -1 for illegal ids."""
        shape = model.config
        beams = FreeBeams(
            shape.levels,
            batch_size=len(rows),
            beam_width=self.config.candidates,
            session_length=shape.session_length,
        )
        decode_sessions(
            model,
            self.batches.take(rows).history.to(self.device),
            beams,
            beam_width=self.config.candidates,
            session_length=shape.session_length,
        )
        sids = beams.sids().numpy()
        leaves = self.catalog.trie.lookup(sids.reshape(-1, shape.levels)).reshape(sids.shape[:3])
        first = self.catalog.leaf_item_indices[self.catalog.leaf_offsets[np.maximum(leaves, 0)]]
        return np.where(leaves >= 0, first, -1)

    def _score_tokens(self, model: OneRec, groups: Groups) -> None:
        """s_t of the losers, from copies of `model` tuned on winners and on losers."""
        tuned = [self._tuned(model, groups, member) for member in (0, 1)]
        with torch.inference_mode():
            for begin in range(0, len(groups), CHUNK):
                part = groups.take(np.arange(begin, min(begin + CHUNK, len(groups))))
                history = self.batches.take(part.samples).history.to(self.device)
                target = self._codes(part.items[:, 1])
                sids = target[..., : self.catalog.levels]
                illegal = ~self.legal.mask(sids)
                good, bad = (
                    each.session_logits(history, target).masked_fill(illegal, float("-inf"))
                    for each in tuned
                )
                beta = {} if self.config.beta is None else {"beta": self.config.beta}
                scores = contrastive_token_scores(good, bad, sids.clamp(min=0), **beta)
                rows = slice(begin, begin + CHUNK)
                groups.token_scores[rows, 1] = scores.flatten(1).cpu().numpy()

    def _tuned(self, model: OneRec, groups: Groups, member: int) -> OneRec:
        """A copy of `model` after one pass over the groups' winners (0) or losers (1)."""
        model = copy.deepcopy(model).requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.config.lr, weight_decay=0.0)
        order = np.random.default_rng([self.config.seed, 6, member]).permutation(len(groups))
        for begin in range(0, len(order), 32):
            rows = order[begin : begin + 32]
            history = self.batches.take(groups.samples[rows]).history.to(self.device)
            optimizer.zero_grad(set_to_none=True)
            model(history, self._codes(groups.items[rows, member])).loss.backward()
            optimizer.step()
        return model.eval().requires_grad_(False)


class Ahead:
    """A process that generates an iteration's candidates while another iteration trains.

    One job at a time. The process is spawned, so that a script that aligns asynchronously needs the
    usual `if __name__ == "__main__":`. It leaves Ctrl-C to the trainer and ends with it.

    Args:
        candidates: What the process works with; it gets a copy.
    """

    def __init__(self, candidates: Candidates) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._connection, theirs = spawning.Pipe()
        # As bytes: tensors among a process's arguments would go through shared memory.
        arguments = (theirs, pickle.dumps(candidates), torch.get_num_threads())
        self._process = spawning.Process(target=_serve, args=arguments, daemon=True)
        # Started by the process it would change the signals' mask back.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.iteration: int | None = None

    def start(self, snapshot: Path, rows: Ints, iteration: int) -> None:
        """Begins `Candidates.generate` with the model in a folder."""
        self.iteration = iteration
        self._connection.send((snapshot, rows, iteration))

    def result(self, check: Callable[[], None]) -> Found:
        """Waits for what was started.

        Args:
            check: Called while waiting; what it raises ends the wait.

        Raises:
            OneRecError: With the traceback of the process, or when it was killed.
        """
        while not self._connection.poll(0.2):
            check()
        self.iteration = None
        try:
            found = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            found = f"it ended with code {self._process.exitcode}"
        if isinstance(found, str):
            raise OneRecError(
                f"the process that generates candidates failed: {found.rstrip()}\nThe same command "
                "goes on from the newest checkpoint."
            )
        return Found(*found)

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.terminate()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, candidates: bytes, threads: int) -> None:
    """Answers jobs until the trainer is gone."""
    trainer = multiprocessing.parent_process()

    def check(_: int) -> None:
        if trainer is not None and not trainer.is_alive():
            raise SystemExit(1)

    try:
        torch.set_num_threads(threads)
        mine: Candidates = pickle.loads(candidates)
        while True:
            try:
                snapshot, rows, iteration = connection.recv()
            except EOFError:
                return
            model = OneRec.from_pretrained(snapshot).to(mine.device).eval().requires_grad_(False)
            connection.send(tuple(mine.generate(model, rows, iteration, check)))
    except Exception:  # `Ahead.result` raises it in the trainer
        connection.send(traceback.format_exc())
