"""Generative recommendation in the manner of OneRec (arXiv 2502.18965)."""

from onerec._version import __version__

__all__ = ["__version__"]
