"""Rows of different lengths that lie behind each other in one array, as a padded matrix."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value", bound=np.generic)


def padded(
    values: npt.NDArray[Value],
    begin: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    width: int,
) -> npt.NDArray[Value]:
    """Rows of `values` as a matrix.

    Args:
        values: The rows behind each other, of a signed type.
        begin: [B], where each row begins.
        lengths: [B], values of each row; those past `width` are left out.
        width: Columns.

    Returns:
        [B, width] of the type of `values`, -1 past each row's length.
    """
    column = np.arange(width)
    inside = column < lengths[:, None]
    out = np.full(inside.shape, -1, dtype=values.dtype)
    out[inside] = values[(begin[:, None] + column)[inside]]
    return out
