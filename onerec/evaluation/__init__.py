"""Evaluation: metrics with intervals, baselines, the harness and the report."""
