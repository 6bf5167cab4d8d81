"""Training of the reward model on exposed sessions, and its measure beside plain predictors."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from onerec.data.session_set import ExposedSessions, SessionSet
from onerec.errors import OneRecError
from onerec.model.config import RewardModelConfig
from onerec.model.reward import RewardModel
from onerec.progress import Progress
from onerec.training.reward.config import SOFT_TARGETS, RewardConfig
from onerec.training.reward.metrics import LogisticRegression, item_means, measure

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]

_WATCH_QUANTILE = 0.99  # of the watch seconds of training items: where the label swt reaches 1
_REGRESSION_ROWS = 100_000
_PREDICT_ROWS = 1024


@dataclass(frozen=True)
class RewardResult:
    """What `train_reward` leaves.

    Attributes:
        model: In evaluation mode; learned from all users, or from those of even row.
        judge: Learned from the users of odd row; None where none was asked for.
        metrics: targets, skipped (target -> why), base rates, the cap of watch time, training
            curves, and for each split the measures of each system.
    """

    model: RewardModel
    judge: RewardModel | None
    metrics: dict[str, Any]


def item_features(sessions: SessionSet) -> Floats:
    """What the reward model knows of items: float32 [N, d + 3].

    The item vectors (centred, mean square 1), the standardised log length with a flag for unknown
    lengths, and the standardised log of the train count.
    """
    vectors = sessions.embeddings - sessions.embeddings.mean(axis=0)
    vectors = vectors / max(float(np.sqrt((vectors**2).mean())), 1e-6)
    length = sessions.items["duration_ms"].to_numpy().astype(np.float64)
    known = np.isfinite(length) & (length > 0)
    logs = np.log(np.where(known, length, 1.0))
    centre, spread = (logs[known].mean(), logs[known].std()) if known.any() else (0.0, 1.0)
    logs = np.where(known, (logs - centre) / max(spread, 1e-6), 0.0)
    count = np.log1p(sessions.items["train_count"].to_numpy().astype(np.float64))
    count = (count - count.mean()) / max(count.std(), 1e-6)
    return np.column_stack([vectors, logs, ~known, count]).astype(np.float32)


def watch_cap(train: ExposedSessions) -> float:
    """Seconds of watch time that count as the label 1; 1.0 where no watch time is known."""
    watch = train.feedback.get("watch_time_ms")
    known = watch[np.isfinite(watch)] if watch is not None else np.empty(0)
    return max(float(np.quantile(known, _WATCH_QUANTILE)) / 1000, 1e-3) if len(known) else 1.0


def labels_of(exposed: ExposedSessions, target: str, cap: float) -> Floats | None:
    """The labels of a target, float32 [n, m] in [0, 1], NaN where unknown; None without its column.

    Args:
        exposed: What was shown.
        target: As in `RewardConfig.targets`.
        cap: From `watch_cap`.
    """
    column = "watch_time_ms" if target in SOFT_TARGETS else target
    values = exposed.feedback.get(column)
    if values is None or target not in SOFT_TARGETS:
        return values
    most = 1000 * cap if target == "swt" else exposed.feedback["duration_ms"]
    share: Floats = np.minimum(values / most, 1).astype(np.float32)
    return share


def _session_labels(labels: Floats) -> Floats:
    """Labels of items [n, m, targets] as those of sessions [n, 1, targets]: means of the known."""
    known = np.isfinite(labels)
    count = known.sum(axis=1, keepdims=True)
    total = np.where(known, labels, 0).sum(axis=1, keepdims=True)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def train_reward(
    sessions: SessionSet,
    config: RewardConfig,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
) -> RewardResult:
    """Trains and measures the reward model, and a judge of other users where one is asked for.

    The split is that of the sessions: training learns from "train", the weights of the least loss
    on "valid" are kept, and "valid" and "test" are measured.

    Args:
        sessions: With exposed sessions.
        config: Settings.
        device: Where to train.
        progress: Called as progress(steps done, all steps, note).

    Raises:
        ValueError: The log has no feedback, or no target that can be trained.
        OneRecError: The loss is not finite any more.
    """
    splits = {name: sessions.exposed_sessions(name) for name in ("train", "valid", "test")}
    for name, part in splits.items():
        if not len(part):
            raise ValueError(f"exposed sessions: the split {name} has none")
    cap = watch_cap(splits["train"])
    chosen, skipped = _targets(splits["train"], config, cap)
    labels = {
        name: np.stack([_needed(labels_of(part, target, cap)) for target in chosen], axis=-1)
        for name, part in splits.items()
    }
    features = item_features(sessions)
    flat = labels["train"].reshape(-1, len(chosen))
    base = np.asarray(np.nanmean(flat, axis=0, dtype=np.float64))
    odds = np.sqrt((1 - base) / base)
    shape = RewardModelConfig(
        n_items=len(features),
        feature_dim=features.shape[1],
        targets=tuple(chosen),
        weights=tuple(config.weights[config.targets.index(target)] for target in chosen),
        base_rates=tuple(base.tolist()),
        positive_weights=tuple(np.clip(odds, 1, config.max_positive_weight).tolist()),
        watch_cap=cap,
        labels=config.labels,
        history_length=config.history_length,
        session_length=splits["train"].items.shape[1],
        d_model=config.d_model,
        n_heads=config.n_heads,
        item_ids=config.item_ids,
        wide=config.wide,
        dropout=config.dropout,
    )
    halves = [(0, 2), (1, 2)] if config.judge else [(0, 1)]
    models, curves = [], []
    for number, (rest, of) in enumerate(halves):
        rows = {
            name: np.flatnonzero(part.user_row % of == rest)
            for name, part in splits.items()
            if name != "test"
        }
        if not all(len(found) for found in rows.values()):
            raise ValueError("judge: half of the users have no exposed session; set it to false")
        told = _shifted(progress, number, len(halves))
        model, curve = _fit(
            shape,
            features,
            {name: (splits[name].take(at), labels[name][at]) for name, at in rows.items()},
            config,
            seed=config.seed + number,
            device=device,
            progress=told,
        )
        models.append(model)
        curves.append(curve)
    metrics: dict[str, Any] = {
        "targets": chosen,
        "skipped": skipped,
        "watch_cap_seconds": cap,
        "base_rates": dict(zip(chosen, base.tolist(), strict=True)),
        "positive_weights": dict(zip(chosen, shape.positive_weights, strict=True)),
        "labels": config.labels,
        "judge": config.judge,
        "exposed_sessions": {name: len(part) for name, part in splits.items()},
        "curve": curves[0],
        "splits": _measure(models, splits, labels, features, base, config),
    }
    return RewardResult(models[0], models[1] if config.judge else None, metrics)


def _needed(labels: Floats | None) -> Floats:
    assert labels is not None  # the training split has the column, so every split has
    return labels


def _shifted(progress: Progress | None, number: int, parts: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, total, note: progress(number * total + done, parts * total, note)


def _targets(
    train: ExposedSessions, config: RewardConfig, cap: float
) -> tuple[list[str], dict[str, str]]:
    """The targets that can be trained, and why the others cannot."""
    chosen, skipped = [], {}
    for target in config.targets:
        found = labels_of(train, target, cap)
        if found is None:
            column = "watch_time_ms" if target in SOFT_TARGETS else target
            skipped[target] = f"the log has no column {column}"
            continue
        positives = float(np.nansum(found))
        negatives = float(np.isfinite(found).sum()) - positives
        if min(positives, negatives) < config.min_positives:
            few = "positive" if positives <= negatives else "negative"
            skipped[target] = (
                f"{min(positives, negatives):.0f} {few} labels in training, wanted "
                f"{config.min_positives} (min_positives)"
            )
            continue
        chosen.append(target)
    for target, why in skipped.items():
        logger.warning("reward: target %s is left out: %s", target, why)
    if not chosen:
        told = "; ".join(f"{target}: {why}" for target, why in skipped.items())
        raise ValueError(f"targets: none can be trained ({told})")
    return chosen, skipped


def _fit(
    shape: RewardModelConfig,
    features: Floats,
    data: dict[str, tuple[ExposedSessions, Floats]],
    config: RewardConfig,
    *,
    seed: int,
    device: str,
    progress: Progress | None,
) -> tuple[RewardModel, list[dict[str, float]]]:
    """Trains one model; returns it with the weights of its best validation, and the curve."""
    torch.manual_seed(seed)
    model = RewardModel(shape)
    model.item_features.copy_(torch.from_numpy(features))
    model.to(device)
    train, labels = data["train"]
    batch = min(config.batch_size, len(train))
    per_epoch = -(-len(train) // batch)
    total = min(config.max_steps, math.ceil(config.epochs * per_epoch))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=config.lr,
    )
    warmup = max(1, total // 20)
    rng = np.random.default_rng([seed, 1])
    order = np.empty(0, np.int64)
    every = max(1, total // config.evaluations)
    best: tuple[float, dict[str, torch.Tensor]] | None = None
    curve: list[dict[str, float]] = []
    running = 0.0
    for step in range(1, total + 1):
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(train))])
        rows, order = order[:batch], order[batch:]
        rate = step / warmup if step <= warmup else 0.5 * (1 + math.cos(math.pi * step / total))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * rate
        model.train()
        loss = _loss(model, *_tensors(train, labels, rows, config, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += float(loss.detach())
        if not math.isfinite(running):
            raise OneRecError(f"the reward model's loss is not finite after step {step}; lower lr")
        if step % every == 0 or step == total:
            valid = _validate(model, *data["valid"])
            count = step - int(curve[-1]["step"] if curve else 0)
            curve.append({"step": step, "loss": running / count, "valid_loss": valid})
            running = 0.0
            if best is None or valid < best[0]:
                best = valid, copy.deepcopy(model.state_dict())
        if progress is not None:
            note = f"valid loss {curve[-1]['valid_loss']:.4f}" if curve else ""
            progress(step, total, note)
    assert best is not None
    model.load_state_dict(best[1])
    return model.cpu().eval(), curve


def _tensors(
    exposed: ExposedSessions,
    labels: Floats,
    rows: npt.NDArray[np.int64],
    config: RewardConfig,
    device: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """History [b, S], sessions [b, 1, m] and labels [b, m, targets] of rows."""
    history = exposed.histories(rows, config.history_length)
    history = history[:, : max(1, int((history >= 0).sum(axis=1).max(initial=0)))]
    return (
        torch.from_numpy(history.astype(np.int64)).to(device),
        torch.from_numpy(exposed.items[rows].astype(np.int64)).unsqueeze(1).to(device),
        torch.from_numpy(labels[rows]).to(device),
    )


def _loss(
    model: RewardModel, history: torch.Tensor, sessions: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Sum over targets of the mean binary cross-entropy, with positives weighted."""
    logits = model(history, sessions).squeeze(1)
    if model.config.labels == "session":
        known = labels.isfinite()
        mean = torch.where(known, labels, 0).sum(dim=1, keepdim=True)
        count = known.sum(dim=1, keepdim=True)
        labels = torch.where(count > 0, mean / count.clamp(min=1), torch.nan)
    known = labels.isfinite()
    weights = torch.tensor(model.config.positive_weights, device=logits.device)
    losses = F.binary_cross_entropy_with_logits(
        logits, labels.nan_to_num(), pos_weight=weights, reduction="none"
    )
    sums = torch.where(known, losses, 0).sum(dim=(0, 1))
    return (sums / known.sum(dim=(0, 1)).clamp(min=1)).sum()


