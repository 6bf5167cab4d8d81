"""The report's figures as inline SVG: no display, no global state, no texts from the data.

Item texts and tags stay in the HTML, where every script can be shown; figures hold only numbers
and this package's own words. Colors are CSS variables, so that a figure follows the page into dark
mode, and points tell their numbers as SVG titles. Panels side by side are SVGs of their own, which
a narrow screen stacks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from onerec.evaluation.result import Measure

SYSTEM_COLORS = {
    "model": "#2457c5",
    "pretrained": "#4a90a4",
    "generator": "#7a9be0",
    "SASRec": "#b5453c",
    "count ranker": "#1b9e77",
    "co-consumption": "#ccbb44",
    "transition": "#aa3377",
    "personal frequency": "#66ccee",
    "recent popularity": "#a6761d",
    "popularity": "#d9822b",
    "random": "#8a929c",
    "oracle": "#2b8a5e",
    "logged": "#7a4fb5",
}
LEVEL_COLORS = ("#2457c5", "#d9822b", "#2b8a5e", "#7a4fb5", "#b5453c", "#4a90a4")
TAG_COLORS = (
    "#4477aa",
    "#ee8866",
    "#228833",
    "#ccbb44",
    "#aa3377",
    "#66ccee",
    "#994455",
    "#997700",
    "#77aadd",
    "#44bb99",
    "#e377c2",
    "#6a51a3",
    "#b3de69",
    "#8c564b",
    "#1b9e77",
    "#fdb462",
    "#bc80bd",
    "#33508a",
    "#d95f5f",
    "#7f7f3f",
)
OTHER_TAG, NO_TAG = "#9aa1a9", "#dfe3e8"

INK, SOFT, GRAY, GRID, PAPER = "#1f242a", "#4a525c", "#8a929c", "#e6e9ed", "#ffffff"
# Color of a figure -> (name of its CSS variable, color in dark mode).
_NEUTRAL = {
    INK: ("ink", "#e6e9ed"),
    SOFT: ("axis", "#b4bcc6"),
    GRAY: ("gray", "#8a929c"),
    GRID: ("grid", "#333a43"),
    PAPER: ("paper", "#15191e"),
}


def _lighter(color: str) -> str:
    return "#" + "".join(f"{round(255 * (0.62 * part + 0.38)):02x}" for part in to_rgb(color))


_VARIABLES = _NEUTRAL | {
    color: (f"c{color[1:]}", _lighter(color))
    for color in (*SYSTEM_COLORS.values(), *LEVEL_COLORS, *TAG_COLORS)
    if color not in _NEUTRAL
}


def color_rules(*, dark: bool) -> str:
    """CSS declarations of the variables that figures take their colors from."""
    return " ".join(
        f"--{name}: {other if dark else color};" for color, (name, other) in _VARIABLES.items()
    )


_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def _svg(
    name: str, size: tuple[float, float], draw: Callable[..., None], *, panels: int = 1
) -> str:
    """A figure of `panels` axes, each of `size` inches, as <svg> elements with ids of their own."""
    with mpl.rc_context(_STYLE), mpl.rc_context({"svg.hashsalt": name}):
        figures = [Figure(figsize=size, layout="constrained") for _ in range(panels)]
        draw(*(figure.subplots() for figure in figures))
        return "\n".join(
            _element(figure, name if panels == 1 else f"{name}-{number}")
            for number, figure in enumerate(figures, start=1)
        )


def _element(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r"(?<=: )#[0-9a-f]{6}\b",
        lambda found: f"var(--{_VARIABLES[found[0]][0]})" if found[0] in _VARIABLES else found[0],
        text,
    )
    text = re.sub(r'<g id="tell:(.*?)">', r"<g><title>\1</title>", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r"(url\(|href=\")#", rf"\g<1>#{name}-", text)


def _tell(artists: Artist | Iterable[Artist], text: str) -> None:
    """Shows `text` where the pointer rests on one of the artists."""
    for artist in [artists] if isinstance(artists, Artist) else artists:
        artist.set_gid(f"tell:{text}")


def _thousands(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def data_shape(
    train_counts: npt.NDArray[np.int64], history_lengths: dict[str, npt.NDArray[np.int64]]
) -> str:
    """Item popularity by rank, and the lengths of the histories of each split."""

    def draw(left: Axes, right: Axes) -> None:
        counts = np.sort(train_counts)[::-1]
        counts = counts[counts > 0]
        if len(counts):
            left.loglog(np.arange(1, len(counts) + 1), counts, color=LEVEL_COLORS[0], lw=1.8)
        left.set_title("Item popularity")
        left.set_xlabel("rank of the item")
        left.set_ylabel("positive exposures in training")
        longest = max((int(v.max(initial=0)) for v in history_lengths.values()), default=0)
        at = np.unique(np.geomspace(1, max(longest, 2), 60).round())
        for (split, lengths), color in zip(history_lengths.items(), LEVEL_COLORS, strict=False):
            if len(lengths):
                share = np.searchsorted(np.sort(lengths), at, side="right") / len(lengths)
                right.step(at, share, where="post", color=color, label=split, lw=1.8)
        right.set_xscale("log")
        right.set_ylim(0, 1.03)
        right.set_title("History length")
        right.set_xlabel("items before the session")
        right.set_ylabel("share of sessions up to that length")
        if right.lines:
            right.legend(loc="lower right")
        for axis in (left.xaxis, left.yaxis, right.xaxis):
            _thousands(axis)
            axis.set_minor_locator(NullLocator())

    return _svg("data-shape", (4.7, 3.0), draw, panels=2)


def code_usage(sids: npt.NDArray[np.int32], codebook_size: int) -> str:
    """Items on each code of each level, most used first, beside the even share."""
    levels = sids.shape[1]

    def draw(*axes: Axes) -> None:
        for level, ax in enumerate(axes):
            sizes = np.sort(np.bincount(sids[:, level], minlength=codebook_size))[::-1]
            rank = np.arange(1, codebook_size + 1)
            color = LEVEL_COLORS[level % len(LEVEL_COLORS)]
            ax.fill_between(rank, sizes, step="mid", color=color, alpha=0.25, lw=0)
            ax.step(rank, sizes, where="mid", color=color, lw=1.4)
            even = len(sids) / codebook_size
            ax.axhline(even, color=INK, lw=1, ls=(0, (4, 3)))
            ax.set_ylim(0, 1.15 * max(float(sizes.max(initial=0)), even))
            ax.set_title(f"Level {level + 1}")
            ax.set_xlabel("code, by size")
            ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.set_ylabel("items (dashed: even)")

    return _svg("code-usage", (4.7, 2.6), draw, panels=levels)


def collisions(items_per_id: npt.NDArray[np.int64]) -> str:
    """How many ids hold one item, two items, and so on."""

    def draw(ax: Axes) -> None:
        most = int(items_per_id.max(initial=1))
        count = np.bincount(items_per_id, minlength=most + 1)[1:]
        for bar, (size, number) in zip(
            ax.bar(np.arange(1, most + 1), count, color=LEVEL_COLORS[0], width=0.8),
            enumerate(count, start=1),
            strict=True,
        ):
            _tell(bar, f"ids with {size} item{'s' * (size > 1)}: {number:,}")
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(0, max(10.0, count.max(initial=1) * 3.0))
        ax.set_xlim(0.3, max(most, 4) + 0.7)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        if most <= 12:
            for size, number in enumerate(count, start=1):
                if number:
                    ax.annotate(
                        f"{number:,}",
                        (size, number),
                        (0, 2),
                        textcoords="offset points",
                        ha="center",
                        va="bottom",
                        fontsize=8,
                    )
        ax.set_xlabel("items with the same id")
        ax.set_ylabel("ids")
        _thousands(ax.yaxis)

    return _svg("collisions", (4.6, 2.6), draw)


def id_tree(sids: npt.NDArray[np.int32], tags: npt.NDArray[np.int64], colors: Sequence[str]) -> str:
    """The tree of ids as an icicle: a row a level, a column an item in the order of ids.

    Args:
        sids: int [N, L].
        tags: int [N], index into `colors`, -1 for an item without a tag.
        colors: Of each tag; a prefix has the color of its most frequent tag, paler where fewer
            of its items have it.
    """
    order = np.lexsort(sids.T[::-1])
    sids, tags = sids[order], tags[order]
    palette = np.array([to_rgb(c) for c in (*colors, NO_TAG)])
    width = min(len(sids), 1600)
    columns = np.linspace(0, len(sids) - 1, width).round().astype(int)
    rows, boundaries = [], []
    for level in range(sids.shape[1]):
        starts = prefix_starts(sids, level + 1)
        dominant, share = dominant_tags(tags, starts, len(colors))
        rows.append(np.c_[palette[dominant], 0.15 + 0.85 * share])
        boundaries.append(np.flatnonzero(starts))
    rows.append(np.c_[palette[tags], np.ones(len(tags))])

    def draw(ax: Axes) -> None:
        n = len(sids)
        for row, color in enumerate(rows):
            top = len(rows) - row
            ax.imshow(
                color[columns][None],
                extent=(0, n, top - 0.94, top),
                aspect="auto",
                interpolation="nearest",
            )
        for level, at in enumerate(boundaries):
            if len(at) <= 300:
                top = len(rows) - level
                ax.vlines(at[1:], top - 0.94, top, color=PAPER, lw=0.7)
        ax.set_xlim(0, n)
        ax.set_ylim(0, len(rows))
        names = [f"level {i + 1}\n{len(b):,} prefixes" for i, b in enumerate(boundaries)]
        ax.set_yticks([len(rows) - i - 0.47 for i in range(len(rows))], [*names, "items"])
        ax.tick_params(axis="y", length=0)
        ax.grid(False)
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _thousands(ax.xaxis)
        ax.set_xlabel("items in the order of their ids")

    return _svg("id-tree", (8.2, 0.8 + 0.62 * len(rows)), draw)


def prefix_starts(sorted_sids: npt.NDArray[np.int32], length: int) -> npt.NDArray[np.bool_]:
    """Where a new prefix of `length` codes begins, bool [N], for ids in lexicographic order."""
    starts = np.ones(len(sorted_sids), dtype=bool)
    head = sorted_sids[:, :length]
    starts[1:] = (head[1:] != head[:-1]).any(axis=1)
    return starts


def dominant_tags(
    tags: npt.NDArray[np.int64], starts: npt.NDArray[np.bool_], n_tags: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The most frequent tag of each item's prefix and the share of the prefix that has it.

    Args:
        tags: int [N], -1 (none) to n_tags - 1, in the order of ids.
        starts: bool [N], where a new prefix begins.
        n_tags: Number of tags.

    Returns:
        int64 [N] tag (n_tags for none) and float64 [N] share.
    """
    group = np.cumsum(starts) - 1
    value = np.where(tags < 0, n_tags, tags)
    keys, counts = np.unique(group * (n_tags + 1) + value, return_counts=True)
    of_key = keys // (n_tags + 1)
    best = np.lexsort((-counts, of_key))
    first = best[np.r_[True, of_key[best][1:] != of_key[best][:-1]]]
    sizes = np.bincount(group)
    return (keys[first] % (n_tags + 1))[group], (counts[first] / sizes)[group]


