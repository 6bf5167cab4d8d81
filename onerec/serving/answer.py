"""What the worker gives for a request, and what the log and the counters read of it."""

from __future__ import annotations

from dataclasses import dataclass

from onerec.inference import Recommendation, Recommender


@dataclass(frozen=True)
class Version:
    """A model and a catalogue as served.

    Attributes:
        number: Counts up with each swap and rollback.
        recommender: Never changed, so that requests under way keep it.
        source: Where it was loaded from.
    """

    number: int
    recommender: Recommender
    source: str


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
