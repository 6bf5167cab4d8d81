"""OneRec v1: history encoder and session decoder with mixture-of-experts layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onerec.model.attention import CrossAttention, RMSNorm, SelfAttention
from onerec.model.config import OneRecConfig
from onerec.model.feed_forward import FeedForward, MoE
from onerec.model.pretrained import Pretrained
from onerec.ops import MoEStats


class RouterStats(NamedTuple):
    """Routing of one forward pass, a row for each decoder layer.

    Attributes:
        counts: int64 [layers, E], (token, slot) pairs of each expert; padding not counted.
        mean_probability: [layers, E].
        entropy: [layers], mean entropy of the routing softmax in nats.
        z_loss: [layers].
    """

    counts: Tensor
    mean_probability: Tensor
    entropy: Tensor
    z_loss: Tensor

    @property
    def imbalance(self) -> Tensor:
        """[layers], load of the busiest expert over the mean load; 1 is even."""
        counts = self.counts.float()
        return counts.amax(dim=-1) / counts.mean(dim=-1).clamp(min=1e-9)


class OneRecOutput(NamedTuple):
    """What a training step needs.

    Attributes:
        loss: [], `loss_per_level.sum()` plus the weighted router losses of the config.
        loss_per_level: [L], mean over predicted items of -log p(code), in nats.
        items: int64 [], predicted items, the weight of this batch in an average.
        router: None for a dense decoder.
    """

    loss: Tensor
    loss_per_level: Tensor
    items: Tensor
    router: RouterStats | None


class Memory(NamedTuple):
    """The encoded history as the decoder reads it; made once a request, shared by its beams.

    Attributes:
        keys: For each decoder layer [B, heads, S, dh].
        values: As `keys`.
        mask: bool [B, 1, 1, S], True at real tokens.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor


