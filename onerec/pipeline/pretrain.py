"""The stage `pretrain`, next-token training of the generator.

The unfinished stage keeps its checkpoints, so that the same command after a kill goes on from the
newest one and ends with the same weights. On many devices: `torchrun -m onerec pretrain --out DIR`;
the first process makes the stage and the others take part in the training.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from onerec.pipeline.inputs import Inputs
from onerec.pipeline.settings import Settings, knows_items
from onerec.pipeline.stage import StageResult, join_stage, run_stage
from onerec.progress import Listener


def make(settings: Settings, inputs: Inputs, listener: Listener) -> StageResult:
    """Makes the stage `pretrain` from the stages `sessions` and `tokenize`."""
    return run_stage(
        inputs.directory,
        "pretrain",
        **_described(settings, inputs, listener),
        say=listener.say,
        resumable=True,
        scratch=["checkpoints"],
    )


def _described(settings: Settings, inputs: Inputs, listener: Listener) -> dict[str, Any]:
    """The stage's configuration, inputs, code and build."""
    read = inputs.fingerprints("sessions", "tokenize")
    from onerec.training.config import FREE_ON_RESUME

    fixed = {k: v for k, v in asdict(settings.train).items() if k not in FREE_ON_RESUME}

    def build(folder: Path) -> dict[str, Any]:
        import torch

        from onerec.evaluation.watched import WATCHED, ranking_score
        from onerec.model import OneRec, OneRecConfig
        from onerec.training import pretrain

        data, catalog = inputs.load()
        fields = dict(settings.model)
        known = knows_items(fields)
        aligned = data.session_length > 1 and inputs.aligned(settings)
        if fields["encoder"] == "causal" and (data.funnel["rule"] != "next" or aligned):
            # Only the rule "next" has a target for every prefix, and alignment none for prefixes.
            fields["encoder"] = "bidirectional"
            listener.say("pretrain: whole sessions are learned: the encoder is bidirectional")
        config = OneRecConfig(
            codebook_size=catalog.codebook_size,
            levels=catalog.levels,
            session_length=data.session_length,
            n_items=len(catalog) if known else 0,
            vector_dim=data.embeddings.shape[1] if known else 0,
            **fields,
        )
        torch.manual_seed(settings.train.seed)
        model = OneRec(config)
        if known:
            model.set_catalog(catalog.sids, data.embeddings)
            model.leave_unseen(data.items["train_count"].to_numpy() == 0)
        train, valid = data.samples("train"), data.samples("valid")
        watched = valid.sample(WATCHED)
        score = None
        if known and len(watched):
            score = ranking_score(watched, catalog, exclude_history=data.exclude_history)
        with listener.progress("pretrain") as report:
            result = pretrain(
                model,
                train,
                watched,
                catalog.sids,
                settings.train,
                folder,
                score=score,
                progress=report,
            )
        if result.improving:
            listener.say(
                f"pretrain: still better at the end of {result.steps} steps: train longer "
                "(--train.epochs, --train.max_steps)"
            )
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "samples": len(train),
            "steps": result.steps,
            "selected_step": result.selected_step,
            "valid_loss": result.valid_loss,
            "valid_ndcg@10": result.valid_score,
            "improving": result.improving,
            "resumed_from": result.resumed_from,
        }

    return {
        "config": {"model": settings.model, "train": fixed},
        "inputs": read,
        "code": ["model", "training", "ops", "evaluation/watched.py", "pipeline/pretrain.py"],
        "build": build,
    }


def join(settings: Settings, inputs: Inputs, listener: Listener) -> None:
    """Takes part in a stage that the first process of the same launch makes."""
    join_stage(inputs.directory, "pretrain", **_described(settings, inputs, listener))
