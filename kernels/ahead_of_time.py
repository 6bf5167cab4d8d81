"""Compiles Triton kernels for a GPU that is not there, and says what they would use of it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Resources(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        registers: A thread.
        spilled: Bytes that a thread stores into local memory for want of registers, by ptxas.
        shared: Bytes of shared memory a block, static and dynamic.
        ptx: The code.
        log: What ptxas said.
    """

    registers: int
    spilled: int
    shared: int
    ptx: str
    log: str


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """Compiles `kernel` with ptxas as on the target; needs no GPU.

    Args:
        kernel: A `triton.jit` function (not in interpreter mode).
        signature: Type of each run-time argument, e.g. {"x": "*fp32", "n": "i32"}. Pointers are
            taken to be 16-byte aligned, as torch's are.
        constants: Value of each `tl.constexpr` argument; None for an absent pointer.
        capability: 90 for sm_90, 80 for sm_80.
        num_warps: Warps of a block.
        num_stages: Depth of software pipelines.

    Raises:
        triton.CompilationError: The kernel does not compile.
        RuntimeError: ptxas does not say what it used.
    """
    types = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    log = io.StringIO()
    # ptxas speaks only where Triton does not take the kernel from its cache.
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    said = log.getvalue()
    spills = re.findall(r"(\d+) bytes spill stores", said)
    registers = re.findall(r"Used (\d+) registers", said)
    shared = re.findall(r"(\d+) bytes smem", said)
    if not spills or not registers:
        raise RuntimeError(f"ptxas: wanted its figures of the kernel, got {said!r}")
    return Resources(
        max(map(int, registers)),
        sum(map(int, spills)),
        max(compiled.metadata.shared, *map(int, shared), 0),
        compiled.asm["ptx"],
        said,
    )
