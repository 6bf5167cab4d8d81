"""Runs of the main job with different settings, compared on valid: `onerec sweep`.

Optuna (extra `sweep`) proposes the settings and keeps the study in `OUT/study.log`. Each trial is a
run in `OUT/trials/`, up to its evaluation on valid; stages that its settings do not change are
linked from the first trial. Test takes no part.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onerec.errors import Interrupted, OneRecError
from onerec.evaluation.result import EvalResult
from onerec.pipeline.job import run
from onerec.pipeline.settings import SECTIONS, Settings
from onerec.pipeline.stage import digest, locked, write_json
from onerec.progress import SILENT, Listener

FILE, PAGE, BEST = "sweep.json", "sweep.html", "best.yaml"
METRICS = ("recall", "ndcg", "hit")
_SHARED = ("world", "sessions", "tokenize")
_START = 5  # trials drawn at random before the sampler goes by what it has seen


@dataclass(frozen=True)
class Choice:
    """A setting and the values that it may take.

    Attributes:
        name: SECTION.FIELD.
        values: One of these; empty for a range.
        low: Least of a range, an int for whole numbers.
        high: Greatest of it.
        log: Whether the range is searched by orders of magnitude.
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @classmethod
    def parse(cls, text: str) -> Choice:
        """ "train.lr=1e-4..1e-2:log", "model.d_model=32..128" or "model.dropout=0,0.1,0.3".

        Raises:
            ValueError: It is none of these.
        """
        name, equals, given = text.partition("=")
        shape = "SECTION.FIELD=LOW..HIGH, LOW..HIGH:log or VALUE,VALUE"
        if not equals or "." not in name or not given:
            raise ValueError(f"try: wanted {shape}, got {text!r}")
        body, log = given.removesuffix(":log"), given.endswith(":log")
        if ".." not in body:
            values = tuple(_value(word) for word in body.split(","))
            if log or len(values) < 2:
                raise ValueError(f"try: {name}: wanted {shape}, got {given!r}")
            return cls(name, values)
        low, high = (_value(word) for word in body.split("..", 1))
        for end in (low, high):
            if isinstance(end, bool) or not isinstance(end, int | float):
                raise ValueError(f"try: {name}: wanted numbers around .., got {given!r}")
        if not low < high or (log and low <= 0):
            wanted = "0 < LOW < HIGH" if log else "LOW < HIGH"
            raise ValueError(f"try: {name}: wanted {wanted}, got {given!r}")
        if float in (type(low), type(high)):
            low, high = float(low), float(high)
        return cls(name, (), low, high, log)

    def distribution(self) -> Any:
        """The same for Optuna."""
        from optuna import distributions

        if self.values:
            return distributions.CategoricalDistribution(self.values)
        if isinstance(self.low, int):
            return distributions.IntDistribution(self.low, int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)


