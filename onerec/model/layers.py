"""The layers of the encoder and of the decoder."""

from __future__ import annotations

from torch import Tensor, nn

from onerec.model.attention import CrossAttention, RMSNorm, SelfAttention
from onerec.model.config import OneRecConfig
from onerec.model.feed_forward import FeedForward, MoE
from onerec.ops import MoEStats


def decoder_dropout(config: OneRecConfig) -> float:
    """The rate of dropout in the decoder."""
    return config.dropout if config.decoder_dropout is None else config.decoder_dropout


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and a dense feed-forward layer."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = SelfAttention(config.d_model, config.n_heads)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, S, d]; the mask of real tokens, bool [B, 1, 1, S], or None for causal attention."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, mask=mask, causal=mask is None))
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, cross-attention and a mixture of experts."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = SelfAttention(config.d_model, config.n_heads)
        self.cross_norm = RMSNorm(config.d_model, config.norm_eps)
        self.cross = CrossAttention(config.d_model, config.n_heads)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = MoE(config) if config.n_experts else FeedForward(config)
        self.dropout = nn.Dropout(decoder_dropout(config))

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
        valid: Tensor,
        blocks: int = 1,
    ) -> tuple[Tensor, MoEStats | None]:
        """One layer over sequences that share a memory.

        Args:
            x: [B, blocks * T, d]; a block does not see another one.
            keys: [B, heads, S, dh].
            values: As `keys`.
            memory_mask: bool, broadcasts to [B, heads, blocks * T, S].
            valid: bool [B, blocks * T], False at padding.
            blocks: Sequences of each row.
        """
        normed = self.attention_norm(x).unflatten(1, (blocks, -1)).flatten(0, 1)
        x = x + self.dropout(self.attention(normed, causal=True).view_as(x))
        return self._after_self_attention(x, keys, values, memory_mask, valid)

    def cached(
        self,
        x: Tensor,
        own: tuple[Tensor, Tensor],
        slots: Tensor,
        start: int,
        keys: Tensor,
        values: Tensor,
        memory_mask: Tensor,
    ) -> Tensor:
        """x [B, M, q, d], new tokens of M beams; see `SelfAttention.cached`."""
        x = x + self.attention.cached(self.attention_norm(x), *own, slots, start)
        rows, _ = self._after_self_attention(x.flatten(1, 2), keys, values, memory_mask, None)
        return rows.view_as(x)

    def _after_self_attention(
        self, x: Tensor, keys: Tensor, values: Tensor, memory_mask: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, MoEStats | None]:
        x = x + self.dropout(self.cross(self.cross_norm(x), keys, values, memory_mask))
        normed, stats = self.ffn_norm(x), None
        if isinstance(self.ffn, MoE):
            rows, stats = self.ffn(normed.flatten(0, 1), None if valid is None else valid.flatten())
            out = rows.view_as(x)
        else:
            out = self.ffn(normed)
        return x + self.dropout(out), stats
