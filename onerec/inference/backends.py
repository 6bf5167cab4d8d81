"""Which engine decodes: a network in the form that a backend runs, and its decoder.

What the other backends need of torch is imported where it is used: the engine needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from onerec.inference.native import NativeDecoder, NativeModel, packs, unsupported
from onerec.trie import SidTrie

if TYPE_CHECKING:
    import torch

    from onerec.inference.decoding import TorchDecoder
    from onerec.inference.graph import GraphModel
    from onerec.model.onerec import OneRec

Model = Union["OneRec", NativeModel, "GraphModel"]


def is_graph(model: Model) -> bool:
    """Whether a model is a `GraphModel`."""
    if isinstance(model, NativeModel):
        return False
    from onerec.inference.graph import GraphModel

    return isinstance(model, GraphModel)


def network_of(model: Model) -> OneRec | NativeModel:
    """The network, packed or not, of a model."""
    return model.network if is_graph(model) else model  # type: ignore[union-attr, return-value]


def device_type(device: str) -> str:
    """ "cpu" of "cpu:0"."""
    return device.partition(":")[0]


def fastest(model: Model, device: str, dtype: torch.dtype | None) -> str:
    """The backend for a caller who names none.

    On the CPU it is the native engine, for networks and types that the engine has; else "torch",
    or the backend that the model was prepared for. Arguments as for `Recommender`.
    """
    if isinstance(model, NativeModel):
        return "native"
    if is_graph(model):
        return "graph"
    kind = model.start.dtype if dtype is None else dtype  # type: ignore[union-attr]
    runs = device_type(device) == "cpu" and packs(kind) and not unsupported(model.config)
    return "native" if runs else "torch"


def prepared(
    model: Model,
    backend: str,
    *,
    device: str,
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
    if backend == "native" and device_type(device) != "cpu":
        raise ValueError(f"backend 'native' runs on the CPU, got device {device!r}")
    if isinstance(model, NativeModel):
        if backend != "native":
            raise ValueError(f"backend {backend!r} needs a OneRec network, got a packed one")
        if dtype is not None and dtype != model.dtype:
            raise ValueError(f"dtype must be None or {model.dtype}, as packed, got {dtype}")
        return model
    from onerec.inference.graph import GraphModel

    if backend == "native":
        if isinstance(model, GraphModel):
            raise ValueError("backend 'native' needs a network, got one's graphs")
        return NativeModel.pack(model, dtype=dtype, num_threads=num_threads)
    if backend == "torch":
        if isinstance(model, GraphModel):
            raise ValueError("backend 'torch' needs a network, got one's graphs")
        return model.to(device=device, dtype=dtype).eval()
    if device_type(device) != "cuda":
        raise ValueError(f"backend 'graph' needs a CUDA device, got {device!r}")
    if model.config.node_outputs or model.config.decoder_start != "learned":
        raise ValueError("backend 'graph' has no node_outputs and no decoder_start 'state' yet")
    if isinstance(model, GraphModel):
        return model
    return GraphModel(model, device=device, dtype=dtype)


def decoder_of(
    model: Model, trie: SidTrie, device: str, num_threads: int | None
) -> TorchDecoder | NativeDecoder:
    """The decoder of a model that `prepared` gave, under a trie."""
    if isinstance(model, NativeModel):
        return NativeDecoder(model, trie, num_threads)
    import torch

    from onerec.inference.decoding import TorchDecoder
    from onerec.inference.graph import GraphDecoder, GraphModel

    if isinstance(model, GraphModel):
        return GraphDecoder(model, trie)
    return TorchDecoder(model, trie, torch.device(device))
