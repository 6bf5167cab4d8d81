"""`onerec simulate`: the stage `world`, a short-video world and the log of its users."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.cli import console
from onerec.cli.config import Settings
from onerec.cli.stage import StageResult, run_stage
from onerec.cli.verb import stage_verb


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/world`."""

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
        directory,
        "world",
        config=asdict(settings.world),
        inputs={},
        code=["data", "cli/simulate.py"],
        build=build,
        say=console.say,
    )


def main(argv: list[str]) -> None:
    stage_verb(
        "simulate",
        "Makes a short-video world with known user interests, and the log of its users, "
        "in OUT/world.",
        argv,
        ["world"],
        make,
    )
