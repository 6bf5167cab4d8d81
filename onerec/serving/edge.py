"""What every request passes before its route: id, keys, body limit, count and log line."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from onerec.serving.answer import Answer, Entry
from onerec.serving.config import ServeConfig
from onerec.serving.journal import Journal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
# A hot route: the request's state and body in, the answer's JSON out.
Route = Callable[[dict[str, Any], bytes], Awaitable[bytes]]

JSON = "application/json"
log = logging.getLogger("onerec.serving")
_Reply = TypeVar("_Reply")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")
# Probes and scrapes come from the cluster, which has no token.
_OPEN = ("/healthz", "/readyz", "/metrics")
# A browser brings a token here: it asks for a password.
_PAGES = ("/", "/docs", "/openapi.json")
_TRY = "/try/"


class Keys:
    """The tokens that requests may bring, and what each of them opens.

    Args:
        clients: Of those who ask for recommendations, separated by commas, as several are valid
            while they are exchanged; None: anybody may ask.
        admin: Of those who may change what is served, too; None: nobody may.

    Raises:
        ValueError: A token that no request could bring.
    """

    def __init__(self, clients: str | None, admin: str | None) -> None:
        self._clients = _tokens("token (ONEREC_TOKEN)", clients)
        self._admin = _tokens("admin_token (ONEREC_ADMIN_TOKEN)", admin)
        self.closed = clients is not None
        self.administered = admin is not None

    def role(self, scope: Scope, path: str) -> str | None:
        """ "admin", "client", or None for one who may not even ask."""
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        token = _credentials(given[0], _is_page(path)) if len(given) == 1 else None
        if token is not None:
            # Every token is compared, so that the time does not tell which was nearly right.
            admin = [hmac.compare_digest(token, one) for one in self._admin]
            client = [hmac.compare_digest(token, one) for one in self._clients]
            if any(admin):
                return "admin"
            if any(client):
                return "client"
        return None if self.closed and path not in _OPEN else "client"


def _is_page(path: str) -> bool:
    return path in _PAGES or path.startswith(_TRY)


def _tokens(name: str, given: str | None) -> list[bytes]:
    if given is None:
        return []
    tokens = given.split(",")
    for token in tokens:
        if not re.fullmatch(r"[!-~]+", token):
            raise ValueError(
                f"{name}: wanted visible ASCII characters alone, as a header brings them, got "
                f"{'none' if not token else 'others too, such as a space or a line break'}"
            )
    return [token.encode() for token in tokens]


def _credentials(header: bytes, page: bool) -> bytes | None:
    scheme, _, rest = header.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip(b" ")
    if page and scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(b" "), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None


class Edge:
    """What every request passes.

    A POST to one of the paths in `hot` goes straight to its function: the router, its middleware
    and the objects that they make take longer than all the rest of a request.

    Args:
        app: What answers the other paths.
        config: Limits.
        journal: Where requests are noted.
        keys: Who may ask.
        hot: Routes by path.
    """

    def __init__(
        self, app: App, config: ServeConfig, journal: Journal, keys: Keys, hot: dict[str, Route]
    ) -> None:
        self.app, self.config, self.journal, self.keys, self.hot = app, config, journal, keys, hot
        self.too_large = f"the body may have {config.max_body_bytes} bytes"
        name = config.client_header
        self._client_header = None if name is None else name.lower().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start = time.perf_counter()
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()
        asked = scope["path"].removeprefix(scope.get("root_path", ""))
        bounded = self._bounded(receive)
        state: dict[str, Any] = {
            "request_id": request_id,
            "client": self._client(scope, headers),
            "role": self.keys.role(scope, asked),
            "receive": bounded,
            "answers": [],
            "users": [],
        }
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
                if (timing := _timing(state["answers"])) is not None:
                    message["headers"].append((b"server-timing", timing))
            await send(message)

        async def refuse(code: int, text: str, extra: dict[str, str] | None = None) -> None:
            body = {"request_id": request_id, "error": text}
            await JSONResponse(body, code, extra)(scope, receive, answer)

        try:
            if state["role"] is None:
                wanted = 'Basic realm="onerec", Bearer' if _is_page(asked) else "Bearer"
                await refuse(
                    401, "wanted Authorization: Bearer TOKEN", {"WWW-Authenticate": wanted}
                )
            elif _length(headers) > self.config.max_body_bytes:
                await refuse(413, self.too_large)
            elif hot is not None:
                path = scope["path"]
                await self._answer_hot(hot, headers, scope, bounded, answer)
            else:
                await self.app(scope, bounded, answer)
        except ClientDisconnect:  # nobody reads an answer
            status = 499
        except asyncio.CancelledError:  # the server stops, and has waited as long as it may
            status = 503
            if not started:
                await refuse(503, "the server is stopping")
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
                    state["answers"],
                    state["client"],
                    state["users"],
                )
            )

    def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Whose share of the queue a request takes."""
        if self._client_header is not None and (named := headers.get(self._client_header)):
            return named[:128].decode("latin-1")
        return str(scope["client"][0]) if scope.get("client") else ""

    async def _answer_hot(
        self, route: Route, headers: dict[bytes, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            check_json(headers)
            body = await route(scope["onerec"], await _body(receive))
        except (RequestValidationError, AnyHTTPException) as error:
            say = on_invalid if isinstance(error, RequestValidationError) else on_error
            return await (await say(Request(scope), error))(scope, receive, send)
        kinds = [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": kinds})
        await send({"type": "http.response.body", "body": body})

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


async def while_connected(state: dict[str, Any], reply: asyncio.Future[_Reply]) -> _Reply:
    """A reply, unless the client leaves before it comes.

    Raises:
        ClientDisconnect: It has left; the reply is cancelled.
    """

    async def watch() -> None:
        while (await state["receive"]())["type"] != "http.disconnect":
            pass
        reply.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return await reply
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


def check_json(headers: dict[bytes, bytes]) -> None:
    """Refuses a body of another type, or a compressed one."""
    if headers.get(b"content-type", b"").lower().split(b";")[0].strip() != JSON.encode():
        raise invalid("Content-Type", JSON, "another")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise invalid("Content-Encoding", "none", "one")


def invalid(name: str, wanted: str, got: object) -> HTTPException:
    """The answer to a field that is wrong."""
    return HTTPException(422, f"{name}: wanted {wanted}, got {got}")


def say(request: Request, status: int, text: str, headers: Any = None) -> JSONResponse:
    """An answer that tells what is wrong."""
    return JSONResponse(
        {"request_id": request.scope["onerec"]["request_id"], "error": text}, status, headers
    )


async def on_invalid(request: Request, error: Exception) -> Response:
    """What is wrong and where, without the values, which may be anything."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if problems and problems[0]["type"] == "json_invalid":
        return say(request, 400, "the body is not JSON")
    parts = (f"{_place(p['loc'])}: {p['msg']}" for p in problems[:5])
    text = "; ".join(parts).encode("ascii", "backslashreplace").decode()
    return say(request, 422, text)


def _place(where: tuple[Any, ...]) -> str:
    """A field's name; without the names of types that pydantic tried for it."""
    names = [str(part) for part in where[1:] if not re.search(r"[\[\]()]", str(part))]
    return ".".join(names) or "body"


async def on_error(request: Request, error: Exception) -> Response:
    """The status and the message of an error, or 500."""
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "internal error")
    return say(request, status, str(detail), getattr(error, "headers", None))


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


def _timing(answers: list[Answer]) -> bytes | None:
    """The Server-Timing header of an answer that the engine made: milliseconds in it and before."""
    if not answers:
        return None
    longest = max(answers, key=lambda one: one.waited + one.seconds)
    return b"queue;dur=%.3f, engine;dur=%.3f" % (1000 * longest.waited, 1000 * longest.seconds)


def _length(headers: dict[bytes, bytes]) -> int:
    given = headers.get(b"content-length", b"0")
    return int(given) if given.isdigit() and len(given) < 20 else 0
