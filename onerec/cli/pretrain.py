"""`onerec pretrain`: next-token training of the generator."""

from __future__ import annotations

from onerec.cli import console
from onerec.cli.command import parse_command
from onerec.cli.verb import stage_verb
from onerec.pipeline import Inputs
from onerec.pipeline.pretrain import join
from onerec.pipeline.stage import rank

SECTIONS = ("model", "train")


def main(argv: list[str]) -> None:
    if rank():
        command = parse_command("pretrain", "", argv, SECTIONS)
        join(command.settings, Inputs(command.out), console.LISTENER)
        return
    stage_verb(
        "pretrain",
        "Trains the generator to write the next session, in OUT/pretrain. The same command after "
        "a kill goes on from the newest checkpoint. On several devices: torchrun "
        "--nproc-per-node N -m onerec pretrain --out DIR.",
        argv,
        SECTIONS,
    )
