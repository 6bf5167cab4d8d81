"""The HTTP application as a Ray Serve deployment, for many replicas on many machines."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from ray import serve

from onerec.inference import Recommender
from onerec.serving.app import create_app
from onerec.serving.config import ServeConfig


def deployment(
    folder: str,
    config: ServeConfig | None = None,
    *,
    num_replicas: int = 1,
    token: str | None = None,
) -> serve.Application:
    """An application for `ray.serve.run`: the routes of `onerec serve` on every replica.

    Each replica has an engine and a queue of its own. `host`, `port` and `drain_seconds` of the
    config are Ray's business here, and so is changing the folder: /admin/swap reaches one replica
    only; deploy again instead.

    Args:
        folder: Of `onerec export`, at the same path on every machine.
        config: Limits and defaults of a replica.
        num_replicas: Replicas.
        token: Bearer token that requests must bring; None: none.
    """
    settings = ServeConfig() if config is None else config
    replica = serve.deployment(
        serve.ingress(_builder(folder, settings, token))(),
        name="onerec",
        num_replicas=num_replicas,
        # A full queue answers 429 itself; Ray must not hold requests back before it.
        max_ongoing_requests=2 * settings.max_queue,
        ray_actor_options={"num_cpus": settings.num_threads or 1},
    )
    return replica.bind()


def _builder(folder: str, config: ServeConfig, token: str | None) -> Callable[[], FastAPI]:
    """What a replica calls when it starts."""

    def build() -> FastAPI:
        recommender = Recommender.from_exported(
            folder, num_threads=config.num_threads or 1, max_rows=config.max_rows
        )
        recommender.warmup(beam_width=config.beam_width)
        return create_app(recommender, config, token=token, source=folder)

    return build
