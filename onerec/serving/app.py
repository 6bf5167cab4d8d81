"""The HTTP interface: routes, limits, request ids, logs."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from onerec._version import __version__
from onerec.errors import DataError
from onerec.inference import Recommender
from onerec.serving.answer import Answer
from onerec.serving.config import ServeConfig
from onerec.serving.metrics import Entry, Journal, Metrics
from onerec.serving.worker import (
    Draining,
    Expired,
    NoEarlierVersion,
    Options,
    QueueFull,
    Worker,
)
from onerec.trie import MAX_TAGS

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
# A hot route: the request's state and body in, the answer's JSON out.
Route = Callable[[dict[str, Any], bytes], Awaitable[bytes]]

log = logging.getLogger("onerec.serving")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")
_Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
_Text = Annotated[str, Field(max_length=4096, strict=True)]
_Tag = Annotated[int, Field(ge=0, lt=MAX_TAGS, strict=True)] | _Text
_Ids = list[_Int64] | list[_Text]


class _Request(BaseModel):
    """What requests for sessions and for rankings share."""

    model_config = ConfigDict(extra="forbid")
    history: _Ids = Field(description="Item ids, oldest first; unknown ids are left out.")
    exclude: _Ids = Field(default_factory=list, description="Item ids never to show.")
    exclude_history: bool = Field(default=True, description="Show nothing from the history.")
    beam_width: int | None = Field(
        default=None, ge=1, description="Beams followed at once; null is the server's default."
    )
    allow_tags: list[_Tag] | None = Field(
        default=None,
        max_length=MAX_TAGS,
        description="Items with one of these tags alone, by word or by number; null: all.",
    )
    scoring: Literal["full_softmax", "legal_softmax"] | None = Field(
        default=None, description="Null is the softmax that the model was trained with."
    )
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    deadline_ms: int | None = Field(
        default=None, ge=1, description="Longest wait for the engine; null is the server's default."
    )


class RecommendRequest(_Request):
    """A user's history, and what is wanted."""

    session_length: int | None = Field(
        default=None, ge=1, description="Items of a session; null is the model's own."
    )
    num_sessions: int = Field(default=1, ge=1, description="Sessions, best first.")


class RankRequest(_Request):
    """A user's history; the next items are wanted, ranked."""

    k: int = Field(default=10, ge=1, description="Most items.")
    dense_weight: float = Field(
        default=0.0, ge=0, le=1, description="Weight of the dense head of a model that has one."
    )


class RankResponse(BaseModel):
    """Next items, best first; fewer than asked where the beam found fewer."""

    request_id: str
    version: int = Field(description="Of the model and the catalogue that answered.")
    items: list[int] | list[str]


class Session(BaseModel):
    """Items in order, and the sum of the log-probabilities of their codes."""

    items: list[int] | list[str]
    score: float


class RecommendResponse(BaseModel):
    """Sessions, best first; fewer than asked where the catalogue has no more."""

    request_id: str
    version: int = Field(description="Of the model and the catalogue that answered.")
    sessions: list[Session]


class SwapRequest(BaseModel):
    """A folder on the server's machine."""

    model_config = ConfigDict(extra="forbid")
    folder: str = Field(min_length=1, max_length=4096)


class VersionResponse(BaseModel):
    """What is served."""

    version: int
    source: str
    items: int
    tags: list[str] = Field(description="Words of the catalogue's tags, by number.")


class ErrorResponse(BaseModel):
    """What went wrong."""

    request_id: str
    error: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The body is not JSON.",
        401: "No or a wrong bearer token.",
        413: "The body is too large.",
        422: "A field is wrong.",
        429: "The queue is full; Retry-After says when to come back.",
        503: "The server is stopping.",
        504: "The deadline passed before the engine was free.",
    }.items()
}


