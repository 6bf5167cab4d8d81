"""What each section of the report shows, read from the files of a run's directory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup

from onerec.errors import DataError
from onerec.evaluation.metrics import TIMES
from onerec.evaluation.result import EvalResult, Measure, best_systems, in_order
from onerec.report import plots
from onerec.report.read import (
    Missing,
    duration,
    evaluation,
    file_of,
    find,
    flatten,
    held_out,
    label,
    lift,
    noted,
    read_json,
)

# A tag on more of the items than this says little about an item that has another.
_COMMON_TAG = 0.4


def _systems(result: EvalResult) -> tuple[str, ...]:
    """The systems that were measured, in the order of tables."""
    return tuple(in_order(measure.system for measure in result.measures))


def data(run: Path) -> dict[str, Any]:
    funnel = read_json(run, "sessions/funnel.json")
    steps = []
    largest: dict[str, int] = {}
    for step in funnel.get("steps", []):
        largest[step["unit"]] = max(largest.get(step["unit"], 0), step["count"])
    for step in funnel.get("steps", []):
        share = step["count"] / max(largest[step["unit"]], 1)
        unit = step["unit"]
        if unit == "sessions" and funnel.get("length") == 1:
            unit = "next items"
        steps.append({**step, "unit": unit, "share": share})
    facts = flatten({k: v for k, v in funnel.items() if k not in ("steps", "config")})
    counts = pq.read_table(file_of(run, "sessions/items.parquet"), columns=["train_count"])
    sessions = pq.read_table(file_of(run, "sessions/sessions.parquet"), columns=["split", "start"])
    split = sessions["split"].to_numpy(zero_copy_only=False)
    start = sessions["start"].to_numpy().astype(np.int64)
    lengths = {name: start[split == name] for name in ("train", "valid", "test")}
    figure = plots.data_shape(counts["train_count"].to_numpy(), lengths)
    return {"steps": steps, "facts": facts, "figure": Markup(figure)}


def _codes(run: Path) -> tuple[npt.NDArray[np.int32], pa.Table]:
    table = pq.read_table(file_of(run, "tokenize/catalog.parquet"))
    codes = np.stack(table["codes"].to_numpy(zero_copy_only=False)).astype(np.int32)
    return codes, table


def semantic_ids(run: Path) -> dict[str, Any]:
    metrics = read_json(run, "tokenize/metrics.json")
    codes, _ = _codes(run)
    size = _codebook_size(run, codes)
    errors = metrics.get("quantizer", {}).get("mse_per_level", [])
    levels = []
    for level in range(codes.shape[1]):
        used = np.bincount(codes[:, level], minlength=size)
        share = used[used > 0] / len(codes)
        bits = float(-(share * np.log2(share)).sum())
        levels.append(
            {
                "level": level + 1,
                "used": int((used > 0).sum()),
                "min": int(used.min()),
                "max": int(used.max()),
                "entropy": bits,
                "evenness": bits / np.log2(size),
                "error": errors[level] if level < len(errors) else None,
            }
        )
    per_id = np.unique(codes, axis=0, return_counts=True)[1]
    scalars = [
        (name, value)
        for name, value in flatten(metrics)
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return {
        "codebook_size": size,
        "levels": levels,
        "items": len(codes),
        "ids": len(per_id),
        "shared": float(per_id[per_id > 1].sum() / len(codes)),
        "largest": int(per_id.max()),
        "scalars": scalars,
        "usage": Markup(plots.code_usage(codes, size)),
        "collisions": Markup(plots.collisions(per_id)) if per_id.max() > 1 else None,
    }


def _codebook_size(run: Path, codes: npt.NDArray[np.int32]) -> int:
    """K as the stage recorded it; without a record, the least that holds every code."""
    record = run / "tokenize" / "stage.json"
    if record.is_file():
        stored = read_json(run, "tokenize/stage.json").get("summary", {}).get("codebook_size")
        if stored:
            return int(stored)
    return int(codes.max()) + 1


def tree(run: Path) -> dict[str, Any]:
    codes, catalog = _codes(run)
    items = pq.read_table(file_of(run, "sessions/items.parquet"), columns=["item_id", "tags"])
    place = {item: row for row, item in enumerate(items["item_id"].to_pylist())}
    rows = np.array([place[item] for item in catalog["item_id"].to_pylist()], dtype=np.int64)
    tag_of, names, counts = _main_tags(items["tags"])
    tag_of = tag_of[rows]
    shown = len(plots.TAG_COLORS)
    colors = [*plots.TAG_COLORS, plots.OTHER_TAG]
    figure = plots.id_tree(codes, np.minimum(tag_of, shown), colors)
    legend = [
        (plots.TAG_COLORS[i], names[i], int(counts[i])) for i in range(min(shown, len(names)))
    ]
    if len(names) > shown:
        others = f"{len(names) - shown:,} other tags"
        legend.append((plots.OTHER_TAG, others, int(counts[shown:].sum())))
    if without := int((tag_of < 0).sum()):
        legend.append((plots.NO_TAG, "no tag", without))
    tagged = tag_of >= 0
    purity = []
    if tagged.any():
        order = np.lexsort(codes[tagged].T[::-1])
        sids, tags = codes[tagged][order], tag_of[tagged][order]
        shuffled = np.random.default_rng(0).permutation(tags)
        for level in range(codes.shape[1]):
            starts = plots.prefix_starts(sids, level + 1)
            own, chance = (
                float(plots.dominant_tags(t, starts, len(names))[1].mean())
                for t in (tags, shuffled)
            )
            purity.append((level + 1, int(starts.sum()), own, chance))
    return {"figure": Markup(figure), "legend": legend, "purity": purity}


def _main_tags(
    column: pa.ChunkedArray,
) -> tuple[npt.NDArray[np.int64], list[str], npt.NDArray[np.int64]]:
    """One tag for each item: its most frequent one that at most 40 % of the items have, else its
    first one.

    Returns:
        int64 [N], -1 for none; the names, most frequent first; items that have each as their main.
    """
    lists = column.to_pylist()
    seen: dict[str, int] = {}
    for tags in lists:
        for tag in set(tags or ()):
            seen[tag] = seen.get(tag, 0) + 1
    telling = {tag: n for tag, n in seen.items() if n <= _COMMON_TAG * len(lists)}
    main = [
        max(
            (t for t in tags or () if t in telling),
            key=lambda t: (telling[t], t),
            default=tags[0] if tags else None,
        )
        for tags in lists
    ]
    total: dict[str, int] = {}
    for tag in main:
        if tag is not None:
            total[tag] = total.get(tag, 0) + 1
    names = sorted(total, key=lambda t: (-total[t], t))
    number = {tag: i for i, tag in enumerate(names)}
    of_item = np.array([-1 if t is None else number[t] for t in main], dtype=np.int64)
    return of_item, names, np.array([total[t] for t in names], dtype=np.int64)


def _records(run: Path) -> list[dict[str, Any]]:
    from onerec.training.metrics import read_metrics

    records = read_metrics(file_of(run, "pretrain/metrics.jsonl"))
    if not records:
        raise DataError(f"{run / 'pretrain/metrics.jsonl'}: no records")
    return records


def training(run: Path) -> dict[str, Any]:
    records = _records(run)
    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    size = None
    if (run / "tokenize" / "catalog.parquet").is_file():
        size = _codebook_size(run, _codes(run)[0])
    facts: list[tuple[str, Any]] = []
    if train:
        speed = float(np.median([r["tokens_per_s"] for r in train]))
        facts += [
            ("steps", train[-1]["step"]),
            ("epochs", train[-1]["epoch"]),
            ("time", duration(train[-1]["seconds"])),
            ("tokens a second, median", round(speed)),
            ("last train loss, nats an item", train[-1]["loss"]),
        ]
    kept = None
    if valid:
        selected = noted(run, "pretrain").get("selected_step")
        found = [r for r in valid if r["step"] == selected]
        kept = found[0] if found else min(valid, key=lambda r: float(r["loss"]))
        facts += [("kept step", kept["step"]), ("its valid loss, nats an item", kept["loss"])]
        facts += [(f"its loss, level {i + 1}", x) for i, x in enumerate(kept["loss_per_level"])]
        if "score" in kept:
            facts.append(("its NDCG@10 on valid", kept["score"]))
    uniform = None if size is None else float(np.log(size))
    if uniform is not None:
        facts.append(("uniform guess of a code, nats", uniform))
    return {"facts": facts, "figure": Markup(plots.training(records, uniform, kept))}


def router(run: Path) -> dict[str, Any]:
    records = [r for r in _records(run) if r.get("router_load")]
    if not records:
        return {"figure": None}
    load = np.array(records[-1]["router_load"])
    most = (load * load.shape[1]).max(axis=1)
    return {
        "figure": Markup(plots.router(records)),
        "layers": load.shape[0],
        "experts": load.shape[1],
        "most": float(most.max()),
    }


def ranking(run: Path) -> dict[str, Any]:
    result = evaluation(run)
    splits, ks = held_out(result), result.protocol["ks"]
    systems = _systems(result)
    single = all(s["targets"] == s["sessions"] for s in result.protocol["split_sizes"].values())
    kinds = ["recall", "ndcg"] if single else ["recall", "ndcg", "hit"]
    metrics = [f"{kind}@{k}" for kind in kinds for k in ks]
    tables = []
    for history in ("masked", "unmasked"):
        rows = _rows(result.measures, metrics, systems, splits, history)
        if rows:
            tables.append({"history": history, "rows": rows})
    top = max(ks)
    differences = []
    for kind, rival in itertools.product(("recall", "ndcg"), result.baselines()):
        metric = f"{kind}@{top}"
        cells = []
        for history, split in itertools.product(("masked", "unmasked"), splits):
            gap = find(result.differences, metric, f"model - {rival}", split, history)
            other = find(result.measures, metric, rival, split, history)
            cells.append((gap, lift(gap, other)))
        if not any(gap for gap, _ in cells):
            continue
        differences.append({"metric": metric, "system": rival, "cells": cells})
    buckets = _buckets(result, f"recall@{top}", splits[0])
    last = splits[0]
    figure = plots.systems(
        [
            [m for s in systems if (m := find(result.measures, metric, s, last, "masked"))]
            for metric in metrics
        ],
        [label(metric) for metric in metrics],
        name="ranking",
        label=f"{last} split, history masked",
    )
    extra = _rows(
        result.measures,
        [f"{name}@{top}" for name in ("id_recall", "coverage", "popular_share", "gini")],
        systems,
        splits,
        "masked",
    )
    return {
        "splits": splits,
        "systems": systems,
        "tables": tables,
        "differences": differences,
        "histories": [t["history"] for t in tables],
        "figure": Markup(figure),
        "buckets": buckets,
        "extra": extra,
        "protocol": result.protocol,
        "last": last,
        "top": top,
    }


def _rows(
    measures: list[Measure],
    metrics: list[str],
    systems: tuple[str, ...],
    splits: list[str],
    history: str,
) -> list[dict[str, Any]]:
    """Table rows: one a metric that any system has; a cell for each split and system."""
    rows = []
    for metric in metrics:
        cells = [
            find(measures, metric, system, split, history) for split in splits for system in systems
        ]
        if any(cell is not None for cell in cells):
            best: list[bool] = []
            for begin in range(0, len(cells), len(systems)):
                of_split = cells[begin : begin + len(systems)]
                values = {s: c and c.value for s, c in zip(systems, of_split, strict=True)}
                best += [s in best_systems(metric, values) for s in systems]
            rows.append({"metric": metric, "cells": cells, "best": best})
    return rows


def _buckets(result: EvalResult, metric: str, split: str) -> dict[str, Any] | None:
    names = list(
        dict.fromkeys(
            m.metric[len(metric) + 1 : -1]
            for m in result.measures
            if m.metric.startswith(f"{metric}[") and m.split == split
        )
    )
    if not names:
        return None
    lines = [
        [
            m
            for system in _systems(result)
            if (m := find(result.measures, f"{metric}[{name}]", system, split, "masked"))
        ]
        for name in names
    ]
    labels = [
        f"{name}{'' if name in TIMES else ' exposures'} ({line[0].n:,})"
        for name, line in zip(names, lines, strict=True)
    ]
    figure = plots.systems(
        lines, labels, name="buckets", label=f"{label(metric)} of the targets, {split} split"
    )
    return {"figure": Markup(figure)}


def only_lists(run: Path) -> bool:
    """Whether the run recommends lists, so that it has no sessions worth a section."""
    try:
        result = evaluation(run)
    except (Missing, DataError):
        return False
    watched = any(m.metric == "watch_seconds" for m in result.measures)
    return bool(result.protocol.get("ranks_items")) and not watched


def sessions(run: Path) -> dict[str, Any]:
    result = evaluation(run)
    splits = held_out(result)
    own_systems = tuple(s for s in _systems(result) if s in ("model", "pretrained"))
    shown_systems = _systems(result)
    compared = ["session_hit", "session_recall", "judged_reward"]
    rows = _rows(result.measures, compared, shown_systems, splits, "masked")
    own = ["session_length", "session_duplicates", "legality", "unconstrained_legality"]
    own += ["session_coverage", "session_popular_share", "session_gini", "session_entropy_bits"]
    own_rows = _rows(result.measures, own, own_systems, splits, "masked")
    last = splits[0]
    watch = [
        m
        for system in ("oracle", *shown_systems, "logged")
        if (m := find(result.measures, "watch_seconds", system, last, "masked"))
    ]
    figure = None
    gaps = []
    if watch:
        drawn = plots.systems(
            [[m] for m in watch],
            [m.system for m in watch],
            name="watch",
            label=f"true expected watch time of a session, seconds, {last} split",
        )
        figure = Markup(drawn)
        metrics = ("watch_seconds", "item_watch_seconds")
        gaps = [
            (metric, m)
            for metric in metrics
            for other in ("pretrained", *result.baselines(), "oracle")
            if (m := find(result.differences, metric, f"model - {other}", last, "masked"))
        ]
    watch_systems = ("oracle", *shown_systems, "logged")
    watch_rows = _rows(
        result.measures, ["watch_seconds", "item_watch_seconds"], watch_systems, [last], "masked"
    )
    offered = any(m.metric == "unconstrained_legality" for m in result.measures)
    return {
        "rows": rows,
        "own_rows": own_rows,
        "splits": splits,
        "figure": figure,
        "gaps": gaps,
        "watch_rows": watch_rows,
        "watch_systems": watch_systems,
        "systems": shown_systems,
        "own_systems": own_systems,
        "last": last,
        "unconstrained": offered,
    }


def latency(run: Path) -> dict[str, Any]:
    latency = evaluation(run).latency
    if not latency:
        return {"figure": None}
    times = np.array(latency["times_ms"], dtype=np.float64)
    # Fewer requests have no 99th percentile of their own.
    names = ("p50", "p90", "p99") if len(times) >= 100 else ("p50", "p90")
    marks = {name: float(latency[f"{name}_ms"]) for name in names}
    figure = plots.latency(times, {name: marks[name] for name in ("p50", names[-1])})
    return {"figure": Markup(figure), "marks": marks, **latency}


def samples(run: Path) -> dict[str, Any]:
    return {"samples": evaluation(run).samples}


def days(run: Path) -> dict[str, Any]:
    """What each update of a run (`onerec update`) did."""
    text = file_of(run, "updates.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    rows = [
        {
            "name": line["version"],
            "time": line["time"][:16].replace("T", " "),
            "rows": line["sessions"]["rows"],
            "new": line["tokenize"]["new_items"],
            "retired": line["tokenize"]["retired"],
            "next_day": line["measure"]["ndcg@10"],
            "before": line["measure"]["held_out"]["ndcg@10"],
            "after": line["check"]["ndcg@10"],
            "taken": line["measure"]["new_items_taken"],
            "cold": line["measure"]["new_items_shown"],
            "shown": line["check"]["new_items_shown"],
            "drift": line["tokenize"]["error_of_new_to_fitted"],
            "seconds": sum(line["seconds"][stage] for stage in line["seconds"] if stage in line),
            "refused": line["refused"],
            "published": line["published"],
        }
        for line in lines
    ]

    def column(name: str) -> list[Any]:
        return [row[name] for row in rows]

    figure = plots.days(
        column("name"),
        {
            "before, on the day's rows": column("next_day"),
            "before, held out": column("before"),
            "after, held out": column("after"),
        },
        {
            "of what was taken": column("taken"),
            "of lists, before": column("cold"),
            "of lists, after": column("shown"),
        },
        column("seconds"),
    )
    return {"rows": rows, "figure": Markup(figure)}


def setup(run: Path, stages: Sequence[str] | None = None) -> dict[str, Any]:
    config = run / "config.yaml"
    if stages is None:
        records = sorted(run.glob("[!.]*/stage.json"), key=lambda path: path.stat().st_mtime_ns)
        stages = [path.parent.name for path in records]
    rows: list[dict[str, Any]] = []
    for name in stages:
        path = run / name / "stage.json"
        if not path.is_file():
            rows.append({"name": name, "state": "not run"})
            continue
        record = read_json(run, f"{name}/stage.json")
        summary = {
            k: v for k, v in record.get("summary", {}).items() if isinstance(v, int | float | str)
        }
        rows.append(
            {
                "name": name,
                "state": "done",
                "time": duration(record["seconds"]) if "seconds" in record else None,
                "version": record.get("version"),
                "fingerprint": str(record.get("fingerprint", ""))[:10],
                "summary": summary,
            }
        )
    versions = {}
    if (run / "evaluate" / "evaluation.json").is_file():
        versions = evaluation(run).versions
    return {
        "config": config.read_text(encoding="utf-8") if config.is_file() else None,
        "stages": rows,
        "versions": versions,
    }


def reward_model(run: Path) -> dict[str, Any]:
    metrics = read_json(run, "reward/metrics.json")
    split = "test"
    systems = ("model", "judge", "logistic regression", "item mean")
    measured = metrics["splits"][split]
    present = [s for s in systems if any(s in row for row in measured.values())]
    rows = [
        {
            "target": target,
            "rows": row["rows"],
            "rate": row["positives"] / max(row["rows"], 1),
            "auc": [row[s]["auc"] if s in row else None for s in present],
            "loss": [row[s]["log_loss"] if s in row else None for s in present],
            "ratio": row["model"]["calibration"]["ratio"] if "model" in row else None,
            "error": row["model"]["calibration"]["error"] if "model" in row else None,
        }
        for target, row in measured.items()
    ]
    curves = {
        target: row["model"]["calibration"]["bins"]
        for target, row in measured.items()
        if "model" in row
    }
    return {
        "split": split,
        "systems": present,
        "rows": rows,
        "skipped": metrics["skipped"],
        "labels": metrics["labels"],
        "judge": metrics["judge"],
        "watch_cap": metrics["watch_cap_seconds"],
        "figure": Markup(plots.calibration(curves)) if curves else None,
    }


_SHOWN_PAIRS = 4


def alignment(run: Path) -> dict[str, Any]:
    record = read_json(run, "align/alignment.json")
    rounds = [record["seed"], *record["iterations"]]
    return {
        "method": record["method"],
        "weight": record["weight"],
        "stopped": record["stopped"],
        "chosen": record["chosen"],
        "rounds": [
            {"name": "seed" if n == 0 else str(n), "chosen": n == record["chosen"], **one}
            for n, one in enumerate(rounds)
        ],
        "figure": Markup(plots.alignment(rounds)) if record["iterations"] else None,
        "pairs": _pairs(run, len(record["iterations"])) if record["iterations"] else [],
    }


def _pairs(run: Path, iteration: int) -> list[dict[str, Any]]:
    """Some of an iteration's samples, with the sessions of highest and lowest reward."""
    pairs = []
    table = pq.read_table(file_of(run, f"align/pairs/iteration_{iteration:02d}.parquet"))
    items = pq.read_table(file_of(run, "sessions/items.parquet"), columns=["text", "tags"])
    texts, tags = items["text"].to_pylist(), items["tags"].to_pylist()
    rows = table.to_pylist()
    begins = [n for n, row in enumerate(rows) if row["member"] == 0]
    ends = [*begins[1:], len(rows)]
    order = np.random.default_rng(0).permutation(len(begins))[:_SHOWN_PAIRS]
    for number in order:
        group = [r for r in rows[begins[number] : ends[number]] if r["reward"] is not None]
        sides = []
        for name, row in (("highest reward", group[0]), ("lowest reward", group[-1])):
            listed = [
                {"item": i, "text": texts[i] or "", "tags": tags[i] or [], "hit": False}
                for i in row["items"]
            ]
            sides.append({"name": name, "reward": row["reward"], "items": listed})
        sides.sort(key=lambda side: -side["reward"])
        pairs.append({"sample": rows[begins[number]]["sample"], "sides": sides})
    return pairs
