"""The stages of a run as functions, and the main job that makes them in order.

A stage NAME is `onerec.pipeline.NAME.make(settings, inputs, listener)`; `stage.py` decides what has
to be made.
"""

from onerec.pipeline.inputs import Inputs
from onerec.pipeline.job import make_stage, run
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import STAGES, StageRecord, StageResult

__all__ = [
    "STAGES",
    "Inputs",
    "Settings",
    "StageRecord",
    "StageResult",
    "make_stage",
    "run",
]
