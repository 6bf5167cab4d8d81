"""What a stage reads of those before it, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onerec.errors import DataError
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import StageRecord, read_record, require

if TYPE_CHECKING:
    from onerec.data import SessionSet
    from onerec.inference import Mixture, Recommender
    from onerec.tokenizer import Catalog

WHOLE = "whole"  # folder of the stage `mixture`


@dataclass(frozen=True)
class Inputs:
    """The stages of a run, as those after them see them.

    Attributes:
        directory: The run's directory.
    """

    directory: Path

    @property
    def has_feedback(self) -> bool:
        """Whether the log of the run has what a reward model needs."""
        return (self.directory / "sessions" / "exposed.parquet").is_file()

    def require(self, name: str) -> StageRecord:
        """The record of a stage that another one reads.

        Raises:
            OneRecError: The stage has not been made, or is damaged; the message says what to run.
        """
        return require(self.directory, name)

    def fingerprints(self, *names: str) -> dict[str, str]:
        """The fingerprints of stages that another one reads; raises as `require` does."""
        return {name: self.require(name).fingerprint for name in names}

    def _made_from(self, name: str, source: str) -> StageRecord | None:
        """The stage `name` if it was made from the present stage `source`; no file is looked at."""
        made, present = (read_record(self.directory / stage) for stage in (name, source))
        if made is None or present is None or made.inputs.get(source) != present.fingerprint:
            return None
        return made

    def reward_model(self) -> StageRecord | None:
        """The stage `reward` if it belongs to `sessions`; its files are not looked at."""
        return self._made_from("reward", "sessions")

    def alignment(self, settings: Settings) -> StageRecord | None:
        """The stage `align` if it belongs to `pretrain`; its files are not looked at.

        Args:
            settings: With `align.iterations` of 0 there is none in any case.
        """
        if settings.align.iterations == 0:
            return None
        return self._made_from("align", "pretrain")

    def served_model(self, settings: Settings) -> StageRecord:
        """The stage whose model is measured and served: `align` if the run has one that changed it.

        Where alignment took no iteration its model is the pretrained one: the run is then like one
        without alignment, and nothing compares the model with itself.

        Raises:
            OneRecError: There is no trained model, or the stage is damaged.
        """
        pretrain = self.require("pretrain")
        aligned = self.alignment(settings)
        if aligned is None or aligned.summary.get("chosen") == 0:
            return pretrain
        return self.require("align")

    def recommender(
        self, stage: str, catalog: Catalog, mixture: Mixture | None = None
    ) -> Recommender:
        """The model of `pretrain` or `align`."""
        from onerec.inference import Recommender
        from onerec.model import OneRec

        model = OneRec.from_pretrained(self.directory / stage / "model")
        return Recommender(model, catalog, batching=True, mixture=mixture)

    def aligned(self, settings: Settings) -> bool:
        """Whether the run has a reward model and an alignment, which are for sessions."""
        wanted = settings.align.iterations > 0 and self.has_feedback
        return wanted and not self.ranks_items(settings)

    def ranks_items(self, settings: Settings) -> bool:
        """Whether the run recommends lists of items, ranked by a mixture, instead of sessions."""
        sessions = self.require("sessions").summary
        return bool(sessions["session_length"] == 1 and settings.model["item_loss"] > 0)

    def mixture(self, settings: Settings, *, whole: bool = False) -> Mixture | None:
        """The mixture of a run that ranks items; None for a run of sessions.

        Args:
            settings: Of the run.
            whole: With the counts of the whole log, to recommend by; otherwise with those of
                train, to be measured.

        Raises:
            OneRecError: The stage has not been made, or is damaged.
        """
        if not self.ranks_items(settings):
            return None
        from onerec.inference import Mixture

        self.require("mixture")
        folder = self.directory / "mixture"
        return Mixture.load(folder / WHOLE if whole else folder)

    def load(self) -> tuple[SessionSet, Catalog]:
        """The sessions and the catalogue of the run.

        Raises:
            DataError: A file is damaged, or the catalogue is not about the items of the sessions.
        """
        from onerec.data import SessionSet
        from onerec.tokenizer import Catalog

        data = SessionSet.load(self.directory / "sessions")
        catalog = Catalog.load(self.directory / "tokenize")
        path = self.directory / "tokenize" / "catalog.parquet"
        wanted = np.asarray(data.items["item_id"].to_pylist(), dtype=catalog.item_ids.dtype)
        if len(wanted) != len(catalog):
            raise DataError(
                f"{path}: wanted the {len(wanted)} items of the sessions, got {len(catalog)}"
            )
        differ = np.flatnonzero(wanted != catalog.item_ids)
        if len(differ):
            row = int(differ[0])
            ours, theirs = (
                wanted[row : row + 1].tolist()[0],
                catalog.item_ids[row : row + 1].tolist()[0],
            )
            raise DataError(
                f"{path}, column 'item_id', row {row}: wanted item {ours!r} of the sessions, "
                f"got {theirs!r}"
            )
        return data, catalog
