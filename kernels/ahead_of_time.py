"""Compiles Triton kernels for a GPU that is not there, and says what they would use of it."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Resources(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        registers: A thread.
        stack: Bytes of local memory a thread; above 0 means that registers were spilled.
        shared: Bytes of shared memory a block, static and dynamic.
        ptx: The code.
        log: What ptxas said, where the environment has TRITON_DUMP_PTXAS_LOG=1 and the kernel was
            not in Triton's cache.
    """

    registers: int
    stack: int
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
    """
    types = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if types[n].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    log = io.StringIO()
    with redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", usage)}
    shared = max(found["SHARED"], compiled.metadata.shared)
    return Resources(found["REG"], found["STACK"], shared, compiled.asm["ptx"], log.getvalue())
