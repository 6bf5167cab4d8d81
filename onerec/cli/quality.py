"""`onerec bench quality`: generator, dense head and baselines on one data set, as one table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.command import add_reading, given_names
from onerec.cli.options import Parser
from onerec.experiments.compare import cell
from onerec.experiments.quality import Options, run


def show(record: dict[str, Any]) -> None:
    """Prints the table."""
    table = Table("row", "seeds", box=None, pad_edge=False)
    for column in ("masked valid", "test", "unmasked valid", "test", "minutes", "test - SASRec"):
        table.add_column(column, justify="right")
    for row in record["rows"]:
        recall = [
            f"{cell(row, split, history, 'recall@10')['value']:.4f}"
            for history in ("masked", "unmasked")
            for split in ("valid", "test")
        ]
        against = cell(row, "test", "masked", "recall@10")["difference"]
        table.add_row(
            escape(row["row"]),
            str(len(row["seeds"])),
            *recall,
            f"{row['cost'].get('train_seconds', 0.0) / 60:.1f}",
            "" if against is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*against),
        )
    console.stdout().print("Recall@10")
    console.stdout().print(table)


def main(argv: list[str]) -> None:
    """`onerec bench quality`; called by the verb `bench`."""
    parser = Parser(
        "bench quality",
        "Trains the generator and its baselines on a log and compares them under one protocol "
        "(docs/quality.md).",
        usage="--data DIR [options]",
    )
    parser.add_argument("--data", type=str, required=True, help="folder of the log")
    add_reading(parser)
    parser.add_argument(
        "--preset",
        type=Literal["cpu", "gpu", "tokenizers"],
        default="cpu",
        help="sizes of the networks; tokenizers: the generator of cpu on the ids of each",
    )
    parser.add_argument(
        "--out", type=str, default=None, help="folder of the runs; runs/quality-DATA-PRESET"
    )
    parser.add_argument(
        "--systems", nargs="*", default=[], help="systems of the preset; all by default"
    )
    optional = {
        "seeds": (int, "trainings of each system instead of the preset's"),
        "epochs": (float, "epochs of each training instead of the preset's"),
        "max_users": (int, "measure a seeded sample of so many users"),
    }
    for name, (kind, text) in optional.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help=text)
    parser.add_argument("--levels", type=int, default=3, help="codes of a semantic id, L")
    parser.add_argument("--codebook_size", type=int, default=256, help="codes of a level, K")
    parser.add_argument("--beam_width", type=int, default=50, help="beams of the generators")
    parser.add_argument(
        "--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to train"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at a time, each with its share of the cores"
    )
    parser.add_argument(
        "--kept", action="store_true", help="train nothing: the table of the finished trainings"
    )
    given = parser.parse(argv)
    parser.check_positive(
        given, "seeds", "epochs", "max_users", "levels", "codebook_size", "beam_width", "jobs"
    )
    data = Path(given.data)
    chosen = {field.name: getattr(given, field.name) for field in dataclasses.fields(Options)}
    chosen["columns"] = given_names(given.columns)
    chosen["out"] = Path(given.out or f"runs/quality-{data.resolve().name}-{given.preset}")
    options = Options(**{**chosen, "data": data, "systems": tuple(given.systems)})
    record = run(options, console.LISTENER)
    if given.json:
        console.print_json(record)
    else:
        show(record)
