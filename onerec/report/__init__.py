"""The HTML report of a run, and of two side by side, from the files of their directories."""

from onerec.report.compare import render_comparison
from onerec.report.render import render_report

__all__ = ["render_comparison", "render_report"]
