"""The quality experiment: generator, dense head and baselines on one data set, as one table.

Nothing here knows a data set: sizes follow from the log. A training is kept in OUT/<system>/seed-N
and not made again while its settings, the data and the release are the same; an unfinished one goes
on from its newest checkpoint. What it is worth is kept beside it in scores-N and can be measured
again without it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from onerec import environment
from onerec.errors import OneRecError
from onerec.experiments.presets import PRESETS, REFERENCE, System
from onerec.pipeline import Inputs, Settings, sessions
from onerec.pipeline.stage import data_digest, locked, run_stage, write_json
from onerec.progress import SILENT, Listener

if TYPE_CHECKING:
    from onerec.data import SessionSet
    from onerec.experiments.compare import Run
    from onerec.experiments.experiment import Experiment


@dataclass(frozen=True)
class Options:
    """What is compared, and how.

    Attributes:
        data: Log to read.
        kind: Its reader.
        columns: Columns of the schema that it has under other names.
        out: Folder of the runs.
        preset: Name in PRESETS.
        systems: Names to train and show; all when empty.
        seeds: Trainings of each system; those of the preset when None.
        epochs: Epochs of each system; those of the preset when None.
        max_users: A seeded sample of so many users is measured; all when None.
        levels: L of the generators' ids, without a collision digit.
        codebook_size: K.
        beam_width: Of generators.
        device: "auto", "cpu" or "cuda".
        kept: Train nothing: the table has the finished trainings only, measured where they are not.
        jobs: Trainings at a time, each in a process with its share of the threads.
    """

    data: Path
    kind: str
    columns: dict[str, str]
    out: Path
    preset: str
    systems: tuple[str, ...]
    seeds: int | None
    epochs: float | None
    max_users: int | None
    levels: int
    codebook_size: int
    beam_width: int
    device: Literal["auto", "cpu", "cuda"]
    kept: bool
    jobs: int = 1


def run(options: Options, listener: Listener = SILENT) -> dict[str, Any]:
    """Trains and measures what is missing and makes the table.

    Args:
        options: The comparison.
        listener: Told of the work.

    Returns:
        The record, as JSON values.

    Raises:
        OneRecError: An unknown system, or a log without sessions.
    """
    chosen = [
        s for s in PRESETS[options.preset] if s.name in options.systems or not options.systems
    ]
    if unknown := set(options.systems) - {s.name for s in chosen}:
        names = ", ".join(s.name for s in PRESETS[options.preset])
        raise OneRecError(f"no system {min(unknown)!r} in the preset; one of: {names}")
    with locked(options.out, "bench quality"):
        data = _sessions(options, listener)
        experiment = _experiment(options, data, listener)
        digest = data_digest(options.data)
        jobs = [
            (s, seed)
            for s in chosen
            for seed in range(1 if s.network == "popularity" else options.seeds or s.seeds)
            if not options.kept or (options.out / s.name / f"seed-{seed}" / "stage.json").is_file()
        ]
        if not jobs:
            raise OneRecError(f"{options.out}: no training of the preset is finished there")
        chosen = [s for s in chosen if any(s is system for system, _ in jobs)]
        named = [
            (system, seed, f"[{place} of {len(jobs)}] {system.name}, seed {seed}")
            for place, (system, seed) in enumerate(jobs, 1)
        ]
        if options.jobs == 1:
            made = [_made(options, experiment, digest, listener, *job) for job in named]
        else:
            made = _side_by_side(options, digest, listener, named)
        record = _record(options, experiment, chosen, [run for runs in made for run in runs])
        write_json(options.out / "quality.json", record)
    return record


def _sessions(options: Options, listener: Listener) -> SessionSet:
    from onerec.data import SessionConfig, SessionSet, open_log

    if not options.data.exists():
        raise OneRecError(f"--data {options.data}: there is no such file or folder")
    with open_log(options.data, kind=options.kind, columns=options.columns) as log:
        names = [*log.vectors][:1]
    settings = Settings.of_preset(
        data=str(options.data),
        kind=options.kind,
        columns=options.columns,
        sessions=SessionConfig(
            rule="next", length=1, embeddings="+".join([*names, "cooccurrence"]), exposed_sessions=0
        ),
    )
    sessions.make(settings, Inputs(options.out), listener)
    return SessionSet.load(options.out / "sessions")


def _experiment(options: Options, data: SessionSet, listener: Listener) -> Experiment:
    from onerec.experiments.experiment import Experiment

    names = ("max_users", "levels", "codebook_size", "beam_width", "epochs", "device")
    chosen = {name: getattr(options, name) for name in names}
    try:
        return Experiment(data, **chosen, progress=listener.progress)
    except ValueError as problem:
        raise OneRecError(f"{options.data}: {problem}") from problem


def _side_by_side(
    options: Options, digest: str, listener: Listener, jobs: list[tuple[System, int, str]]
) -> list[list[Run]]:
    """What `_made` gives for each job, `options.jobs` of them at a time."""
    import multiprocessing
    import signal
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    import torch

    threads = max(1, torch.get_num_threads() // options.jobs)
    # Ctrl-C at a terminal reaches every process; what the others do is for this one to say.
    deaf = (signal.SIG_BLOCK, {signal.SIGINT})
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, signal.pthread_sigmask, deaf) as pool:
        futures = [
            pool.submit(_made_beside_others, options, threads, digest, listener, *job)
            for job in jobs
        ]
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool as problem:
            raise OneRecError(
                "a training's process was killed, for want of memory perhaps; what was finished is "
                "kept, the same command goes on from it, with a smaller --jobs on less memory"
            ) from problem
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # a training writes a checkpoint first
            raise


def _made_beside_others(
    options: Options,
    threads: int,
    digest: str,
    listener: Listener,
    system: System,
    seed: int,
    title: str,
) -> list[Run]:
    """`_made` in a process of its own: on its share of the threads, and without bars."""
    import os

    import torch

    from onerec.data import SessionSet

    os.environ["TERM"] = "dumb"  # bars would be drawn over each other
    torch.set_num_threads(threads)
    experiment = _experiment(options, SessionSet.load(options.out / "sessions"), listener)
    return _made(options, experiment, digest, listener, system, seed, title)


def _made(
    options: Options,
    experiment: Experiment,
    digest: str,
    listener: Listener,
    system: System,
    seed: int,
    title: str,
) -> list[Run]:
    """The rows of one training, trained and measured now or found whole."""
    from onerec.experiments.compare import CASES, load_runs, save_runs

    folder = options.out / system.name
    folder.mkdir(exist_ok=True)
    described = dataclasses.asdict(system)
    described.pop("seeds")
    chosen = ("epochs", "max_users", "levels", "codebook_size", "beam_width", "device")
    name = f"seed-{seed}"

    def train(partial: Path) -> dict[str, Any]:
        if options.kept:
            raise OneRecError(f"{folder / name}: of other settings, and --kept trains nothing")
        return experiment.train(system, seed, partial, title)

    trained = run_stage(
        folder,
        name,
        config={**described, "seed": seed, **{key: getattr(options, key) for key in chosen}},
        inputs={"data": digest},
        # A change of the sources does not undo hours of training; a release does.
        code=[],
        build=train,
        say=listener.say,
        resumable=True,
        scratch=["training"],
    ).record

    def measure(partial: Path) -> dict[str, Any]:
        runs = experiment.measure(system, seed, folder / name, trained.summary, title)
        save_runs(partial, runs)
        return {run.row: run.facts for run in runs}

    run_stage(
        folder,
        f"scores-{seed}",
        config={"cases": CASES},
        inputs={"training": trained.fingerprint},
        code=[],
        build=measure,
        say=listener.say,
    )
    return load_runs(folder / f"scores-{seed}", system.name, seed)


def _record(
    options: Options, experiment: Experiment, systems: list[System], runs: list[Run]
) -> dict[str, Any]:
    from datetime import UTC, datetime

    from onerec.experiments.compare import compare

    test = experiment.parts["test"]
    counts = experiment.data.items["train_count"].to_numpy()
    targets = test.targets(np.arange(len(test)), 1)[:, 0]
    counted = {}
    for system in systems:
        facts = next(run.facts for run in runs if run.system == system.name)
        counted[system.name] = experiment.flops(system, facts)
    rows = compare(
        [
            dataclasses.replace(run, facts={**run.facts, "flops": counted[run.system]})
            for run in runs
        ],
        reference=REFERENCE if any(run.row == REFERENCE for run in runs) else None,
        users={split: samples.user_row for split, samples in experiment.parts.items()},  # type: ignore[misc]
        train_counts=counts[targets],
    )
    train = experiment.data.samples("train")
    return {
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": options.preset,
        "data": {
            "name": options.data.name,
            "items": experiment.data.n_items,
            "users": experiment.data.sequences.num_rows,
            "train_sessions": len(train),
            "sessions": {split: len(samples) for split, samples in experiment.parts.items()},
            "vectors": experiment.data.funnel["embeddings"]["about"],
        },
        "options": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in dataclasses.asdict(options).items()
            if k not in ("data", "out", "kept")
        },
        "systems": {s.name: dataclasses.asdict(s) for s in systems},
        "reference": REFERENCE,
        "environment": environment.published(),
        "rows": rows,
    }
