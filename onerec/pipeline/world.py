"""The stage `world`, a short-video world and the log of its users."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import StageResult, run_stage
from onerec.progress import Listener


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `world`."""

    def build(folder: Path) -> dict[str, Any]:
        import pyarrow.parquet as pq

        from onerec.data import simulate

        simulate(settings.world).write(folder)
        return {
            "users": settings.world.n_users,
            "items": settings.world.n_items,
            "interactions": pq.read_metadata(folder / "interactions.parquet").num_rows,
        }

    return run_stage(
        inputs.directory,
        "world",
        config=asdict(settings.world),
        inputs={},
        code=["data", "pipeline/world.py"],
        build=build,
        say=listener.say,
    )
