"""OneRec v1: history encoder and session decoder with mixture-of-experts layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onerec.model.attention import RMSNorm
from onerec.model.cache import DecoderCache, Memory
from onerec.model.config import OneRecConfig
from onerec.model.feed_forward import MoE
from onerec.model.item_loss import item_cross_entropy, sampled_item_cross_entropy
from onerec.model.layers import DecoderLayer, EncoderLayer, decoder_dropout
from onerec.model.node_outputs import node_log_probs, node_logits, node_tables
from onerec.model.output import OneRecOutput, RouterStats
from onerec.model.pretrained import Pretrained
from onerec.model.trie_mask import TrieMask
from onerec.ops import MoEStats

ArrayLike = Any  # whatever torch.as_tensor takes


class OneRec(Pretrained):
    """Encoder-decoder that writes a session of items, code by code (arXiv 2502.18965, section 3.2).

    The encoder reads a learned start token and the n * L codes of the history (or n items, see
    `OneRecConfig.history_tokens`). The decoder reads
    [BOS, s1, .., sL] once an item and predicts each code from all before it, never a BOS. A level
    has its own code table and its own softmax over K codes.

    Args:
        config: Its shape.

    Example:
        >>> model = OneRec(OneRecConfig.preset("paper-tiny", codebook_size=256))
        >>> history = torch.randint(256, (2, 7, 3))  # 2 users, 7 items, 3 codes each
        >>> target = torch.randint(256, (2, 5, 3))
        >>> model(history, target).loss.backward()
    """

    model_type = "onerec"
    config_class = OneRecConfig
    config: OneRecConfig
    item_sids: Tensor
    item_vectors: Tensor

    def __init__(self, config: OneRecConfig) -> None:
        super().__init__()
        self.config = config
        self.items: nn.Embedding | None = None
        self.vectors: nn.Linear | None = None
        self._trie: TrieMask | None = None
        if config.n_items:
            self.items = nn.Embedding(config.n_items, config.d_model)
            empty = torch.full((config.n_items, config.levels), -1, dtype=torch.int64)
            self.register_buffer("item_sids", empty)
        if config.vector_dim:
            self.vectors = nn.Linear(config.vector_dim, config.d_model, bias=False)
            self.register_buffer("item_vectors", torch.zeros(config.n_items, config.vector_dim))
        codes = config.levels * config.codebook_size
        self.codes = nn.Embedding(codes, config.d_model)
        self.decoder_codes = None if config.share_codes else nn.Embedding(codes, config.d_model)
        self.heads = None if config.tie_heads else nn.Parameter(torch.zeros(codes, config.d_model))
        self.start = nn.Parameter(torch.zeros(config.d_model))
        self.bos = nn.Parameter(torch.zeros(config.d_model))
        self.age = nn.Embedding(config.history_length, config.d_model)
        self.time = nn.Embedding(config.session_length * (config.levels + 1), config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.decoder_dropout = nn.Dropout(decoder_dropout(config))
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

    @property
    def prefixes(self) -> bool:
        """Whether `forward` takes a target for every prefix of the history."""
        return self.config.encoder == "causal"

    @property
    def item_column(self) -> bool:
        """Whether rows of codes carry the item's index last."""
        return self.config.n_items > 0

    @property
    def session_codes(self) -> nn.Embedding:
        """The table from which the decoder reads codes."""
        return self.codes if self.decoder_codes is None else self.decoder_codes

    @torch.no_grad()
    def set_catalog(self, sids: ArrayLike, vectors: ArrayLike | None = None) -> None:
        """Tells a network with `config.n_items` its items; saved with the weights.

        Args:
            sids: Integers [n_items, L].
            vectors: Floats [n_items, vector_dim], scaled here to length 1; only, and always, with
                `config.vector_dim`.

        Raises:
            ValueError: A shape that is not the config's, or a code out of range.
        """
        config = self.config
        codes = torch.tensor(np.asarray(sids), dtype=torch.int64)
        if not config.n_items or codes.shape != (config.n_items, config.levels):
            raise ValueError(
                f"sids must be [n_items = {config.n_items}, {config.levels}], "
                f"got {list(codes.shape)}"
            )
        if codes.min() < 0 or codes.max() >= config.codebook_size:
            raise ValueError(f"sids must hold codes 0..{config.codebook_size - 1}")
        if (vectors is None) == bool(config.vector_dim):
            raise ValueError(f"vectors must be given exactly with vector_dim = {config.vector_dim}")
        self.item_sids.copy_(codes)
        if vectors is not None:
            rows = torch.tensor(np.asarray(vectors), dtype=torch.float32)
            if rows.shape != self.item_vectors.shape:
                raise ValueError(
                    f"vectors must be {list(self.item_vectors.shape)}, got {list(rows.shape)}"
                )
            self.item_vectors.copy_(F.normalize(rows, dim=1))
        self._trie = None

    def leave_unseen(self, unseen: ArrayLike) -> None:
        """Keeps the own vectors of items at zero while the network is trained.

        Training would push the vectors of items that are never a target away from every user. At
        zero such an item is read and generated by its codes and its content vector.

        Args:
            unseen: bool [n_items], the items that training does not see.
        """
        assert self.items is not None
        rows = torch.tensor(np.asarray(unseen), device=self.items.weight.device)[:, None]
        with torch.no_grad():
            self.items.weight.masked_fill_(rows, 0.0)
        self.items.weight.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: grad.masked_fill(rows.to(grad.device), 0.0)
        )

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
                and at most `history_length`. With `item_column` [B, S, L + 1].
            target: int64 [B, m, L], rows past a session's end -1; m at most `session_length`. With
                a causal encoder also [B, S, m, L], the session after each prefix of the history.
                With `item_column` [..., L + 1].

        Raises:
            ValueError: A wrong shape or type; on the CPU also a code out of range and padding that
                is not at the end (on CUDA that check would wait for the device).
        """
        config = self.config
        hidden, context, stats = self._session_hidden(history, target)
        real = target[..., 0] >= 0
        items = real.sum()
        rows, wanted = hidden[real], target[real]
        losses = []
        nodes = self._node_tables()
        for level in range(config.levels):
            if nodes:
                found = node_log_probs(
                    self._tree(), rows[:, level], wanted[:, -1], level, nodes[level]
                )
                losses.append(-found.sum())
            else:
                logits = self._trained_logits(rows[:, level], wanted[:, -1], level)
                losses.append(F.cross_entropy(logits, wanted[:, level], reduction="sum"))
        per_level = torch.stack(losses) / items.clamp(min=1)
        loss = per_level.sum()
        if config.item_loss:
            loss = loss + config.item_loss * self._item_loss(context, history, target)
        router = RouterStats.stack(stats) if stats else None
        if router is not None and config.router_balance_loss:
            loss = loss + config.router_balance_loss * router.balance()
        if router is not None and config.router_z_loss:
            loss = loss + config.router_z_loss * router.z_loss.sum()
        return OneRecOutput(loss, per_level.detach(), items, router)

    def session_logits(self, history: Tensor, target: Tensor, copies: int = 1) -> Tensor:
        """Teacher-forced logits of each code of the target sessions.

        Args:
            history: As for `forward`.
            target: As for `forward`, but [B * copies, m, L]: first those of history 0, and so on.
            copies: Sessions of each history, which is encoded once for all of them.

        Returns:
            [B * copies, (S,) m, L, K] in at least float32; rows of padded items mean nothing.
        """
        hidden, _, _ = self._session_hidden(history, target, copies)
        levels = range(self.config.levels)
        if self.config.node_outputs:
            node, rows = torch.zeros_like(target[..., 0]), []
            for level, table in enumerate(self._node_tables()):
                rows.append(node_logits(self._tree(), hidden[..., level, :], node, level, table))
                node = self._tree().step(node, target[..., level], level)
            return torch.stack(rows, dim=-2)
        return torch.stack([self._logits(hidden[..., level, :], level) for level in levels], dim=-2)

    # The catalogue

    def item_scores(self, history: Tensor) -> Tensor:
        """Logits of every item as the next one, [B, n_items]: the dense head.

        Args:
            history: As for `forward`.

        Raises:
            ValueError: The network was not trained with `item_loss`.
        """
        if not self.config.item_loss:
            raise ValueError("item_scores needs a network with item_loss above 0")
        context, mask = self._encode(history)
        return self._last(context, mask) @ self.item_table().T

    def item_log_probs(self, history: Tensor, items: Tensor) -> Tensor:
        """log p of items as the first of the session, by their codes.

        Args:
            history: As for `forward`.
            items: int64 [B, C], indices of the catalogue.

        Returns:
            [B, C], at least float32, of the softmax that the network is trained with.
        """
        sids = self.item_sids[items]
        context, mask = self._encode(history)
        state = self._last(context, mask).unsqueeze(1)
        hidden, _ = self._decode_blocks(context, mask, sids.unsqueeze(2), state)
        total = hidden.new_zeros(items.shape, dtype=torch.float32)
        nodes = self._node_tables()
        for level in range(self.config.levels):
            states = hidden[:, :, 0, level]
            if nodes:
                found = node_log_probs(
                    self._tree(), states.flatten(0, 1), items.flatten(), level, nodes[level]
                )
                total = total + found.view_as(total)
            else:
                logits = self._trained_logits(states, items, level)
                codes = sids[..., level, None]
                total = total + logits.log_softmax(dim=-1).gather(-1, codes).squeeze(-1)
        return total

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """Item vectors [n, d] of the dense head: own embedding, codes and projected vector.

        The encoder reads the same vectors.

        Args:
            items: int64 [n]; None: all of them.
        """
        assert self.items is not None
        index = slice(None) if items is None else items
        x = self.codes(self.item_sids[index] + self._offsets(self.start.device)).sum(dim=-2)
        x = x + self.items.weight[index]
        if self.vectors is not None:
            x = x + self.vectors(self.item_vectors[index].to(x.dtype))
        out: Tensor = x
        return out

    def _item_loss(self, context: Tensor, history: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the first item of each session from the state before it."""
        config = self.config
        if target.dim() == 4:
            states, first = context[:, 1:], target[:, :, 0, config.levels]
        else:
            states = self._last(context, self._memory_mask(history))
            first = target[:, 0, config.levels]
        real = first >= 0
        rows, items = states[real], first[real]
        if config.item_negatives and self.training:
            drawn = torch.randint(config.n_items, (config.item_negatives,), device=items.device)
            return sampled_item_cross_entropy(
                rows,
                self.item_table(items),
                self.item_table(drawn),
                items[:, None] == drawn,
                config.n_items,
            )
        return item_cross_entropy(rows, self.item_table(), items)

    def _last(self, context: Tensor, mask: Tensor) -> Tensor:
        """The encoder's state [B, d] at the latest item, or at the start token."""
        last = mask[:, 0, 0].sum(dim=1) - 1
        return context[torch.arange(len(context), device=context.device), last]

    def update_router_bias(self, counts: Tensor) -> None:
        """Loss-free balancing after an optimizer step; nothing when the config has it off.

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
        x = self._embed_history(history)
        mask = self._memory_mask(history)
        causal = self.config.encoder == "causal"
        for layer in self.encoder:
            # Padding is at the end, where no real token of a causal encoder looks.
            x = layer(x, None if causal else mask)
        return self.encoder_norm(x), mask

    def _memory_mask(self, history: Tensor) -> Tensor:
        real = history[..., 0] >= 0
        if self.config.history_tokens == "codes":
            levels = self.config.levels
            real = real.repeat_interleave(levels, dim=1, output_size=real.shape[1] * levels)
        return F.pad(real, (1, 0), value=True)[:, None, None, :]

    def _embed_history(self, history: Tensor) -> Tensor:
        config = self.config
        batch, items = history.shape[:2]
        real = history[..., 0] >= 0
        codes = history[..., : config.levels].clamp(min=0)
        x: Tensor = self.codes(codes + self._offsets(history.device))
        at = torch.arange(items, device=history.device)
        if config.encoder == "bidirectional":
            # Positions count from the latest item, which is 0 for everybody.
            at = (real.sum(dim=1, keepdim=True) - 1 - at).clamp(min=0)
        position = self.age(at)
        if config.history_tokens == "items":
            x = x.sum(dim=2) + position
        else:
            x = (x + position.unsqueeze(2)).flatten(1, 2)
        if self.items is not None:
            index = history[..., config.levels]
            own = self.items(index.clamp(min=0))
            kept = index >= 0
            if self.training and config.item_dropout:
                kept = kept & (torch.rand(kept.shape, device=x.device) >= config.item_dropout)
            x = x + own * kept.unsqueeze(-1)
            if self.vectors is not None:
                rows = self.item_vectors[index.clamp(min=0)].to(x.dtype)
                rows = self.vectors(rows) * (index >= 0).unsqueeze(-1)
                x = x + F.dropout(rows, config.vector_dropout, self.training)
        x = torch.cat([self.start.to(x.dtype).expand(batch, 1, -1), x], dim=1)
        out: Tensor = self.dropout(x)
        return out

    def _offsets(self, device: torch.device) -> Tensor:
        return torch.arange(self.config.levels, device=device) * self.config.codebook_size

    # Decoder

    def _session_hidden(
        self, history: Tensor, target: Tensor, copies: int = 1
    ) -> tuple[Tensor, Tensor, list[MoEStats]]:
        """Decoder states [B * copies, (S,) m, L, d] of the target codes, and the encoder's
        output."""
        if target.dim() != 4:
            self._check("target", target, self.config.session_length)
        elif copies > 1 or self.config.encoder != "causal" or target.shape[1] != history.shape[1]:
            raise ValueError(
                "target must be [B, m, L]; with a causal encoder also [B, S, m, L] for the S "
                f"items of history, got {list(target.shape)} and history {list(history.shape)}"
            )
        else:
            self._check("target", target.flatten(0, 1), self.config.session_length)
        if history.shape[0] * copies != target.shape[0]:
            raise ValueError(
                f"target must have {copies} rows for each one of history, "
                f"got {target.shape[0]} and {history.shape[0]}"
            )
        context, mask = self._encode(history)
        codes = target[..., : self.config.levels]
        if target.dim() == 3:
            sessions = codes.reshape(len(context), copies, *codes.shape[1:])
            state = self._last(context, mask).unsqueeze(1)
            hidden, stats = self._decode_blocks(context, mask, sessions, state)
            return hidden.flatten(0, 1), context, stats
        # The tokens of prefix t see the start token and the items up to t.
        prefixes, items = target.shape[1:3]
        tokens = items * (self.config.levels + 1) - 1
        seen = torch.ones(prefixes, prefixes + 1, dtype=torch.bool, device=mask.device).tril(1)
        seen = seen.repeat_interleave(tokens, dim=0, output_size=prefixes * tokens)
        hidden, stats = self._decode_blocks(context, seen[None, None], codes, context[:, 1:])
        return hidden, context, stats

    def _decode_blocks(
        self, context: Tensor, memory_mask: Tensor, target: Tensor, state: Tensor
    ) -> tuple[Tensor, list[MoEStats]]:
        """Decoder states [B, C, m, L, d] of C sessions [B, C, m, L] that share a history.

        state [B, C or 1, d] is the encoder's output at the end of each session's prefix.
        """
        batch, blocks, items, levels = target.shape
        tokens = F.pad(target, (1, 0)).flatten(2)[..., :-1]
        real = target[..., :1] >= 0
        # An item's last code predicts nothing itself: it is read for the sake of a next item.
        last = F.pad(real, (0, 0, 0, 1))[:, :, 1:]
        valid = torch.cat([real.expand(-1, -1, -1, levels), last], dim=3).flatten(2)[..., :-1]
        valid = valid.flatten(1)
        x = self.decoder_dropout(self._embed_session(tokens, 0, state)).flatten(1, 2)
        stats = []
        for layer in self.decoder:
            x, layer_stats = layer(x, *layer.cross.project(context), memory_mask, valid, blocks)
            if layer_stats is not None:
                stats.append(layer_stats)
        hidden = self.decoder_norm(x).unflatten(1, (blocks, -1))
        hidden = F.pad(hidden, (0, 0, 0, 1)).view(batch, blocks, items, levels + 1, -1)
        return hidden[:, :, :, :-1], stats

    def _embed_session(self, tokens: Tensor, start: int, state: Tensor) -> Tensor:
        """Embeds tokens [..., q] of times start .. start + q - 1; a BOS's token is not read.

        state [..., d] is what a BOS reads with `decoder_start` = "state".
        """
        times = torch.arange(start, start + tokens.shape[-1], device=tokens.device)
        level = times % (self.config.levels + 1) - 1
        rows = tokens.clamp(min=0) + level.clamp(min=0) * self.config.codebook_size
        x: Tensor = self.session_codes(rows)
        times_embedded: Tensor = self.time(times)
        bos = self.bos.to(x.dtype)
        if self.config.decoder_start == "state":
            bos = bos + state.unsqueeze(-2)
        return torch.where((level < 0)[:, None], bos, x) + times_embedded

    def head(self, level: int) -> Tensor:
        """The output layer of one level, [K, d]."""
        weight = self.session_codes.weight if self.heads is None else self.heads
        size = self.config.codebook_size
        return weight[level * size : (level + 1) * size]

    def _logits(self, hidden: Tensor, level: int) -> Tensor:
        """[..., d] -> [..., K] of one level, in at least float32."""
        logits = F.linear(hidden, self.head(level))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _trained_logits(self, hidden: Tensor, items: Tensor, level: int) -> Tensor:
        """[..., d] -> [..., K] of one level, under the softmax that the network is trained with.

        With `legal_softmax`, -inf where the trie has no such code after the codes before it of
        items [...]; else these are not read.
        """
        logits = self._logits(hidden, level)
        if not self.config.legal_softmax:
            return logits
        return logits.masked_fill(~self._tree().items(items, level), float("-inf"))

    def _tree(self) -> TrieMask:
        """The trie of `item_sids`, made when it is first needed."""
        if self._trie is None:
            self._trie = TrieMask(self.item_sids, self.config.codebook_size)
        return self._trie

    def _node_tables(self) -> list[Tensor]:
        """The output vectors of each level's nodes, with `node_outputs`; else nothing."""
        if not self.config.node_outputs:
            return []
        return node_tables(self._tree(), self.head, self.item_table())

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
            self._last(context, mask),
            self._node_tables(),
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
        nodes = torch.zeros(batch_size, 1, dtype=torch.int64, device=like.device)
        return DecoderCache(keys, values, slots, nodes)

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
        x = self._embed_session(tokens, start, memory.state.unsqueeze(1))
        own = zip(cache.keys, cache.values, strict=True)
        shared = zip(memory.keys, memory.values, strict=True)
        for layer, mine, theirs in zip(self.decoder, own, shared, strict=True):
            x = layer.cached(x, mine, slots, start, *theirs, memory.mask)
        last = self.decoder_norm(x[:, :, -1])
        if not self.config.node_outputs:
            return self._logits(last, level)
        if level == 0:
            cache.nodes = torch.zeros_like(cache.nodes)
        else:
            cache.nodes = self._tree().step(cache.nodes, tokens[:, :, -1], level - 1)
        return node_logits(self._tree(), last, cache.nodes, level, memory.nodes[level])

    def _check(self, name: str, codes: Tensor, longest: int) -> None:
        columns = self.config.levels + self.item_column
        if codes.dtype != torch.int64 or codes.dim() != 3 or codes.shape[2] != columns:
            raise ValueError(
                f"{name} must be int64 [B, items, {columns}], got {codes.dtype} {list(codes.shape)}"
            )
        if codes.shape[1] > longest:
            raise ValueError(f"{name} must have at most {longest} items, got {codes.shape[1]}")
        if codes.device.type == "cpu" and not torch.compiler.is_exporting() and codes.numel():
            index = codes[..., self.config.levels :]
            if index.numel() and not -1 <= index.min() <= index.max() < self.config.n_items:
                raise ValueError(
                    f"{name} must hold item indices -1..{self.config.n_items - 1} last, "
                    f"got {int(index.min())}..{int(index.max())}"
                )
            codes = codes[..., : self.config.levels]
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
