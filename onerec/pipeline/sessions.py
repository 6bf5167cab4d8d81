"""`onerec sessions`: the stage `sessions`, from a log to items, histories and good sessions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.cli import console
from onerec.cli.config import Settings
from onerec.cli.stage import StageResult, data_digest, require, run_stage
from onerec.cli.verb import stage_verb
from onerec.errors import OneRecError

SPLITS = ("train", "valid", "test")


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/sessions` from the log, or from `directory/world` when there is none."""
    if settings.data is None:
        if settings.columns:
            raise OneRecError("--columns names columns of --data, which was not given")
        source = directory / "world"
        inputs = {"world": require(directory, "world").fingerprint}
    else:
        source = Path(settings.data)
        if not source.is_dir():
            found = "a file" if source.exists() else "nothing"
            raise OneRecError(
                f"--data {source}: wanted the folder of interactions.parquet, found {found}"
            )
        inputs = {"data": data_digest(source)}

    def build(folder: Path) -> dict[str, Any]:
        from onerec.data import build_sessions, open_log

        with open_log(
            source, kind=settings.kind, columns=settings.columns, engine=settings.engine
        ) as log:
            console.say(f"sessions: {log.describe()}")
            with console.progress("sessions") as report:
                found = build_sessions(log, settings.sessions, folder, progress=report)
        return {
            "users": found.sequences.num_rows,
            "items": found.items.num_rows,
            **{f"{split}_sessions": len(found.samples(split)) for split in SPLITS},
            "vector_size": int(found.embeddings.shape[1]),
        }

    return run_stage(
        directory,
        "sessions",
        config={"kind": settings.kind, "columns": settings.columns, **asdict(settings.sessions)},
        inputs=inputs,
        code=["data", "cli/sessions.py"],
        build=build,
        say=console.say,
    )


def main(argv: list[str]) -> None:
    stage_verb(
        "sessions",
        "Reads a log, keeps the good sessions, splits them by time, and makes item vectors, "
        "in OUT/sessions.",
        argv,
        ["sessions"],
        make,
        data=True,
    )