@torch.inference_mode()
def _probabilities(model: RewardModel, exposed: ExposedSessions) -> npt.NDArray[np.float64]:
    """Calibrated probabilities [n, m or 1, targets] of exposed sessions."""
    model.eval()
    device = model.item_features.device
    parts = []
    for begin in range(0, len(exposed), _PREDICT_ROWS):
        rows = np.arange(begin, min(begin + _PREDICT_ROWS, len(exposed)))
        history = torch.from_numpy(
            exposed.histories(rows, model.config.history_length).astype(np.int64)
        )
        items = torch.from_numpy(exposed.items[rows].astype(np.int64)).unsqueeze(1)
        logits = model(history.to(device), items.to(device)).squeeze(1)
        parts.append(model.probabilities(logits).double().cpu().numpy())
    return np.concatenate(parts)


def _validate(model: RewardModel, exposed: ExposedSessions, labels: Floats) -> float:
    """Sum over targets of the log loss of the corrected probabilities."""
    wanted = labels if model.config.labels == "item" else _session_labels(labels)
    p = np.clip(_probabilities(model, exposed), 1e-7, 1 - 1e-7)
    losses = -wanted * np.log(p) - (1 - wanted) * np.log1p(-p)
    flat = losses.reshape(-1, losses.shape[-1])
    known = np.isfinite(flat)
    return float((np.where(known, flat, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)).sum())


