"""Reads a log of `nvcc -Xptxas=-v`: prints each kernel's registers, and fails if one spills."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def main(path: str) -> int:
    """Checks the log at `path`; returns the exit status."""
    kernels: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    current = None
    for line in Path(path).read_text().splitlines():
        if found := ENTRY.search(line):
            current = found.groups()
        elif current and (found := SPILLS.search(line)):
            kernels[current][1] += int(found[2]) + int(found[3])
        elif current and (found := REGISTERS.search(line)):
            kernels[current][0] = int(found[1])
    names = "\n".join(name for name, _ in kernels)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    spilling = 0
    for ((_, target), (registers, spills)), name in zip(
        kernels.items(), plain.stdout.splitlines(), strict=True
    ):
        spilling += spills > 0
        print(f"{target} {registers:4d} registers {spills:5d} bytes spilled  {name[:120]}")
    print(f"{len(kernels)} kernels compiled, {spilling} spill")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
