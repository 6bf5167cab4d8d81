"""The HTTP interface: routes and what they check."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException as AnyHTTPException

from onerec._version import __version__
from onerec.errors import DataError
from onerec.inference import Recommender
from onerec.serving.answer import Answer, Version
from onerec.serving.config import ServeConfig
from onerec.serving.edge import (
    JSON,
    App,
    Edge,
    Keys,
    Receive,
    Route,
    Scope,
    Send,
    check_json,
    invalid,
    on_error,
    on_invalid,
    while_connected,
)
from onerec.serving.journal import Journal
from onerec.serving.metrics import Metrics
from onerec.serving.page import page
from onerec.serving.queue import Options, QueueFull
from onerec.serving.schema import (
    EventsRequest,
    EventsResponse,
    RankBatchRequest,
    RankBatchResponse,
    RankRequest,
    RankResponse,
    RecommendBatchRequest,
    RecommendBatchResponse,
    RecommendRequest,
    RecommendResponse,
    RollbackRequest,
    SwapRequest,
    User,
    VersionResponse,
    Wanted,
    WantedRanking,
    WantedSessions,
    errors,
)
from onerec.serving.served import ServedLog
from onerec.serving.trial import Trial, add_page
from onerec.serving.users import UserStore
from onerec.serving.versions import Draining, NoEarlierVersion, SwapUnderWay, Versions
from onerec.serving.worker import Expired, Worker

log = logging.getLogger("onerec.serving")
_Body = TypeVar("_Body", bound=BaseModel)
_ASKED = errors(400, 401, 413, 422, 429, 503, 504)
_ADMIN = errors(400, 401, 403, 409, 413, 422, 503)


def create_app(
    recommender: Recommender,
    config: ServeConfig | None = None,
    *,
    token: str | None = None,
    admin_token: str | None = None,
    source: str = "",
    challenger: Recommender | None = None,
    challenger_source: str = "",
    users: UserStore | None = None,
) -> FastAPI:
    """The application around a recommender; its engine thread starts here and ends with the app.

    Args:
        recommender: What to serve first; warmed up by the caller.
        config: Limits and defaults.
        token: Bearer token that requests must bring, or several with commas between them. None:
            none.
        admin_token: The same of those who may change what is served; it opens the other routes too.
            None: there are no admin routes.
        source: Name of the first version.
        challenger: Arm "b" of an A/B split, for the share `config.split` of the users.
        challenger_source: Its name.
        users: Histories of the users that requests name; the app closes it at its end.

    Raises:
        ValueError: A token that no request could bring.
    """
    config = ServeConfig() if config is None else config
    keys = Keys(token, admin_token)
    metrics = Metrics()
    served = None
    if config.served_log is not None:
        served = ServedLog(config.served_log, config.served_log_megabytes << 20)
    journal = Journal(metrics, served)
    sources = {"a": (recommender, source)}
    if challenger is not None:
        sources["b"] = (challenger, challenger_source)
    arms = {
        arm: Versions(one, name, config, arm=arm, on_change=metrics.changed)
        for arm, (one, name) in sources.items()
    }
    worker = Worker(arms, metrics, config)

    def close() -> None:
        for versions in arms.values():
            versions.close()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        close()
        await _in_thread(lambda: worker.stop(config.drain_seconds))
        journal.write()
        if served is not None:
            await _in_thread(lambda: served.stop(config.drain_seconds))
        if store is not None:
            store.close()

    store = users
    app = _Application(title="onerec", version=__version__, lifespan=lifespan, docs_url=None)
    app.state.worker, app.state.metrics, app.state.close = worker, metrics, close
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(AnyHTTPException, on_error)
    app.add_exception_handler(Exception, on_error)

    def arm_of(user: User) -> str:
        """By a hash of the user, so that one sees the same arm each time."""
        if challenger is None or user.user is None:
            return "a"
        # An id that is a number and its digits as text are one user.
        digest = hashlib.blake2b(str(user.user).encode(), digest_size=8).digest()
        return "b" if int.from_bytes(digest, "big") < config.split * 2**64 else "a"

    async def ask(
        state: dict[str, Any], users: list[User], body: Wanted, options: Callable[[str], Options]
    ) -> list[Answer]:
        """The engine's answers for users, in their order; one error is all of theirs."""
        if body.deadline_ms is not None and body.deadline_ms > config.max_deadline_ms:
            raise invalid("deadline_ms", f"at most {config.max_deadline_ms}", body.deadline_ms)
        wanted = config.deadline_ms if body.deadline_ms is None else body.deadline_ms
        asked = []
        for user in users:
            history = await history_of(user)
            arm = arm_of(user)
            version, chosen = arms[arm].now, options(arm)
            if chosen.beam_width > config.max_beam_width:
                raise invalid("beam_width", f"at most {config.max_beam_width}", chosen.beam_width)
            if body.allow_tags is not None:
                try:
                    version.recommender.catalog.tag_bits(body.allow_tags)
                except ValueError as error:
                    raise HTTPException(422, f"allow_tags: {error}") from None
            for name, ids in (("history", history), ("exclude", user.exclude)):
                _check_ids(name, ids, version.recommender, config.max_history)
            asked.append((user, history, chosen))
        replies: list[asyncio.Future[Answer]] = []
        try:
            for user, history, chosen in asked:
                replies.append(
                    worker.submit(history, user.exclude, chosen, wanted / 1000, state["client"])
                )
            found = await while_connected(state, asyncio.gather(*replies))
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
        finally:
            for reply in replies:
                reply.cancel()  # those that are not done when another has failed
        state["answers"] = found
        state["users"] = [(user.user, len(history)) for user, history, _ in asked]
        return found

    async def history_of(user: User) -> list[Any]:
        """The history that the server keeps of the user, and what the request has behind it."""
        if store is None or user.user is None:
            if user.history is None:
                raise invalid("history", "a list of item ids", "none")
            return user.history
        kept = await asyncio.to_thread(store.history, user.user)
        # Ids of another kind are those of a catalogue that was served before.
        text = arms[arm_of(user)].now.recommender.catalog.item_ids.dtype == object
        kept = [item for item in kept if isinstance(item, str) == text]
        here = user.history or []
        room = config.max_history - len(here)
        return [*(kept[-room:] if room > 0 else []), *here]

    def options_of(body: Wanted, arm: str, **rest: Any) -> Options:
        width = config.beam_width if body.beam_width is None else body.beam_width
        tags = None if body.allow_tags is None else frozenset(body.allow_tags)
        fields: dict[str, Any] = {"session_length": None, "num_sessions": 1, **rest}
        return Options(
            beam_width=width,
            exclude_history=body.exclude_history,
            allow_tags=tags,
            scoring=body.scoring,
            temperature=body.temperature,
            arm=arm,
            **fields,
        )

    async def sessions(
        state: dict[str, Any], users: list[User], body: WantedSessions
    ) -> list[dict[str, Any]]:
        length = body.session_length

        def options(arm: str) -> Options:
            longest = arms[arm].now.recommender.config.session_length
            if length is not None and length > longest:
                raise invalid("session_length", f"at most {longest}", length)
            made = options_of(body, arm, session_length=length, num_sessions=body.num_sessions)
            if body.num_sessions > made.beam_width:
                wanted = f"at most beam_width = {made.beam_width}"
                raise invalid("num_sessions", wanted, body.num_sessions)
            return made

        return [
            {
                "version": answer.version.number,
                "arm": answer.version.arm,
                "sessions": [
                    {"items": items, "score": score}
                    for items, score in zip(
                        answer.recommendation.item_ids, answer.recommendation.scores, strict=True
                    )
                ],
            }
            for answer in await ask(state, users, body, options)
        ]

    async def rankings(
        state: dict[str, Any], users: list[User], body: WantedRanking
    ) -> list[dict[str, Any]]:
        def options(arm: str) -> Options:
            if body.dense_weight and not arms[arm].now.recommender.config.item_loss:
                wanted = "0, for the model has no dense head"
                raise invalid("dense_weight", wanted, body.dense_weight)
            return options_of(body, arm, k=body.k, dense_weight=body.dense_weight)

        return [
            {
                "version": answer.version.number,
                "arm": answer.version.arm,
                "items": answer.recommendation.item_ids[0],
            }
            for answer in await ask(state, users, body, options)
        ]

    async def recommend(state: dict[str, Any], raw: bytes) -> bytes:
        """The best sessions."""
        body = _parse(RecommendRequest, raw)
        (found,) = await sessions(state, [body], body)
        return to_json({"request_id": state["request_id"], **found})

    async def rank(state: dict[str, Any], raw: bytes) -> bytes:
        """The next items, by the beam or by the beam and the dense head."""
        body = _parse(RankRequest, raw)
        (found,) = await rankings(state, [body], body)
        return to_json({"request_id": state["request_id"], **found})

    async def recommend_batch(state: dict[str, Any], raw: bytes) -> bytes:
        """The best sessions of many users."""
        body = _parse(RecommendBatchRequest, raw)
        found = await sessions(state, _few(body.users, config), body)
        return to_json({"request_id": state["request_id"], "results": found})

    async def rank_batch(state: dict[str, Any], raw: bytes) -> bytes:
        """The next items of many users."""
        body = _parse(RankBatchRequest, raw)
        found = await rankings(state, _few(body.users, config), body)
        return to_json({"request_id": state["request_id"], "results": found})

    hot: dict[str, Route] = {}

    def publish(path: str, route: Route, asked: type[BaseModel], answered: type[BaseModel]) -> None:
        """`Edge` answers requests to exactly this path; FastAPI, OpenAPI and a mounted path."""

        async def endpoint(request: Request) -> Response:
            state = request.scope["onerec"]
            check_json(dict(request.scope["headers"]))
            return Response(await route(state, await request.body()), media_type=JSON)

        hot[path] = route
        schema = asked.model_json_schema(
            ref_template=f"#/components/schemas/{asked.__name__}.{{model}}"
        )
        bodies.update(
            {f"{asked.__name__}.{name}": one for name, one in schema.pop("$defs", {}).items()}
        )
        content = {JSON: {"schema": schema}}
        app.post(
            path,
            name=route.__name__,
            description=route.__doc__,
            response_model=answered,
            responses=_ASKED,
            openapi_extra={"requestBody": {"required": True, "content": content}},
        )(endpoint)

    bodies: dict[str, Any] = {}
    publish("/v1/recommend", recommend, RecommendRequest, RecommendResponse)
    publish("/v1/rank", rank, RankRequest, RankResponse)
    publish("/v1/recommend/batch", recommend_batch, RecommendBatchRequest, RecommendBatchResponse)
    publish("/v1/rank/batch", rank_batch, RankBatchRequest, RankBatchResponse)

    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process answers."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse, responses=errors(503))
    async def readyz() -> str:
        """The engine takes requests, and makes progress."""
        if not worker.ready:
            raise HTTPException(503, "not ready")
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        """Counters in the Prometheus text format."""
        journal.write()
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/version", response_model=VersionResponse, responses=errors(401, 422))
    async def version(arm: str = "a") -> dict[str, Any]:
        """What is served."""
        return _told(_arm(arms, arm).now)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> str:
        return page(app.openapi())

    if config.page:
        add_page(app, Trial(arms["a"], config, source))

    if keys.administered:
        guarded: dict[str, Any] = {
            "response_model": VersionResponse,
            "responses": _ADMIN,
            "dependencies": [Depends(_admin_only)],
        }

        @app.post("/admin/swap", **guarded)
        async def swap(request: Request, body: SwapRequest) -> dict[str, Any]:
            """Serves another folder from the next batch on; if it is wrong, nothing changes."""
            asked = {"action": "swap", "folder": body.folder, "force": body.force, "arm": body.arm}
            async with _audited(request, asked):
                now = await _arm(arms, body.arm).swap(body.folder, force=body.force)
                asked.update(_told(now))
            return _told(now)

        @app.post("/admin/rollback", **guarded)
        async def rollback(request: Request, body: RollbackRequest | None = None) -> dict[str, Any]:
            """Serves again what was served before the last swap."""
            arm = "a" if body is None else body.arm
            asked: dict[str, Any] = {"action": "rollback", "arm": arm}
            async with _audited(request, asked):
                now = _arm(arms, arm).rollback()
                asked.update(_told(now))
            return _told(now)

    if store is not None:

        async def events(state: dict[str, Any], raw: bytes) -> bytes:
            """Puts what users took at the end of the histories that the server keeps."""
            body = _parse(EventsRequest, raw)
            if len(body.events) > config.max_batch:
                raise invalid("events", f"at most {config.max_batch}", len(body.events))
            for one in body.events:
                _check_ids("items", one.items, arms["a"].now.recommender, config.max_history)
            kept = [await asyncio.to_thread(store.add, e.user, e.items) for e in body.events]
            return to_json({"request_id": state["request_id"], "kept": kept})

        publish("/v1/events", events, EventsRequest, EventsResponse)

        @app.delete("/v1/users/{user}", status_code=204, responses=errors(401, 404))
        async def forget(user: str) -> Response:
            """Deletes the history of a user."""
            if not await asyncio.to_thread(store.forget, user):
                raise HTTPException(404, f"user: {user!r} is not known")
            return Response(status_code=204)

    app.bodies = bodies
    app.edge = Edge(app.behind_the_edge, config, journal, keys, hot)
    return app