def _value(word: str) -> Any:
    named = {"true": True, "false": False, "null": None}
    if word in named:
        return named[word]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def changed(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Settings with some of them set.

    Args:
        settings: What they begin from, left as they are.
        values: SECTION.FIELD -> value.

    Raises:
        ValueError: There is no such setting, or the value is out of range.
    """
    made = replace(settings)
    for key, value in values.items():
        section, _, name = key.partition(".")
        before: Any = getattr(made, section) if section in SECTIONS else {}
        if name not in (before if isinstance(before, dict) else asdict(before)):
            raise ValueError(f"{key}: there is no such setting (`onerec run --help` lists them)")
        try:
            one = {name: value}
            after = {**before, **one} if section == "model" else replace(before, **one)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{section}.{error}") from None
        setattr(made, section, after)
    return made


def sweep(
    settings: Settings,
    choices: Sequence[Choice],
    out: str | Path,
    *,
    metric: str = "ndcg@10",
    trials: int = 20,
    seed: int = 0,
    listener: Listener = SILENT,
) -> dict[str, Any]:
    """Tries settings, and writes the table, the plots and the best settings.

    The same call goes on where an earlier one stopped: trials that are done count, and one that
    was interrupted goes on from its stages.

    Args:
        settings: Of every trial but for what `choices` set.
        choices: What is tried.
        out: Folder of the sweep: sweep.json, sweep.html, best.yaml, study.log, trials/.
        metric: recall@k, ndcg@k or hit@k of the model on valid, the history as it is served;
            greater is better.
        trials: How many in all.
        seed: Of the sampler.
        listener: Told of the work.

    Returns:
        What sweep.json holds: "metric", "space", "trials" (number, state, value, low, high,
        settings, seconds, folder, error) in the order of their numbers, and "best", the number of
        the best one or None.

    Raises:
        ValueError: A choice or the metric is not one of the settings'.
        OneRecError: `out` holds a sweep of other settings, Optuna is missing, or no trial ended
            well.
    """
    kind, at, k = metric.partition("@")
    if kind not in METRICS or not at or k not in map(str, settings.evaluate.ks):
        cuts = ", ".join(f"{name}@{cut}" for name in METRICS for cut in settings.evaluate.ks)
        raise ValueError(f"metric: wanted one of {cuts}, got {metric!r}")
    if trials < 1:
        raise ValueError(f"trials: wanted 1 or more, got {trials}")
    for choice in choices:
        changed(settings, {choice.name: choice.values[0] if choice.values else choice.low})
    base = changed(settings, {"evaluate.splits": ("valid",), "evaluate.latency_requests": 0})
    base = changed(base, {"evaluate.sample_sessions": 0})
    directory = Path(out)
    with locked(directory, "sweep"):
        study = _study(directory, base, metric, seed)
        space = {choice.name: choice.distribution() for choice in choices}
        while (number := sum(map(_counts, study.trials))) < trials:
            trial = study.ask(space)
            told = ", ".join(f"{name} {_shown(value)}" for name, value in trial.params.items())
            listener.say(f"sweep: trial {number + 1}: {told}")
            folder = directory / "trials" / digest(trial.params)[:12]
            trial.set_user_attr("folder", str(folder.relative_to(directory)))
            begin = time.monotonic()
            try:
                made = changed(base, trial.params)
                _share(directory, study, folder)
                run(made, folder, listener, until="evaluate")
                found = EvalResult.load(folder / "evaluate" / "evaluation.json")
            except (OneRecError, ValueError) as error:
                if isinstance(error, Interrupted):
                    raise
                trial.set_user_attr("error", str(error))
                study.tell(trial, state=_state("FAIL"))
                listener.say(f"sweep: trial {number + 1} failed: {error}")
                ended = [t for t in study.trials if _counts(t)]
                if len(ended) == min(3, trials) and all(t.value is None for t in ended):
                    raise OneRecError(f"sweep: every trial failed, the last one: {error}") from None
                continue
            got = found.value(metric, split="valid", history=found.protocol["served"])
            trial.set_user_attr("interval", [got.low, got.high])
            trial.set_user_attr("seconds", round(time.monotonic() - begin, 3))
            study.tell(trial, got.value)
            listener.say(f"sweep: trial {number + 1}: {metric} {got.value:.4f} on valid")
            _write(directory, study, choices, metric, settings)
        return _write(directory, study, choices, metric, settings)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _counts(trial: Any) -> bool:
    """Whether a trial ended by itself: one that was interrupted is tried again instead."""
    return trial.state == _state("COMPLETE") or "error" in trial.user_attrs


def _study(directory: Path, base: Settings, metric: str, seed: int) -> Any:
    """The study of a folder, with what was interrupted queued again."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
    except ImportError as error:
        raise OneRecError(
            f'`onerec sweep` needs the extra: pip install "onerec[sweep]" ({error})'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = str(directory / "study.log")
    storage = optuna.storages.JournalStorage(
        JournalFileBackend(file, lock_obj=JournalFileOpenLock(file))
    )
    study = optuna.create_study(
        study_name="sweep", storage=storage, direction="maximize", load_if_exists=True
    )
    # The seed goes on with the trials, so that a study that is continued draws anew.
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(study.trials), n_startup_trials=_START
    )
    made_with = digest([_plain(asdict(base)), metric])
    if study.user_attrs.get("settings", made_with) != made_with:
        raise OneRecError(
            f"{directory}: it holds a sweep with other settings or another metric; take another "
            "--out, or give the settings that it was begun with"
        )
    study.set_user_attr("settings", made_with)
    for trial in study.trials:
        if trial.state == _state("RUNNING"):
            study.enqueue_trial(trial.params)
            study.tell(trial.number, state=_state("FAIL"))
    return study


def _plain(value: Any) -> Any:
    """Tuples as lists: what JSON makes of them."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _share(directory: Path, study: Any, folder: Path) -> None:
    """Links the first stages of an earlier trial; a stage of other settings is then made again."""
    for trial in study.trials:
        source = directory / trial.user_attrs.get("folder", "")
        if trial.state != _state("COMPLETE") or source == folder:
            continue
        for name in _SHARED:
            if (source / name).is_dir() and not (folder / name).exists():
                shutil.copytree(source / name, folder / name, copy_function=os.link)
        return


def _write(
    directory: Path, study: Any, choices: Sequence[Choice], metric: str, settings: Settings
) -> dict[str, Any]:
    from onerec.report.sweep import render_sweep

    rows: list[dict[str, Any]] = []
    for trial in study.trials:
        if not _counts(trial):
            continue
        attributes = trial.user_attrs
        low, high = attributes.get("interval", (None, None))
        rows.append(
            {
                "number": len(rows) + 1,
                "state": "done" if trial.value is not None else "failed",
                "value": trial.value,
                "low": low,
                "high": high,
                "settings": trial.params,
                "seconds": attributes.get("seconds"),
                "folder": attributes.get("folder"),
                "error": attributes.get("error"),
            }
        )
    done = [row for row in rows if row["value"] is not None]
    if not done:
        raise OneRecError(f"sweep: no trial ended well, the last one: {rows[-1]['error']}")
    best = max(done, key=lambda row: float(row["value"]))
    told = {
        "metric": metric,
        "split": "valid",
        "space": [asdict(choice) for choice in choices],
        "trials": rows,
        "best": best["number"],
    }
    write_json(directory / FILE, told)
    changed(settings, best["settings"]).save(directory / BEST)
    render_sweep(told, directory / PAGE)
    return told


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
