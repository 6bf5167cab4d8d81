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
        self.width = levels + 1
        self.last_loss = math.nan
        self.valid_loss: float | None = None
        self._losses: list[torch.Tensor] = []
        self._steps: list[dict[str, Any]] = []
        self._sums: dict[str, Any] = {}
        self._clear()

    def _clear(self) -> None:
        self._sums = {
            "steps": 0,
            "items": 0,
            "tokens": 0,
            "losses": [0.0] * self.width,
            "norm": 0.0,
            "counts": None,
            "seconds": 0.0,
            "data_seconds": 0.0,
            "lr": 0.0,
            "epoch": 0.0,
        }

    def add_loss(
        self, loss: torch.Tensor, per_level: torch.Tensor, items: int, *, new: bool
    ) -> None:
        """Adds one micro-batch of this process; `new` begins a step."""
        sums = torch.cat([loss.detach()[None], per_level.detach()]).double() * items
        if new:
            self._losses.append(sums)
        else:
            self._losses[-1] += sums

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
        losses = self.accelerator.reduce(torch.stack(self._losses), "sum").tolist()
        norms = torch.stack([step["norm"] for step in self._steps]).tolist()
        sums = self._sums
        for values, loss, norm in zip(self._steps, losses, norms, strict=True):
            self.last_loss = loss[0] / values["items"]
            for name, value in (("loss", self.last_loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise TrainingDiverged(
                        f"the {name} became {value} at step {values['step']} (learning rate "
                        f"{values['lr']:.3g}). Earlier checkpoints are whole; a lower lr, a longer "
                        "warmup or a smaller grad_clip usually helps, in a new folder."
                    )
            sums["steps"] += 1
            sums["losses"] = [a + b for a, b in zip(sums["losses"], loss, strict=True)]
            sums["norm"] += norm
            for name in ("items", "tokens", "seconds", "data_seconds"):
                sums[name] += values[name]
            sums["lr"], sums["epoch"] = values["lr"], values["epoch"]
            if values["counts"] is not None:
                counts = values["counts"].double().cpu()
                sums["counts"] = counts if sums["counts"] is None else sums["counts"] + counts
        self._losses.clear()
        self._steps.clear()

    def record(self, step: int, seconds: float) -> Record:
        """The record of the steps since the last one; begins a new window."""
        sums = self._sums
        loss, *levels = (value / sums["items"] for value in sums["losses"])
        record: Record = {
            "kind": "train",
            "step": step,
            "epoch": sums["epoch"],
            "loss": loss,
            "loss_per_level": levels,
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
        self._clear()
        return record

    def state(self) -> dict[str, Any]:
        counts = self._sums["counts"]
        sums = {**self._sums, "counts": None if counts is None else counts.tolist()}
        return {"sums": sums, "valid_loss": self.valid_loss}

    def restore(self, state: dict[str, Any]) -> None:
        counts = state["sums"]["counts"]
        self._sums = {
            **state["sums"],
            "counts": None if counts is None else torch.tensor(counts, dtype=torch.float64),
        }
        self.valid_loss = state["valid_loss"]
