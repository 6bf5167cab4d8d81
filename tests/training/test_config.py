"""Training settings: checks and the learning rate."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from onerec.training import TrainConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("steps", 0),
        ("keep", 0),
        ("eval_every", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("epochs", float("inf")),
        ("warmup", 1.5),
        ("beta2", 1.0),
        ("grad_clip", -1.0),
        ("mixed_precision", "fp16"),
        ("device", "tpu"),
        ("select", "first"),
        ("num_threads", 0),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any):
    with pytest.raises(ValueError, match=f"^{name}: wanted .*, got {value!r}"):
        TrainConfig(**{name: value})


def test_learning_rate():
    config = TrainConfig(lr=2.0, warmup=0.1, min_lr=0.25)
    rates = [config.learning_rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.5 < rates[-1] < 0.502


def test_learning_rate_without_warmup():
    config = TrainConfig(lr=1.0, warmup=0.0)
    assert config.learning_rate(0, 1) == 1.0
    assert TrainConfig(lr=1.0, warmup=1.0).learning_rate(9, 10) == 1.0


def test_the_settings_load_no_torch():
    code = "import sys, onerec.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_few_samples_take_the_least_number_of_steps() -> None:
    config = TrainConfig(epochs=2, min_steps=50, max_steps=70)
    assert [config.total_steps(per_epoch) for per_epoch in (5, 30, 100)] == [50, 60, 70]
    assert TrainConfig(steps=3, min_steps=50).total_steps(5) == 3
