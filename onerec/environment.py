"""What is installed and what this machine can do; no probe can make it fail."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onerec._version import __version__

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "pyarrow",
    "ibis-framework",
    "duckdb",
    "jsonargparse",
    "rich",
    "matplotlib",
    "jinja2",
    "transformers",
    "tensorboard",
    "fastapi",
    "uvicorn",
    "faiss-cpu",
    "pytest-benchmark",
)


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    from onerec import _native

    if not _native.available():
        return {"loaded": False, "problem": _native.problem()}
    core = _native.core()
    return {
        "loaded": True,
        "version": core.version(),
        "path": core.__file__,
        "isa": core.isa(),
        "isas": core.isas(),
        "cuda": core.cuda_info(),
    }


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda_built": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "processors": properties.multi_processor_count,
            }
        )
    return found


def _cpu() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {
        "name": name,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _memory() -> dict[str, float]:
    fields = {}
    with open("/proc/meminfo", encoding="utf-8") as file:
        for line in file:
            key, value = line.split(":", 1)
            fields[key] = int(value.split()[0])
    return {
        "total_gib": round(fields["MemTotal"] / 2**20, 1),
        "available_gib": round(fields["MemAvailable"] / 2**20, 1),
    }


def collect() -> dict[str, Any]:
    """Everything that a bug report or a benchmark has to say about its machine, as JSON values."""
    return {
        "onerec": __version__,
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: _guarded(lambda name=name: _package(name)) for name in PACKAGES},  # type: ignore[misc]
        "native": _guarded(_native),
        "torch": _guarded(_torch),
        "gpus": _guarded(_gpus),
        "cpu": _guarded(_cpu),
        "memory": _guarded(_memory),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("ONEREC_")
        },
    }


def published() -> dict[str, Any]:
    """What `collect` tells, without the folders of this machine: records are published."""
    found = collect()
    del found["executable"]
    found["native"].pop("path", None)
    variables = found["environment"]
    found["environment"] = {k: v for k, v in variables.items() if not Path(v).is_absolute()}
    return found
