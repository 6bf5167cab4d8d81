"""`onerec bench ladder`: sizes, experts and sessions against true watch time, as one table."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onerec.cli import console, sessions, simulate
from onerec.cli.bench import published_environment
from onerec.cli.config import SECTIONS, Settings, section_class
from onerec.cli.stage import locked, run_stage, write_json
from onerec.errors import OneRecError


@dataclass(frozen=True)
class Options:
    """What the command line chose.

    Attributes:
        out: Folder of the world and of the runs.
        rungs: Names to train and show; all when empty.
        seeds: Trainings of each rung.
        users: Users of the world.
        epochs: Passes over the training sessions.
        device: "auto", "cpu" or "cuda".
    """

    out: Path
    rungs: tuple[str, ...] = ()
    seeds: int = 1
    users: int = 1000
    epochs: float = 4.0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def run(options: Options) -> dict[str, Any]:
    """Makes the world, trains and values the rungs that are missing, and makes the table.

    Returns:
        The record, as JSON values.

    Raises:
        OneRecError: An unknown rung.
    """
    from datetime import UTC, datetime

    from onerec.data import SessionSet, World
    from onerec.evaluation.adapters import WorldRows
    from onerec.evaluation.ladder import RUNGS, Ladder, summarise

    chosen = [rung for rung in RUNGS if rung.name in options.rungs or not options.rungs]
    if unknown := set(options.rungs) - {rung.name for rung in chosen}:
        names = ", ".join(rung.name for rung in RUNGS)
        raise OneRecError(f"no rung {min(unknown)!r}; one of: {names}")
    with locked(options.out, "bench ladder"):
        inputs = _make(options)
        sets = [SessionSet.load(options.out / name / "sessions") for name in ("session", "next")]
        world = WorldRows(
            World.load(options.out / "world"),
            sets[0].sequences["user_id"].to_pylist(),
            sets[0].items["item_id"].to_pylist(),
        )
        ladder = Ladder(world, *sets, epochs=options.epochs, device=options.device)
        jobs = [(rung, seed) for rung in chosen for seed in range(options.seeds)]
        found = []
        for place, (rung, seed) in enumerate(jobs):
            title = f"[{place + 1} of {len(jobs)}] {rung.name}, seed {seed}"
            found.append((rung, seed, _made(options, ladder, inputs, rung, seed, title)))
        record = {
            "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
            "preset": "ladder",
            "data": {
                "name": "simulated world",
                "users": options.users,
                "items": len(ladder.sids),
                "train_sessions": len(ladder.train["session"]),
                "test_sessions": len(ladder.test),
            },
            "options": {"seeds": options.seeds, "epochs": options.epochs},
            "environment": published_environment(),
            **summarise(found, ladder.test.user_row),
        }
        write_json(options.out / "ladder.json", record)
    return record


def _make(options: Options) -> dict[str, str]:
    """World and both session sets; their fingerprints."""
    from onerec.data import SessionConfig, SimulatorConfig

    made = {name: section_class(name)() for name in SECTIONS if name != "model"}
    made["world"] = SimulatorConfig(
        n_users=options.users, n_items=1000, n_creators=100, requests_per_user=16.0
    )
    settings = Settings(data=None, kind="auto", preset="tiny", model={}, **made)
    simulate.make(options.out, settings)
    prints = {}
    rules: dict[str, Any] = {
        "session": {"rule": "request", "length": 5},
        "next": {"rule": "next", "length": 1},
    }
    for name, rule in rules.items():
        made["sessions"] = SessionConfig(**rule, exposed_sessions=0)
        data = str(options.out / "world")
        settings = Settings(data=data, kind="auto", preset="tiny", model={}, **made)
        prints[name] = sessions.make(options.out / name, settings).record.fingerprint
    return prints


def _made(
    options: Options, ladder: Any, inputs: dict[str, str], rung: Any, seed: int, title: str
) -> dict[str, Any]:
    """What a rung's training left, trained now or found whole."""

    def build(folder: Path) -> dict[str, Any]:
        with console.progress(title) as report:
            facts: dict[str, Any] = ladder.climb(rung, seed, folder / "training", report)
        write_json(folder / "facts.json", facts)
        return {key: value for key, value in facts.items() if key != "seconds"}

    folder = options.out / rung.name
    folder.mkdir(exist_ok=True)
    run_stage(
        folder,
        f"seed-{seed}",
        config={**dataclasses.asdict(rung), "seed": seed, "epochs": options.epochs},
        inputs=inputs,
        code=[],
        build=build,
        say=console.say,
        resumable=True,
        scratch=["training"],
    )
    facts: dict[str, Any] = json.loads((folder / f"seed-{seed}" / "facts.json").read_text())
    return facts


def show(record: dict[str, Any]) -> None:
    """Prints the table and the comparisons."""
    from rich.table import Table

    table = Table("rung", box=None, pad_edge=False)
    for column in ("parameters", "active", "MFLOP an item", "true seconds a session", "minutes"):
        table.add_column(column, justify="right")
    for row in record["rows"]:
        table.add_row(
            f"{row['size']} {'experts' if row['experts'] else 'dense'} {row['target']}",
            f"{row['parameters']:,.0f}",
            f"{row['active_parameters']:,.0f}",
            f"{row['flops'] / 1e6:.2f}",
            "{:.1f} [{:.1f}, {:.1f}]".format(*row["watch_seconds"]),
            f"{row['train_seconds'] / 60:.1f}",
        )
    console.stdout().print(table)
    for pair in record["pairs"]:
        console.stdout().print(
            f"{pair['claim']}: {pair['first']} - {pair['second']} "
            "{:+.1f} [{:+.1f}, {:+.1f}]".format(*pair["difference"])
        )


def main(argv: list[str]) -> None:
    """`onerec bench ladder`; called by the verb `bench`."""
    from onerec.cli.options import Parser

    parser = Parser(
        "bench ladder",
        "Trains generators of three sizes, dense and with experts, on sessions and on next items "
        "of a simulated world, and values their sessions by the truth (docs/quality.md).",
        usage="[options]",
    )
    defaults = Options(Path("runs/ladder"))
    parser.add_argument("--out", type=str, default=str(defaults.out), help="folder of the runs")
    parser.add_argument("--rungs", nargs="*", default=[], help="names of rungs; all by default")
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help="trainings of each rung")
    parser.add_argument("--users", type=int, default=defaults.users, help="users of the world")
    parser.add_argument(
        "--epochs", type=float, default=defaults.epochs, help="passes over the training sessions"
    )
    parser.add_argument(
        "--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to train"
    )
    given = parser.parse(argv)
    parser.check_positive(given, "seeds", "users", "epochs")
    chosen = {field.name: getattr(given, field.name) for field in dataclasses.fields(Options)}
    record = run(Options(**{**chosen, "out": Path(given.out), "rungs": tuple(given.rungs)}))
    if given.json:
        console.print_json(record)
    else:
        show(record)
