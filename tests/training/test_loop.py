"""The training loop: what it learns, what it writes, and how it goes on after any end."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from onerec.errors import DataError, OneRecError
from onerec.model import OneRec
from onerec.training import (
    OrderedBatches,
    TrainConfig,
    TrainingDiverged,
    TrainingInterrupted,
    pretrain,
    read_metrics,
)
from onerec.training.metrics import MetricsLog

JOB = Path(__file__).with_name("train_job.py")
_spec = importlib.util.spec_from_file_location("train_job", JOB)
assert _spec
assert _spec.loader
job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(job)

TIMES = ("tokens_per_s", "data_share", "seconds")


def metrics(out_dir: Path) -> list[dict[str, Any]]:
    """The records of a run without what the clock decides."""
    records = read_metrics(out_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def weights(out_dir: Path) -> dict[str, bytes]:
    saved = load_file(out_dir / "model" / "model.safetensors")
    return {name: value.numpy().tobytes() for name, value in saved.items()}


def assert_same_run(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    assert weights(a) == weights(b)


def spawn(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    out_dir = tmp_path_factory.mktemp("whole")
    job.run(out_dir)
    return out_dir


def test_it_learns_and_writes_everything(tmp_path: Path):
    result = job.run(
        tmp_path,
        steps=110,
        lr=2e-2,
        batch_size=32,
        dropout=0.0,
        eval_every=50,
        checkpoint_every=0,
    )
    records = read_metrics(tmp_path / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    valid = [record for record in records if record["kind"] == "valid"]
    assert [record["step"] for record in train] == [*range(7, 110, 7), 110]
    assert [record["step"] for record in valid] == [50, 100, 110]
    # Guessing codes costs 3 log 8 = 6.24 nats an item, knowing the catalogue alone log 60 = 4.09.
    assert train[0]["loss"] > 5.5
    assert valid[-1]["loss"] < 3.8
    for record in train:
        assert sum(record["loss_per_level"]) == pytest.approx(record["loss"], rel=1e-5)
        for layer in record["router_load"]:
            assert sum(layer) == pytest.approx(1)
        assert all(0 <= value <= 1 for value in record["router_load_entropy"])
        assert all(0 <= value <= math.log(4) + 1e-6 for value in record["router_entropy"])
        assert record["tokens_per_s"] > 0
        assert 0 < record["data_share"] < 1
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000110"]
    assert result.steps == 110
    assert result.resumed_from == 0
    best = min(valid, key=lambda record: record["loss"])
    assert (result.selected_step, result.valid_loss) == (best["step"], best["loss"])


def test_the_result_holds_the_best_weights(tmp_path: Path):
    # A rate that overfits: the best validation loss comes before the end.
    result = job.run(tmp_path, steps=150, lr=3e-2, dropout=0.0, eval_every=10, batch_size=64)
    valid = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "valid"]
    assert result.selected_step < 150
    assert result.valid_loss == min(r["loss"] for r in valid) < valid[-1]["loss"]
    assert [r["step"] for r in valid if r["best"]][-1] == result.selected_step

    model = OneRec.from_pretrained(result.model_dir)
    batches = OrderedBatches(
        job.make_samples(50, 2),
        job.make_sids(),
        history_length=10,
        session_length=4,
        batch_size=64,
    )
    with torch.no_grad():
        losses = [
            (model(batch.history, batch.target).loss.item(), batch.items) for batch in batches
        ]
    total = sum(loss * items for loss, items in losses) / sum(items for _, items in losses)
    assert total == pytest.approx(result.valid_loss, rel=1e-5)


def test_select_last(tmp_path: Path):
    result = job.run(tmp_path, steps=60, lr=3e-2, eval_every=5, select="last")
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (result.selected_step, result.valid_loss) == (60, last["loss"])
    saved = load_file(tmp_path / "checkpoints" / "step_00000060" / "model.safetensors")
    model = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], model[name]) for name in model)


def test_the_model_is_left_with_the_selected_weights_and_threads_as_before(tmp_path: Path):
    model, threads = job.make_model(), torch.get_num_threads()
    config = TrainConfig(steps=5, batch_size=16, num_threads=1)
    result = pretrain(model, job.make_samples(90, 1), None, job.make_sids(), config, tmp_path)
    assert result.valid_loss is None
    assert torch.get_num_threads() == threads
    assert not model.training
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    # accelerate's wrapper is gone.
    assert "forward" not in vars(model)


@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path, micro: int):
    one = job.run(tmp_path / "one", dropout=0.0)
    many = job.run(tmp_path / "many", dropout=0.0, grad_accumulation=micro)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("router_load") == b.get("router_load")
    a, b = (load_file(r.model_dir / "model.safetensors") for r in (one, many))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("step", [1, 13, 19, 38])
def test_ctrl_c_saves_and_goes_on_exactly(tmp_path: Path, whole: Path, step: int):
    def press(done: int, total: int, note: str) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=f"SIGINT after step {step + 1} of 40") as info:
        job.run(tmp_path, progress=press)
    assert str(tmp_path / "checkpoints") in str(info.value)
    assert signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / "model").exists()
    result = job.run(tmp_path)
    assert result.resumed_from == step + 1
    assert_same_run(tmp_path, whole)


def test_sigkill_goes_on_exactly(tmp_path: Path, whole: Path):
    for step in (4, 27):
        done = spawn(str(JOB), str(tmp_path), "{}", f"kill={step}")
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "model").exists()
    # Cut the last record as a kill in mid-write would.
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert job.run(tmp_path).resumed_from == 20
    assert_same_run(tmp_path, whole)


def test_sigkill_while_a_checkpoint_is_written(tmp_path: Path, whole: Path):
    script = f"""
