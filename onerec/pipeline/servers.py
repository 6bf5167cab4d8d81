"""A new export on running servers: all of them or none."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onerec.errors import OneRecError

_SECONDS = 120.0  # for an answer; a swap loads a folder meanwhile


def swap_all(
    servers: Sequence[str], folder: Path, token: str | None, say: Callable[[str], None]
) -> None:
    """Has every server serve an export; where one does not, the others go back.

    Each is asked first what it serves, so that one that is not there or does not know the token
    changes nothing. A server that serves the folder already is left as it is.

    Args:
        servers: Addresses such as http://host:8000.
        folder: Of `onerec export`, under the path by which the servers reach it.
        token: Of the servers' admin.
        say: Takes one line for the user.

    Raises:
        OneRecError: A server is not there or refused; no server has changed, unless the message
            names one that would not go back.
    """
    if token is None:
        raise OneRecError(
            "--serve: wanted the servers' admin token in ONEREC_ADMIN_TOKEN, got none"
        )
    path = str(folder.resolve())
    serving = {}
    for url in servers:
        try:
            serving[url] = _ask(url, "/v1/version", token)["source"]
        except (OSError, ValueError, KeyError) as error:
            raise OneRecError(f"--serve {url}: {_reason(error)}; no server was changed") from None
    changed: list[str] = []
    for url in servers:
        if serving[url] == path:
            say(f"update: {url} serves {path} already")
            continue
        try:
            told = _ask(url, "/admin/swap", token, {"folder": path})
        except (OSError, ValueError) as error:
            stuck = _back(changed, token)
            told_of = f"; {', '.join(stuck)} would not go back and still serve it" if stuck else ""
            raise OneRecError(
                f"--serve {url}: {_reason(error)}; the servers serve what they served{told_of}"
            ) from None
        changed.append(url)
        say(f"update: {url} serves {path} (version {told['version']} there)")


def _back(changed: Sequence[str], token: str) -> list[str]:
    """Rolls servers back; returns those that would not."""
    stuck = []
    for url in reversed(changed):
        try:
            _ask(url, "/admin/rollback", token, {})
        except (OSError, ValueError):
            stuck.append(url)
    return stuck


def _ask(url: str, route: str, token: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"wanted an address such as http://localhost:8000, got {url!r}")
    request = urllib.request.Request(
        url.rstrip("/") + route,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def _reason(error: Exception) -> str:
    """What a server or the network said."""
    if isinstance(error, urllib.error.HTTPError):
        text = error.read().decode(errors="replace")
        try:
            text = str(json.loads(text)["detail"])
        except (ValueError, KeyError, TypeError):
            text = text[:200]
        return f"answered {error.code}: {text}"
    if isinstance(error, urllib.error.URLError):
        return f"no answer ({error.reason})"
    return str(error)
