"""The HTML report of a run, from the files of its directory."""

from onerec.report.render import render_report

__all__ = ["render_report"]
