"""`onerec tokenize`: the stage `tokenize`, from item vectors to semantic ids and their trie."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from onerec.cli import console
from onerec.cli.config import Settings
from onerec.cli.stage import StageResult, require, run_stage, write_json
from onerec.cli.verb import stage_verb
from onerec.errors import OneRecError


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/tokenize` from `directory/sessions`."""
    upstream = require(directory, "sessions")
    config = settings.tokenize

    def build(folder: Path) -> dict[str, Any]:
        from onerec.data import SessionSet
        from onerec.tokenizer import Catalog, ResidualQuantizer

        items = SessionSet.load(directory / "sessions")
        size = config.size_for(items.n_items)
        if config.distinct in ("cap", "distinct") and size**config.levels < items.n_items:
            raise OneRecError(
                f"{size} codes at {config.levels} levels are {size**config.levels:,} semantic ids, "
                f"too few for {items.n_items:,} distinct ones: raise --tokenize.codebook_size or "
                "--tokenize.levels"
            )
        if size > items.n_items:
            raise OneRecError(
                f"--tokenize.codebook_size {size}: wanted at most the {items.n_items:,} items, for "
                "no cluster of a level is empty"
            )
        quantizer = ResidualQuantizer(
            config.levels,
            size,
            method=config.method,
            distinct=config.distinct,
            max_iter=config.max_iter,
            random_state=config.seed,
        )
        with console.progress("tokenize") as report:
            quantizer.fit(items.embeddings, progress=report)
        quantizer.save_pretrained(folder / "quantizer")
        catalog = Catalog.build(items.items["item_id"].to_pylist(), quantizer.sids_, size)
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
        inputs={"sessions": upstream.fingerprint},
        code=["tokenizer", "cli/tokenize.py", "cli/config.py"],
        build=build,
        say=console.say,
    )


def main(argv: list[str]) -> None:
    stage_verb(
        "tokenize",
        "Turns item vectors into balanced semantic ids, a catalogue and a trie, in OUT/tokenize.",
        argv,
        ["tokenize"],
        make,
    )
