"""The `onerec` command: a verb per file; `stage.py` decides what has to run."""
