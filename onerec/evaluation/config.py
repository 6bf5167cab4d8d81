"""Options of the evaluation; imports nothing heavy, because every command's help reads it."""

from __future__ import annotations

from dataclasses import dataclass


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
        unmasked: Also rank with the user's history left in (the protocol of several papers).
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
    unmasked: bool = True
    popular_top: float = 0.1
    buckets: tuple[int, ...] = (0, 5, 20)
    batch_size: int = 64
    resamples: int = 1000
    confidence: float = 0.95
    latency_requests: int = 100
    sample_sessions: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {
            "beam_width": self.beam_width,
            "batch_size": self.batch_size,
            "resamples": self.resamples,
            "max_users": 1 if self.max_users is None else self.max_users,
        }
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name, value in (
            ("latency_requests", self.latency_requests),
            ("sample_sessions", self.sample_sessions),
        ):
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks must be positive and not empty, got {self.ks}")
        if not self.splits:
            raise ValueError("splits must name at least one split")
        if not 0.0 < self.popular_top <= 1.0:
            raise ValueError(f"popular_top must be in (0, 1], got {self.popular_top}")
        if list(self.buckets) != sorted(set(self.buckets)) or min(self.buckets, default=0) < 0:
            raise ValueError(f"buckets must be >= 0 and increasing, got {self.buckets}")
