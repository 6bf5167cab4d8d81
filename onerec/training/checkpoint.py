"""Checkpoints that appear whole, are checked before use, and replace one another."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onerec.errors import DataError, OneRecError

logger = logging.getLogger(__name__)

MANIFEST = "trainer.json"
FORMAT = 1


class CheckpointStore:
    """The folder of a run's checkpoints.

    `step_00000200/` holds what `accelerate` saves (weights, optimizer, random states) and
    trainer.json: the trainer's own state and the size and CRC-32 of every file.
    `best_00000100.safetensors` holds the best weights so far, named by their step.

    Args:
        root: The folder; made when it does not exist.
        keep: Checkpoints that `prune` leaves.
        main: Whether this process publishes and removes; one of the run's processes does.
        barrier: Waits until every process of the run has come to the same call.
    """

    def __init__(self, root: Path, keep: int, main: bool, barrier: Callable[[], None]) -> None:
        self.root = root
        self.keep = keep
        self.main = main
        self.barrier = barrier
        if main:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(".step_*"):
                shutil.rmtree(leftover)
        barrier()

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, newest first."""
        found = (path.name.removeprefix("step_") for path in self.root.glob("step_*"))
        return sorted((int(name) for name in found if name.isdigit()), reverse=True)

    def path(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def best_path(self, step: int) -> Path:
        return self.root / f"best_{step:08d}.safetensors"

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Publishes a checkpoint: `write` fills a temporary folder, which is renamed at the end.

        Args:
            step: Optimizer steps done.
            state: The trainer's own state, as JSON.
            write: Called in every process with the folder.

        Raises:
            OneRecError: Where a file cannot be written; earlier checkpoints stay.
        """
        final = self.path(step)
        temporary = self.root / f".{final.name}"
        try:
            if self.main:
                temporary.mkdir()
            self.barrier()
            write(temporary)
            self.barrier()
            if self.main:
                _write_manifest(temporary, {"format": FORMAT, "step": step, "state": state})
                if final.exists():
                    shutil.rmtree(final)
                temporary.replace(final)
                _sync(self.root)
        except Exception as problem:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OneRecError(
                f"could not write the checkpoint of step {step} to {self.root}: {problem}. Earlier "
                "checkpoints are whole: make room and run the same command again to go on from the "
                "newest."
            ) from problem
        if self.main:
            self._prune()
        self.barrier()

    def _prune(self) -> None:
        steps = self.steps()
        for step in steps[self.keep :]:
            shutil.rmtree(self.path(step))
        needed = {read_state(self.path(step)).get("best_step") for step in steps[: self.keep]}
        for path in self.root.glob("best_*.safetensors"):
            if int(path.stem.removeprefix("best_")) not in needed:
                path.unlink()

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest whole checkpoint; None where there is none at all.

        A damaged one is told in the log as a warning and removed, and the one before it is taken: a
        run that goes on from there takes the same steps again. Called in one process only.

        Raises:
            DataError: Where every checkpoint is damaged; none is removed then.
        """
        problems: list[DataError] = []
        for step in self.steps():
            try:
                state = verify(self.path(step))
                best = state.get("best_step")
                if best is not None and not self.best_path(best).is_file():
                    raise DataError(f"{self.best_path(best)} is missing")
            except DataError as problem:
                problems.append(problem)
                continue
            for damage in problems:
                logger.warning("%s; going back to the checkpoint of step %d", damage, step)
            for newer in self.steps()[: len(problems)]:
                shutil.rmtree(self.path(newer))
            return step, state
        if problems:
            raise DataError(
                f"every checkpoint in {self.root} is damaged; remove the folder to train from the "
                f"start. {'; '.join(map(str, problems))}"
            )
        return None


def read_state(path: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint's manifest, after checking the manifest itself.

    Raises:
        DataError: Where trainer.json is missing, damaged or of another format.
    """
    return dict(_read_manifest(path)["state"])


def optimizer_state(root: Path) -> dict[str, Any] | None:
    """The optimizer's state in the newest whole checkpoint below a folder; None: there is none."""
    import torch

    store = CheckpointStore(root, 1, False, lambda: None)
    for step in store.steps():
        file = store.path(step) / "optimizer.bin"
        try:
            verify(store.path(step))
        except DataError:
            continue
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    return None


def verify(path: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest and returns the trainer's state.

    Raises:
        DataError: Naming the file that is missing, cut short or changed.
    """
    manifest = _read_manifest(path)
    for name, (size, checksum) in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise DataError(f"{file} is missing")
        if file.stat().st_size != size:
            raise DataError(f"{file}: wanted {size} bytes, got {file.stat().st_size}")
        if _checksum(file) != checksum:
            raise DataError(f"{file}: contents do not match the checksum in {MANIFEST}")
    return dict(manifest["state"])


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest["files"] = {
        str(path.relative_to(folder)): (path.stat().st_size, _checksum(path)) for path in files
    }
    body = json.dumps(manifest, sort_keys=True)
    (folder / MANIFEST).write_text(f"{body}\n{zlib.crc32(body.encode()):08x}\n", encoding="utf-8")
    for path in [*files, folder / MANIFEST, folder]:
        _sync(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        body, _, checksum = file.read_text(encoding="utf-8").partition("\n")
        if f"{zlib.crc32(body.encode()):08x}" != checksum.strip():
            raise DataError(f"{file}: contents do not match the checksum in its last line")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{file}: {problem}") from problem
    manifest: dict[str, Any] = json.loads(body)
    if manifest["format"] != FORMAT:
        raise DataError(f"{file}: wanted format {FORMAT}, got {manifest['format']}")
    return manifest


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sync(path: Path) -> None:
    """Brings a file's contents, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
