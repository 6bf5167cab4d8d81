"""Which engine decodes: a network in the form that a backend runs, and its decoder."""

from __future__ import annotations

import torch

from onerec.inference.decoding import TorchDecoder
from onerec.inference.graph import GraphDecoder, GraphModel
from onerec.inference.native import DTYPES, NativeDecoder, NativeModel, unsupported
from onerec.model.onerec import OneRec
from onerec.trie import SidTrie

Model = OneRec | NativeModel | GraphModel


def fastest(model: Model, device: torch.device, dtype: torch.dtype | None) -> str:
    """The backend for a caller who names none.

    On the CPU it is the native engine, for networks and types that the engine has; else "torch",
    or the backend that the model was prepared for. Arguments as for `Recommender`.
    """
    if isinstance(model, NativeModel):
        return "native"
    if isinstance(model, GraphModel):
        return "graph"
    kind = model.start.dtype if dtype is None else dtype
    packs = device.type == "cpu" and kind in DTYPES and not unsupported(model.config)
    return "native" if packs else "torch"


def prepared(
    model: Model,
    backend: str,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    num_threads: int | None,
) -> Model:
    """The model packed, with graphs, or on the device and in evaluation mode.

    Arguments as for `Recommender`; one that is prepared already is given back.

    Raises:
        ValueError: An unknown backend, or one that cannot run this model on this device.
    """
    if backend not in ("torch", "native", "graph"):
        raise ValueError(f"backend must be 'torch', 'native' or 'graph', got {backend!r}")
    if backend == "native":
        if device.type != "cpu":
            raise ValueError(f"backend 'native' runs on the CPU, got device {str(device)!r}")
        if isinstance(model, GraphModel):
            raise ValueError("backend 'native' needs a network, got one's graphs")
        if isinstance(model, OneRec):
            return NativeModel.pack(model, dtype=dtype, num_threads=num_threads)
        if dtype not in (None, model.dtype):
            raise ValueError(f"dtype must be None or {model.dtype}, as packed, got {dtype}")
        return model
    if isinstance(model, NativeModel):
        raise ValueError(f"backend {backend!r} needs a OneRec network, got a packed one")
    if backend == "torch":
        if isinstance(model, GraphModel):
            raise ValueError("backend 'torch' needs a network, got one's graphs")
        return model.to(device=device, dtype=dtype).eval()
    if device.type != "cuda":
        raise ValueError(f"backend 'graph' needs a CUDA device, got {str(device)!r}")
    if model.config.node_outputs or model.config.decoder_start != "learned":
        raise ValueError("backend 'graph' has no node_outputs and no decoder_start 'state' yet")
    return GraphModel(model, device=device, dtype=dtype) if isinstance(model, OneRec) else model


def decoder_of(
    model: Model, trie: SidTrie, device: torch.device, num_threads: int | None
) -> TorchDecoder | NativeDecoder:
    """The decoder of a model that `prepared` gave, under a trie."""
    if isinstance(model, NativeModel):
        return NativeDecoder(model, trie, num_threads)
    if isinstance(model, GraphModel):
        return GraphDecoder(model, trie)
    return TorchDecoder(model, trie, device)