def training(
    records: list[dict[str, Any]], uniform: float | None, kept: dict[str, Any] | None
) -> str:
    """Loss against steps, whole and by level; the validation whose model is kept is marked.

    Args:
        records: Of metrics.jsonl.
        uniform: Loss of a uniform guess of one code, ln K.
        kept: The validation whose model is kept.
    """
    train = [r for r in records if r["kind"] == "train"]
    valid = [r for r in records if r["kind"] == "valid"]
    levels = len((train or valid)[0]["loss_per_level"])

    def draw(left: Axes, right: Axes) -> None:
        if train:
            left.plot(
                [r["step"] for r in train],
                [r["loss"] for r in train],
                color=LEVEL_COLORS[0],
                lw=1.5,
                label="train",
            )
        if valid:
            left.plot(
                [r["step"] for r in valid],
                [r["loss"] for r in valid],
                color=LEVEL_COLORS[1],
                lw=1.8,
                marker="o",
                ms=3.5,
                label="valid",
            )
            for r in valid:
                (point,) = left.plot(r["step"], r["loss"], "o", ms=8, alpha=0.0)
                _tell(point, f"step {r['step']:,}: valid loss {r['loss']:.4f}")
        if kept is not None:
            left.plot(
                kept["step"],
                kept["loss"],
                marker="*",
                ms=12,
                color=LEVEL_COLORS[1],
                mec=PAPER,
                ls="none",
                label=f"kept, step {kept['step']:,}",
            )
        if uniform is not None:
            left.axhline(uniform * levels, color=GRAY, lw=1, ls=(0, (4, 3)), label="uniform guess")
        left.set_title("Loss of an item (sum over levels)")
        left.legend(loc="lower left")
        for level in range(levels):
            color = LEVEL_COLORS[level % len(LEVEL_COLORS)]
            right.plot(
                [r["step"] for r in train],
                [r["loss_per_level"][level] for r in train],
                color=color,
                lw=1,
                alpha=0.6,
            )
            right.plot(
                [r["step"] for r in valid],
                [r["loss_per_level"][level] for r in valid],
                color=color,
                lw=1.8,
                marker="o",
                ms=3,
                label=f"level {level + 1}",
            )
        if uniform is not None:
            right.axhline(uniform, color=GRAY, lw=1, ls=(0, (4, 3)))
        right.set_title("Loss by level (dots: valid, thin: train)")
        right.legend(loc="lower left")
        for ax in (left, right):
            ax.set_xlabel("step")
            ax.set_ylabel("nats")
            ax.set_ylim(0, 1.03 * ax.get_ylim()[1])
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            _thousands(ax.xaxis)

    return _svg("training", (4.7, 3.2), draw, panels=2)