async def _admin_only(request: Request) -> None:
    state = request.scope["onerec"]
    if state["role"] != "admin":
        fields = {"path": request.url.path, "status": 403}
        fields.update(request_id=state["request_id"], client=state["client"])
        log.warning("admin", extra={"fields": fields})
        raise HTTPException(403, "wanted the admin's token")


@asynccontextmanager
async def _audited(request: Request, asked: dict[str, Any]) -> AsyncIterator[None]:
    """Tells errors as answers, and logs who asked for what."""
    state = request.scope["onerec"]
    status = 500
    try:
        yield
        status = 200
    except HTTPException as error:
        status, asked["error"] = error.status_code, error.detail
        raise
    except SwapUnderWay as error:
        status, asked["error"] = 409, str(error)
        raise HTTPException(409, str(error)) from None
    except Draining as error:
        status, asked["error"] = 503, str(error)
        raise HTTPException(503, str(error)) from None
    except (DataError, NoEarlierVersion, ValueError, OSError) as error:
        status, asked["error"] = 422, str(error)
        raise HTTPException(422, str(error)) from None
    finally:
        fields = {k: v for k, v in asked.items() if k != "tags"}
        fields.update(request_id=state["request_id"], client=state["client"], status=status)
        log.log(
            logging.INFO if status == 200 else logging.WARNING, "admin", extra={"fields": fields}
        )


