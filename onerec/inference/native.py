"""The native engine: encoder, decoder and beam search in one call into C++, on the CPU."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from onerec._native import core
from onerec.errors import DataError
from onerec.inference.results import Beams
from onerec.model.config import OneRecConfig
from onerec.threads import default_threads
from onerec.trie import SCORINGS, SidTrie, allow_masks, check_scoring

if TYPE_CHECKING:
    import torch

    from onerec import _C
    from onerec.model.onerec import OneRec

DTYPES = ("float32", "bfloat16")  # of packed matrices, as torch names them
_ACTIVATIONS = ("swiglu", "geglu", "gelu", "relu")
_STARTS = ("learned", "state")
# Fields that the engine decodes by under the same name, and those that decoding does not read:
# training's, and the ones that only say where a weight lies.
_SAME = (
    "levels",
    "codebook_size",
    "session_length",
    "history_length",
    "n_items",
    "d_model",
    "n_heads",
    "encoder_layers",
    "decoder_layers",
    "d_ff",
    "n_experts",
    "experts_per_token",
    "expert_d_ff",
    "norm_eps",
)
_TRANSLATED = (
    "history_tokens",
    "encoder",
    "vector_dim",
    "item_loss",
    "legal_softmax",
    "node_outputs",
    "decoder_start",
    "normalize_gates",
    "activation",
    "share_codes",
)
_NOT_READ = (
    "item_dropout",
    "vector_dropout",
    "item_negatives",
    "loss_free_balancing",
    "balancing_rate",
    "router_balance_loss",
    "router_z_loss",
    "dropout",
    "decoder_dropout",
    "tie_heads",
    "init_std",
)


def packs(dtype: torch.dtype) -> bool:
    """Whether the engine has matrices of a type."""
    return str(dtype).removeprefix("torch.") in DTYPES


def unsupported(config: OneRecConfig) -> list[str]:
    """The features of a network that the native engine lacks, as "field=value"."""
    known = {*_SAME, *_TRANSLATED, *_NOT_READ}
    return [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in known and getattr(config, field.name) != field.default
    ]


def refuse_unsupported(config: OneRecConfig) -> None:
    """Refuses a network with a feature that the native engine lacks.

    Raises:
        ValueError: The message names the fields.
    """
    if foreign := unsupported(config):
        raise ValueError(
            f"backend 'native' has no {', '.join(foreign)}; backend 'torch' decodes this network"
        )


class NativeModel:
    """A network in the engine's packed form, in memory or mapped from a file; read-only.

    Made by `pack` or `load`. Processes that load one file share its pages. Sums are float32 always;
    activations too, unless the CPU multiplies bfloat16 itself (instruction set "avx512_bf16"),
    where those of bfloat16 matrices are rounded, and keys and values of the history.

    Attributes:
        config: The network's.
        nbytes: Size in memory and in the file, in bytes.
    """

    def __init__(self, native: _C.EngineModel, config: OneRecConfig) -> None:
        self._native = native
        self.config = config
        self.nbytes = native.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """`torch.float32` or `torch.bfloat16`: how matrices are stored."""
        import torch

        return torch.bfloat16 if self._native.config["bfloat16"] else torch.float32

    @classmethod
    def pack(
        cls, model: OneRec, *, dtype: torch.dtype | None = None, num_threads: int | None = None
    ) -> Self:
        """Packs a network; other types than these two are converted to float32 first.

        Args:
            model: Left as it is.
            dtype: `torch.float32`, `torch.bfloat16`, or None for the network's own.
            num_threads: None asks torch.

        Raises:
            ValueError: Another `dtype`, or a feature that the engine lacks.
        """
        import torch

        config = model.config
        refuse_unsupported(config)
        wanted = model.start.dtype if dtype is None else dtype
        if not packs(wanted):
            raise ValueError(
                f"dtype must be torch.float32 or torch.bfloat16 for backend 'native', got {wanted}"
            )
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        state.setdefault("heads", state.get("decoder_codes.weight", state["codes.weight"]))
        if config.n_items:
            state["item_table"] = model.item_table().detach()
        if config.node_outputs:
            for level, table in enumerate(_node_tables(model)):
                state[f"nodes.{level}"] = table
        if not config.loss_free_balancing:
            for name in state:
                if name.endswith("selection_bias"):
                    state[name] = torch.zeros_like(state[name])
        tensors = {name: t.to("cpu", torch.float32).contiguous() for name, t in state.items()}
        native = core().EngineModel.build(
            _engine_config(config, wanted == torch.bfloat16),
            {name: (t.data_ptr(), t.numel()) for name, t in tensors.items()},
            default_threads() if num_threads is None else num_threads,
        )
        return cls(native, config)

    def save(self, path: str | Path) -> None:
        """Writes one file, whole or not at all. Equal networks give equal bytes.

        Raises:
            OSError: It cannot be written.
        """
        try:
            self._native.save(str(path))
        except RuntimeError as error:
            raise OSError(str(error)) from None

    @classmethod
    def load(cls, path: str | Path, config: OneRecConfig) -> Self:
        """Maps a file that `save` wrote for a network of this config, and checks all of it.

        Raises:
            FileNotFoundError: There is no such file.
            DataError: It is damaged, of another version, or of a network of another config.
            OSError: It cannot be read.
        """
        Path(path).stat()
        module = core()
        try:
            native = module.EngineModel.load(str(path))
        except module.EngineFormatError as error:
            raise DataError(f"{path}: {error}") from None
        except RuntimeError as error:
            raise OSError(str(error)) from None
        found = native.config
        wanted = _engine_config(config, bool(found["bfloat16"]))
        wanted["norm_eps"] = float(np.float32(wanted["norm_eps"]))
        for name, value in wanted.items():
            if found[name] != value:
                raise DataError(
                    f"{path}: {name} must be {value} as in the config, got {found[name]}"
                )
        return cls(native, config)

    @property
    def native(self) -> _C.EngineModel:
        """The native object."""
        return self._native

    @property
    def item_sids(self) -> npt.NDArray[np.int32] | None:
        """[n_items, L], the semantic ids of the items that the network knows; None for none."""
        if not self.config.n_items:
            return None
        count = self.config.n_items * self.config.levels
        codes = (ctypes.c_int32 * count).from_address(self._native.item_sids)
        return np.ctypeslib.as_array(codes).reshape(-1, self.config.levels).copy()


def _engine_config(config: OneRecConfig, bfloat16: bool) -> dict[str, int | float]:
    fields: dict[str, int | float] = {name: getattr(config, name) for name in _SAME}
    if config.n_experts == 0:
        fields["experts_per_token"] = fields["expert_d_ff"] = 0
    fields["history_is_items"] = int(config.history_tokens == "items")
    fields["causal"] = int(config.encoder == "causal")
    fields["dense_head"] = int(config.item_loss > 0)
    fields["legal_softmax"] = int(config.legal_softmax)
    fields["node_outputs"] = int(config.node_outputs)
    fields["decoder_start"] = _STARTS.index(config.decoder_start)
    fields["normalize_gates"] = int(config.normalize_gates)
    fields["activation"] = _ACTIVATIONS.index(config.activation)
    fields["share_codes"] = int(config.share_codes)
    fields["bfloat16"] = int(bfloat16)
    return fields


def _node_tables(model: OneRec) -> list[torch.Tensor]:
    """The float32 output vectors [nodes, d] of each level's nodes."""
    import torch

    from onerec.model.node_outputs import node_tables
    from onerec.model.trie_mask import TrieMask

    trie = TrieMask(model.item_sids, model.config.codebook_size)
    with torch.no_grad():
        items = model.item_table().float()
        return node_tables(trie, lambda level: model.head(level).float(), items)


