"""`onerec align`: the stage `align`, iterative preference alignment of the pretrained model.

The unfinished stage keeps its checkpoints, so that the same command after a kill goes on from the
newest one. On many devices: `torchrun -m onerec align --out DIR`.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from onerec.cli import console
from onerec.cli.config import Settings, parse_command
from onerec.cli.inputs import load_data
from onerec.cli.stage import StageResult, join_stage, rank, require, run_stage
from onerec.cli.verb import stage_verb

_COLUMNS = (
    ("groups", "pairs"),
    ("candidates_per_s", "candidates/s"),
    ("reward_best", "reward"),
    ("win_rate", "wins"),
    ("winner_change", "winner, nats"),
    ("legality", "legality"),
    ("drift_seed", "drift, nats"),
    ("loss", "loss"),
)


def make(directory: Path, settings: Settings) -> StageResult:
    """Makes `directory/align` from the pretrained model, the reward model and the sessions."""
    return run_stage(
        directory,
        "align",
        **_described(directory, settings),
        say=console.say,
        resumable=True,
        scratch=["checkpoints"],
    )


def _described(directory: Path, settings: Settings) -> dict[str, Any]:
    """The stage's configuration, inputs, code and build."""
    names = ("sessions", "tokenize", "pretrain", "reward")
    inputs = {name: require(directory, name).fingerprint for name in names}
    from onerec.training.alignment.config import FREE_ON_RESUME

    fixed = {k: v for k, v in asdict(settings.align).items() if k not in FREE_ON_RESUME}

    def build(folder: Path) -> dict[str, Any]:
        from onerec.model import OneRec, RewardModel
        from onerec.training import align

        data, catalog = load_data(directory)
        model = OneRec.from_pretrained(directory / "pretrain" / "model")
        reward = RewardModel.from_pretrained(directory / "reward" / "model")
        with console.progress("align") as report:
            result = align(
                model,
                reward,
                data.samples("train"),
                data.samples("valid"),
                catalog,
                settings.align,
                folder,
                progress=report,
            )
        seed = {k: v for k, v in result.record["seed"].items() if k != "rewards"}
        return {
            "method": settings.align.method,
            "iterations": result.iterations,
            "chosen": result.chosen,
            "stopped": result.stopped,
            "weight": result.record["weight"],
            "seed": seed,
            "rounds": [
                {k: v for k, v in one.items() if k != "rewards"}
                for one in result.record["iterations"]
            ],
        }

    return {
        "config": fixed,
        "inputs": inputs,
        "code": ["model", "training", "inference", "ops", "cli/align.py"],
        "build": build,
    }


def show(folder: Path, summary: dict[str, Any]) -> None:
    """Prints what each iteration did."""
    table = Table(
        "iteration", box=box.SIMPLE, title=f"alignment, {summary['method']}", title_justify="left"
    )
    for _, name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate([summary["seed"], *summary["rounds"]]):
        cells = [row.get(key) for key, _ in _COLUMNS]
        mark = " *" if number == summary["chosen"] else ""
        table.add_row(
            f"{number or 'seed'}{mark}",
            *("" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.4g}" for x in cells),
        )
    console.stdout().print(table)
    if stale := max((row.get("stale_steps", 0) for row in summary["rounds"]), default=0):
        waited = sum(row["waited_s"] for row in summary["rounds"])
        console.stdout().print(
            f"asynchronous     candidates {stale} steps old, {waited:.1f} s waited"
        )
    if summary["stopped"]:
        console.stdout().print(escape(f"ended early      {summary['stopped']}"), soft_wrap=True)
    same = "" if summary["chosen"] else ", the pretrained model as it was"
    console.stdout().print(f"* chosen         {escape(str(folder / 'model'))}{same}")


def main(argv: list[str]) -> None:
    if rank():
        command = parse_command("align", "", argv, ["align"])
        join_stage(command.out, "align", **_described(command.out, command.settings))
        return
    stage_verb(
        "align",
        "Aligns the pretrained model with the reward model, in OUT/align: candidates by session "
        "beam search, winners and losers, preference loss beside next-token training. The same "
        "command after a kill goes on from the newest checkpoint. On several devices: torchrun "
        "--nproc-per-node N -m onerec align --out DIR.",
        argv,
        ["align"],
        make,
        show=show,
    )
