"""How many threads a call takes whose caller does not say."""

from __future__ import annotations

import os
import sys


def default_threads() -> int:
    """torch's setting where torch is loaded; else OMP_NUM_THREADS, or the process's processors."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))
