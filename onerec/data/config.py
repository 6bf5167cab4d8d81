"""Settings of session building and of the simulator; light to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MOST_SHOWN = 10  # the longest request of the simulator
N_TOPICS = 24  # topics that the simulator has words for


@dataclass(frozen=True)
class SessionConfig:
    """How sessions are built.

    Args:
        rule: What makes a session: "request" (rows of one request_id), "session" (of one
            session_id), "gap" (rows with no pause over `gap_minutes`), "next" (the user's next
            `length` good exposures), or "auto": the first of these that keeps the log's positive
            rows as targets; "next" where there are no real sessions or no feedback.
        length: m, the most target items of a session; longer ones are cut into windows of m.
            Null: 1 with "next", else 5.
        stride: With "next", how many good exposures later the next training window begins;
            windows of valid and test never overlap.
        gap_minutes: With "gap", the longest pause inside a session.
        really_watched_seconds: Without a long_view column, an exposure counts as really watched
            when it was watched to the end or for this long (KuaiRand's long view).
        interactions: Which flags count as an interaction.
        min_watched: Criterion: really watched exposures of a session.
        min_watch_seconds: Criterion: total watch time of a session. The paper gives no value.
        min_interactions: Criterion: exposures of a session with an interaction.
        require: Whether "any" or "all" of the criteria that the log has columns for must hold.
            They do not apply to "next", whose windows hold good exposures only.
        target: With "request", "session" and "gap", whether the target holds the "positive"
            exposures (really watched or interacted with, and not hated) or all "shown" ones.
        min_history: Sessions with fewer earlier positive exposures are dropped.
        split: "time", "last" (a user's last session is test, the last but one valid, if there
            are three), "column" (the log's own), or "auto": the log's own, else "time", and "last"
            where items are learned one by one and cuts in time would hold out few users.
        valid_from: With "time", where valid begins: ISO time (UTC unless it says otherwise) or
            milliseconds.
        test_from: Where test begins.
        valid_fraction: Without `valid_from`, the share of positive exposures between the two
            cuts, unless the log has cuts of its own (KuaiRand-Pure, see docs/data.md).
        test_fraction: Without `test_from`, the share of positive exposures after the test cut.
        unknown_items: Whether rows whose item is not in the items table are refused ("refuse")
            or dropped and counted ("drop").
        embeddings: One of the log's vector files by name, "cooccurrence", "text" (what `text_model`
            makes of the items' texts and tags; needs the extra `text`), several of these
            joined by "+" (side by side, each centred and scaled to equal mean square), or
            "auto": the first of the log's, with "next" joined with co-occurrence, or co-occurrence
            where the log has none.
        embedding_dim: Of co-occurrence vectors.
        text_model: Folder of a sentence-transformers model, or a name on the Hugging Face Hub; for
            "text".
        cooccurrence_window: Largest distance of a co-occurring pair.
        seed: Of co-occurrence and of filled vectors.
        exposed_sessions: Most exposed sessions with feedback that are written for a reward model; 0
            writes none. Of more, those with a known watch time come first, then an even sample.
    """

    rule: Literal["auto", "request", "session", "gap", "next"] = "auto"
    length: int | None = None
    stride: int = 1
    gap_minutes: float = 30.0
    really_watched_seconds: float = 18.0
    interactions: tuple[str, ...] = ("like", "follow", "share", "comment")
    min_watched: int = 5
    min_watch_seconds: float = 60.0
    min_interactions: int = 1
    require: Literal["any", "all"] = "any"
    target: Literal["positive", "shown"] = "positive"
    min_history: int = 1
    split: Literal["auto", "time", "last", "column"] = "auto"
    valid_from: str | int | None = None
    test_from: str | int | None = None
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    unknown_items: Literal["refuse", "drop"] = "refuse"
    embeddings: str = "auto"
    embedding_dim: int = 64
    text_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    cooccurrence_window: int = 5
    seed: int = 0
    exposed_sessions: int = 100_000

    def __post_init__(self) -> None:
        for name in ("length", "stride", "embedding_dim", "cooccurrence_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {value}")
        for name in (
            "gap_minutes",
            "really_watched_seconds",
            "min_watched",
            "min_watch_seconds",
            "min_interactions",
            "min_history",
            "exposed_sessions",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: wanted 0 or more, got {getattr(self, name)}")
        for name, allowed in (
            ("rule", ("auto", "request", "session", "gap", "next")),
            ("require", ("any", "all")),
            ("target", ("positive", "shown")),
            ("split", ("auto", "time", "last", "column")),
            ("unknown_items", ("refuse", "drop")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: wanted one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("valid_from, test_from: give both or neither")
        for name in ("valid_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted a share in (0, 1), got {getattr(self, name)}")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("valid_fraction + test_fraction: wanted less than 1")


@dataclass(frozen=True)
class SimulatorConfig:
    """The size and the switches of a simulated world.

    Args:
        n_users: Users.
        n_items: Items.
        n_creators: Creators; each keeps mostly to one topic.
        n_topics: Topics, at most 24.
        days: Length of the log.
        requests_per_user: Mean number of requests a user sends; it varies between users
            (gamma, shape 3).
        min_shown: Fewest videos of a request.
        max_shown: Most videos of a request, at most 10.
        latent_dim: Of interests and items.
        unseen_dim: How many of these the item vectors given to the tokenizer leave out.
        embedding_dim: Of the item vectors given to the tokenizer: the seen part, rotated, with
            dimensions that mean nothing and noise.
        embedding_noise: Noise of the item vectors, as a share of their spread.
        affinity_weight: Effect of a standard deviation of affinity on the watch logits.
        quality_weight: The same of item quality.
        activity_weight: The same of the user's general patience with videos.
        explore: Share of shown videos that the logging policy draws evenly.
        popular: Share that it draws by popularity; the rest are the best of `candidates` draws
            by a noisy affinity.
        candidates: Draws behind a personal slot, half by popularity and half even.
        coherence: How much a personal slot leans towards what the request's earlier slots show, in
            standard deviations of affinity at full similarity; negative: away from it.
        policy_noise: Noise of the policy's guess of the affinity, in standard deviations of it.
        popularity_spread: Standard deviation of the log of an item's popularity that its
            quality does not explain.
        fatigue: Whether interest falls with the similarity to the last items of the session.
        repetition: Whether it falls for a creator or an item that the session had before.
        leaving: Whether users may leave a session before its end.
        fatigue_weight: Loss in logits at full similarity.
        creator_weight: Loss for a creator again.
        item_weight: Loss for an item again.
        leave_logit: Logit of leaving after an item, before the user's own part, fatigue and
            what the user did with the item.
        start_ms: When the log begins, ms UTC (default 2024-01-01).
        seed: Of everything; equal configs give equal worlds and logs.
    """

    n_users: int = 2000
    n_items: int = 3000
    n_creators: int = 300
    n_topics: int = 24
    days: int = 14
    requests_per_user: float = 28.0
    min_shown: int = 5
    max_shown: int = 10
    latent_dim: int = 16
    unseen_dim: int = 4
    embedding_dim: int = 64
    embedding_noise: float = 0.3
    affinity_weight: float = 1.5
    quality_weight: float = 1.3
    activity_weight: float = 2.7
    explore: float = 0.1
    popular: float = 0.25
    candidates: int = 32
    coherence: float = 2.0
    policy_noise: float = 0.5
    popularity_spread: float = 0.6
    fatigue: bool = True
    repetition: bool = True
    leaving: bool = True
    fatigue_weight: float = 0.8
    creator_weight: float = 0.5
    item_weight: float = 2.0
    leave_logit: float = -3.6
    start_ms: int = 1704067200000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "n_users",
            "n_items",
            "n_creators",
            "n_topics",
            "days",
            "min_shown",
            "latent_dim",
            "embedding_dim",
            "candidates",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")
        if self.n_topics > N_TOPICS:
            raise ValueError(f"n_topics: wanted at most {N_TOPICS}, got {self.n_topics}")
        if not self.min_shown <= self.max_shown <= MOST_SHOWN:
            raise ValueError(
                f"max_shown: wanted {self.min_shown} (min_shown) to {MOST_SHOWN}, "
                f"got {self.max_shown}"
            )
        if self.n_items < self.max_shown:
            raise ValueError(f"n_items: wanted at least max_shown, got {self.n_items}")
        if not 0 <= self.unseen_dim < self.latent_dim:
            raise ValueError(f"unseen_dim: wanted 0..latent_dim - 1, got {self.unseen_dim}")
        if self.embedding_dim < self.latent_dim:
            raise ValueError(
                f"embedding_dim: wanted at least latent_dim ({self.latent_dim}), "
                f"got {self.embedding_dim}"
            )
        if self.requests_per_user <= 0:
            raise ValueError(f"requests_per_user: wanted more than 0, got {self.requests_per_user}")
        if self.explore < 0 or self.popular < 0 or self.explore + self.popular > 1:
            raise ValueError("explore, popular: wanted shares that add up to at most 1")
