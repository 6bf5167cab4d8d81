"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_regular(path: str | Path) -> bool:
    """Whether a path is a regular file. Nothing is opened: a FIFO or a device would block.

    Raises:
        FileNotFoundError: There is no such file.
    """
    return stat.S_ISREG(os.stat(path).st_mode)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds the path to an error of a write to an open file, which does not know it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is not None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path` to write to, and renames it to `path` at the end.

    On any exception the temporary file is removed and an earlier `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_directory(temporary: str | Path, path: str | Path) -> None:
    """Puts the folder `temporary` in the place of the folder `path`, on the same file system.

    The earlier `path` waits as `.NAME.old` between the two renames; a process that is killed there
    leaves it, and `recover_directory` puts it back.
    """
    temporary, path = Path(temporary), Path(path)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    if path.exists():
        path.replace(old)
    temporary.replace(path)
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(path: str | Path) -> None:
    """Puts back a folder that a killed `replace_directory` had moved away."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.replace(path)


def check_replaceable(path: str | Path, mark: str) -> None:
    """Refuses a folder that is to be replaced as a whole but is not an earlier result.

    Args:
        path: The folder, which may be missing.
        mark: A file that every earlier result has.

    Raises:
        FileExistsError: It has contents, but not that file.
    """
    path = Path(path)
    if path.is_dir() and not (path / mark).is_file() and any(path.iterdir()):
        reason = f"would be replaced, but holds other files and no {mark}: choose another folder"
        raise FileExistsError(errno.EEXIST, reason, str(path))


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, and puts it in the place of `path` at the end.

    An earlier `path` is replaced as a whole; on any exception it stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
