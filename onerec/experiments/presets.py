"""What `onerec bench quality` trains: the networks of a table and their settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from onerec.model.config import preset_fields
from onerec.pipeline.sasrec import ADAM, RECIPE
from onerec.pipeline.settings import preset_values

REFERENCE = "SASRec, cross entropy"


@dataclass(frozen=True)
class System:
    """A network of the table and how it is trained.

    Attributes:
        name: Folder of its runs.
        row: Name of its row; of a generator with a dense head, the beginning of three.
        network: What it is.
        model: Fields of its config, less those that the data decide.
        train: Fields of TrainConfig.
        ids: Tokenizer of a generator; "" for networks over items.
        eval_epochs: Epochs between two validations.
        seeds: Trainings, with seeds 0, 1, ...
    """

    name: str
    row: str
    network: Literal["popularity", "sasrec", "onerec"]
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    ids: str = ""
    eval_epochs: float = 1.0
    seeds: int = 1


_ONEREC = {
    "history_tokens": "items",
    "encoder": "causal",
    "n_heads": 4,
    "n_experts": 0,
    "share_codes": False,
    "legal_softmax": True,
    "item_loss": 1.0,
    "item_dropout": 0.3,
    "vector_dropout": 0.5,
}
_SMALL = {"n_heads": 2, "d_model": 64, "d_ff": 128, "encoder_layers": 2, "decoder_layers": 1}
_ONEREC_CPU = {
    **_ONEREC,
    **_SMALL,
    "history_length": 50,
    "dropout": 0.3,
    "decoder_dropout": 0.1,
    "item_negatives": 1024,
}
# Codes and collision digit come with the ids.
_TIGER = {
    name: value
    for name, value in preset_fields("tiger").items()
    if name not in ("codebook_size", "levels", "session_length")
}

PRESETS: dict[str, tuple[System, ...]] = {
    # Two cores: SASRec and OneRec took half an hour a seed, on one thread.
    "cpu": (
        System("popularity", "popularity", "popularity"),
        System(
            "sasrec-ce",
            REFERENCE,
            "sasrec",
            {},
            RECIPE,
            eval_epochs=3,
            seeds=3,
        ),
        System(
            "sasrec-bce",
            "SASRec, binary loss",
            "sasrec",
            {"loss": "bce", "negatives": 1},
            {**ADAM, "epochs": 60, "batch_size": 256, "grad_accumulation": 4},
            eval_epochs=6,
        ),
        System(
            "onerec",
            "OneRec",
            "onerec",
            _ONEREC_CPU,
            {"lr": 2e-3, "epochs": 16, "batch_size": 256, "grad_accumulation": 8},
            ids="balanced",
            eval_epochs=4,
            seeds=3,
        ),
        # The default network of `onerec run`, on its ids.
        System(
            "items",
            "OneRec, preset items",
            "onerec",
            preset_fields("items"),
            {
                name.removeprefix("train."): value
                for name, value in preset_values("items").items()
                if name in ("train.lr", "train.epochs", "train.grad_accumulation")
            }
            | {"batch_size": 256},
            ids="balanced",
            eval_epochs=2,
            seeds=3,
        ),
        # The paper's encoder: an encoding serves one prefix, at several times the work.
        System(
            "onerec-bidirectional",
            "OneRec, bidirectional",
            "onerec",
            {**_ONEREC_CPU, "encoder": "bidirectional"},
            {"lr": 2e-3, "epochs": 16, "batch_size": 256},
            ids="balanced",
            eval_epochs=4,
        ),
        System(
            "tiger",
            "TIGER",
            "onerec",
            {**_TIGER, **_SMALL, "dropout": 0.0},
            {"lr": 2e-3, "epochs": 18, "batch_size": 128, "weight_decay": 0.035},
            ids="rqvae",
            eval_epochs=3,
        ),
    ),
    # One H200.
    "gpu": (
        System("popularity", "popularity", "popularity"),
        System(
            "sasrec-ce",
            REFERENCE,
            "sasrec",
            {},
            {**ADAM, "epochs": 30, "batch_size": 256},
            eval_epochs=2,
            seeds=5,
        ),
        System(
            "onerec",
            "OneRec",
            "onerec",
            {
                **_ONEREC,
                "history_length": 50,
                "d_model": 256,
                "d_ff": 512,
                "encoder_layers": 3,
                "decoder_layers": 3,
                "dropout": 0.4,
                "decoder_dropout": 0.1,
            },
            {"lr": 1e-3, "epochs": 120, "batch_size": 512},
            ids="balanced",
            eval_epochs=10,
            seeds=5,
        ),
        System(
            "tiger",
            "TIGER",
            "onerec",
            {**_TIGER, "dropout": 0.2},
            {"lr": 1e-3, "epochs": 40, "batch_size": 1024, "weight_decay": 0.035},
            ids="rqvae",
            eval_epochs=4,
            seeds=3,
        ),
    ),
}


# One generator on the ids of each tokenizer: without the items' own embeddings, vectors and dense
# head, which would hide what the ids are worth.
PRESETS["tokenizers"] = tuple(
    System(
        f"onerec-{ids}",
        f"{ids} ids",
        "onerec",
        {
            **_SMALL,
            "history_tokens": "items",
            "encoder": "causal",
            "n_experts": 0,
            "share_codes": False,
            "history_length": 50,
            "dropout": 0.2,
            "decoder_dropout": 0.1,
        },
        {"lr": 2e-3, "epochs": 8, "batch_size": 256, "grad_accumulation": 8},
        ids=ids,
        eval_epochs=2,
    )
    for ids in ("balanced", "sequential", "faiss", "rqvae-unique")
)