@dataclass
class DecoderCache:
    """Keys and values of generated tokens; they stay where they were written.

    A beam finds its ancestors by `slots`: the token at time t of beam m lies in slot
    `slots[b, m, t]` of time t. Choosing beams rewrites that small table only.

    Attributes:
        keys: For each decoder layer [B, T, M, heads, dh].
        values: As `keys`.
        slots: int64 [B, M, T]; M is the present number of beams.
        length: Tokens written so far.
    """

    keys: list[Tensor]
    values: list[Tensor]
    slots: Tensor
    length: int = 0

    def choose(self, parents: Tensor) -> None:
        """Goes on with beam `parents[b, m]` as beam m.

        Args:
            parents: int64 [B, M]; -1 (a dead beam) is read as 0.
        """
        index = parents.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.slots.shape[2])
        self.slots = self.slots.gather(1, index)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and a dense feed-forward layer."""

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = SelfAttention(config.d_model, config.n_heads)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask=mask))
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
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, memory_mask: Tensor, valid: Tensor
    ) -> tuple[Tensor, MoEStats | None]:
        """x [B, T, d]; `valid` bool [B, T] is False at padding."""
        x = x + self.dropout(self.attention(self.attention_norm(x), causal=True))
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


class OneRec(Pretrained):
    """Encoder-decoder that writes a session of items, code by code (arXiv 2502.18965, section 3.2).

    The encoder reads a learned start token and the n * L codes of the history (or n items, see
    `OneRecConfig.history_tokens`). The decoder reads
    [BOS, s1, .., sL] once an item and predicts each code from all before it, never a BOS. A level
    has its own code table and its own softmax over K codes.

    Args:
        config: Its shape.

    Example:
        >>> model = OneRec(OneRecConfig.preset("tiny", codebook_size=256))
        >>> history = torch.randint(256, (2, 7, 3))  # 2 users, 7 items, 3 codes each
        >>> target = torch.randint(256, (2, 5, 3))
        >>> model(history, target).loss.backward()
    """

    model_type = "onerec"
    config_class = OneRecConfig
    config: OneRecConfig

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.config = config
        codes = config.levels * config.codebook_size
        self.codes = nn.Embedding(codes, config.d_model)
        self.decoder_codes = None if config.share_codes else nn.Embedding(codes, config.d_model)
        self.heads = None if config.tie_heads else nn.Parameter(torch.zeros(codes, config.d_model))
        self.start = nn.Parameter(torch.zeros(config.d_model))
        self.bos = nn.Parameter(torch.zeros(config.d_model))
        self.age = nn.Embedding(config.history_length, config.d_model)
        self.time = nn.Embedding(config.session_length * (config.levels + 1), config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder = cast("Sequence[EncoderLayer]", encoder)
        self.encoder_norm = RMSNorm(config.d_model, config.norm_eps)
        decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder = cast("Sequence[DecoderLayer]", decoder)
        self.decoder_norm = RMSNorm(config.d_model, config.norm_eps)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        std = self.config.init_std
        depths = {"encoder": self.config.encoder_layers, "decoder": self.config.decoder_layers}
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                continue
            # Projections into the residual stream: its variance then does not grow with depth.
            inward = name.endswith(("out.weight", "w2.weight", "w2"))
            depth = depths[name.split(".")[0]] if inward else 0
            parameter.normal_(std=std / math.sqrt(2 * depth) if inward else std)

    def num_parameters(self, *, active: bool = False) -> int:
        """Parameters of the network.

        Args:
            active: Of each mixture count only `experts_per_token` experts.
        """
        total = sum(p.numel() for p in self.parameters())
        if active:
            share = 1 - self.config.experts_per_token / max(self.config.n_experts, 1)
            idle = sum(share * (layer.w13.numel() + layer.w2.numel()) for layer in self._mixtures())
            total -= round(idle)
        return total

    def _mixtures(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]

    # Training

    def forward(self, history: Tensor, target: Tensor) -> OneRecOutput:
        """Loss of the target sessions: eq. 4, summed over codes, averaged over predicted items.

        Args:
            history: int64 [B, S, L], codes oldest first, rows past a user's history -1; S may be 0
                and at most `history_length`.
            target: int64 [B, m, L], rows past a session's end -1; m at most `session_length`.

        Raises:
            ValueError: A wrong shape or type; on the CPU also a code out of range and padding that
                is not at the end (on CUDA that check would wait for the device).
        """
        hidden, stats = self._session_hidden(history, target)
        items = (target[..., 0] >= 0).sum()
        losses = []
        for level in range(self.config.levels):
            logits = self._logits(hidden[:, :, level], level)
            wanted = target[..., level]
            losses.append(
                F.cross_entropy(
                    logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="sum"
                )
            )
        per_level = torch.stack(losses) / items.clamp(min=1)
        loss = per_level.sum()
        router = None
        if stats:
            router = RouterStats(
                torch.stack([s.counts for s in stats]),
                torch.stack([s.mean_probability for s in stats]),
                torch.stack([s.entropy for s in stats]),
                torch.stack([s.z_loss for s in stats]),
            )
            if self.config.router_balance_loss:
                share = router.counts / router.counts.sum(dim=-1, keepdim=True).clamp(min=1)
                balance = self.config.n_experts * (share * router.mean_probability).sum()
                loss = loss + self.config.router_balance_loss * balance
            if self.config.router_z_loss:
                loss = loss + self.config.router_z_loss * router.z_loss.sum()
        return OneRecOutput(loss, per_level.detach(), items, router)

    def session_logits(self, history: Tensor, target: Tensor, copies: int = 1) -> Tensor:
        """Teacher-forced logits of each code of the target sessions.

        Args:
            history: As for `forward`.
            target: As for `forward`, but [B * copies, m, L]: first those of history 0, and so on.
            copies: Sessions of each history, which is encoded once for all of them.

        Returns:
            [B * copies, m, L, K] in at least float32; rows of padded items mean nothing.
        """
        hidden, _ = self._session_hidden(history, target, copies)
        levels = range(self.config.levels)
        return torch.stack([self._logits(hidden[:, :, level], level) for level in levels], dim=2)

    def update_router_bias(self, counts: Tensor) -> None:
        """Loss-free balancing after an optimiser step; nothing when the config has it off.

        Args:
            counts: [layers, E], `OneRecOutput.router.counts` summed over the micro-batches and
                processes of the step.
        """
        if self.config.loss_free_balancing:
            for mixture, row in zip(self._mixtures(), counts, strict=True):
                mixture.update_bias(row)

    # Encoder

    def _encode(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder output [B, T, d] and the mask of real tokens, bool [B, 1, 1, T].

        T is 1 + S L with a token a code, 1 + S with a token an item.
        """
        self._check("history", history, self.config.history_length)
        x, real = self._embed_history(history)
        mask = real[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), mask

    def _embed_history(self, history: Tensor) -> tuple[Tensor, Tensor]:
        batch, items, levels = history.shape
        real = history[..., 0] >= 0
        x = self.codes(history.clamp(min=0) + self._offsets(history.device))
        # Positions count from the latest item, which is 0 for everybody.
        back = real.sum(dim=1, keepdim=True) - 1 - torch.arange(items, device=history.device)
        age = self.age(back.clamp(min=0))
        if self.config.history_tokens == "items":
            x = x.sum(dim=2) + age
        else:
            x = (x + age.unsqueeze(2)).flatten(1, 2)
            real = real.repeat_interleave(levels, dim=1, output_size=items * levels)
        x = torch.cat([self.start.to(x.dtype).expand(batch, 1, -1), x], dim=1)
        return self.dropout(x), F.pad(real, (1, 0), value=True)

    def _offsets(self, device: torch.device) -> Tensor:
        return torch.arange(self.config.levels, device=device) * self.config.codebook_size

    # Decoder

    def _session_hidden(
        self, history: Tensor, target: Tensor, copies: int = 1
    ) -> tuple[Tensor, list[MoEStats]]:
        """Decoder states [B * copies, m, L, d] that predict the codes of the target."""
        self._check("target", target, self.config.session_length)
        if history.shape[0] * copies != target.shape[0]:
            raise ValueError(
                f"target must have {copies} rows for each one of history, "
                f"got {target.shape[0]} and {history.shape[0]}"
            )
        batch, items, levels = target.shape
        context, memory_mask = self._encode(history)
        if copies > 1:
            context = context.repeat_interleave(copies, dim=0)
            memory_mask = memory_mask.repeat_interleave(copies, dim=0)
        tokens = F.pad(target, (1, 0)).flatten(1)[:, :-1]
        real = target[..., :1] >= 0
        # An item's last code predicts nothing itself: it is read for the sake of a next item.
        last = F.pad(real, (0, 0, 0, 1))[:, 1:]
        valid = torch.cat([real.expand(-1, -1, levels), last], dim=2).flatten(1)[:, :-1]
        x = self.dropout(self._embed_session(tokens, 0))
        stats = []
        for layer in self.decoder:
            x, layer_stats = layer(x, *layer.cross.project(context), memory_mask, valid)
            if layer_stats is not None:
                stats.append(layer_stats)
        hidden = F.pad(self.decoder_norm(x), (0, 0, 0, 1)).view(batch, items, levels + 1, -1)
        return hidden[:, :, :-1], stats

    def _embed_session(self, tokens: Tensor, start: int) -> Tensor:
        """Embeds tokens [..., q] of times start .. start + q - 1; a BOS's token is not read."""
        times = torch.arange(start, start + tokens.shape[-1], device=tokens.device)
        level = times % (self.config.levels + 1) - 1
        table = self.codes if self.decoder_codes is None else self.decoder_codes
        x: Tensor = table(tokens.clamp(min=0) + level.clamp(min=0) * self.config.codebook_size)
        times_embedded: Tensor = self.time(times)
        return torch.where((level < 0)[:, None], self.bos.to(x.dtype), x) + times_embedded

    def _logits(self, hidden: Tensor, level: int) -> Tensor:
        """[..., d] -> [..., K] of one level, in at least float32."""
        if self.heads is not None:
            weight: Tensor = self.heads
        else:
            weight = (self.codes if self.decoder_codes is None else self.decoder_codes).weight
        size = self.config.codebook_size
        logits = F.linear(hidden, weight[level * size : (level + 1) * size])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    # Incremental decoding

    def encode(self, history: Tensor) -> Memory:
        """Encodes the history and projects the keys and values of every cross-attention, once.

        Args:
            history: As for `forward`.
        """
        context, mask = self._encode(history)
        pairs = [layer.cross.project(context) for layer in self.decoder]
        # Contiguous once here instead of in every step.
        return Memory(
            [keys.contiguous() for keys, _ in pairs],
            [values.contiguous() for _, values in pairs],
            mask,
        )

    def new_cache(self, batch_size: int, beam_width: int, session_length: int) -> DecoderCache:
        """An empty cache for `batch_size` requests of `beam_width` beams.

        Args:
            batch_size: B.
            beam_width: Most beams of a request.
            session_length: Items to generate, at most `config.session_length`.

        Raises:
            ValueError: A session longer than the model was made for.
        """
        if not 1 <= session_length <= self.config.session_length:
            raise ValueError(
                f"session_length must lie in 1..{self.config.session_length} (the model's), "
                f"got {session_length}"
            )
        times = session_length * (self.config.levels + 1)
        heads, width = self.config.n_heads, self.config.d_model // self.config.n_heads
        shape = (batch_size, times, beam_width, heads, width)
        like = self.start
        keys = [like.new_zeros(shape) for _ in self.decoder]
        values = [like.new_zeros(shape) for _ in self.decoder]
        slots = torch.zeros(batch_size, 1, times, dtype=torch.int64, device=like.device)
        return DecoderCache(keys, values, slots)

    def decode(self, tokens: Tensor, cache: DecoderCache, memory: Memory) -> Tensor:
        """Appends tokens to every beam and gives the logits of the next code.

        A session is fed as [BOS] alone, then a code at a time; the last code of an item goes in
        together with the BOS of the next. Which time is a BOS follows from the cache's length, so
        its token is not read.

        Args:
            tokens: int64 [B, M, q] for the M beams that `cache.choose` left (1 at the start).
            cache: Written in place.
            memory: From `encode`.

        Returns:
            [B, M, K], at least float32, of the level that comes next.

        Raises:
            ValueError: The tokens end with an item's last code, after which no code is predicted,
                or the cache is full, or has another number of beams.
        """
        new = tokens.shape[2]
        start, cache.length = cache.length, cache.length + new
        level = (cache.length - 1) % (self.config.levels + 1)
        if tokens.shape[:2] != cache.slots.shape[:2] or cache.length > cache.slots.shape[2]:
            raise ValueError(
                f"tokens must be [{cache.slots.shape[0]}, {cache.slots.shape[1]}, q <= "
                f"{cache.slots.shape[2] - start}], got {list(tokens.shape)}"
            )
        if level == self.config.levels:
            raise ValueError("tokens must not end with an item's last code: add the next BOS")
        beams = tokens.shape[1]
        cache.slots[:, :, start : cache.length] = torch.arange(
            beams, device=tokens.device
        ).unsqueeze(-1)
        slots = cache.slots[:, :, : cache.length]
        x = self._embed_session(tokens, start)
        own = zip(cache.keys, cache.values, strict=True)
        shared = zip(memory.keys, memory.values, strict=True)
        for layer, mine, theirs in zip(self.decoder, own, shared, strict=True):
            x = layer.cached(x, mine, slots, start, *theirs, memory.mask)
        return self._logits(self.decoder_norm(x[:, :, -1]), level)

    def _check(self, name: str, codes: Tensor, longest: int) -> None:
        if codes.dtype != torch.int64 or codes.dim() != 3 or codes.shape[2] != self.config.levels:
            raise ValueError(
                f"{name} must be int64 [B, items, {self.config.levels}], "
                f"got {codes.dtype} {list(codes.shape)}"
            )
        if codes.shape[1] > longest:
            raise ValueError(f"{name} must have at most {longest} items, got {codes.shape[1]}")
        if codes.device.type == "cpu" and codes.numel():
            real = codes >= 0
            whole = real.all(dim=-1)
            if not torch.equal(real.any(dim=-1), whole) or (whole[:, 1:] & ~whole[:, :-1]).any():
                raise ValueError(f"{name} must be padded with whole rows of -1 at the end")
            low, high = int(codes.min()), int(codes.max())
            if low < -1 or high >= self.config.codebook_size:
                raise ValueError(
                    f"{name} must hold codes 0..{self.config.codebook_size - 1} (-1 is padding), "
                    f"got {low}..{high}"
                )
