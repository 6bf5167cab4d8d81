"""The output layer for legal codes only, for engines of your own around `BeamSearch`.

The packed engine of `onerec.inference` has a product of its own.
"""

from __future__ import annotations

import torch

from onerec._native import core
from onerec.ops.legal_logits.reference import legal_logits_reference
from onerec.ops.session_beam.beam import LegalCodes

# A gathered product reads a row of the head for each code, the dense one each row once for all
# beams. On an AVX2 core they break even between an eighth and a quarter (width 512) and between a
# quarter and a half (width 128), with 16 and with 128 beams.
DENSE_SHARE = 1 / 8


def legal_logits(
    hidden: torch.Tensor,
    head: torch.Tensor,
    legal: LegalCodes,
    *,
    num_threads: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Logits of the legal codes of every beam, for `BeamSearch.step_legal`.

    Args:
        hidden: float32 [B, R, d] on the CPU, last stride 1; row i belongs to beam i. R may be below
            the beam width if no live beam is beyond it.
        head: float32 [K, d] on the CPU, last stride 1: the output layer.
        legal: What `BeamSearch.legal` gave.
        num_threads: None asks torch. Does not change what "native" gives.
        backend: "native" (gathered products), "reference" (all K codes of all rows, then those
            asked for), or "auto": "reference" where an eighth of all codes or more is legal.

    Returns:
        float32 [n].

    Raises:
        TypeError: A tensor of another dtype.
        ValueError: Shapes that do not fit one another, or an unknown backend.
    """
    for name, tensor, ndim in (("hidden", hidden, 3), ("head", head, 2)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: wanted float32, got {tensor.dtype}")
        if tensor.ndim != ndim or not tensor.is_cpu:
            raise ValueError(f"{name}: wanted {ndim} dimensions on the CPU, got {tensor.shape}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: wanted a last stride of 1, got {tensor.stride(-1)}")
    batch, rows, size = hidden.shape
    if batch != len(legal.counts) or size != head.shape[1]:
        wanted = [len(legal.counts), rows, head.shape[1]]
        raise ValueError(f"hidden: wanted shape {wanted}, got {list(hidden.shape)}")
    if legal.counts[:, rows:].any():
        raise ValueError(f"hidden: wanted a row for each live beam, got {rows} rows")
    if len(legal.codes) and int(legal.codes.max()) >= len(head):
        raise ValueError(f"head: wanted more than {int(legal.codes.max())} rows, got {len(head)}")
    if backend == "auto":
        dense = len(legal.codes) >= DENSE_SHARE * batch * rows * len(head)
        backend = "reference" if dense else "native"
    if backend == "reference":
        return legal_logits_reference(hidden, head, legal)
    if backend != "native":
        raise ValueError(f"backend: wanted 'auto', 'native' or 'reference', got {backend!r}")
    out = torch.empty(len(legal.codes))
    core().legal_logits(
        hidden.data_ptr(),
        hidden.stride(0),
        hidden.stride(1),
        size,
        legal.counts.shape[1],
        head.data_ptr(),
        head.stride(0),
        legal.rows.data_ptr(),
        legal.codes.data_ptr(),
        len(out),
        out.data_ptr(),
        torch.get_num_threads() if num_threads is None else num_threads,
    )
    return out