async def _in_thread(work: Callable[[], None]) -> None:
    """Runs something that may hang, in a thread that the process does not wait for at its end."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def run() -> None:
        work()
        loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=run, daemon=True).start()
    await done


def _parse(model: type[_Body], raw: bytes) -> _Body:
    """A body, straight from its bytes: half the time of FastAPI's own way."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise RequestValidationError(
            [{**p, "loc": ("body", *p["loc"])} for p in error.errors()]
        ) from None


def _few(users: list[User], config: ServeConfig) -> list[User]:
    if len(users) > config.max_batch:
        raise invalid("users", f"at most {config.max_batch}", len(users))
    return users


def _check_ids(name: str, ids: list[Any], served: Recommender, most: int) -> None:
    if len(ids) > most:
        raise invalid(name, f"at most {most} items", len(ids))
    text = served.catalog.item_ids.dtype == object
    if ids and isinstance(ids[0], str) != text:
        wanted = "strings" if text else "integers"
        raise invalid(name, f"{wanted} as in the catalogue", type(ids[0]).__name__)


def _arm(arms: dict[str, Versions], arm: str) -> Versions:
    if arm not in arms:
        raise invalid("arm", " or ".join(arms), repr(arm[:20]))
    return arms[arm]


def _told(now: Version) -> dict[str, Any]:
    recommender = now.recommender
    return {
        "version": now.number,
        "arm": now.arm,
        "source": now.source,
        "export": recommender.lineage.export,
        "catalog": recommender.lineage.catalog,
        "quantizer": recommender.lineage.quantizer,
        "items": len(recommender.catalog),
        "tags": recommender.catalog.tag_words,
        "library": __version__,
    }


class _Application(FastAPI):
    """A FastAPI application whose requests pass `edge` before anything else."""

    edge: App
    bodies: dict[str, Any]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.edge(scope, receive, send)

    async def behind_the_edge(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The schema, with the tokens that its paths want."""
        if not self.openapi_schema:
            schema = super().openapi()
            parts = schema.setdefault("components", {})
            parts.setdefault("schemas", {}).update(self.bodies)
            bearer = {"type": "http", "scheme": "bearer"}
            parts["securitySchemes"] = {
                "token": {**bearer, "description": "ONEREC_TOKEN, where the server has one."},
                "admin": {**bearer, "description": "ONEREC_ADMIN_TOKEN."},
            }
            for path, verbs in schema["paths"].items():
                for verb in verbs.values():
                    if path.startswith("/admin/"):
                        verb["security"] = [{"admin": []}]
                    elif path.startswith("/v1/"):
                        verb["security"] = [{"token": []}, {"admin": []}, {}]
        return self.openapi_schema  # type: ignore[return-value]


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