import os, signal, sys
sys.argv = ["job", {str(tmp_path)!r}, "{{}}"]
from onerec.training import checkpoint
written = checkpoint._write_manifest
def kill(folder, manifest):
    if manifest["step"] == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    written(folder, manifest)
checkpoint._write_manifest = kill
exec(open({str(JOB)!r}).read())
"""
    done = spawn("-c", script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"step_00000010", "step_00000020", ".step_00000030"} <= names
    assert job.run(tmp_path).resumed_from == 20
    assert_same_run(tmp_path, whole)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_finished_run_is_not_trained_again(tmp_path: Path):
    first = job.run(tmp_path)
    before = metrics(tmp_path), weights(tmp_path)
    again = job.run(tmp_path)
    assert again.resumed_from == again.steps == 40
    assert (again.valid_loss, again.selected_step) == (first.valid_loss, first.selected_step)
    assert (metrics(tmp_path), weights(tmp_path)) == before


def stop_at(step: int) -> Any:
    def progress(done: int, total: int, note: str) -> None:
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    return progress


@pytest.mark.parametrize("harm", ["cut", "changed", "missing", "manifest"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    tmp_path: Path, whole: Path, harm: str, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(TrainingInterrupted):
        job.run(tmp_path, progress=stop_at(34))
    newest = tmp_path / "checkpoints" / "step_00000035"
    file = newest / ("trainer.json" if harm == "manifest" else "optimizer.bin")
    data = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        result = job.run(tmp_path)
    assert result.resumed_from == 30
    assert str(file) in caplog.text
    assert "going back to the checkpoint of step 30" in caplog.text
    assert_same_run(tmp_path, whole)


def test_all_checkpoints_damaged_is_an_error(tmp_path: Path):
    job.run(tmp_path)
    for path in (tmp_path / "checkpoints").glob("step_*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"every checkpoint .* damaged; remove the folder") as info:
        job.run(tmp_path)
    assert "wanted" in str(info.value)
    assert "got 0" in str(info.value)


def test_another_run_in_the_folder_is_refused(tmp_path: Path):
    job.run(tmp_path, steps=10)
    before = weights(tmp_path)
    with pytest.raises(OneRecError, match=r"belongs to another run \(config.lr: 0.001 there, 0.01"):
        job.run(tmp_path, steps=10, lr=1e-2)
    config = TrainConfig(steps=10, batch_size=16, lr=1e-3, eval_every=12, num_threads=1)
    with pytest.raises(OneRecError, match=r"another run \(train: "):
        pretrain(
            job.make_model(),
            job.make_samples(201, 1),
            job.make_samples(50, 2),
            job.make_sids(),
            config,
            tmp_path,
        )
    assert weights(tmp_path) == before


def test_logging_settings_may_change_on_resume(tmp_path: Path, whole: Path):
    with pytest.raises(TrainingInterrupted):
        job.run(tmp_path, progress=stop_at(15))
    assert job.run(tmp_path, keep=1, checkpoint_every=11, log_every=1).resumed_from == 16
    assert weights(tmp_path) == weights(whole)
    steps = [r["step"] for r in metrics(tmp_path) if r["kind"] == "train"]
    assert steps == [7, 14, *range(17, 41)]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, whole: Path):
    done = spawn(str(JOB), str(tmp_path), "{}", "full=25")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("onerec.errors.OneRecError: could not write the checkpoint of step 30")
    assert "run the same command again" in last
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"step_00000010", "step_00000020"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert job.run(tmp_path).resumed_from == 20
    assert_same_run(tmp_path, whole)


def test_metrics_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch: Any):
    def full(log: MetricsLog, record: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(OneRecError, match=r"could not write .*metrics\.jsonl: .*No space left"):
        job.run(tmp_path)


@pytest.mark.parametrize("step", [5, 25])
def test_nan_stops_and_names_the_step(tmp_path: Path, step: int, monkeypatch: Any):
    forward = OneRec.forward
    calls = 0

    def poisoned(self: OneRec, history: torch.Tensor, target: torch.Tensor) -> Any:
        nonlocal calls
        output = forward(self, history, target)
        if self.training:
            calls += 1
            if calls == step:
                return output._replace(loss=output.loss * math.nan)
        return output

    monkeypatch.setattr(OneRec, "forward", poisoned)
    with pytest.raises(TrainingDiverged, match=f"loss became nan at step {step} "):
        job.run(tmp_path)
    for path in (tmp_path / "checkpoints").glob("step_*/model.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values())
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path: Path):
    overrides = {"dropout": 0.0, "grad_accumulation": 2, "steps": 25, "lr": 1e-2}
    job.run(tmp_path / "one", **overrides)
    done = spawn(
        *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
        *(str(JOB), str(tmp_path / "two"), json.dumps(overrides)),
    )
    assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 7
    for a, b in zip(one, two, strict=True):
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["loss_per_level"] == pytest.approx(b["loss_per_level"], rel=1e-4)
        if a["kind"] == "train":
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
            assert np.allclose(a["router_load"], b["router_load"], atol=1e-3)
            assert a["router_entropy"] == pytest.approx(b["router_entropy"], rel=1e-3)
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_two_processes_go_on_after_a_kill(tmp_path: Path):
    def run(name: str, *actions: str) -> int:
        settings = '{"steps": 24}'
        return spawn(str(JOB), str(tmp_path / name), settings, "together=2", *actions).returncode

    assert run("whole") == 0
    assert run("cut", "kill=14") == 1
    assert not (tmp_path / "cut" / "model").exists()
    assert (tmp_path / "cut" / "checkpoints" / "step_00000010").exists()
    assert run("cut") == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_bfloat16_stays_near_float32(tmp_path: Path):
    job.run(tmp_path / "float32", dropout=0.0)
    job.run(tmp_path / "bfloat16", dropout=0.0, mixed_precision="bf16")
    pairs = list(zip(metrics(tmp_path / "float32"), metrics(tmp_path / "bfloat16"), strict=True))
    assert all(a["loss"] == pytest.approx(b["loss"], rel=2e-2) for a, b in pairs)
    assert any(a["loss"] != b["loss"] for a, b in pairs)
    # The weights and their sums stay in float32.
    saved = load_file(tmp_path / "bfloat16" / "model" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_only_matrices_decay():
    from onerec.training.loop import _optimizer

    model = job.make_model()
    decayed, rest = (
        {id(p) for p in group["params"]}
        for group in _optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    )
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert len(decayed) + len(rest) == len(list(model.parameters()))
    assert "encoder.0.ffn.w13.weight" in names
    assert "decoder.1.ffn.w13" in names
    for name in (
        "codes.weight",
        "age.weight",
        "time.weight",
        "start",
        "bos",
        "encoder_norm.weight",
    ):
        assert name not in names
    assert not [name for name in names if "norm" in name]


def test_the_order_of_samples_follows_the_seed(tmp_path: Path):
    job.run(tmp_path / "a", steps=5, seed=1)
    job.run(tmp_path / "b", steps=5, seed=2)
    assert metrics(tmp_path / "a") != metrics(tmp_path / "b")


def test_tensorboard_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OneRecError, match=r"pip install 'onerec\[tensorboard\]'"):
        job.run(tmp_path, tensorboard=True)


def test_cuda_that_is_not_there(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no CUDA device"):
        job.run(tmp_path, device="cuda")


def test_a_batch_that_cannot_be_shared_out(tmp_path: Path):
    with pytest.raises(ValueError, match=r"batch_size: wanted a multiple of .* 3 x 1, got 16"):
        job.run(tmp_path, grad_accumulation=3)


def test_tensorboard_gets_what_the_records_hold(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job.run(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {e.step: e.value for e in events.Scalars("train/loss")}
    records = [r for r in metrics(tmp_path) if r["kind"] == "train"]
    assert losses == pytest.approx({r["step"]: r["loss"] for r in records})
