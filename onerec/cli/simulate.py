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
        from onerec.data import simulate

        world = simulate(settings.world)
        world.write(folder)
        return {
            "users": len(world.user_ids),
            "items": len(world.item_ids),
            "interactions": world.interactions.num_rows,
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
