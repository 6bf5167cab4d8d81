"""Serving over HTTP: one engine thread behind a bounded queue, hot swap, metrics."""