def router(records: list[dict[str, Any]]) -> str:
    """Load of each expert at the end (1 = even), and the evenness over the steps."""
    last = np.array(records[-1]["router_load"])
    relative = last * last.shape[1]

    def draw(left: Axes, right: Axes) -> None:
        most = max(2.0, float(relative.max()))
        norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=most)  # a load is never below nothing
        image = left.imshow(relative, cmap="RdBu_r", norm=norm, aspect="auto")
        if relative.size <= 96:
            for (row, column), value in np.ndenumerate(relative):
                dark = abs(float(norm(value)) - 0.5) > 0.3
                left.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="#fefefe" if dark else "#1f2429",
                )
        left.figure.colorbar(image, ax=left, label="load, 1 = even", shrink=0.9)
        left.set_yticks(range(relative.shape[0]), [f"{i + 1}" for i in range(relative.shape[0])])
        left.xaxis.set_major_locator(MaxNLocator(min(12, relative.shape[1]), integer=True))
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value + 1:.0f}"))
        left.grid(False)
        left.set_title("Router load at the end")
        left.set_xlabel("expert")
        left.set_ylabel("layer")
        entropy = np.array([r["router_load_entropy"] for r in records])
        for layer in range(entropy.shape[1]):
            right.plot(
                [r["step"] for r in records],
                entropy[:, layer],
                lw=1.5,
                color=LEVEL_COLORS[layer % len(LEVEL_COLORS)],
                label=f"layer {layer + 1}",
            )
        right.set_ylim(min(0.9, float(entropy.min()) - 0.02), 1.005)
        right.set_title("Evenness (entropy of the load, 1 = even)")
        right.set_xlabel("step")
        right.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _thousands(right.xaxis)
        right.legend(ncols=2, loc="lower right")

    height = 2.4 + 0.16 * relative.shape[0]
    return _svg("router", (4.7, height), draw, panels=2)


