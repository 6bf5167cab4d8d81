"""Stages of a run: folders that appear whole, know what they were made from, and are made once.

A stage `DIR/NAME/` holds its outputs and `stage.json`: the fingerprint (configuration, inputs,
code) and the size and hash of every output. A stage with an equal fingerprint and whole outputs is
skipped. It is built in `DIR/.NAME.partial/` and renamed at the end, so that a failure at any moment
leaves the earlier result as it was.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onerec
from onerec.errors import OneRecError
from onerec.files import atomic_write, naming, recover_directory, replace_directory

# Larger files are known by their size, time of change and a sample of their blocks.
WHOLE_HASH_BYTES = 256 << 20
_BLOCK = 1 << 20

# In the order of the main job; each is `onerec.pipeline.NAME.make`.
STAGES = (
    "world",
    "sessions",
    "tokenize",
    "pretrain",
    "reward",
    "align",
    "mixture",
    "evaluate",
    "recommend",
    "report",
)


def digest(value: Any) -> str:
    """A short hash of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """A hash of a file's content; for a file over 256 MiB, of its size, time and 64 blocks."""
    size = path.stat().st_size
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_HASH_BYTES:
            while block := file.read(_BLOCK):
                state.update(block)
        else:
            state.update(f"{size} {path.stat().st_mtime_ns}".encode())
            for i in range(64):
                file.seek((size - _BLOCK) * i // 63)
                state.update(file.read(_BLOCK))
    return state.hexdigest()


def data_files(path: Path) -> list[Path]:
    """The files of a log: those below a folder, those of a glob, or the file itself with those
    beside it."""
    if path.is_file():
        path = path.parent
    if path.is_dir():
        files = [p for p in path.rglob("*") if not p.name.startswith(".")]
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True)]
    return sorted(p for p in files if p.is_file())


def data_digest(path: Path) -> str:
    """A hash of the names and contents of the files of a log, and of which of them it names."""
    root = path if path.is_dir() else path.parent
    named = [] if path.is_dir() else [path.name]
    files = data_files(path)
    return digest([[os.path.relpath(p, root), file_digest(p)] for p in files] + named)


def code_digest(parts: Sequence[str]) -> str:
    """A hash of the release and of the Python sources under `onerec/<part>` for each part."""
    root = Path(onerec.__file__).parent
    state = hashlib.blake2b(onerec.__version__.encode(), digest_size=16)
    for part in parts:
        base = root / part
        if not base.exists():
            raise FileNotFoundError(base)
        for path in [base] if base.is_file() else sorted(base.rglob("*.py")):
            state.update(str(path.relative_to(root)).encode())
            state.update(path.read_bytes())
    return state.hexdigest()


@dataclass
class StageRecord:
    """What `stage.json` holds.

    Attributes:
        stage: Name.
        fingerprint: Hash of `config`, `inputs` and `code`.
        version: Release of onerec that made it.
        code: Hash of the sources that made it.
        config: The settings it was made with.
        inputs: Name of each input -> fingerprint of that stage, or hash of that file.
        outputs: Path inside the stage -> {"bytes": size, "blake2b": hash}.
        seconds: Wall time of the build; of its last part if it was resumed.
        summary: Figures that the stage reports (rows, sizes, metrics).
    """

    stage: str
    fingerprint: str
    version: str
    code: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)


