"""Bodies of requests and answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from onerec.trie import MAX_TAGS

_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
_Text = Annotated[str, Field(max_length=4096, strict=True)]
_Tag = Annotated[int, Field(ge=0, lt=MAX_TAGS, strict=True)] | _Text
_Count = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
_Ids = list[_Int64] | list[_Text]


class User(BaseModel):
    """Whose history, and what not to show."""

    model_config = ConfigDict(extra="forbid")
    history: _Ids | None = Field(
        default=None,
        description="Item ids, oldest first; unknown ids are left out. Where the server keeps "
        "histories and `user` is given, they come behind the user's, and may be left out.",
    )
    exclude: _Ids = Field(default_factory=list, description="Item ids never to show.")
    user: _Int64 | _Text | None = Field(
        default=None,
        description="Who it is, for the A/B split, the log of what was served, and the history "
        "where the server keeps them.",
    )


class Wanted(BaseModel):
    """What requests for sessions and for rankings share."""

    model_config = ConfigDict(extra="forbid")
    exclude_history: bool = Field(
        default=True, strict=True, description="Show nothing from the history."
    )
    beam_width: _Count | None = Field(
        default=None, description="Beams followed at once; null is the server's default."
    )
    allow_tags: list[_Tag] | None = Field(
        default=None,
        max_length=MAX_TAGS,
        description="Items with one of these tags only, by word or by number; null: all.",
    )
    scoring: Literal["full_softmax", "legal_softmax"] | None = Field(
        default=None, description="Null is the softmax that the model was trained with."
    )
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    deadline_ms: _Count | None = Field(
        default=None, description="Longest wait for the answer; null is the server's default."
    )


class WantedSessions(Wanted):
    """Sessions."""

    session_length: _Count | None = Field(
        default=None, description="Items of a session; null is the model's own."
    )
    num_sessions: _Count = Field(default=1, description="Sessions, best first.")


class WantedRanking(Wanted):
    """A ranking of next items."""

    k: Annotated[int, Field(ge=1, le=100_000, strict=True)] = Field(
        default=10, description="Most items."
    )
    dense_weight: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Null ranks as the run measured: by its mixture of generator, dense head and "
        "counts where the export has one, else by the generator. 0: by the generator. Above 0: by "
        "both heads of a model that has a dense one.",
    )


class RecommendRequest(User, WantedSessions):
    """A user's history, and what is wanted."""


class RankRequest(User, WantedRanking):
    """A user's history; the next items are wanted, ranked."""


class RecommendBatchRequest(WantedSessions):
    """Many users, and what is wanted for each of them."""

    users: list[User] = Field(min_length=1)


class RankBatchRequest(WantedRanking):
    """Many users; the next items are wanted for each of them, ranked."""

    users: list[User] = Field(min_length=1)


class Session(BaseModel):
    """Items in order, and the sum of the log-probabilities of their codes."""

    items: list[int] | list[str]
    score: float


class Sessions(BaseModel):
    """Sessions, best first; fewer than asked where the catalogue has no more."""

    version: int = Field(description="Of the model and the catalogue that answered.")
    arm: str = Field(description="Of the A/B split.")
    sessions: list[Session]


class Ranking(BaseModel):
    """Next items, best first; fewer than asked where the beam found fewer."""

    version: int = Field(description="Of the model and the catalogue that answered.")
    arm: str = Field(description="Of the A/B split.")
    items: list[int] | list[str]


class RecommendResponse(Sessions):
    """A user's sessions."""

    request_id: str


class RankResponse(Ranking):
    """A user's next items."""

    request_id: str


class RecommendBatchResponse(BaseModel):
    """For each user, in their order, sessions."""

    request_id: str
    results: list[Sessions]


class RankBatchResponse(BaseModel):
    """For each user, in their order, next items."""

    request_id: str
    results: list[Ranking]


class UserEvents(BaseModel):
    """What a user took."""

    model_config = ConfigDict(extra="forbid")
    user: _Int64 | _Text
    items: _Ids = Field(min_length=1, description="Item ids, oldest first.")


class EventsRequest(BaseModel):
    """What users took, to be kept for their later requests."""

    model_config = ConfigDict(extra="forbid")
    events: list[UserEvents] = Field(min_length=1)


class EventsResponse(BaseModel):
    """For each user of the request, in their order, how many items the history has now."""

    request_id: str
    kept: list[int]


class SwapRequest(BaseModel):
    """A folder on the server's machine."""

    model_config = ConfigDict(extra="forbid")
    folder: Annotated[str, Field(min_length=1, max_length=4096, strict=True)]
    force: bool = Field(
        default=False,
        strict=True,
        description="Take also other ids, another quantizer, or far fewer items.",
    )
    arm: Literal["a", "b"] = "a"


class RollbackRequest(BaseModel):
    """Which arm of the A/B split goes back."""

    model_config = ConfigDict(extra="forbid")
    arm: Literal["a", "b"] = "a"


class VersionResponse(BaseModel):
    """What is served."""

    version: int
    arm: str
    source: str
    export: str = Field(description="Fingerprint of the export.")
    catalog: str = Field(description="Fingerprint of item ids and semantic ids.")
    quantizer: str = Field(description="Fingerprint of the quantizer of the semantic ids.")
    items: int
    tags: list[str] = Field(description="Words of the catalogue's tags, by number.")
    library: str = Field(description="Version of onerec.")


class ErrorResponse(BaseModel):
    """What went wrong."""

    request_id: str
    error: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The body is not JSON.",
        401: "No or a wrong bearer token.",
        403: "The token is not the admin's.",
        404: "There is none.",
        409: "Another swap is under way.",
        413: "The body is too large.",
        422: "A field is wrong.",
        429: "The queue is full; Retry-After says when to come back.",
        503: "The server is stopping.",
        504: "The deadline passed, or would have before the answer.",
    }.items()
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Descriptions of these answers, for OpenAPI."""
    return {status: ERRORS[status] for status in statuses}