def _measure(
    models: list[RewardModel],
    splits: dict[str, ExposedSessions],
    labels: dict[str, Floats],
    features: Floats,
    base: npt.NDArray[np.float64],
    config: RewardConfig,
) -> dict[str, Any]:
    """For valid and test: target -> system -> measures, at the level of the labels."""
    session_level = config.labels == "session"
    train = splits["train"]
    shown = train.items >= 0
    items = train.items[shown].astype(np.int64)
    means = item_means(items, labels["train"][shown].astype(np.float64), len(features), base)
    rng = np.random.default_rng([config.seed, 2])
    some = rng.permutation(len(train))[: max(1, _REGRESSION_ROWS // train.items.shape[1])]
    part = train.take(some)
    plain = LogisticRegression().fit(
        _crossed(part, features, config)[part.items >= 0], labels["train"][some][part.items >= 0]
    )
    measured: dict[str, Any] = {}
    for name in ("valid", "test"):
        exposed, wanted = splits[name], labels[name]
        shown = exposed.items >= 0
        item_level = {
            "item mean": means[np.maximum(exposed.items, 0)],
            "logistic regression": np.full(wanted.shape, np.nan),
        }
        item_level["logistic regression"][shown] = plain.predict(
            _crossed(exposed, features, config)[shown]
        )
        predicted = {"model": _probabilities(models[0], exposed)}
        if len(models) > 1:
            predicted["judge"] = _probabilities(models[1], exposed)
        for system, values in item_level.items():
            values = np.where(shown[..., None], values, np.nan)
            predicted[system] = (
                _session_labels(values.astype(np.float32)).astype(np.float64)
                if session_level
                else values
            )
        truth = _session_labels(wanted) if session_level else wanted
        measured[name] = {}
        for number, target in enumerate(models[0].config.targets):
            known = np.isfinite(truth[..., number])
            y = truth[..., number][known].astype(np.float64)
            row: dict[str, Any] = {"rows": len(y), "positives": float(y.sum())}
            if 0 < y.sum() < len(y):
                for system, values in predicted.items():
                    row[system] = measure(values[..., number][known], y)
            measured[name][target] = row
    return measured


def _crossed(exposed: ExposedSessions, features: Floats, config: RewardConfig) -> Floats:
    """Features of the logistic regression, float32 [n, m, D].

    The item's, their products with the mean of the history's, and the log of its length.
    """
    rows = np.arange(len(exposed))
    history = exposed.histories(rows, config.history_length)
    real = history >= 0
    count = real.sum(axis=1)
    mean = np.zeros((len(exposed), features.shape[1]), dtype=np.float32)
    for column in range(history.shape[1]):
        at = real[:, column]
        mean[at] += features[history[at, column]]
    mean /= np.maximum(count, 1)[:, None]
    own = features[np.maximum(exposed.items, 0)]
    length = np.broadcast_to(np.log1p(count)[:, None, None], (*own.shape[:2], 1))
    return np.concatenate([own, own * mean[:, None], length], axis=2).astype(np.float32)


def save_reward(result: RewardResult, folder: Path) -> None:
    """Writes model/, judge/ and metrics.json into `folder`."""
    import json

    from onerec.files import atomic_write

    result.model.save_pretrained(folder / "model")
    if result.judge is not None:
        result.judge.save_pretrained(folder / "judge")
    with atomic_write(folder / "metrics.json") as temporary:
        temporary.write_text(
            json.dumps(result.metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
