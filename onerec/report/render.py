"""One self-contained HTML file about a run, made from the files of its directory alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from onerec._version import __version__
from onerec.errors import DataError
from onerec.evaluation.result import Measure
from onerec.files import atomic_write
from onerec.report import plots, sections
from onerec.report.read import Missing, label
from onerec.report.summary import summary

# What reading a file of other contents than wanted can raise.
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError)


# Section -> the stage without which it is left out.
_OPTIONAL = {"reward": "reward", "alignment": "align", "days": "updates"}


@dataclass
class Section:
    """A part of the page.

    Attributes:
        name: Anchor, and the block of the template.
        title: Heading.
        data: What the template shows; empty when `problem` says why there is nothing.
        problem: Why the section is empty, or None.
    """

    name: str
    title: str
    data: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def render_report(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    stages: Sequence[str] | None = None,
    leave_out: Collection[str] = (),
) -> Path:
    """Writes the report of a run.

    Reads config.yaml, */stage.json, sessions/ (funnel.json, items.parquet, sessions.parquet),
    tokenize/ (metrics.json, catalog.parquet), pretrain/metrics.jsonl, reward/metrics.json, align/
    (alignment.json, pairs), evaluate/evaluation.json and updates.jsonl. A stage that is missing or
    damaged is named in its section; reward model, alignment and updates have one only where they
    were made.

    Args:
        run_dir: The run's directory.
        out: The file to write; `run_dir/report.html` by default.
        stages: The stages of a run in their order; one of them that was not made is told. By
            default those that were made, in the order of their times.
        leave_out: Of "reward" and "align", the stages that get no section although they were made.

    Returns:
        The path written.

    Raises:
        DataError: `run_dir` is not a directory.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise DataError(f"{run}: no such run directory")
    parts = [
        _section(run, *part)
        for part in (
            ("summary", "Summary", summary),
            ("days", "Every day", sections.days),
            ("data", "Data", sections.data),
            ("ids", "Semantic ids", sections.semantic_ids),
            ("tree", "Tree of ids", sections.tree),
            ("training", "Training", sections.training),
            ("router", "Router load", sections.router),
            ("reward", "Reward model", sections.reward_model),
            ("alignment", "Preference alignment", sections.alignment),
            ("metrics", "Ranking", sections.ranking),
            ("sessions", "Generated sessions", sections.sessions),
            ("latency", "Latency", sections.latency),
            ("samples", "Samples", sections.samples),
            ("setup", "Configuration and versions", partial(sections.setup, stages=stages)),
        )
        # A log without feedback has neither; the table of stages says that they were not run.
        if (
            (stage := _OPTIONAL.get(part[0])) is None
            or (stage not in leave_out and (run / stage).is_dir())
        )
        and not (part[0] == "sessions" and sections.only_lists(run))
    ]
    path = run / "report.html" if out is None else Path(out)
    contents = [(part.name, part.title) for part in parts]
    write_page(path, "report.html", run.resolve().name, contents, sections=parts)
    return path


def write_page(
    path: Path, template: str, title: str, contents: list[tuple[str, str]], **values: Any
) -> None:
    """Writes a page of a template, whole or not at all.

    Args:
        path: The file.
        template: Its name in the folder of templates.
        title: Heading of the page.
        contents: Anchor and heading of each section.
        **values: What the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=_number, interval=_interval, label=label, percent="{:+.1f}%".format
    )
    page = environment.get_template(template).render(
        title=title,
        contents=contents,
        colors=plots.color_rules(dark=False),
        dark_colors=plots.color_rules(dark=True),
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(run: Path, name: str, title: str, build: Callable[[Path], dict[str, Any]]) -> Section:
    try:
        return Section(name, title, build(run))
    except Missing as error:
        stage = error.path.split("/")[0]
        problem = f"Nothing to show: {error.path} is missing (stage {stage} has not been run)."
    except (DataError, OSError, pa.ArrowException, *_DAMAGE) as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"The files of this stage cannot be read. {detail}"
    return Section(name, title, problem=problem)


def _number(value: Any) -> str:
    """A number for people: 12,345, 0.0532, 41.70, 5; other values as they are."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer():
        return f"{int(value):,}"
    size = abs(value)
    if size < 0.001:
        return f"{value:.2g}"
    return f"{value:.4f}" if size < 1 else f"{value:.2f}" if size < 1000 else f"{value:,.0f}"


def _interval(measure: Measure) -> str:
    """Its ends; nothing where there is none, or where they are the value as it is shown."""
    if measure.low is None or measure.high is None:
        return ""
    low, high = _number(measure.low), _number(measure.high)
    return "" if low == high == _number(measure.value) else f"[{low}, {high}]"
