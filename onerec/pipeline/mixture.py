"""The stage `mixture`, weights of generator, dense head and counts fitted on valid.

Only a run that ranks items has the stage. Its folder holds the mixture with the counts of train,
which is measured, and in `whole` the same weights with the counts of the whole log, which is
served: what people take today is in the held-out sessions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec.errors import OneRecError
from onerec.pipeline.inputs import WHOLE, Inputs
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import StageResult, run_stage
from onerec.progress import Listener

if TYPE_CHECKING:
    from onerec.data import SessionSet
    from onerec.inference import Mixture

SESSIONS = 4000  # of valid, at most
_BEAMS = 50
_TOP = 50
_BLOCK = 256


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `mixture` from the trained model and the sessions of valid."""
    if not inputs.ranks_items(settings):
        most = inputs.require("sessions").summary["session_length"]
        raise OneRecError(
            f"mixture: wanted a run that ranks items (sessions of one item and a dense head), "
            f"sessions have up to {most} items and model.item_loss is {settings.model['item_loss']}"
        )
    directory = inputs.directory
    served = inputs.served_model(settings)
    read = inputs.fingerprints("sessions", "tokenize")
    read[served.stage] = served.fingerprint

    def build(folder: Path) -> dict[str, Any]:
        from onerec.evaluation.counting import count_evidence
        from onerec.inference import Mixture, NextItems

        data, catalog = inputs.load()
        recommender = inputs.recommender(served.stage, catalog)
        valid = data.samples("valid").sample(SESSIONS)
        histories = [catalog.item_ids[valid.history(i)].tolist() for i in range(len(valid))]
        summary: dict[str, Any] = {"sessions": len(valid)}
        counts = count_evidence(data)
        requests: dict[str, list[tuple[NextItems, Any]]] = {"masked": [], "unmasked": []}
        with listener.progress("mixture") as report:
            for number, (history, rows_of) in enumerate(requests.items()):
                for begin in range(0, len(valid), _BLOCK):
                    rows = range(begin, min(begin + _BLOCK, len(valid)))
                    found = recommender.next_items(
                        histories[begin : rows.stop],
                        beam_width=_BEAMS,
                        dense_top=_TOP,
                        counts=counts,
                        exclude_history=history == "masked",
                    )
                    rows_of += [
                        (one, valid.target(row)) for one, row in zip(found, rows, strict=True)
                    ]
                    report(number * len(valid) + rows.stop, len(requests) * len(valid), history)
        mixture = Mixture.fit(counts, **requests)
        save(folder, mixture, data)
        for history in requests:
            weights = getattr(mixture, history).tolist()
            summary[f"weights_{history}"] = [round(w, 4) for w in weights]
        return summary

    return run_stage(
        directory,
        "mixture",
        config={},
        inputs=read,
        code=["inference", "model", "ops", "evaluation/counting.py", "pipeline/mixture.py"],
        build=build,
        say=listener.say,
    )


def save(folder: Path, mixture: Mixture, data: SessionSet) -> None:
    """Writes a mixture with the counts of train, and beside it with those of the whole log."""
    from onerec.evaluation.counting import count_evidence

    mixture.save(folder)
    (folder / WHOLE).mkdir()
    replace(mixture, counts=count_evidence(data, whole=True)).save(folder / WHOLE)
