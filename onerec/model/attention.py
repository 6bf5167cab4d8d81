"""Multi-head attention of the encoder and of the decoder, with and without caches.

Positions are learned vectors added to the input embeddings, not rotations of keys: the history is
counted from its latest item, so "how long ago" is plain in what the encoder hands to the decoder (a
rotary cross-attention would have no common axis for the two), sequences have a fixed maximum, and
cached keys need nothing done to them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onerec.ops import ancestry_attention


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv 1910.07467), computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * dh] -> [B, heads, S, dh]."""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, S, dh] -> [B, S, heads * dh]."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention; `project` and `attend` are apart so that a decoder can keep its own cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attention within x.

        Args:
            x: [B, S, d].
            mask: bool, broadcasts to [B, heads, S, S]; True may be seen.
            causal: A position sees itself and earlier ones; excludes `mask`.
        """
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        out: Tensor = self.out(merge_heads(y))
        return out

    def cached(self, x: Tensor, keys: Tensor, values: Tensor, slots: Tensor, start: int) -> Tensor:
        """Attention of new tokens to their ancestors, whose keys and values lie in a cache.

        Args:
            x: [B, M, q, d], the tokens at times start .. start + q - 1 of M beams.
            keys: [B, T, M', heads, dh] with M' >= M; the new keys are written at
                [:, start : start + q, :M].
            values: As `keys`.
            slots: int64 [B, M, start + q], the beam slot that holds each time of each beam.
            start: Tokens already in the cache.

        Returns:
            [B, M, q, d].
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        y = ancestry_attention(qkv, keys, values, slots, start, backend="torch")
        out: Tensor = self.out(y)
        return out


class CrossAttention(nn.Module):
    """Attention from the decoder to the encoder's output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, S, dh] of context [B, S, d]."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of x [B, Q, d] to keys and values [B, heads, S, dh].

        All beams of a request are queries of one row, so keys and values are never expanded.

        Args:
            x: [B, Q, d].
            keys: [B, heads, S, dh].
            values: [B, heads, S, dh].
            mask: bool, broadcasts to [B, heads, Q, S]; True may be seen. None: all.
        """
        q = split_heads(self.q(x), self.heads)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        out: Tensor = self.out(merge_heads(y))
        return out
