"""The attentions of a beam in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """As `onerec.ops.cross_attention`."""
    mask = torch.arange(keys.shape[2], device=q.device) < lengths[:, None]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask[:, None, None]
    )
    return y.transpose(1, 2).flatten(2)


def ancestry_attention(
    qkv: Tensor, keys: Tensor, values: Tensor, slots: Tensor, start: int
) -> Tensor:
    """As `onerec.ops.ancestry_attention`."""
    batch, beams, new, _, heads, _ = qkv.shape
    q, k, v = qkv.unbind(3)
    keys[:, start : start + new, :beams] = k.transpose(1, 2)
    values[:, start : start + new, :beams] = v.transpose(1, 2)
    times, width = keys.shape[1], keys.shape[2]
    seen = start + new
    row = torch.arange(batch, device=q.device).view(-1, 1, 1) * times
    row = (row + torch.arange(seen, device=q.device)) * width + slots
    shape = (batch * beams, seen, heads, -1)
    k = keys.view(-1, keys[0, 0, 0].numel()).index_select(0, row.flatten()).view(shape)
    v = values.view(-1, values[0, 0, 0].numel()).index_select(0, row.flatten()).view(shape)
    mask = None
    if new > 1:
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(start)
    y = F.scaled_dot_product_attention(
        q.flatten(0, 1).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return y.transpose(1, 2).flatten(2).view(batch, beams, new, -1)
