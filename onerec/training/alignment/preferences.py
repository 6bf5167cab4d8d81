"""Groups of generated sessions and the losses over them.

A group is what one training sample learns from besides its own target: a winner and its losers, an
elite, or sessions with advantages.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from onerec.files import atomic_write
from onerec.training.alignment import losses
from onerec.training.alignment.config import PAIRED, AlignmentConfig

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass
class Groups:
    """P groups of at most G sessions of m items of L codes.

    Attributes:
        samples: int64 [P], the training sample of each.
        items: int64 [P, G, m], item indices; -1 where a group has fewer sessions. With a winner, it
            comes first.
        rewards: float32 [P, G], of the reward model; NaN where it was not asked.
        advantages: float32 [P, G], of policy gradients; 1 otherwise.
        reference: float32 [P, G, m * L], log-probability of each code under the snapshot that
            generated the group.
        token_scores: float32 [P, G, m * L], s_t of `critical_dpo`; 0 otherwise.
    """

    samples: Ints
    items: Ints
    rewards: Floats
    advantages: Floats
    reference: Floats
    token_scores: Floats

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def of(cls, found: list[tuple[int, Ints, Floats, Floats]], length: int, levels: int) -> Groups:
        """Pads (sample, items [g, m], rewards [g], advantages [g]) to one width."""
        width = max((len(items) for _, items, _, _ in found), default=1)
        items = np.full((len(found), width, length), -1, dtype=np.int64)
        rewards = np.full(items.shape[:2], np.nan, dtype=np.float32)
        advantages = np.ones(items.shape[:2], dtype=np.float32)
        for row, (_, mine, reward, advantage) in enumerate(found):
            items[row, : len(mine)] = mine
            rewards[row, : len(mine)] = reward
            advantages[row, : len(mine)] = advantage
        codes = np.zeros((*items.shape[:2], length * levels), dtype=np.float32)
        samples = np.array([sample for sample, *_ in found], dtype=np.int64)
        return cls(samples, items, rewards, advantages, codes, codes.copy())

    def save(self, path: Path) -> None:
        """Writes Parquet, one row a session: sample, member (0 is the winner), items, reward ..."""
        real = self.items[:, :, 0] >= 0
        group, member = np.nonzero(real)
        table = pa.table(
            {
                "sample": self.samples[group],
                "member": member,
                "items": list(self.items[real]),
                "reward": pa.array(self.rewards[real], from_pandas=True),
                "advantage": self.advantages[real],
                "reference": list(self.reference[real]),
                "token_scores": list(self.token_scores[real]),
            },
            schema=_SCHEMA,
        )
        with atomic_write(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def load(cls, path: Path, length: int, levels: int) -> Groups:
        """Reads what `save` wrote."""
        table = pq.read_table(path)
        member = table["member"].to_numpy()
        begin = np.append(np.flatnonzero(member == 0), len(member))
        columns = {name: table[name].to_pylist() for name in ("items", "reference", "token_scores")}
        reward = table["reward"].to_numpy()
        advantage = table["advantage"].to_numpy()
        samples = table["sample"].to_numpy()
        groups = cls.of(
            [
                (
                    int(samples[a]),
                    np.array(columns["items"][a:b], dtype=np.int64),
                    reward[a:b],
                    advantage[a:b],
                )
                for a, b in pairwise(begin)
            ],
            length,
            levels,
        )
        for row, (a, b) in enumerate(pairwise(begin)):
            groups.reference[row, : b - a] = columns["reference"][a:b]
            groups.token_scores[row, : b - a] = columns["token_scores"][a:b]
        return groups

    def take(self, rows: npt.NDArray[np.integer]) -> Groups:
        """The groups at `rows`."""
        return Groups(*(getattr(self, field.name)[rows] for field in fields(self)))


_SCHEMA = pa.schema(
    {
        "sample": pa.int64(),
        "member": pa.int32(),
        "items": pa.list_(pa.int32()),
        "reward": pa.float32(),
        "advantage": pa.float32(),
        "reference": pa.list_(pa.float32()),
        "token_scores": pa.list_(pa.float32()),
    }
)


def ranked(items: Ints, rewards: Floats) -> tuple[Ints, float]:
    """Places of a sample's candidates, best by reward first, and how far apart the rewards are.

    Candidates of one set of items count once.

    Args:
        items: int64 [n, m], the candidates, best by the generator first.
        rewards: float32 [n].
    """
    if not len(items):
        return np.empty(0, dtype=np.int64), 0.0
    _, first = np.unique(np.sort(items, axis=1), axis=0, return_index=True)
    first = np.sort(first)
    order = first[np.argsort(-rewards[first], kind="stable")]
    return order, float(rewards[order[0]] - rewards[order[-1]])


def choose(
    items: Ints, rewards: Floats, config: AlignmentConfig, rng: np.random.Generator
) -> tuple[Ints, Floats] | None:
    """Which candidates of a sample make its group, and their advantages.

    None where rewards differ by less than `min_gap`: such a sample would teach the reward model's
    noise.

    Args:
        items: int64 [n, m], the candidates, best by the generator first.
        rewards: float32 [n].
        config: Settings.
        rng: Of what is drawn.
    """
    order, gap = ranked(items, rewards)
    if gap < max(config.min_gap, 1e-12):
        return None
    if config.method in PAIRED:
        if config.method == "softmax_dpo":
            chosen = np.concatenate([order[:1], order[1:][-config.losers :][::-1]])
        elif config.loser == "low_quarter":
            low = order[1:][-max(1, len(order) // 4) :]
            chosen = np.array([order[0], rng.choice(low)])
        else:
            chosen = order[[0, -1]]
        return chosen, np.ones(len(chosen), dtype=np.float32)
    if config.method == "cem":
        chosen = order[: max(1, round(config.elite * len(order)))]
        return chosen, np.ones(len(chosen), dtype=np.float32)
    chosen = np.sort(rng.permutation(order)[: config.group])
    advantage = losses.group_advantage(torch.from_numpy(rewards[chosen])[None])[0].numpy()
    return (chosen, advantage) if advantage.any() else None


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    real: Tensor,
    advantages: Tensor,
    token_scores: Tensor,
    config: AlignmentConfig,
) -> Tensor:
    """One loss a group, [P].

    Args:
        policy: Log-probability of each code [P, G, T], with gradients; 0 where there is no code.
        reference: The same under the snapshot, without.
        real: bool [P, G].
        advantages: [P, G].
        token_scores: [P, G, T].
        config: Settings.
    """
    method = config.method
    if method not in PAIRED:
        share = real / real.sum(dim=1, keepdim=True).clamp(min=1)
        if method == "cem":
            values = -policy.mean(dim=-1)
        elif method == "ecpo":
            values = losses.ecpo(
                policy, reference, advantages[..., None], epsilon=config.epsilon, delta=config.delta
            ).mean(dim=-1)
        else:
            values = losses.gbpo(policy, reference, advantages[..., None]).mean(dim=-1)
        return (values * share).sum(dim=1)
    beta: dict[str, Any] = {} if config.beta is None else {"beta": config.beta}
    gamma: dict[str, Any] = {} if config.gamma is None else {"gamma": config.gamma}
    now, before = policy.sum(dim=-1), reference.sum(dim=-1)
    four = now[:, 0], now[:, 1], before[:, 0], before[:, 1]
    codes = policy.shape[-1]
    if method == "dpo":
        found = losses.dpo(*four, **beta)
    elif method == "ipo":
        found = losses.ipo(*four, **beta)
    elif method in ("conservative_dpo", "robust_dpo"):
        loss = losses.conservative_dpo if method == "conservative_dpo" else losses.robust_dpo
        found = loss(*four, label_smoothing=config.label_smoothing, **beta)
    elif method == "cpo":
        return losses.cpo(now[:, 0], now[:, 1], nll_weight=config.winner_nll / codes, **beta)
    elif method == "simpo":
        found = losses.simpo(now[:, 0], now[:, 1], codes, codes, **beta, **gamma)
    elif method == "softmax_dpo":
        losers = now[:, 1:].masked_fill(~real[:, 1:], float("-inf"))
        found = losses.softmax_dpo(now[:, 0], losers, before[:, 0], before[:, 1:], **beta)
    else:
        found = losses.critical_dpo(
            now[:, 0], policy[:, 1], before[:, 0], reference[:, 1], token_scores[:, 1], **gamma
        )
    return found - config.winner_nll * now[:, 0] / codes
