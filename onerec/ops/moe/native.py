"""The experts on packed weights in native code, for inference on the CPU."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from onerec._native import core
from onerec.activations import GATED, PLAIN

ACTIVATIONS = (*GATED, *PLAIN)
TYPES = {torch.float32: 0, torch.bfloat16: 1}


class PackedExperts:
    """A copy of a mixture's weights in the order in which the CPU reads them; forward only.

    `packed(x, ids, gates)` is `onerec.ops.moe_experts(x, ids, gates, w13, w2)`. A row's result does
    not depend on the rows beside it or on the number of threads, to the last bit.
    """

    def __init__(
        self,
        w13: Tensor,
        w2: Tensor,
        *,
        activation: str = "swiglu",
        dtype: torch.dtype = torch.float32,
        num_threads: int | None = None,
    ) -> None:
        """Packs the weights; later changes of them are not seen.

        Args:
            w13: [E, 2F, d], gate half first, or [E, F, d] for the plain activations; on the CPU.
            w2: [E, d, F].
            activation: "swiglu", "geglu", "gelu" or "relu".
            dtype: torch.float32, or torch.bfloat16 for half the bytes; sums are float32 always.
                Where the CPU multiplies bfloat16 itself (instruction set "avx512_bf16") bfloat16
                weights meet inputs and hidden values rounded to it.
            num_threads: None asks torch.

        Raises:
            ValueError: Shapes that do not fit, an unknown activation or type, weights elsewhere.
        """
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: wanted one of {ACTIVATIONS}, got {activation!r}")
        if dtype not in TYPES:
            raise ValueError(f"dtype: wanted one of {list(TYPES)}, got {dtype}")
        if w13.device.type != "cpu" or w2.device.type != "cpu":
            raise ValueError(f"w13 and w2: wanted on the CPU, got {w13.device} and {w2.device}")
        parts = 2 if activation in GATED else 1
        if w2.dim() != 3 or w13.shape != (w2.shape[0], parts * w2.shape[2], w2.shape[1]):
            raise ValueError(
                f"w13: wanted [E, {parts}F, d] for w2 {list(w2.shape)} and {activation}, "
                f"got {list(w13.shape)}"
            )
        self.experts, self.width, self.hidden = w2.shape
        self.activation, self.dtype = activation, dtype
        matrices = [*w13.detach().chunk(parts, dim=1), w2.detach()]
        threads = torch.get_num_threads() if num_threads is None else num_threads
        self._packed = [self._pack(matrix.float(), threads) for matrix in matrices]
        address = [buffer.data_ptr() for buffer in self._packed]
        self._native = core().PackedExperts(
            address[0],
            address[1] if parts == 2 else 0,
            address[-1],
            TYPES[dtype],
            ACTIVATIONS.index(activation),
            self.experts,
            self.width,
            self.hidden,
        )
        self._workspaces = threading.local()

    def _pack(self, matrices: Tensor, threads: int) -> Tensor:
        """uint8 [E, bytes], each matrix packed."""
        count, n, k = matrices.shape
        kind = TYPES[self.dtype]
        packed = torch.empty(count, core().packed_bytes(n, k, kind), dtype=torch.uint8)
        core().advise_large_pages(packed.data_ptr(), packed.numel())
        for source, target in zip(matrices, packed, strict=True):
            source = source.contiguous()
            core().pack_weights(source.data_ptr(), n, k, k, kind, target.data_ptr(), threads)
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(buffer.numel() for buffer in self._packed)

    def __call__(
        self,
        x: Tensor,
        ids: Tensor,
        gates: Tensor,
        *,
        first_expert: int = 0,
        num_threads: int | None = None,
    ) -> Tensor:
        """y [T, d] float32. Any number of threads may call; each has a workspace of its own.

        Args:
            x: float32 [T, d] on the CPU, rows contiguous.
            ids: int64 [T, k]; an id of no expert here adds nothing.
            gates: float32 [T, k].
            first_expert: Id of the first expert.
            num_threads: None asks torch. Does not change the result.

        Raises:
            ValueError: A wrong shape, type or device.
        """
        if x.dim() != 2 or x.shape[1] != self.width or x.dtype != torch.float32:
            raise ValueError(f"x: wanted float32 [T, {self.width}], got {x.dtype} {list(x.shape)}")
        wanted = (len(x), ids.shape[-1])
        if ids.shape != wanted or gates.shape != wanted or ids.dtype != torch.int64:
            raise ValueError(
                f"ids and gates: wanted int64 and float32 [{len(x)}, k], got {ids.dtype} "
                f"{list(ids.shape)} and {gates.dtype} {list(gates.shape)}"
            )
        if gates.dtype != torch.float32 or not x.device == ids.device == gates.device == _CPU:
            raise ValueError(
                f"x, ids and float32 gates: wanted on the CPU, got {x.device}, {ids.device} and "
                f"{gates.dtype} on {gates.device}"
            )
        if x.stride(1) != 1:
            x = x.contiguous()
        ids, gates = ids.contiguous(), gates.contiguous()
        needed = self._native.workspace(*ids.shape)
        workspace = getattr(self._workspaces, "buffer", None)
        if workspace is None or needed > workspace.numel():
            workspace = self._workspaces.buffer = torch.empty(needed, dtype=torch.uint8)
        y = torch.empty(len(x), self.width)
        self._native.forward(
            x.data_ptr(),
            len(x),
            x.stride(0),
            ids.data_ptr(),
            gates.data_ptr(),
            ids.shape[1],
            first_expert,
            workspace.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads() if num_threads is None else num_threads,
        )
        return y


_CPU = torch.device("cpu")