class NativeDecoder:
    """Sessions of a packed network under a trie; threads may share one object.

    A request's result does not depend on the other requests of a call nor on the number of threads,
    not even in its last bit.

    Args:
        model: The network.
        trie: The allowed semantic ids.
        num_threads: Threads of a call; None asks torch at each call (`default_threads`).

    Raises:
        ValueError: A trie of other levels or codebook size, or, for a network with `node_outputs`,
            with a semantic id that is none of its items'.
    """

    def __init__(self, model: NativeModel, trie: SidTrie, num_threads: int | None = None) -> None:
        self.model, self.trie, self.num_threads = model, trie, num_threads
        self._engine = core().Engine(model.native, trie.native)

    def search(
        self,
        codes: Sequence[npt.NDArray[np.int64]],
        deny: Sequence[npt.NDArray[np.int64]],
        allow_tags: Sequence[int | None] | None = None,
        *,
        beam_width: int,
        session_length: int,
        scoring: str = "full_softmax",
        temperature: float = 1.0,
    ) -> Beams:
        """The best sessions of each request.

        Args:
            codes: For each request its history, int64 [S, L], or [S, L + 1] (`item_column`).
            deny: For each request leaf ids never to give, ascending and distinct.
            allow_tags: As for `onerec.ops.BeamSearch`.
            beam_width: M.
            session_length: m.
            scoring: As for `onerec.ops.BeamSearch`.
            temperature: As for `onerec.ops.BeamSearch`.

        Raises:
            ValueError: An argument out of range.
        """
        check_scoring(scoring, temperature)
        history, offsets = self._histories(codes)
        allow = allow_masks(allow_tags, len(codes), self.trie)
        leaves = np.concatenate([np.empty(0, np.int64), *deny])
        deny_offsets = np.cumsum([0, *map(len, deny)], dtype=np.int64)
        shape = (len(codes), beam_width, session_length)
        items = np.empty(shape, dtype=np.int64)
        sids = np.empty((*shape, self.trie.levels), dtype=np.int32)
        scores = np.empty(shape[:2], dtype=np.float32)
        valid = np.empty(shape[0], dtype=np.int32)
        self._engine.run(
            history.ctypes.data,
            offsets.ctypes.data,
            leaves.ctypes.data,
            deny_offsets.ctypes.data,
            allow.ctypes.data,
            len(codes),
            beam_width,
            session_length,
            SCORINGS.index(scoring),
            float(temperature),
            self._threads(),
            items.ctypes.data,
            sids.ctypes.data,
            scores.ctypes.data,
            valid.ctypes.data,
        )
        return Beams(sids, items, scores, valid)

    def item_scores(self, codes: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        """Logits float32 [B, n_items] of every item as the next one, as `OneRec.item_scores`."""
        history, offsets = self._histories(codes)
        scores = np.empty((len(codes), self.model.config.n_items), dtype=np.float32)
        self._engine.item_scores(
            history.ctypes.data,
            offsets.ctypes.data,
            len(codes),
            self._threads(),
            scores.ctypes.data,
        )
        return scores

    def item_log_probs(
        self, codes: Sequence[npt.NDArray[np.int64]], items: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """float32 [B, C] for items int64 [B, C], as `OneRec.item_log_probs`."""
        history, offsets = self._histories(codes)
        wanted = np.ascontiguousarray(items)
        scores = np.empty(items.shape, dtype=np.float32)
        self._engine.item_log_probs(
            history.ctypes.data,
            offsets.ctypes.data,
            len(codes),
            wanted.ctypes.data,
            items.shape[1],
            self._threads(),
            scores.ctypes.data,
        )
        return scores

    def _threads(self) -> int:
        return default_threads() if self.num_threads is None else self.num_threads

    def _histories(
        self, codes: Sequence[npt.NDArray[np.int64]]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """What the engine reads of all histories, and where each begins."""
        levels = self.trie.levels
        if self.model.config.n_items:
            codes = [rows[:, levels:] for rows in codes]
            levels = 1
        flat = np.concatenate([np.empty((0, levels), np.int64), *codes]).astype(np.int32)
        return flat, np.cumsum([0, *map(len, codes)], dtype=np.int64)
