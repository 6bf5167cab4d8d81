"""The main job: every stage in order, each made only when it has to be."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import STAGES, StageResult, locked
from onerec.progress import SILENT, Listener

Make = Callable[[Settings, Inputs, Listener], StageResult]


def make_stage(
    name: str,
    settings: Settings,
    out: str | Path,
    listener: Listener = SILENT,
    *,
    verb: str | None = None,
) -> StageResult:
    """Makes one stage of a run, or finds it made.

    Args:
        name: One of STAGES.
        settings: Written to `out/config.yaml`; what was there stays where the stage fails.
        out: Directory of the run, held for this process meanwhile.
        listener: Told of the work.
        verb: What the directory's lock calls the command; by default `name`.

    Raises:
        OneRecError: A stage that this one reads is missing or damaged, or another process holds
            the directory.
    """
    directory = Path(out)
    with locked(directory, verb or name), settings.saved(directory / "config.yaml"):
        return _maker(name)(settings, Inputs(directory), listener)


def run(
    settings: Settings,
    out: str | Path,
    listener: Listener = SILENT,
    *,
    until: str = STAGES[-1],
) -> dict[str, StageResult]:
    """The main job: log -> sessions -> semantic ids -> models -> evaluation -> report.

    Args:
        settings: Written to `out/config.yaml`; what was there stays where the first stage that has
            to be made fails. `data` None makes the stage `world` first.
        out: Directory of the run, held for this process meanwhile. A stage in it whose inputs have
            not changed is skipped; an interrupted one goes on.
        listener: Told of the work.
        until: The last stage that is made.

    Returns:
        Name of each stage -> how it ended, in order. A log without feedback has no `reward` and no
        `align`; neither has a run without iterations of alignment, or one that ranks items, which
        has a `mixture` instead.

    Raises:
        OneRecError: What the log or the settings do not allow, or another process holds `out`.
    """
    inputs = Inputs(Path(out))
    results: dict[str, StageResult] = {}
    config = inputs.directory / "config.yaml"
    with locked(inputs.directory, "run"), settings.saved(config) as undo:
        for name in STAGES[: STAGES.index(until) + 1]:
            if name == "world" and settings.data is not None:
                continue
            if name in ("reward", "align") and not inputs.aligned(settings):
                continue
            if name == "mixture" and not inputs.ranks_items(settings):
                continue
            result = results[name] = _maker(name)(settings, inputs, listener)
            if not result.skipped:  # the settings that it was made with stay, whatever fails later
                undo.pop_all()
    return results


def _maker(name: str) -> Make:
    make: Make = importlib.import_module(f"onerec.pipeline.{name}").make
    return make
