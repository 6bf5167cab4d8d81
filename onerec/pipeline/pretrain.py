"""`onerec pretrain`: the stage `pretrain`, next-token training of the generator.

The unfinished stage keeps its checkpoints, so that the same command after a kill goes on from the
newest one and ends with the same weights. On many devices: `torchrun -m onerec pretrain --out DIR`;
the first process makes the stage and the others take part in the training.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.cli import console
from onerec.cli.config import Settings, parse_command
from onerec.cli.inputs import load_data
from onerec.cli.stage import StageResult, join_stage, rank, require, run_stage
from onerec.cli.verb import stage_verb

SECTIONS = ("model", "train")


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/pretrain` from `directory/sessions` and `directory/tokenize`."""
    return run_stage(
        directory,
        "pretrain",
        **_described(directory, settings),
        say=console.say,
        resumable=True,
        scratch=["checkpoints"],
    )


def _described(directory: Path, settings: Settings) -> dict[str, Any]:
    """The stage's configuration, inputs, code and build."""
    sessions, tokens = require(directory, "sessions"), require(directory, "tokenize")
    from onerec.training.config import FREE_ON_RESUME

    fixed = {k: v for k, v in asdict(settings.train).items() if k not in FREE_ON_RESUME}

    def build(folder: Path) -> dict[str, Any]:
        import torch

        from onerec.model import OneRec, OneRecConfig
        from onerec.training import pretrain

        data, catalog = load_data(directory)
        knows_items = settings.model["item_loss"] > 0 or settings.model["legal_softmax"]
        config = OneRecConfig(
            codebook_size=catalog.codebook_size,
            levels=catalog.levels,
            session_length=settings.sessions.length,
            n_items=len(catalog) if knows_items else 0,
            vector_dim=data.embeddings.shape[1] if knows_items else 0,
            **settings.model,
        )
        torch.manual_seed(settings.train.seed)
        model = OneRec(config)
        if knows_items:
            model.set_catalog(catalog.sids, data.embeddings)
        train, valid = data.samples("train"), data.samples("valid")
        with console.progress("pretrain") as report:
            result = pretrain(
                model, train, valid, catalog.sids, settings.train, folder, progress=report
            )
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "samples": len(train),
            "steps": result.steps,
            "selected_step": result.selected_step,
            "valid_loss": result.valid_loss,
            "resumed_from": result.resumed_from,
        }

    return {
        "config": {"model": settings.model, "train": fixed},
        "inputs": {"sessions": sessions.fingerprint, "tokenize": tokens.fingerprint},
        "code": ["model", "training", "ops", "cli/pretrain.py"],
        "build": build,
    }


def main(argv: list[str]) -> None:
    if rank():
        command = parse_command("pretrain", "", argv, SECTIONS)
        described = _described(command.out, command.settings)
        join_stage(command.out, "pretrain", **described)
        return
    stage_verb(
        "pretrain",
        "Trains the generator to write the next session, in OUT/pretrain. The same command after "
        "a kill goes on from the newest checkpoint. On several devices: torchrun "
        "--nproc-per-node N -m onerec pretrain --out DIR.",
        argv,
        SECTIONS,
        make,
    )