def create_app(
    recommender: Recommender,
    config: ServeConfig | None = None,
    *,
    token: str | None = None,
    source: str = "",
) -> FastAPI:
    """The application around a recommender; its engine thread starts here and ends with the app.

    Args:
        recommender: What to serve first; warmed up by the caller.
        config: Limits and defaults.
        token: Bearer token that requests must bring. None: none, and then there are no admin
            routes, as anybody could load any folder.
        source: Name of the first version.

    Raises:
        ValueError: A token that no request could bring.
    """
    config = ServeConfig() if config is None else config
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ValueError(
            "token (ONEREC_TOKEN): wanted visible ASCII characters alone, as a header brings them, "
            f"got {'none' if not token else 'others too, such as a space or a line break'}"
        )
    metrics = Metrics()
    journal = Journal(metrics)
    worker = Worker(
        recommender,
        metrics,
        source=source,
        max_queue=config.max_queue,
        max_rows=config.max_rows,
        keep_versions=config.keep_versions,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.stop)
        journal.write()

    app = _Application(title="onerec", version=__version__, lifespan=lifespan)
    app.state.worker, app.state.metrics = worker, metrics
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(AnyHTTPException, _on_error)
    app.add_exception_handler(Exception, _on_error)

    async def ask(state: dict[str, Any], body: _Request, options: Options) -> Answer:
        served = worker.version.recommender
        if options.beam_width > config.max_beam_width:
            raise _invalid("beam_width", f"at most {config.max_beam_width}", options.beam_width)
        if body.allow_tags is not None:
            try:
                served.catalog.tag_bits(body.allow_tags)
            except ValueError as error:
                raise HTTPException(422, f"allow_tags: {error}") from None
        for name, ids in (("history", body.history), ("exclude", body.exclude)):
            _check_ids(name, ids, served, config.max_history)
        wanted = config.deadline_ms if body.deadline_ms is None else body.deadline_ms
        if wanted > config.max_deadline_ms:
            raise _invalid("deadline_ms", f"at most {config.max_deadline_ms}", wanted)
        try:
            answer = await worker.ask(body.history, body.exclude, options, wanted / 1000)
        except QueueFull as error:
            raise HTTPException(
                429, "the queue is full", headers={"Retry-After": str(error.retry_after)}
            ) from None
        except Draining as error:
            raise HTTPException(503, str(error)) from None
        except Expired as error:
            raise HTTPException(504, str(error)) from None
        except (TypeError, ValueError) as error:  # ids of the kind that a swap has just replaced
            raise HTTPException(422, str(error)) from None
        state["answer"] = answer
        return answer

    def options_of(body: _Request, **rest: Any) -> Options:
        width = config.beam_width if body.beam_width is None else body.beam_width
        tags = None if body.allow_tags is None else frozenset(body.allow_tags)
        fields: dict[str, Any] = {"session_length": None, "num_sessions": 1, **rest}
        return Options(
            beam_width=width,
            exclude_history=body.exclude_history,
            allow_tags=tags,
            scoring=body.scoring,
            temperature=body.temperature,
            **fields,
        )

    async def recommend(state: dict[str, Any], raw: bytes) -> bytes:
        """The best sessions."""
        body = _parse(RecommendRequest, raw)
        longest = worker.version.recommender.config.session_length
        if body.session_length is not None and body.session_length > longest:
            raise _invalid("session_length", f"at most {longest}", body.session_length)
        options = options_of(
            body, session_length=body.session_length, num_sessions=body.num_sessions
        )
        if body.num_sessions > options.beam_width:
            wanted = f"at most beam_width = {options.beam_width}"
            raise _invalid("num_sessions", wanted, body.num_sessions)
        answer = await ask(state, body, options)
        found = answer.recommendation
        return to_json(
            {
                "request_id": state["request_id"],
                "version": answer.version.number,
                "sessions": [
                    {"items": items, "score": score}
                    for items, score in zip(found.item_ids, found.scores, strict=True)
                ],
            }
        )

    async def rank(state: dict[str, Any], raw: bytes) -> bytes:
        """The next items, by the beam or by the beam and the dense head."""
        body = _parse(RankRequest, raw)
        if body.dense_weight and not worker.version.recommender.config.item_loss:
            raise _invalid("dense_weight", "0, for the model has no dense head", body.dense_weight)
        answer = await ask(state, body, options_of(body, k=body.k, dense_weight=body.dense_weight))
        return to_json(
            {
                "request_id": state["request_id"],
                "version": answer.version.number,
                "items": answer.recommendation.item_ids[0],
            }
        )

    hot: dict[str, Route] = {}

    def publish(path: str, route: Route, asked: type[BaseModel], answered: type[BaseModel]) -> None:
        """`_Edge` answers requests to exactly this path; FastAPI, OpenAPI and a mounted path."""

        async def endpoint(request: Request) -> Response:
            state = request.scope["onerec"]
            _check_json(dict(request.scope["headers"]))
            return Response(await route(state, await request.body()), media_type=_JSON)

        hot[path] = route
        content = {_JSON: {"schema": asked.model_json_schema()}}
        app.post(
            path,
            name=route.__name__,
            description=route.__doc__,
            response_model=answered,
            responses=_ERRORS,
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )(endpoint)

    publish("/v1/recommend", recommend, RecommendRequest, RecommendResponse)
    publish("/v1/rank", rank, RankRequest, RankResponse)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process answers."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse, responses={503: _ERRORS[503]})
    async def readyz() -> str:
        """The engine takes requests."""
        if not worker.ready:
            raise HTTPException(503, "not ready")
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """Counters in the Prometheus text format."""
        journal.write()
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/version", response_model=VersionResponse)
    async def version() -> dict[str, Any]:
        """What is served."""
        return _version(worker)

    if token is not None:

        @app.post("/admin/swap", response_model=VersionResponse, responses=_ERRORS)
        async def swap(body: SwapRequest) -> dict[str, Any]:
            """Serves another folder from the next batch on; if it is wrong, nothing changes."""
            try:
                await asyncio.to_thread(worker.swap, Path(body.folder))
            except (DataError, ValueError, OSError) as error:
                raise HTTPException(422, str(error)) from None
            return _version(worker)

        @app.post("/admin/rollback", response_model=VersionResponse, responses=_ERRORS)
        async def rollback() -> dict[str, Any]:
            """Serves again what was served before the last swap."""
            try:
                await asyncio.to_thread(worker.rollback)
            except NoEarlierVersion as error:
                raise HTTPException(422, str(error)) from None
            return _version(worker)

    app.edge = _Edge(app.behind_the_edge, config, journal, token, hot)
    return app


