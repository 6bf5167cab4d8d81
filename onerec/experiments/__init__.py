"""Experiments that train and compare recommenders: what `onerec bench quality` and `ladder` run."""