def read_record(folder: Path) -> StageRecord | None:
    """The record of a finished stage, or None if the folder holds none that can be read."""
    try:
        return StageRecord(**json.loads((folder / "stage.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def damage(folder: Path, record: StageRecord) -> str | None:
    """The first output that is not as `record` says, with the reason; None if all are whole."""
    for name, known in record.outputs.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        size = path.stat().st_size
        if size != known["bytes"]:
            return f"{path} has {size} bytes, not the {known['bytes']} that were written"
        if size <= WHOLE_HASH_BYTES and file_digest(path) != known["blake2b"]:
            return f"{path} has changed since it was written"
    return None


def require(directory: Path, name: str) -> StageRecord:
    """The record of a stage that another one reads.

    Raises:
        OneRecError: The stage has not been made, or is damaged; the message says what to run.
    """
    folder = directory / name
    recover_directory(folder)
    verb = "simulate" if name == "world" else name
    record = read_record(folder)
    if record is None:
        raise OneRecError(
            f"{folder} does not exist or holds no finished stage: "
            f"run `onerec {verb} --out {directory}` (or `onerec run`) first"
        )
    if problem := damage(folder, record):
        raise OneRecError(f"{problem}: make it again with `onerec {verb} --out {directory}`")
    return record


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: its record, and whether it was built now or found whole."""

    record: StageRecord
    skipped: bool


def run_stage(
    directory: Path,
    name: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    code: Sequence[str],
    build: Callable[[Path], dict[str, Any]],
    say: Callable[[str], None],
    resumable: bool = False,
    scratch: Sequence[str] = (),
) -> StageResult:
    """Makes the stage `directory/name`, or finds it made.

    Args:
        directory: The run's directory, which the caller has locked.
        name: Folder of the stage.
        config: Its settings as JSON values.
        inputs: Name of each input -> fingerprint or hash.
        code: Parts of the package (folders or files under `onerec/`) whose change makes it again.
        build: Fills the folder it is given and returns the summary.
        say: Takes one line for the user.
        resumable: Whether an unfinished build of the same fingerprint is handed to `build` again.
        scratch: Folders inside the stage that are not outputs.

    Raises:
        OneRecError: The folder exists and is not a stage.
        Exception: Whatever `build` raises; the earlier result is then still there.
    """
    folder, partial = directory / name, directory / f".{name}.partial"
    recover_directory(folder)
    wanted = _wanted(name, config, inputs, code)
    found = read_record(folder)
    if found is None and folder.exists():
        if not (folder / "stage.json").exists() and any(folder.iterdir()):
            raise OneRecError(
                f"{folder} was not made by onerec: move it away or give another --out"
            )
        say(f"{name}: {folder / 'stage.json'} cannot be read; making it again")
    if found is not None and found.fingerprint == wanted.fingerprint:
        problem = damage(folder, found)
        if problem is None:
            shutil.rmtree(partial, ignore_errors=True)
            say(f"{name}: unchanged, skipped")
            return StageResult(found, skipped=True)
        say(f"{name}: {problem}; making it again")
    elif found is not None:
        say(f"{name}: {_difference(found, wanted)} changed, making it again")

    started = partial / "started.json"
    same = started.is_file() and started.read_text(encoding="utf-8") == wanted.fingerprint
    if not (resumable and same):
        shutil.rmtree(partial, ignore_errors=True)
    begin = time.monotonic()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if resumable:
            started.write_text(wanted.fingerprint, encoding="utf-8")
        with naming(folder):
            wanted.summary = build(partial)
        started.unlink(missing_ok=True)
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            relative = path.relative_to(partial)
            if relative.parts[0] not in scratch:
                wanted.outputs[str(relative)] = {
                    "bytes": path.stat().st_size,
                    "blake2b": file_digest(path),
                }
        wanted.seconds = round(time.monotonic() - begin, 3)
        (partial / "stage.json").write_text(
            json.dumps(asdict(wanted), indent=1) + "\n", encoding="utf-8"
        )
        replace_directory(partial, folder)
    except BaseException:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    say(f"{name}: done in {wanted.seconds:.1f} s")
    return StageResult(wanted, skipped=False)


def rank() -> int:
    """This process among those of `torchrun` or `accelerate launch`; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def join_stage(
    directory: Path,
    name: str,
    *,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    code: Sequence[str],
    build: Callable[[Path], dict[str, Any]],
    patience: float = 600.0,
) -> None:
    """Takes part in a build that another process of the same launch runs with `run_stage`.

    Args:
        directory: The run's directory, which that process has locked.
        name: Folder of the stage.
        config: As that process has it.
        inputs: As that process has them.
        code: As that process has it.
        build: Is given the unfinished folder once that process has opened it.
        patience: Seconds to wait for it.

    Raises:
        OneRecError: The other process has not begun in time.
    """
    folder, partial = directory / name, directory / f".{name}.partial"
    wanted = _wanted(name, config, inputs, code)
    found = read_record(folder)
    if found and found.fingerprint == wanted.fingerprint and not damage(folder, found):
        return
    started = partial / "started.json"
    deadline = time.monotonic() + patience
    while not (started.is_file() and started.read_text(encoding="utf-8") == wanted.fingerprint):
        if time.monotonic() > deadline:
            raise OneRecError(f"{partial}: the first process has not begun for {patience:.0f} s")
        time.sleep(0.05)
    build(partial)


def _wanted(
    name: str, config: Mapping[str, Any], inputs: Mapping[str, str], code: Sequence[str]
) -> StageRecord:
    """The record of a stage that is still to be made."""
    plain = json.loads(json.dumps(config))
    hashed = code_digest(code)
    return StageRecord(
        stage=name,
        fingerprint=digest([name, plain, dict(inputs), hashed]),
        version=onerec.__version__,
        code=hashed,
        config=plain,
        inputs=dict(inputs),
    )


def _difference(found: StageRecord, wanted: StageRecord) -> str:
    """What changed since the stage was made, in words."""
    changes = []
    for key in sorted({*found.config, *wanted.config}):
        before, after = found.config.get(key), wanted.config.get(key)
        if before != after:
            changes.append(f"{key} ({json.dumps(before)} -> {json.dumps(after)})")
    changes += [
        f"input {key}"
        for key in sorted({*found.inputs, *wanted.inputs})
        if found.inputs.get(key) != wanted.inputs.get(key)
    ]
    if found.code != wanted.code:
        changes.append("onerec itself")
    return ", ".join(changes) or "its description"


@contextmanager
def locked(directory: Path, verb: str) -> Iterator[None]:
    """Holds the run's directory for this process; the lock ends with the process, however it ends.

    Raises:
        OneRecError: Another process holds it, the directory cannot be made, or `torchrun` started
            a verb that is one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and verb not in ("pretrain", "align"):
        raise OneRecError(
            f"onerec {verb} is one process; torchrun takes the stages pretrain and align, and "
            "`onerec run` afterwards finds them made"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise OneRecError(f"--out {directory}: wanted a directory, found a file") from None
    with (directory / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OneRecError(
                f"{directory} is in use by another onerec ({file.read().strip() or 'starting'}): "
                "wait for it to end or give another --out"
            ) from None
        file.truncate(0)
        file.write(f"onerec {verb}, process {os.getpid()}")
        file.flush()
        yield
        file.truncate(0)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file that appears whole."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
