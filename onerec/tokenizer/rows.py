"""Item vectors in files that need not fit into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onerec.errors import DataError
from onerec.files import atomic_write
from onerec.progress import Progress

CHUNK = 65_536  # rows that are in memory at a time


def open_rows(
    path: str | Path,
    *,
    column: str = "embedding",
    scratch: str | Path | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The vectors of a file as a memory-mapped float32 array [N, d].

    A .npy file of float32 in C order is mapped as it is. Any other .npy, and the fixed-size-list
    column `column` of a Parquet file, is first written to `scratch` in that form, in pieces of
    65,536 rows; a copy from before, of the same file in the same state, is used again.

    Args:
        path: A .npy or .parquet file.
        column: Name of the Parquet column.
        scratch: Folder for the copy; by default that of `path`.
        progress: Called as `progress(rows, N, "")` while copying.

    Raises:
        DataError: The file is missing or damaged, or holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".parquet":
            found = None
        else:
            raise DataError(f"{path}: wanted a .npy or .parquet file")
        if found is not None:
            if found.ndim != 2 or found.shape[1] == 0 or found.dtype.kind not in "fiu":
                raise DataError(
                    f"{path}: wanted numbers of shape [n, d], got {found.dtype} {list(found.shape)}"
                )
            if found.dtype == np.float32 and found.flags.c_contiguous:
                mapped: NDArray[np.float32] = found
                return mapped
        status = path.stat()
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: wanted an array of numbers, got {error}") from error
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {column}"
    name = f"{path.stem}.{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    copy = (Path(scratch) if scratch is not None else path.parent) / name
    if not copy.exists():
        if found is not None:
            shape, pieces = found.shape, _array_pieces(found)
        else:
            shape, pieces = _parquet_pieces(path, column)
        with atomic_write(copy) as temporary:
            rows = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=np.float32, shape=(int(shape[0]), int(shape[1]))
            )
            done = 0
            for piece in pieces:
                rows[done : done + len(piece)] = piece
                done += len(piece)
                if progress is not None:
                    progress(done, len(rows), "")
            rows.flush()
            del rows
    copied: NDArray[np.float32] = np.load(copy, mmap_mode="r")
    return copied


def _array_pieces(rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]


def _parquet_pieces(
    path: Path, column: str
) -> tuple[tuple[int, int], Iterator[NDArray[np.float32]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        kind = file.schema_arrow.field(column).type
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"{path}: column {column}: {error}") from error
    if not pa.types.is_fixed_size_list(kind):
        raise DataError(f"{path}: column {column}: wanted a fixed-size list, got {kind}")

    def pieces() -> Iterator[NDArray[np.float32]]:
        row = 0
        for batch in file.iter_batches(batch_size=CHUNK, columns=[column]):
            values = batch.column(0)
            if values.null_count:
                missing = row + int(np.flatnonzero(values.is_null())[0])
                raise DataError(
                    f"{path}: column {column}, row {missing}: wanted a vector, got null"
                )
            flat = values.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
            yield flat.reshape(len(values), kind.list_size)
            row += len(values)

    return (file.metadata.num_rows, kind.list_size), pieces()
