"""Next-token pretraining of the generator: the first stage of OneRec (arXiv 2502.18965, eq. 4)."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from safetensors.torch import load_model, save_model
from torch import nn

from onerec.errors import Interrupted, OneRecError
from onerec.files import atomic_directory, atomic_write
from onerec.progress import Progress
from onerec.training.batches import (
    Batch,
    OrderedBatches,
    PrefixBatches,
    SessionBatches,
    fingerprint,
)
from onerec.training.checkpoint import CheckpointStore
from onerec.training.config import FREE_ON_RESUME, TrainConfig
from onerec.training.metrics import MetricsLog, Record
from onerec.training.window import TrainingDiverged, Window

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from onerec.data.session_set import Samples
    from onerec.model.output import OneRecOutput

logger = logging.getLogger(__name__)

_IMPROVING = 0.02  # gain of the last validation from which more steps would help


class TrainingInterrupted(Interrupted):
    """Ctrl-C or SIGTERM: a checkpoint is saved, and the same call goes on from it."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        model_dir: Folder of the selected weights, as `save_pretrained` writes it.
        steps: Optimizer steps of the whole run.
        selected_step: Step after which the selected weights were taken.
        valid_loss: Their validation loss, nats per item; None without validation samples.
        valid_score: What `score` gave for them; None without it.
        improving: Whether the last validation was the best by over 2 %: more steps would help.
        seconds: Time in the loop, over all parts of a run that was stopped in between.
        resumed_from: Step this call went on from; 0 for a fresh start.
    """

    model_dir: Path
    steps: int
    selected_step: int
    valid_loss: float | None
    valid_score: float | None
    improving: bool
    seconds: float
    resumed_from: int


class Trainable(Protocol):
    """What the loop asks of a network beside being a `torch.nn.Module`.

    Attributes:
        config: Has history_length and session_length.
        prefixes: Whether one pass supervises every prefix of a sequence (`PrefixBatches`).
        item_column: Whether it reads the item's index behind the codes.
    """

    config: Any

    @property
    def prefixes(self) -> bool: ...

    @property
    def item_column(self) -> bool: ...

    def __call__(self, history: torch.Tensor, target: torch.Tensor) -> OneRecOutput: ...


def pretrain(
    model: Trainable,
    train: Samples,
    valid: Samples | None,
    sids: npt.NDArray[np.integer],
    config: TrainConfig,
    out_dir: str | Path,
    *,
    score: Callable[[Any], float] | None = None,
    optimizer: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains `model` to write the next session, and leaves it holding the selected weights.

    Runs in one process, or in each process of `accelerate launch` / `torchrun`; the processes of a
    run share `out_dir`. A run that was stopped or killed goes on from its newest checkpoint when
    the same call is made again; on the CPU with the same number of threads and processes the
    final weights are then bit for bit those of a run that was never stopped.

    Loss and gradient are means over the target items of the whole step, so they do not depend on
    how the step is split into micro-batches and processes. Seeds torch's global generator at every
    micro-batch.

    Args:
        model: What is trained; moved to the training device.
        train: Training samples.
        valid: Validation samples; None, or an empty set, trains without validation.
        sids: int [N, L], semantic id of every item index.
        config: Settings.
        out_dir: Gets model/ (the selected weights), metrics.jsonl and checkpoints/.
        score: Called as `score(model)` at each validation, the model in evaluation mode, alike in
            every process; "best" is then the greatest score instead of the lowest loss.
        optimizer: State of the optimizer that trained these weights before
            (`checkpoint.optimizer_state`), to go on from. Rows that its tables lack begin with
            none.
        progress: Called in the main process as `progress(steps done, all steps, note)`.

    Returns:
        Where the weights are and how the run went.

    Raises:
        ValueError: On settings or samples that do not fit together.
        DataError: Where every checkpoint in `out_dir` is damaged.
        TrainingInterrupted: After Ctrl-C or SIGTERM, once a checkpoint is saved.
        TrainingDiverged: On a loss or gradient that is not finite, naming the step.
        OneRecError: Where `out_dir` holds another run, or cannot be written to.
    """
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(config.num_threads or threads)
        run = Run(
            model, train, valid, sids, config, Path(out_dir), stack, score=score, warm=optimizer
        )
        stop = stack.enter_context(stop_on_signal())
        run.loop(stop, progress)
        return run.publish()


