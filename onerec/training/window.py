"""Sums over the steps between two records of metrics.jsonl."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator

from onerec.errors import OneRecError
from onerec.training.metrics import Record


class TrainingDiverged(OneRecError):
    """The loss or the gradient is no finite number any more."""


class Window:
    """Sums over the steps since the last record.

    Losses of the newest steps stay on the device until `settle` brings them over.
    """

    def __init__(self, accelerator: Accelerator, levels: int) -> None:
        self.accelerator = accelerator
        self.levels = levels
        self.last_loss = math.nan
        self.valid_loss: float | None = None
        self._means: list[torch.Tensor] = []
        self._steps: list[dict[str, Any]] = []
        self._sums: dict[str, Any] = {}
        self._clear()

    @property
    def steps(self) -> int:
        """Settled steps since the last record."""
        return int(self._sums["steps"])

    def _clear(self) -> None:
        self._sums = {
            "steps": 0,
            "items": 0,
            "tokens": 0,
            "means": [],
            "norm": 0.0,
            "counts": None,
            "seconds": 0.0,
            "data_seconds": 0.0,
            "lr": 0.0,
            "epoch": 0.0,
        }

    def add_means(self, means: torch.Tensor, items: int, *, new: bool) -> None:
        """Adds one micro-batch of this process.

        Args:
            means: [1 + L + layers], loss, loss of each level, router entropy of each layer.
            items: What these are means over.
            new: Whether it begins a step.
        """
        sums = means.detach().double() * items
        if new:
            self._means.append(sums)
        else:
            self._means[-1] += sums

    def add_step(self, step: int, **values: Any) -> None:
        """Ends a step; values are of the global batch."""
        self._steps.append({"step": step, **values})

    def settle(self) -> None:
        """Brings the losses of all processes over.

        Raises:
            TrainingDiverged: Naming the first step with a loss or gradient norm that is not finite.
        """
        if not self._steps:
            return
        means = self.accelerator.reduce(torch.stack(self._means), "sum").tolist()
        norms = torch.stack([step["norm"] for step in self._steps]).tolist()
        sums = self._sums
        for values, row, norm in zip(self._steps, means, norms, strict=True):
            self.last_loss = row[0] / values["items"]
            for name, value in (("loss", self.last_loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise TrainingDiverged(
                        f"the {name} became {value} at step {values['step']} (learning rate "
                        f"{values['lr']:.3g}). Earlier checkpoints are whole; a lower lr, a longer "
                        "warmup or a smaller grad_clip usually helps, in a new folder."
                    )
            sums["steps"] += 1
            before = sums["means"] or [0.0] * len(row)
            sums["means"] = [a + b for a, b in zip(before, row, strict=True)]
            sums["norm"] += norm
            for name in ("items", "tokens", "seconds", "data_seconds"):
                sums[name] += values[name]
            sums["lr"], sums["epoch"] = values["lr"], values["epoch"]
            if values["counts"] is not None:
                counts = values["counts"].double().cpu()
                sums["counts"] = counts if sums["counts"] is None else sums["counts"] + counts
        self._means.clear()
        self._steps.clear()

    def record(self, step: int, seconds: float) -> Record:
        """The record of the steps since the last one; begins a new window."""
        sums = self._sums
        means = [value / sums["items"] for value in sums["means"]]
        record: Record = {
            "kind": "train",
            "step": step,
            "epoch": sums["epoch"],
            "loss": means[0],
            "loss_per_level": means[1 : self.levels + 1],
            "lr": sums["lr"],
            "grad_norm": sums["norm"] / sums["steps"],
            "tokens_per_s": sums["tokens"] / sums["seconds"],
            "data_share": sums["data_seconds"] / sums["seconds"],
            "seconds": seconds,
        }
        if sums["counts"] is not None:
            load = sums["counts"] / sums["counts"].sum(dim=1, keepdim=True)
            entropy = torch.special.entr(load).sum(dim=1) / math.log(max(2, load.shape[1]))
            record["router_load"] = load.tolist()
            record["router_load_entropy"] = entropy.tolist()
            record["router_entropy"] = means[self.levels + 1 :]
        self._clear()
        return record

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON; after `settle`."""
        counts = self._sums["counts"]
        sums = {**self._sums, "counts": None if counts is None else counts.tolist()}
        return {"sums": sums, "valid_loss": self.valid_loss}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self._sums = dict(state["sums"])
        if self._sums["counts"] is not None:
            self._sums["counts"] = torch.tensor(self._sums["counts"], dtype=torch.float64)
        self.valid_loss = state["valid_loss"]
