"""What the worker gives for a request, and what the log and the counters read of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onerec.inference import Recommendation, Recommender


@dataclass(frozen=True)
class Version:
    """A model and a catalogue as served.

    Attributes:
        number: Counts up with each swap and rollback.
        recommender: Never changed, so that requests under way keep it.
        source: Where it was loaded from.
        arm: Of the A/B split.
    """

    number: int
    recommender: Recommender
    source: str
    arm: str = "a"


@dataclass(frozen=True)
class Answer:
    """A request's sessions, and by what they were made.

    Attributes:
        recommendation: The sessions; of a ranking one, without a score, with its items in order.
        version: Of the model and the catalogue.
        waited: Seconds in the queue.
        seconds: Of the engine's call.
        batch: Requests decoded together.
    """

    recommendation: Recommendation
    version: Version
    waited: float
    seconds: float
    batch: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that has been answered.

    Attributes:
        ended: Seconds since 1970.
        seconds: From its headers to the end of its answer.
        request_id: Its own or the server's.
        method: Of HTTP.
        path: Of the route; "other" for none.
        status: Of HTTP.
        answers: The engine's, if it got that far: one, or one a user of a batch.
        client: Who asked.
        users: Of each answer the user and the length of the history.
    """

    ended: float
    seconds: float
    request_id: str
    method: str
    path: str
    status: int
    answers: list[Answer]
    client: str = ""
    users: list[tuple[Any, int]] = field(default_factory=list)
