"""The first screen: what was run on what, the one table that matters, what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from onerec.evaluation.result import COUNTS, EvalResult, Measure, best_systems, in_order
from onerec.report.read import (
    duration,
    evaluation,
    find,
    held_out,
    lift,
    noted,
    read_json,
    stage_record,
)

_FEW_USERS = 1000  # fewer held-out users than this make intervals wide
_EARLY = 0.5  # share of the steps before which a best validation is told
_FILLED = _COLD = 0.1  # shares of items without a vector, of targets without training, that matter


def summary(run: Path) -> dict[str, Any]:
    """What the first section shows."""
    result = evaluation(run)
    split, served = held_out(result)[0], result.protocol["served"]
    metrics = [f"{kind}@{max(result.protocol['ks'])}" for kind in ("recall", "ndcg")]
    if find(result.measures, "watch_seconds", "model", split, served):
        metrics.append("watch_seconds")
    first = metrics[0]
    of = {m.system: m for m in _measured(result, first, split, served)}
    rival = max((of[s] for s in result.baselines() if s in of), key=_value)
    counted = max((of[s] for s in COUNTS if s in of), key=_value)
    gap = find(result.differences, first, f"model - {rival.system}", split, served)
    if gap.low > 0:
        verdict = f"the model is better than {rival.system} beyond the interval"
    elif gap.high < 0:
        verdict = f"the model is worse than {rival.system} beyond the interval"
    else:
        verdict = "the interval includes zero: no difference is shown"
    rows = []
    for system in in_order(of):
        cells = [find(result.measures, metric, system, split, served) for metric in metrics]
        rows.append(
            {
                "system": system,
                "cells": cells,
                "best": [system in _best(result, metric, split, served) for metric in metrics],
                "lift": None if system == counted.system else _share(of[system], counted),
            }
        )
    lead = find(result.differences, first, f"model - {counted.system}", split, served)
    interval = None
    if lead is not None and counted.value:
        interval = [100.0 * end / counted.value for end in (lead.low, lead.high)]
    return {
        "about": _about(run, result, split),
        "tiles": _tiles(run, result),
        "split": split,
        "served": served,
        "metrics": metrics,
        "metric": first,
        "rows": rows,
        "counted": counted.system,
        "confidence": result.protocol["confidence"],
        "lead": interval,
        "model": of["model"],
        "rival": rival,
        "gap": gap,
        "lift": lift(gap, rival),
        "verdict": verdict,
        "good": gap.low > 0,
        "bad": gap.high < 0,
        "next": _next(run, result, split, gap, rival),
    }


def advice(run: Path) -> list[str]:
    """What an evaluated run itself says should be done next, most useful first."""
    told: list[str] = summary(run)["next"]
    return told


def _measured(result: EvalResult, metric: str, split: str, history: str) -> list[Measure]:
    wanted = (metric, split, history)
    return [m for m in result.measures if (m.metric, m.split, m.history) == wanted]


def _value(measure: Measure) -> float:
    return float(measure.value)


def _share(measure: Measure, base: Measure) -> float | None:
    return 100.0 * (measure.value / base.value - 1.0) if base.value else None


def _best(result: EvalResult, metric: str, split: str, history: str) -> set[str]:
    return best_systems(
        metric, {m.system: m.value for m in _measured(result, metric, split, history)}
    )


def _about(run: Path, result: EvalResult, split: str) -> list[str]:
    """What was run on what, a sentence each."""
    told = []
    if (run / "sessions" / "funnel.json").is_file():
        funnel = read_json(run, "sessions/funnel.json")
        log = funnel.get("log", {})
        sizes = [f"{funnel[name]:,} {name}" for name in ("users", "items") if name in funnel] or [
            "users and items"
        ]
        rows = log.get("interactions", log.get("rows"))
        told.append(
            f"Log: {log.get('path', 'unknown')}"
            + (f", {rows:,} rows" if isinstance(rows, int) else "")
            + f" of {' and '.join(sizes)}"
            + (f", {log['times']}" if "times" in log else "")
            + "."
        )
    size = result.protocol["split_sizes"][split]
    what = "next items" if size["targets"] == size["sessions"] else "sessions"
    trained = noted(run, "pretrain")
    if trained.get("parameters"):
        preset = _preset(run)
        told.append(
            f"Model: {trained['parameters']:,} parameters"
            + (f" (preset {preset})" if preset else "")
            + f", {trained['steps']:,} steps over {trained['samples']:,} training "
            + ("sessions." if what == "sessions" else "targets.")
        )
    told.append(
        f"Measured on {size['sessions']:,} {what} of {size['users']:,} users ({split} split), "
        f"ranked among all {result.protocol['items']:,} items."
    )
    return told


def _preset(run: Path) -> str:
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(settings.get("preset", "")) if isinstance(settings, dict) else ""


def _tiles(run: Path, result: EvalResult) -> list[tuple[str, Any]]:
    seconds = [
        record["seconds"]
        for path in run.glob("[!.]*/stage.json")
        if path.parent.name != "report"
        and (record := stage_record(run, path.parent.name)).get("seconds")
    ]
    tiles: list[tuple[str, Any]] = [("the whole run", duration(sum(seconds)))] if seconds else []
    trained = stage_record(run, "pretrain").get("seconds")
    if trained:
        tiles.append(("training", duration(trained)))
    if result.latency:
        tiles.append(("ms a request, p50", f"{result.latency['p50_ms']:,.3g}"))
    coverage = find(
        result.measures,
        f"coverage@{max(result.protocol['ks'])}",
        "model",
        held_out(result)[0],
        result.protocol["served"],
    )
    if coverage:
        tiles.append(("of the catalogue is recommended", f"{100 * coverage.value:.0f} %"))
    return tiles


def _next(run: Path, result: EvalResult, split: str, gap: Measure, rival: Measure) -> list[str]:
    """What the run itself says should be done about it, most useful first."""
    told = []
    if (run / "sessions" / "funnel.json").is_file():
        told += _about_data(read_json(run, "sessions/funnel.json"))
    trained = noted(run, "pretrain")
    if trained.get("improving"):
        told.append(
            f"The model was still improving at the end of {trained['steps']:,} steps: train "
            "longer (--train.epochs, --train.max_steps)."
        )
    elif trained.get("selected_step", 0) and trained["selected_step"] < _EARLY * trained["steps"]:
        told.append(
            f"The best validation was at step {trained['selected_step']:,} of "
            f"{trained['steps']:,}: what came later did not help. Fewer steps, or more dropout "
            "(--model.dropout), do as well."
        )
    low, high = gap.low or 0.0, gap.high or 0.0
    # The truth of a simulated world, which sessions are for, tells more than the log's next item.
    true = [
        m.low or 0.0
        for m in result.differences
        if (m.metric, m.split) == ("watch_seconds", split)
        and m.system.removeprefix("model - ") in COUNTS
    ]
    if true and min(true) > 0:
        low = high = min(true)
    if low <= 0:
        worse = "is worse than" if high < 0 else "is not shown to be better than"
        told.append(
            f"The model {worse} {rival.system}, which takes seconds: serve that, or try item "
            "vectors of your own, another --sessions.rule, more steps."
        )
    size = result.protocol["split_sizes"][split]
    if size["users"] < _FEW_USERS and low <= 0 <= high:
        more = "more users, or --sessions.split last, which holds out a session of every user"
        if size["users"] < size["users_in_split"]:
            more = f"--evaluate.max_users null measures all {size['users_in_split']:,}"
        told.append(
            f"Only {size['users']:,} users are measured, so the intervals are wide: {more}."
        )
    if size["targets_not_in_train"] > _COLD * size["targets"]:
        told.append(
            f"{_percent(size['targets_not_in_train'], size['targets'])} of the {split} targets do "
            "not occur in training, which no count can find: vectors of what items are like "
            "(--sessions.embeddings text, embeddings.npy) help."
        )
    stopped = noted(run, "align").get("stopped")
    if stopped:
        told.append(f"The alignment ended early: {stopped}.")
    without = noted(run, "recommend").get("users_without_items", 0)
    if without:
        told.append(
            f"{without:,} users got no recommendation, for they have taken everything that was "
            "found: --recommend.exclude_history false."
        )
    return told


def _about_data(funnel: dict[str, Any]) -> list[str]:
    told = []
    targets = funnel.get("targets", {})
    rows, train = targets.get("positive rows", 0), targets.get("that are a training target", 0)
    if train < rows / 2:
        more = ": --sessions.rule next makes targets of nearly all"
        way = "" if funnel.get("rule") == "next" else more
        part = f"1 of {rows / train:.3g} positive rows is" if train else "No positive row is"
        told.append(f"{part} a training target{way}.")
    vectors = funnel.get("embeddings", {})
    items, filled = funnel.get("items", 0), vectors.get("filled", 0)
    if vectors.get("source") == "cooccurrence":
        told.append(
            "Item vectors come from co-occurrence, so a new item has none until people took it: "
            "vectors of its text (--sessions.embeddings text) or your own (embeddings.npy in the "
            "log's folder) know it at once."
        )
    elif items and filled > _FILLED * items:
        told.append(
            f"{_percent(filled, items)} of the items have no vector of their own and were given "
            "their neighbors' mean: complete the vectors."
        )
    return told


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %"