def _points(ax: Axes, rows: Sequence[Sequence[Measure]], names: Sequence[str]) -> None:
    """Points with intervals, one line a name, systems above one another within it."""
    systems = list(dict.fromkeys(m.system for row in rows for m in row))
    offsets = {
        s: 0.62 * (i - (len(systems) - 1) / 2) / max(len(systems), 1) for i, s in enumerate(systems)
    }
    alone = all(len(row) == 1 for row in rows)
    for line, row in enumerate(rows):
        for m in row:
            low = m.value if m.low is None else m.low
            high = m.value if m.high is None else m.high
            y = line if alone else line + offsets[m.system]
            color = SYSTEM_COLORS.get(m.system, INK)
            drawn = ax.plot([low, high], [y, y], color=color, lw=2.2, solid_capstyle="butt")
            label = m.system if line == 0 else None
            drawn += ax.plot(m.value, y, "o", color=color, ms=4.5, label=label)
            _tell(drawn, f"{m.system}: {m.value:.4g} [{low:.4g}, {high:.4g}]")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    if not alone:
        _legend_above(ax, min(len(systems), 5))


def _legend_above(ax: Axes, columns: int) -> None:
    """A legend over the axes, where it covers no data."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handlelength=1.4,
    )


def systems(
    rows: Sequence[Sequence[Measure]], names: Sequence[str], *, name: str, label: str
) -> str:
    """Measures of several systems with their intervals.

    Args:
        rows: One list of measures a line.
        names: Of the lines; words of this package, not of the data.
        name: Prefix of the SVG's ids.
        label: Of the axis.
    """

    def draw(ax: Axes) -> None:
        _points(ax, rows, names)
        ax.set_xlabel(label)

    count = max((len(row) for row in rows), default=1)
    return _svg(name, (8.2, 1.4 + (0.28 + 0.1 * count) * len(names)), draw)


def latency(times_ms: npt.NDArray[np.float64], marks: dict[str, float]) -> str:
    """Histogram of the times of single requests, with named times (in ms) marked."""

    def draw(ax: Axes) -> None:
        low, high = float(times_ms.min()), float(times_ms.max())
        edges = np.linspace(low, max(high, low * 1.01 + 1e-6), 31)
        counts, *_ = ax.hist(
            times_ms, bins=edges.tolist(), color=LEVEL_COLORS[0], alpha=0.75, rwidth=0.94
        )
        for bar, count, begin, end in zip(
            ax.patches, np.atleast_1d(counts), edges[:-1], edges[1:], strict=True
        ):
            _tell(bar, f"{begin:,.1f} to {end:,.1f} ms: {count:.0f} requests")
        top = ax.get_ylim()[1]
        for (word, value), color in zip(marks.items(), (INK, "#b5453c"), strict=False):
            label = f"{word} {value:,.4g} ms" if value < 1000 else f"{word} {value:,.0f} ms"
            ax.axvline(value, color=color, lw=1.3, ls=(0, (4, 3)), label=label)
        ax.set_ylim(0, top)
        ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_xlabel("milliseconds a request")
        ax.set_ylabel("requests")
        _thousands(ax.xaxis)
        _legend_above(ax, 2)

    return _svg("latency", (8.2, 2.6), draw)


def calibration(curves: dict[str, Sequence[Sequence[float]]]) -> str:
    """Predicted against observed rates of each target, in bins of equally many rows."""

    def draw(ax: Axes) -> None:
        values = [v for rows in curves.values() for row in rows for v in row[:2] if v > 0]
        low, high = min(values, default=1e-3), max(values, default=1.0)
        ax.plot([low, high], [low, high], color=GRAY, lw=1, ls=(0, (4, 3)))
        for (target, rows), color in zip(curves.items(), TAG_COLORS, strict=False):
            points = np.array([row[:2] for row in rows if row[0] > 0 and row[1] > 0])
            if len(points):
                ax.plot(*points.T, marker="o", ms=3.5, lw=1.4, color=color, label=target)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("predicted rate")
        ax.set_ylabel("observed rate")
        ax.legend(loc="lower right")

    return _svg("calibration", (5.6, 4.2), draw)


def alignment(rounds: Sequence[dict[str, Any]]) -> str:
    """Rewards before and after, and what each iteration did to the model.

    Args:
        rounds: The seed's measures, then those of each iteration (align/alignment.json).
    """

    def draw(left: Axes, middle: Axes, right: Axes) -> None:
        before, after = (np.asarray(rounds[n]["rewards"], np.float64) for n in (0, -1))
        edges = np.histogram_bin_edges(np.concatenate([before, after]), bins=24).tolist()
        left.hist(before, bins=edges, color=GRAY, alpha=0.75, label="before")
        left.hist(after, bins=edges, color=LEVEL_COLORS[0], alpha=0.6, label="after")
        left.set_title("Reward of the best session")
        left.set_xlabel("1 = average of the log")
        left.legend(loc="upper right")
        at = np.arange(len(rounds))
        for key, name, color in (
            ("reward_best", "best by its own score", LEVEL_COLORS[0]),
            ("reward_mean", "mean of the beam", LEVEL_COLORS[1]),
            ("reward_max", "best of the beam", LEVEL_COLORS[2]),
        ):
            middle.plot(at, [r[key] for r in rounds], marker="o", ms=4, color=color, label=name)
        middle.set_title("Reward by iteration")
        for key, name, color in (
            ("drift_seed", "divergence from the seed", LEVEL_COLORS[0]),
            ("drift_last", "from the last snapshot", LEVEL_COLORS[1]),
        ):
            right.plot(at, [r[key] for r in rounds], marker="o", ms=4, color=color, label=name)
        right.set_title("Drift, nats an item")
        for ax in (middle, right):
            ax.set_xlabel("iteration")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        middle.legend(loc="lower right")
        right.legend(loc="upper left")

    return _svg("alignment", (4.7, 3.1), draw, panels=3)


def sweep(
    numbers: Sequence[int],
    values: Sequence[float],
    settings: dict[str, Sequence[Any]],
    logs: Collection[str],
    label: str,
) -> str:
    """A sweep's values by trial, with the best so far, and against each setting.

    Args:
        numbers: Of the trials that ended well.
        values: Their values.
        settings: Name of each setting -> its value in each of these trials.
        logs: Settings on a logarithmic axis.
        label: Of the values.
    """

    def draw(first: Axes, *rest: Axes) -> None:
        best = np.maximum.accumulate(values)
        first.step(numbers, best, where="post", color=LEVEL_COLORS[2], lw=1.5, label="best so far")
        first.set_title("By trial")
        first.set_xlabel("trial")
        first.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        first.legend(loc="lower right")
        for ax, name in zip(rest, settings, strict=True):
            ax.set_title(name)
            if name in logs:
                ax.set_xscale("log")
        columns = [numbers, *settings.values()]
        for ax, places in zip((first, *rest), columns, strict=True):
            ax.set_ylabel(label)
            named = any(isinstance(one, str | bool) or one is None for one in places)
            for number, place, value in zip(numbers, places, values, strict=True):
                (point,) = ax.plot(
                    str(place) if named else place, value, "o", ms=6, color=LEVEL_COLORS[0]
                )
                _tell(point, f"trial {number}: {value:.4g}")

    return _svg("sweep", (4.7, 3.0), draw, panels=1 + len(settings))


def days(
    names: Sequence[str],
    measured: dict[str, Sequence[float]],
    new_items: dict[str, Sequence[float]],
    seconds: Sequence[float],
) -> str:
    """The updates of a run: how they rank, what becomes of new items, what they cost.

    Args:
        names: Of the updates.
        measured: NDCG@10 by what was measured.
        new_items: Shares by what they are of.
        seconds: Of each update.
    """

    def draw(left: Axes, middle: Axes, right: Axes) -> None:
        at = np.arange(len(names))
        for ax, lines in ((left, measured), (middle, new_items)):
            for color, (label, values) in zip(LEVEL_COLORS, lines.items(), strict=False):
                ax.plot(at, values, marker="o", ms=4, color=color, label=label)
                for place, value in enumerate(values):
                    (point,) = ax.plot(place, value, "o", ms=8, alpha=0)
                    _tell(point, f"{names[place]}, {label}: {value:.4g}")
            ax.legend(loc="best")
            ax.set_ylim(bottom=0)
        left.set_title("NDCG@10")
        middle.set_title("Share of new items")
        right.bar(at, seconds, color=LEVEL_COLORS[0])
        right.set_title("Seconds")
        for ax in (left, middle, right):
            ax.set_xlabel("update")
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.xaxis.set_major_formatter(
                FuncFormatter(lambda x, _: str(names[int(x)]) if 0 <= x < len(names) else "")
            )

    return _svg("days", (4.7, 3.0), draw, panels=3)
