"""Options of the evaluation; imports nothing heavy, because every command's help reads it."""

from __future__ import annotations

from dataclasses import dataclass

from onerec.checks import at_least, at_least_or_none, fraction, wanted


@dataclass(frozen=True)
class EvaluationConfig:
    """How a recommender is measured.

    Attributes:
        splits: Splits to measure, side by side; one that has no sessions is left out, and the
            result says so.
        ks: Cut-offs of Recall@k, NDCG@k and hit rate.
        beam_width: Beams of the next-item ranking and of session generation. A width below
            max(ks) leaves places empty, which count as misses.
        max_users: Measure a seeded sample of this many users; all when null.
        max_sessions: Of these no more users than have this many sessions in a split; all when null.
        unmasked: Also rank with the user's history left in (the protocol of several papers).
        sasrec: Train SASRec on the run's own sequences as one more baseline (`onerec evaluate` and
            `onerec run`; minutes to hours on a CPU).
        popular_top: Share of the catalogue, by train count, that counts as popular.
        buckets: Upper ends of the rare-item buckets, by the target's train count; the last
            bucket is open.
        batch_size: Requests decoded together.
        resamples: Bootstrap samples; whole users are drawn.
        confidence: Coverage of the intervals.
        latency_requests: Single requests timed one after another, after 3 for warming up.
        sample_sessions: Example sessions kept in the result.
        seed: Of the user sample, the bootstrap, the baselines and the examples.
    """

    splits: tuple[str, ...] = ("valid", "test")
    ks: tuple[int, ...] = (5, 10)
    beam_width: int = 20
    max_users: int | None = None
    max_sessions: int | None = None
    unmasked: bool = True
    sasrec: bool = False
    popular_top: float = 0.1
    buckets: tuple[int, ...] = (0, 5, 20)
    batch_size: int = 64
    resamples: int = 1000
    confidence: float = 0.95
    latency_requests: int = 100
    sample_sessions: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "beam_width", "batch_size", "resamples")
        at_least_or_none(self, 1, "max_users", "max_sessions")
        at_least(self, 0, "latency_requests", "sample_sessions")
        if not self.ks or min(self.ks) < 1:
            raise wanted("ks", "numbers of at least 1, not empty", self.ks)
        if not self.splits:
            raise wanted("splits", "at least one split", self.splits)
        fraction(self, "popular_top", ends="(]")
        if list(self.buckets) != sorted(set(self.buckets)) or min(self.buckets, default=0) < 0:
            raise wanted("buckets", "increasing numbers of at least 0", self.buckets)