_JSON = "application/json"
_Body = TypeVar("_Body", bound=BaseModel)


def _check_json(headers: dict[bytes, bytes]) -> None:
    if not headers.get(b"content-type", b"").lower().startswith(_JSON.encode()):
        raise _invalid("Content-Type", _JSON, "another")


def _parse(model: type[_Body], raw: bytes) -> _Body:
    """A body, straight from its bytes: half the time of FastAPI's own way."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise RequestValidationError(
            [{**p, "loc": ("body", *p["loc"])} for p in error.errors()]
        ) from None


def _check_ids(name: str, ids: list[Any], served: Recommender, most: int) -> None:
    if len(ids) > most:
        raise _invalid(name, f"at most {most} items", len(ids))
    text = served.catalog.item_ids.dtype == object
    if ids and isinstance(ids[0], str) != text:
        wanted = "strings" if text else "integers"
        raise _invalid(name, f"{wanted} as in the catalogue", type(ids[0]).__name__)


def _invalid(name: str, wanted: str, got: object) -> HTTPException:
    return HTTPException(422, f"{name}: wanted {wanted}, got {got}")


def _version(worker: Worker) -> dict[str, Any]:
    now = worker.version
    return {
        "version": now.number,
        "source": now.source,
        "items": len(now.recommender.catalog),
        "tags": now.recommender.catalog.tag_words,
    }


def _say(request: Request, status: int, text: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(
        {"request_id": request.scope["onerec"]["request_id"], "error": text}, status, headers
    )


async def _on_invalid(request: Request, error: Exception) -> Response:
    """What is wrong and where, without the values, which may be anything."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if problems and problems[0]["type"] == "json_invalid":
        return _say(request, 400, "the body is not JSON")
    parts = (f"{'.'.join(map(str, p['loc'][1:])) or 'body'}: {p['msg']}" for p in problems[:5])
    text = "; ".join(parts).encode("ascii", "backslashreplace").decode()
    return _say(request, 422, text)


