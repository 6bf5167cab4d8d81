"""The stage `tokenize`, from item vectors to semantic ids and their trie."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onerec.errors import OneRecError
from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings
from onerec.pipeline.stage import StageResult, run_stage, write_json
from onerec.progress import Listener


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `tokenize` from the stage `sessions`."""
    directory, config = inputs.directory, settings.tokenize

    def build(folder: Path) -> dict[str, Any]:
        from onerec.data import SessionSet
        from onerec.tokenizer import Catalog, ResidualQuantizer

        items = SessionSet.load(directory / "sessions")
        levels, size = config.shape_for(items.n_items)
        if config.distinct in ("cap", "distinct") and size**levels < items.n_items:
            raise OneRecError(
                f"{size} codes at {levels} levels are {size**levels:,} semantic ids, "
                f"too few for {items.n_items:,} distinct ones: raise --tokenize.codebook_size or "
                "--tokenize.levels"
            )
        if size > items.n_items:
            raise OneRecError(
                f"--tokenize.codebook_size {size}: wanted at most the {items.n_items:,} items, for "
                "no cluster of a level is empty"
            )
        quantizer = ResidualQuantizer(
            levels,
            size,
            method=config.method,
            distinct=config.distinct,
            max_iter=config.max_iter,
            random_state=config.seed,
        )
        with listener.progress("tokenize") as report:
            quantizer.fit(items.embeddings, progress=report)
        quantizer.save_pretrained(folder / "quantizer")
        catalog = Catalog.build(
            items.items["item_id"].to_pylist(),
            quantizer.sids_,
            size,
            quantizer=quantizer.fingerprint,
        )
        catalog.save(folder)
        write_json(
            folder / "metrics.json",
            {"quantizer": quantizer.report_, "catalog": catalog.collision_report()},
        )
        spread = float(items.embeddings.var(axis=0, dtype=np.float64).sum())
        return {
            "items": items.n_items,
            "levels": catalog.levels,
            "codebook_size": size,
            "distinct_ids": catalog.trie.n_leaves,
            "error_share_of_variance": quantizer.report_["mse"] / spread if spread else 0.0,
        }

    return run_stage(
        directory,
        "tokenize",
        config=asdict(config),
        inputs=inputs.fingerprints("sessions"),
        code=["tokenizer", "pipeline/tokenize.py", "pipeline/settings.py"],
        build=build,
        say=listener.say,
    )
