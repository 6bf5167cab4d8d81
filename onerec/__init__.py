"""Generative recommendation in the manner of OneRec (arXiv 2502.18965).

The names below are imported on first use, so that `onerec --help` and the light parts of the
package do not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from onerec._lazy import lazy
from onerec._version import __version__

if TYPE_CHECKING:
    from onerec.inference import Recommendation, Recommender
    from onerec.model import OneRec, OneRecConfig
    from onerec.ops.session_beam import constrained_beam_search
    from onerec.pipeline.front import Fitted, fit, load
    from onerec.trie import LiveTrie, SidTrie

# Public name -> module that defines it. A new public name has a line here, one in `__all__` and an
# import under TYPE_CHECKING for the type checkers.
_HOMES = {
    "LiveTrie": "onerec.trie",
    "OneRec": "onerec.model",
    "OneRecConfig": "onerec.model",
    "Recommendation": "onerec.inference",
    "Recommender": "onerec.inference",
    "Fitted": "onerec.pipeline.front",
    "SidTrie": "onerec.trie",
    "fit": "onerec.pipeline.front",
    "load": "onerec.pipeline.front",
    "constrained_beam_search": "onerec.ops.session_beam",
}

__all__ = [
    "Fitted",
    "LiveTrie",
    "OneRec",
    "OneRecConfig",
    "Recommendation",
    "Recommender",
    "SidTrie",
    "__version__",
    "constrained_beam_search",
    "fit",
    "load",
]

__getattr__ = lazy(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