async def _on_error(request: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "internal error")
    return _say(request, status, str(detail), getattr(error, "headers", None))


class _Application(FastAPI):
    """A FastAPI application whose requests pass `edge` before anything else."""

    edge: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.edge(scope, receive, send)

    async def behind_the_edge(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)


class _Edge:
    """What every request passes: id, token, body limit, count and log line.

    A POST to one of the paths in `hot` goes straight to its function: the router, its middleware
    and the objects that they make take longer than all the rest of a request.
    """

    def __init__(
        self,
        app: App,
        config: ServeConfig,
        journal: Journal,
        token: str | None,
        hot: dict[str, Route],
    ) -> None:
        self.app, self.config, self.journal, self.hot = app, config, journal, hot
        self.token = None if token is None else f"Bearer {token}".encode()
        self.too_large = f"the body may have {config.max_body_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        state: dict[str, Any] = {"request_id": request_id}
        scope["onerec"] = state
        status = 500
        started = False
        path = ""
        hot = self.hot.get(scope["path"]) if scope["method"] == "POST" else None

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if (timing := _timing(state)) is not None:
                    message["headers"].append((b"server-timing", timing))
            await send(message)

        async def refuse(code: int, text: str, extra: dict[str, str] | None = None) -> None:
            body = {"request_id": request_id, "error": text}
            await JSONResponse(body, code, extra)(scope, receive, answer)

        try:
            if not self._allowed(scope["path"], headers):
                await refuse(
                    401, "wanted Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
                )
            elif _length(headers) > self.config.max_body_bytes:
                await refuse(413, self.too_large)
            elif hot is not None:
                path = scope["path"]
                await self._answer_hot(hot, headers, scope, self._bounded(receive), answer)
            else:
                await self.app(scope, self._bounded(receive), answer)
        except ClientDisconnect:  # before its body was whole: nobody reads an answer
            status = 499
        except Exception:
            log.exception("request failed", extra={"fields": {"request_id": request_id}})
            if not started:
                await refuse(500, "internal error")
        finally:
            path = path or getattr(scope.get("route"), "path", "other")
            self.journal.note(
                Entry(
                    time.time(),
                    time.perf_counter() - start,
                    request_id,
                    scope["method"],
                    path,
                    status,
                    state.get("answer"),
                )
            )

    async def _answer_hot(
        self, route: Route, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            _check_json(headers)
            body = await route(scope["onerec"], await _body(receive))
        except (RequestValidationError, AnyHTTPException) as error:
            say = _on_invalid if isinstance(error, RequestValidationError) else _on_error
            return await (await say(Request(scope), error))(scope, receive, send)
        kinds = [(b"content-type", _JSON.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": kinds})
        await send({"type": "http.response.body", "body": body})

    def _allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        # Probes and scrapes come from the cluster, which has no token.
        if self.token is None or path in ("/healthz", "/readyz", "/metrics"):
            return True
        return hmac.compare_digest(headers.get(b"authorization", b""), self.token)

    def _bounded(self, receive: Receive) -> Receive:
        """Counts the body's bytes, for a client may lie about its length or send chunks."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.config.max_body_bytes:
                raise HTTPException(413, self.too_large)
            return message

        return counted


async def _body(receive: Receive) -> bytes:
    """All of a request's body. Raises `ClientDisconnect` if it ends before that."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _timing(state: dict[str, Any]) -> bytes | None:
    """The Server-Timing header of an answer that the engine made: milliseconds in it and before."""
    answer: Answer | None = state.get("answer")
    if answer is None:
        return None
    return b"queue;dur=%.3f, engine;dur=%.3f" % (1000 * answer.waited, 1000 * answer.seconds)


def _length(headers: dict[bytes, bytes]) -> int:
    given = headers.get(b"content-length", b"0")
    return int(given) if given.isdigit() and len(given) < 20 else 0


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
