"""The stage `sessions`, from a log to items, histories and good sessions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.errors import OneRecError
from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import StageResult, data_digest, data_files, run_stage
from onerec.progress import Listener

SPLITS = ("train", "valid", "test")


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `sessions` from the log, or from the stage `world` when there is none."""
    if settings.data is None:
        if settings.columns:
            raise OneRecError("--columns names columns of --data, which was not given")
        source = inputs.directory / "world"
        read = inputs.fingerprints("world")
    else:
        source = Path(settings.data)
        if not data_files(source):
            raise OneRecError(f"--data {source}: wanted a folder, a file or a glob, found nothing")
        read = {"data": data_digest(source)}

    def build(folder: Path) -> dict[str, Any]:
        from onerec.data import build_sessions, open_log

        with open_log(
            source, kind=settings.kind, columns=settings.columns, engine=settings.engine
        ) as log:
            for line in (log.describe(), *log.notes):
                listener.say(f"sessions: {line}")
            with listener.progress("sessions") as report:
                found = build_sessions(log, settings.sessions, folder, progress=report)
        for line in found.describe():
            listener.say(f"sessions: {line}")
        return {
            "users": found.sequences.num_rows,
            "items": found.items.num_rows,
            **{f"{split}_sessions": len(found.samples(split)) for split in SPLITS},
            "rule": found.funnel["rule"],
            "session_length": found.session_length,
            "share_of_positive_rows": found.funnel["targets"]["share"],
            "vector_size": int(found.embeddings.shape[1]),
        }

    return run_stage(
        inputs.directory,
        "sessions",
        config={"kind": settings.kind, "columns": settings.columns, **asdict(settings.sessions)},
        inputs=read,
        code=["data", "pipeline/sessions.py"],
        build=build,
        say=listener.say,
    )
