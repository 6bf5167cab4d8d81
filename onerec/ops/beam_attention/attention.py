"""The two attentions of a decoder whose beams share a history: to that, and to their own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from onerec.ops.beam_attention import reference


def cross_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Attention of all beams of a request to its one context: softmax(q k / sqrt(dh)) v.

    Args:
        q: [B, Q, heads, dh], contiguous; Q counts beams and their new tokens.
        keys: [B, heads, S, dh], contiguous.
        values: As `keys`.
        lengths: int32 [B], keys of each request that count, 1 to S; read on the device.
        backend: "torch", "triton" (CUDA, no gradients; the same bits whatever B is), or "auto":
            "triton" on CUDA.

    Returns:
        [B, Q, heads * dh].

    Raises:
        ValueError: Shapes or types that do not fit, or an unknown backend.
    """
    batch, _, heads, width = q.shape
    wanted = (batch, heads, keys.shape[2], width)
    if keys.shape != wanted or values.shape != wanted or lengths.shape != (batch,):
        raise ValueError(
            f"keys and values: wanted [{batch}, {heads}, S, {width}] and lengths [{batch}], got "
            f"{list(keys.shape)}, {list(values.shape)}, {list(lengths.shape)}"
        )
    if _choose(backend, q) == "torch":
        return reference.cross_attention(q, keys, values, lengths)
    from onerec.kernels import cross_attention as kernel  # type: ignore[import-not-found]

    with torch.cuda.device(q.get_device()):  # where Triton launches
        out: Tensor = kernel.cross_attention(q, keys, values, lengths)
    return out


def ancestry_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, start: int, *, backend: str = "auto"
) -> Tensor:
    """Causal attention of new tokens to their beam's own ones, found through `slots`; fills caches.

    Args:
        qkv: [B, M, n, 3, heads, dh], contiguous: queries, keys and values of the tokens at times
            start .. start + n - 1 of M beams.
        keys: [B, T, M', heads, dh] with M' >= M, contiguous; the new keys are written to
            [:, start : start + n, :M].
        values: As `keys`.
        slots: int64 [B, M, start + n], the place in M' that holds each time of each beam; that of
            the new times is the beam itself. A view of whole rows is enough: the last stride is 1
            and that of B is M times that of M.
        start: Times already in the cache.
        backend: As for `cross_attention`.

    Returns:
        [B, M, n, heads * dh].

    Raises:
        ValueError: Shapes that do not fit, or an unknown backend.
    """
    batch, beams, new, _, heads, width = qkv.shape
    if (
        keys.shape != values.shape
        or (keys.shape[0], *keys.shape[3:]) != (batch, heads, width)
        or keys.shape[1] < start + new
        or keys.shape[2] < beams
        or slots.shape != (batch, beams, start + new)
    ):
        raise ValueError(
            f"keys and values: wanted [{batch}, T >= {start + new}, M' >= {beams}, {heads}, "
            f"{width}] and slots [{batch}, {beams}, {start + new}], got {list(keys.shape)}, "
            f"{list(values.shape)}, {list(slots.shape)}"
        )
    if _choose(backend, qkv) == "torch":
        return reference.ancestry_attention(qkv, keys, values, slots, start)
    from onerec.kernels import ancestry_attention as kernel

    with torch.cuda.device(qkv.get_device()):
        out: Tensor = kernel.ancestry_attention(qkv, keys, values, slots, start)
    return out


def _choose(backend: str, x: Tensor) -> str:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: wanted 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "auto":
        return "triton" if x.is_cuda else "torch"
    return backend