class Run:
    """The state of one call of `pretrain`; preference alignment extends it.

    Arguments as for `pretrain`, and:

    Args:
        stack: Undoes at its end what the run changes around itself.
        identity: What else must be equal for a checkpoint to be gone on from, as JSON values.
        warm: `optimizer` of `pretrain`.
    """

    def __init__(
        self,
        model: Any,
        train: Samples,
        valid: Samples | None,
        sids: npt.NDArray[np.integer],
        config: TrainConfig,
        out_dir: Path,
        stack: ExitStack,
        identity: dict[str, Any] | None = None,
        score: Callable[[Any], float] | None = None,
        warm: dict[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.score = score
        self.out_dir = out_dir
        self.accelerator = accelerator = _accelerator(config)
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        self.main: bool = accelerator.is_main_process
        self.world: int = accelerator.num_processes
        shape = model.config
        sharing: dict[str, Any] = {
            "history_length": shape.history_length,
            "session_length": shape.session_length,
            "item_column": model.item_column,
            "rank": accelerator.process_index,
            "world_size": self.world,
        }
        self.batches = (PrefixBatches if model.prefixes else SessionBatches)(
            train,
            sids,
            batch_size=config.batch_size,
            micro_batches=config.grad_accumulation,
            seed=config.seed,
            bucket_batches=config.bucket_batches,
            **sharing,
        )
        self.total = config.total_steps(self.batches.steps_per_epoch)
        self.valid: OrderedBatches | None = None
        if valid is not None and len(valid):
            per_call = self.batches.batch_size // (config.grad_accumulation * self.world)
            self.valid = OrderedBatches(valid, sids, batch_size=per_call, **sharing)
        self.identity = {
            "config": {
                name: value
                for name, value in dataclasses.asdict(config).items()
                if name not in FREE_ON_RESUME
            },
            "steps": self.total,
            "precision": accelerator.mixed_precision,
            "train": fingerprint(train, sids),
            "valid": fingerprint(valid, sids) if self.valid is not None and valid else None,
            "model": _shapes(model),
            **(identity or {}),
        }

        self.step = 0
        self.resumed_from = 0
        self.seconds = 0.0
        # What is lowest at the best step (loss, or minus the score), the step, its loss.
        self.best: tuple[float, int, float] | None = None
        self.gain = 0.0  # of the best validation over the best before it, as a share
        self.window = Window(accelerator, sids.shape[1])
        self.model, self.optimizer = accelerator.prepare(model, _optimizer(model, config))
        if warm is not None:
            self.optimizer.load_state_dict(_grown(warm, self.optimizer.param_groups))
        self.module: Any = accelerator.unwrap_model(self.model)
        stack.callback(accelerator.unwrap_model, self.model, keep_fp32_wrapper=False)
        self.store = CheckpointStore(
            out_dir / "checkpoints", config.keep, self.main, accelerator.wait_for_everyone
        )
        self._restore()
        self.metrics: MetricsLog | None = None
        self.events: SummaryWriter | None = None
        if self.main:
            self.metrics = MetricsLog(out_dir / "metrics.jsonl", self.step)
            stack.callback(self.metrics.close)
            if config.tensorboard:
                self.events = _summary_writer(out_dir / "tensorboard", self.step)
                stack.callback(self.events.close)

    def loop(self, stop: list[str], progress: Progress | None) -> None:
        """Steps until the end, or until `stop` holds the name of a signal."""
        config = self.config
        started = time.perf_counter() - self.seconds
        # On one CPU process, reading the loss costs nothing; elsewhere it waits for the device.
        settle_every = 1 if self.world == 1 and self.accelerator.device.type == "cpu" else None
        self.model.train()
        while self._more():
            self._train_step()
            step = self.step
            last = step == self.total
            log = step % config.log_every == 0 or last
            evaluate = last or bool(config.eval_every and step % config.eval_every == 0)
            save = last or bool(config.checkpoint_every and step % config.checkpoint_every == 0)
            stopped = ""
            if log or evaluate or save or settle_every:
                self.window.settle()
                stopped = self._agree(stop)
            self.seconds = time.perf_counter() - started
            if log:
                self._record(self.window.record(step, self.seconds))
            if evaluate and self.valid is not None:
                self._validate(self.valid)
            if save or stopped:
                self._save()
            if progress and self.main and (step % max(1, self.total // 100) == 0 or last):
                progress(step, self.total, f"loss {self.window.last_loss:.3f}")
            if stopped and not last:
                raise TrainingInterrupted(
                    f"stopped by {stopped} after step {step} of {self.total}; the checkpoint is in "
                    f"{self.store.path(step)}. The same command goes on from there."
                )

    def publish(self) -> TrainResult:
        """Takes the selected weights into the model and writes them to model/."""
        selected, valid_loss, valid_score = self.total, None, None
        if self.best is not None and self.config.select == "best":
            lowest, selected, valid_loss = self.best
            valid_score = None if self.score is None else -lowest
            load_model(self.module, self.store.best_path(selected))
        elif self.valid is not None:
            valid_loss = self.window.valid_loss
        model_dir = self.out_dir / "model"
        module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        module.eval()
        if self.main:
            with writing(model_dir), atomic_directory(model_dir) as folder:
                module.save_pretrained(folder)
        self.accelerator.wait_for_everyone()
        return TrainResult(
            model_dir,
            self.total,
            selected,
            valid_loss,
            valid_score,
            selected == self.total and self.gain > _IMPROVING,
            self.seconds,
            self.resumed_from,
        )

    def _more(self) -> bool:
        """Whether there is another step to take."""
        return self.step < self.total

    def _train_step(self) -> None:
        began = time.perf_counter()
        config, accelerator, window = self.config, self.accelerator, self.window
        lr = config.learning_rate(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        items = self.batches.step_items(self.step)
        data_seconds = time.perf_counter() - began
        counts = None
        for micro in range(config.grad_accumulation):
            fetched = time.perf_counter()
            batch = _to(self.batches.batch(self.step, micro), accelerator.device)
            data_seconds += time.perf_counter() - fetched
            _seed(config.seed, self.step, micro, accelerator.process_index)
            final = micro == config.grad_accumulation - 1
            with nullcontext() if final else accelerator.no_sync(self.model):
                output = self.model(batch.history, batch.target)
                # DDP takes the mean of the gradients over processes; this makes it the mean over
                # the items of the whole step.
                loss = output.loss * (batch.items * self.world / items)
                extra = self._extra_loss(self.batches.share(self.step, micro))
                accelerator.backward(loss if extra is None else loss + extra)
            means = [output.loss[None], output.loss_per_level]
            if output.router is not None:
                routed = output.router.counts
                counts = routed if counts is None else counts + routed
                means.append(output.router.entropy)
            window.add_means(torch.cat(means), batch.items, new=micro == 0)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if counts is not None:
            counts = accelerator.reduce(counts, "sum")
            self.module.update_router_bias(counts)
        self.step += 1
        window.add_step(
            self.step,
            items=items,
            tokens=self.batches.step_tokens(self.step - 1),
            lr=lr,
            epoch=self.step / self.batches.steps_per_epoch,
            norm=norm,
            counts=counts,
            data_seconds=data_seconds,
            seconds=time.perf_counter() - began,
        )

    def _extra_loss(self, rows: npt.NDArray[np.int64]) -> torch.Tensor | None:
        """What is added to the loss for these samples, of which the micro-batch is made."""
        return None

    @torch.no_grad()
    def _validate(self, valid: OrderedBatches) -> None:
        self.module.eval()
        sums = torch.zeros(self.window.levels + 2, dtype=torch.float64)
        for index in range(len(valid)):
            batch = _to(valid[index], self.accelerator.device)
            output = self.module(batch.history, batch.target)
            losses = torch.stack([output.loss, *output.loss_per_level]).double().cpu()
            sums += torch.cat([losses * batch.items, torch.tensor([float(batch.items)])])
        score = None if self.score is None else self.score(self.module)
        self.module.train()
        sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum")
        loss, *levels = (sums[:-1] / sums[-1]).tolist()
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the validation loss became {loss} after step {self.step}")
        self.window.valid_loss = loss
        lowest = loss if score is None else -score
        better = self.best is None or lowest < self.best[0]
        record = {
            "kind": "valid",
            "step": self.step,
            "loss": loss,
            "loss_per_level": levels,
            "best": better,
        }
        self._record(record if score is None else {**record, "score": score})
        self._tell("step %d of %d: validation loss %.4f", self.step, self.total, loss)
        if better:
            self.gain = abs(1 - lowest / self.best[0]) if self.best and self.best[0] else 0.0
            self.best = lowest, self.step, loss
            if self.main:
                path = self.store.best_path(self.step)
                with writing(path), atomic_write(path) as temporary:
                    save_model(self.module, str(temporary))

    def _record(self, record: Record) -> None:
        if self.metrics is not None:
            with writing(self.out_dir / "metrics.jsonl"):
                self.metrics.write(record)
        if self.events is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self.events.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def _save(self) -> None:
        if self.metrics is not None:
            with writing(self.out_dir / "metrics.jsonl"):
                self.metrics.sync()
        state = {
            "identity": self.identity,
            "best": self.best,
            "best_step": self.best and self.best[1],
            "window": self.window.state(),
            "seconds": self.seconds,
            "threads": torch.get_num_threads(),
            "processes": self.world,
        }
        self.store.save(self.step, state, self.accelerator.save_state)
        self._tell("step %d of %d: checkpoint saved", self.step, self.total)

    def _restore(self) -> None:
        """Goes on from the newest whole checkpoint, in every process from the same one."""
        found: list[Any] = [None]
        if self.main:
            try:
                found = [self.store.newest()]
            except OneRecError as problem:
                found = [problem]
        found = broadcast_object_list(found)
        if isinstance(found[0], OneRecError):
            raise found[0]
        if found[0] is None:
            return
        step, state = found[0]
        path = self.store.path(step)
        # JSON makes lists of tuples on both sides.
        differences = _differences(state["identity"], json.loads(json.dumps(self.identity)))
        if differences:
            raise OneRecError(
                f"{path} belongs to another run ({'; '.join(differences)}): take another folder, "
                "or remove this one to train from the start"
            )
        for name, here in (("threads", torch.get_num_threads()), ("processes", self.world)):
            if state[name] != here:
                logger.warning(
                    "%s: %d when the checkpoint was written, %d now; the weights will differ in "
                    "the last bits from those of a run that was not stopped",
                    name,
                    state[name],
                    here,
                )
        self.accelerator.load_state(str(path))
        self.step = self.resumed_from = step
        self.seconds = state["seconds"]
        self.window.restore(state["window"])
        if state["best"] is not None:
            lowest, best_step, loss = state["best"]
            self.best = lowest, best_step, loss
        self._tell("going on from step %d of %d (%s)", step, self.total, path)

    def _tell(self, message: str, *values: object) -> None:
        if self.main:
            logger.info(message, *values)

    def _agree(self, stop: list[str]) -> str:
        """The signal that any process has received, "" for none; the same in every process."""
        if self.world == 1:
            return stop[0] if stop else ""
        flag = torch.tensor(float(bool(stop)), device=self.accelerator.device)
        stopped = self.accelerator.reduce(flag, "sum").item()
        return (stop[0] if stop else "a signal to another process") if stopped else ""


def _accelerator(config: TrainConfig) -> Accelerator:
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ValueError("device is 'cuda', but torch sees no CUDA device; wanted 'auto' or 'cpu'")
    on_cpu = config.device == "cpu" or not has_cuda
    precision = config.mixed_precision
    if precision == "auto":
        precision = "no" if on_cpu else "bf16"
    return Accelerator(
        cpu=on_cpu,
        mixed_precision=precision,
        # Each process keeps its own buffers: the router bias is updated alike in all of them.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no embeddings, norms, biases and other vectors."""
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p.ndim >= 2 and id(p) not in tables for p in trained]
    return torch.optim.AdamW(
        [
            {
                "params": [p for p, d in zip(trained, decayed, strict=True) if d],
                "weight_decay": config.weight_decay,
            },
            {
                "params": [p for p, d in zip(trained, decayed, strict=True) if not d],
                "weight_decay": 0.0,
            },
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def _grown(state: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state with rows of zeros for those that tables have more now."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    if len(parameters) != sum(len(group["params"]) for group in state["param_groups"]):
        raise ValueError("optimizer: wanted the state of a network with the same weights")
    grown = {}
    for at, values in state["state"].items():
        grown[at] = dict(values)
        for name, value in values.items():
            more = parameters[at].shape[0] - value.shape[0] if value.dim() else 0
            if more > 0:
                grown[at][name] = torch.cat([value, value.new_zeros(more, *value.shape[1:])])
    return {**state, "state": grown}


def _seed(seed: int, step: int, micro: int, rank: int) -> None:
    state = np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def _to(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    history, target = (tensor.pin_memory().to(device, non_blocking=True) for tensor in batch[:2])
    return Batch(history, target, batch.items)


def _shapes(model: nn.Module) -> str:
    """A short checksum of the names and shapes of all weights."""
    names = [f"{name} {list(value.shape)}" for name, value in model.state_dict().items()]
    return f"{zlib.crc32(chr(10).join(names).encode()):08x}"


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """What two nested settings differ in, as text."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        a, b = there.get(name), here.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a} there, {b} here")
    return found


def _summary_writer(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as problem:
        raise OneRecError(
            f"tensorboard is on, but cannot be imported ({problem}): pip install "
            "'onerec[tensorboard]'"
        ) from problem
    return SummaryWriter(str(folder), purge_step=step + 1)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write into one message that says what is safe."""
    try:
        yield
    # safetensors and torch raise errors of their own.
    except Exception as problem:
        raise OneRecError(
            f"could not write {path}: {problem}. Checkpoints are whole: make room and run the same "
            "command again to go on from the newest."
        ) from problem


@contextmanager
def stop_on_signal() -> Iterator[list[str]]:
    """Yields a list that gets the name of the first SIGINT or SIGTERM; a second acts as ever."""
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
