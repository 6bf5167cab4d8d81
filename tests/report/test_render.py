"""The report of a synthetic run: it parses, holds the numbers, asks for nothing, escapes texts."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec.cli.main import main
from onerec.errors import DataError
from onerec.evaluation.result import EvalResult, Measure
from onerec.report import plots, render, render_comparison, render_report, sections
from onerec.report.summary import summary

HOSTILE = "<script>alert('$x_1$')</script> \"&' 视频 🎬 %s {{ 7*7 }}"
N, K, LEVELS = 60, 8, 3
VOID = {"meta", "br", "img", "hr", "link", "input", "col", "path", "use", "rect"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; checks that elements close in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def measures() -> tuple[list[Measure], list[Measure]]:
    rows, gaps = [], []
    for s, split in enumerate(("valid", "test")):
        for history in ("masked", "unmasked"):
            for metric in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
                for i, system in enumerate(("model", "popularity", "random")):
                    value = 0.1234 / (i + 1) + 0.001 * s
                    rows.append(
                        Measure(
                            split, history, system, metric, value, 0.9 * value, 1.1 * value, 500
                        )
                    )
                gaps.append(
                    Measure(split, history, "model - popularity", metric, 0.06, 0.01, 0.11, 500)
                )
        for system in ("model", "popularity", "random"):
            rows.append(Measure(split, "masked", system, "recall@10[0]", 0.0, 0.0, 0.0, 3))
            rows.append(Measure(split, "masked", system, "recall@10[1-5]", 0.1, 0.05, 0.2, 30))
            rows.append(Measure(split, "masked", system, "session_hit", 0.3, 0.2, 0.4, 500))
            rows.append(Measure(split, "masked", system, "coverage@10", 0.77, None, None, 5000))
        rows.append(Measure(split, "masked", "model", "legality", 1.0, 1.0, 1.0, 500))
        for i, system in enumerate(("model", "popularity", "random", "oracle", "logged")):
            seconds = 61.5 + i
            rows.append(
                Measure(
                    split, "masked", system, "watch_seconds", seconds, seconds - 2, seconds + 2, 500
                )
            )
        gaps.append(
            Measure(split, "masked", "model - oracle", "watch_seconds", -3.0, -4.0, -2.0, 500)
        )
    return rows, gaps


def item(number: int, *, hit: bool = False, text: str | None = None) -> dict[str, Any]:
    return {
        "item": str(number),
        "text": f"text {number}" if text is None else text,
        "tags": [HOSTILE],
        "hit": hit,
    }


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a finished run has, with hostile texts wherever data can bring them."""
    run: Path = tmp_path_factory.mktemp("runs") / "a run & more"
    rng = np.random.default_rng(0)
    for stage in ("sessions", "tokenize", "pretrain", "evaluate"):
        (run / stage).mkdir(parents=True)
        (run / stage / "stage.json").write_text(
            json.dumps(
                {
                    "stage": stage,
                    "fingerprint": f"feed{stage}",
                    "version": "0.1.0",
                    "seconds": 12.5,
                    "summary": {"codebook_size": K} if stage == "tokenize" else {"note": HOSTILE},
                }
            )
        )
    (run / "config.yaml").write_text(f"model:\n  d_model: 128\n# {HOSTILE}\n")
    (run / "sessions" / "funnel.json").write_text(
        json.dumps(
            {
                "log": {"kind": "parquet", "path": HOSTILE, "rows": 12345},
                "rule": "gap",
                "split": {"rule": "time", "valid_from": 1650988800000},
                "steps": [
                    {"step": "rows in the log", "unit": "exposures", "count": 98765},
                    {"step": "positive exposures", "unit": "exposures", "count": 4321},
                    {"step": "sessions kept", "unit": "sessions", "count": 0},
                ],
                "config": {"hidden": "not shown"},
            }
        )
    )
    ids = [f"v{i}" for i in range(N)]
    tags = [[HOSTILE], ["music", "all"], None, [f"tag{i % 17}" for i in range(3)], []]
    pq.write_table(
        pa.table(
            {
                "item_id": ids,
                "tags": pa.array([tags[i % 5] for i in range(N)], pa.list_(pa.string())),
                "train_count": pa.array(rng.zipf(1.8, N) % 1000, pa.int64()),
            }
        ),
        run / "sessions" / "items.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "split": ["train"] * 70 + ["valid"] * 20 + ["test"] * 10,
                "start": pa.array(rng.integers(0, 300, 100), pa.int32()),
            }
        ),
        run / "sessions" / "sessions.parquet",
    )
    codes = rng.integers(0, K, (N, LEVELS)).tolist()
    codes[1] = codes[0]
    pq.write_table(
        pa.table(
            {
                "item_id": ids[::-1],
                "codes": pa.array(codes, pa.list_(pa.int32())),
                "leaf": list(range(N)),
            }
        ),
        run / "tokenize" / "catalog.parquet",
    )
    (run / "tokenize" / "metrics.json").write_text(
        json.dumps({"quantizer": {"relative_mse": 0.4242}, "catalog": {"collision_rate": 0.25}})
    )
    with (run / "pretrain" / "metrics.jsonl").open("w") as file:
        for step in range(10, 210, 10):
            levels = [math.log(K) * math.exp(-step / 200 * (i + 1)) for i in range(LEVELS)]
            load = rng.dirichlet(np.full(6, 30.0), size=2)
            train = {
                "kind": "train",
                "step": step,
                "epoch": step / 50,
                "loss": sum(levels),
                "loss_per_level": levels,
                "lr": 1e-3,
                "tokens_per_s": 1000.0,
                "seconds": step * 0.1,
                "router_load": load.tolist(),
                "router_load_entropy": (-(load * np.log(load)).sum(1) / np.log(6)).tolist(),
            }
            file.write(json.dumps(train) + "\n")
            if step % 50 == 0:
                valid = {"kind": "valid", "step": step, "loss": sum(levels) + 0.1}
                valid |= {"loss_per_level": levels, "best": True}
                file.write(json.dumps(valid) + "\n")
    rows, gaps = measures()
    size = {
        "sessions": 500,
        "users": 400,
        "users_in_split": 4000,
        "targets": 500,
        "targets_in_history": 7,
        "targets_not_in_train": 11,
        "empty_histories": 0,
    }
    times = rng.gamma(4.0, 2.0, 200)
    EvalResult(
        protocol={
            "items": N,
            "splits": ["valid", "test"],
            "served": "masked",
            "split_sizes": {"valid": size, "test": size},
            "splits_without_sessions": [],
            "ks": [5, 10],
            "beam_width": 20,
            "resamples": 1000,
            "confidence": 0.95,
            "popular_top": 0.1,
            "seed": 3,
            "notes": ["A hit is the item itself."],
        },
        measures=rows,
        differences=gaps,
        latency={
            "requests": 200,
            "times_ms": times.tolist(),
            "p50_ms": float(np.percentile(times, 50)),
            "p90_ms": 12.0,
            "p99_ms": float(np.percentile(times, 99)),
            "mean_ms": 8.0,
            "setting": "one request at a time",
        },
        samples=[
            {
                "user": HOSTILE,
                "split": "test",
                "history_length": 20,
                "history": [item(1), item(2, text="")],
                "recommended": [item(3, hit=True, text=HOSTILE), item(4)],
                "watched": [item(3, hit=True)],
            }
        ],
        versions={"onerec": "0.1.0", "torch": "2.13.0"},
    ).save(run / "evaluate" / "evaluation.json")
    return run


@pytest.fixture(scope="module")
def html(whole_run: Path) -> str:
    return render_report(whole_run).read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as empty elements, for tests of everything around them."""
    monkeypatch.setattr(plots, "_svg", lambda *args, **options: "<svg></svg>")


def test_the_page_is_well_formed_and_whole(html: str) -> None:
    page = Page(html)
    assert 'class="problem"' not in html
    assert page.tags.count("figure") == 10
    assert page.tags.count("svg") == 15  # three figures have two panels, one has three
    for heading in ("Data", "Semantic ids", "Tree of ids", "Training", "Router load", "Ranking"):
        assert heading in page.words
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert len(html) < 1_500_000


def test_nothing_is_fetched(html: str) -> None:
    page = Page(html)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
        assert not name.startswith("on"), (tag, name)
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.search(r"url\((?!#)|@import|https?://", outside)


def test_references_inside_figures_hit_their_target(html: str) -> None:
    page = Page(html)
    ids = {value for _, name, value in page.attributes if name == "id"}
    wanted = set(re.findall(r"url\(#([^)]+)\)", html))
    wanted |= {v[1:] for _, n, v in page.attributes if n.endswith("href") and v.startswith("#")}
    assert wanted <= ids


def test_hostile_texts_are_shown_and_not_run(html: str) -> None:
    page = Page(html)
    shown = " ".join(HOSTILE.split())
    # config, log path, legend of tags, stage summaries, samples: text, tags and user.
    assert page.words.count(shown) >= 8
    assert "<script" not in html
    # Figures hold no text of the data.
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        assert "alert" not in svg
        assert "music" not in svg


def test_the_numbers_are_there(html: str) -> None:
    words = Page(html).words
    for wanted in (
        "0.1244",  # recall of the model, test
        "[0.1120, 0.1368]",
        "+0.0600",
        "the model is better than popularity beyond the interval",
        "98,765",
        "2022-04-26 16:00 UTC",
        "a seeded sample of 4,000",
        "text 3",
        "item 2",  # an item without a text
        "last 2 of 20",
        "0.4242",
        "feedtokeni",
        "d_model: 128",
        "model - oracle",
    ):
        assert wanted in words, wanted
    assert "not shown" not in words
    assert 'class="hit"' in html
    # Model 0.1234 on valid, popularity half of it: the lead is +0.0600.
    assert "+0.0600 (+97.2%)" in words


def test_bold_marks_the_best_of_a_row(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    result = EvalResult.load(run / "evaluate" / "evaluation.json")
    for split in ("valid", "test"):
        result.measures.append(
            Measure(split, "masked", "count ranker", "recall@10", 0.5, 0.4, 0.6, 500)
        )
        result.differences.append(
            Measure(split, "masked", "model - count ranker", "recall@10", -0.3, -0.4, -0.2, 500)
        )
    result.save(run / "evaluate" / "evaluation.json")
    shown = sections.ranking(run)
    systems = ("model", "count ranker", "popularity", "random")
    assert shown["systems"] == systems
    best = {row["metric"]: row["best"] for row in shown["tables"][0]["rows"]}
    assert best["recall@10"] == [False, True, False, False] * 2
    assert best["ndcg@10"] == [True, False, False, False] * 2
    assert not any(any(row["best"]) for row in shown["extra"])
    words = Page(render_report(run, tmp_path / "report.html").read_text()).words
    assert "the model is worse than count ranker beyond the interval" in words
    assert "-0.3000 (-60.0%)" in words


@pytest.mark.usefixtures("undrawn")
def test_the_tree_counts_what_the_catalogue_says(whole_run: Path) -> None:
    shown = sections.tree(whole_run)
    assert sum(count for _, _, count in shown["legend"]) == N
    # "all" and "music" are on one item in five each; three tags are on another fifth.
    assert {name for _, name, _ in shown["legend"]} >= {HOSTILE, "no tag"}
    levels = [own for _, _, own, _ in shown["purity"]]
    assert levels == sorted(levels)  # finer prefixes are purer
    ids = sections.semantic_ids(whole_run)
    assert ids["ids"] < N
    assert [row["max"] for row in ids["levels"]] >= [math.ceil(N / K)] * LEVELS


def test_an_item_with_common_tags_only_has_its_first() -> None:
    lists = pa.chunked_array([[["Drama"], ["Drama", "War"], ["War", "Drama"], ["Drama"], None, []]])
    of_item, names, counts = sections._main_tags(lists)
    assert (names, counts.tolist()) == (["Drama", "War"], [2, 2])
    assert of_item.tolist() == [0, 1, 1, 0, -1, -1]


def test_numbers_for_people() -> None:
    shown = {12345: "12,345", 1.0: "1", 5.0: "5", 0.0: "0", 0.0532: "0.0532", 0.000413: "0.00041"}
    assert {value: render._number(value) for value in shown} == shown
    assert render._number(1261.4) == "1,261"
    assert render._number(float("nan")) == "n/a"
    flat = Measure("test", "masked", "model", "legality", 1.0, 1.0, 1.0, 5)
    assert render._interval(flat) == ""
    assert render._interval(replace(flat, value=0.5, low=0.4, high=0.6)) == "[0.4000, 0.6000]"
    told = [sections.duration(s) for s in (3.21, 41.2, 788.1, 9600)]
    assert told == ["3.2 s", "41 s", "13 min 8 s", "2 h 40 min"]


def test_figures_follow_the_page_into_dark_mode_and_tell_their_numbers(html: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    used = {name for svg in figures for name in re.findall(r"var\(--(\w+)\)", svg)}
    light, dark = (plots.color_rules(dark=dark) for dark in (False, True))
    for name in used:
        assert f"--{name}: " in light
        assert f"--{name}: " in dark
    for svg in figures:
        assert plots.INK not in svg, "a color of its own would be black on black"
    assert "prefers-color-scheme: dark" in html
    titles = [t for svg in figures for t in re.findall(r"<title>(.*?)</title>", svg)]
    assert "step 200: valid loss 1.2499" in titles
    assert any(re.fullmatch(r"model: 0\.1244 \[0\.112, 0\.1368\]", t) for t in titles)


def test_few_requests_have_no_99th_percentile(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    assert list(sections.latency(run)["marks"]) == ["p50", "p90", "p99"]
    result = EvalResult.load(run / "evaluate" / "evaluation.json")
    result.latency["times_ms"] = result.latency["times_ms"][:10]
    result.save(run / "evaluate" / "evaluation.json")
    assert list(sections.latency(run)["marks"]) == ["p50", "p90"]


def change(path: Path, **values: Any) -> None:
    """Sets keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_the_first_screen(whole_run: Path, tmp_path: Path) -> None:
    shown = summary(whole_run)
    assert shown["about"][0].startswith(f"Log: {HOSTILE}, 12,345 rows of ")
    assert shown["about"][1] == "Measured on 500 next items of 400 users (test split), " + (
        f"ranked among all {N} items."
    )
    assert [row["system"] for row in shown["rows"]] == ["model", "popularity", "random"]
    assert shown["metrics"] == ["recall@10", "ndcg@10", "watch_seconds"]
    assert [row["best"][0] for row in shown["rows"]] == [True, False, False]
    # 0.1244 over popularity's 0.0627, whose paired lead is 0.01 to 0.11.
    assert shown["rows"][0]["lift"] == pytest.approx(100 * (0.1244 / 0.0627 - 1))
    assert shown["lead"] == pytest.approx([100 * 0.01 / 0.0627, 100 * 0.11 / 0.0627])
    assert shown["rows"][1]["lift"] is None
    assert shown["next"] == [], "nothing stands out"


def test_a_run_of_lists_has_no_section_on_sessions(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    result = EvalResult.load(run / "evaluate" / "evaluation.json")
    assert not sections.only_lists(run)
    result.protocol["ranks_items"] = True
    result.save(run / "evaluate" / "evaluation.json")
    assert not sections.only_lists(run), "a world's true watch time is worth a section"
    result.measures = [m for m in result.measures if m.metric != "watch_seconds"]
    result.save(run / "evaluate" / "evaluation.json")
    assert sections.only_lists(run)
    words = Page(render_report(run, tmp_path / "page.html").read_text(encoding="utf-8")).words
    assert "Generated sessions" not in words
    assert "Samples" in words


def test_the_run_says_what_to_do_next(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    targets = {"positive rows": 1000, "that are a training target": 40}
    vectors = {"source": "cooccurrence", "filled": 0}
    change(run / "sessions" / "funnel.json", targets=targets, embeddings=vectors, items=N)
    trained = {"steps": 36, "selected_step": 36, "improving": True, "parameters": 9, "samples": 7}
    change(run / "pretrain" / "stage.json", summary=trained)
    result = EvalResult.load(run / "evaluate" / "evaluation.json")
    result.differences = [replace(m, low=-0.1, high=0.11) for m in result.differences]
    result.protocol["split_sizes"]["test"]["targets_not_in_train"] = 300
    result.save(run / "evaluate" / "evaluation.json")
    told = summary(run)["next"]
    assert told[0].startswith("1 of 25 positive rows is a training target: --sessions.rule next")
    assert told[1].startswith("Item vectors come from co-occurrence")
    assert told[2].startswith("The model was still improving at the end of 36 steps: train longer")
    assert told[3].startswith("The model is not shown to be better than popularity")
    assert told[4].startswith("Only 400 users are measured, so the intervals are wide: --eval")
    assert told[5].startswith("60 % of the test targets do not occur in training")
    assert len(told) == 6
    words = Page(render_report(run).read_text(encoding="utf-8")).words
    assert "1 of 25 positive rows" in words
    # In a simulated world the true watch time tells whether counting is beaten.
    seconds = Measure("test", "masked", "model - popularity", "watch_seconds", 3.0, 1.0, 5.0, 500)
    result.differences.append(seconds)
    result.save(run / "evaluate" / "evaluation.json")
    assert not any("not shown to be better" in line for line in summary(run)["next"])
    result.differences[-1] = replace(seconds, low=-1.0)
    result.save(run / "evaluate" / "evaluation.json")
    assert any("not shown to be better" in line for line in summary(run)["next"])
    change(run / "pretrain" / "stage.json", summary={**trained, "improving": False})
    change(run / "pretrain" / "stage.json", summary={**trained, "improving": 0, "selected_step": 9})
    assert summary(run)["next"][2].startswith("The best validation was at step 9 of 36")


def compared_runs(whole_run: Path, folder: Path) -> list[Path]:
    """Two runs whose sessions have values: the second has 0.2 more in nine of ten, 50 in common."""
    runs = []
    rng = np.random.default_rng(0)
    values = rng.random(60)
    for number, name in enumerate(("monday", "tuesday")):
        run = folder / name
        shutil.copytree(whole_run, run)
        seen = slice(10 * number, 50 + 10 * number)
        better = np.where(np.arange(60) % 10 > 0, 0.2 * number, 0.0)
        rows = {
            "split": ["test"] * 50,
            "user_id": [f"u{u}" for u in range(60)][seen],
            "start": pa.array(range(60), pa.int64())[seen],
            "target": ["a b"] * 50,
            "recall@10, masked": (values + better)[seen],
        }
        pq.write_table(pa.table(rows), run / "evaluate" / "rows.parquet")
        (run / "config.yaml").write_text(f"model: {{d_model: {64 * (number + 1)}, n_heads: 2}}\n")
        runs.append(run)
    return runs


def test_two_runs_side_by_side(whole_run: Path, tmp_path: Path) -> None:
    runs = compared_runs(whole_run, tmp_path)
    out = render_comparison(*runs, tmp_path / "two.html")
    html = out.read_text(encoding="utf-8")
    words = Page(html).words
    assert "tuesday is better than monday beyond the interval (Recall@10 on the test" in words
    # Of the 40 common sessions 36 have 0.2 more.
    assert "+0.1800" in words
    assert "Paired over the 40 that both measured" in words
    assert "model, d model 64 128" in words
    assert "n heads" not in words, "an equal setting"
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)

    (runs[0] / "evaluate" / "rows.parquet").unlink()
    words = Page(render_comparison(*runs, out).read_text(encoding="utf-8")).words
    assert "No held-out session was measured in both runs" in words
    (runs[0] / "evaluate" / "evaluation.json").unlink()
    with pytest.raises(DataError, match=r"monday/evaluate/evaluation.json: there is no such file"):
        render_comparison(*runs, out)
    with pytest.raises(DataError, match="no such run directory"):
        render_comparison(tmp_path / "nowhere", runs[1], out)


def test_the_command_compares(
    whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = compared_runs(whole_run, tmp_path)
    out = tmp_path / "two.html"
    assert main(["report", "--compare", *map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == ["comparison", str(out)]
    assert "tuesday" in out.read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["report", "--compare", str(runs[0])])


def test_dominant_tags_by_hand() -> None:
    sids = np.array([[0, 0], [0, 0], [0, 1], [2, 1], [2, 3]], dtype=np.int32)
    starts = plots.prefix_starts(sids, 1)
    assert starts.tolist() == [True, False, False, True, False]
    assert plots.prefix_starts(sids, 2).tolist() == [True, False, True, True, True]
    tag, share = plots.dominant_tags(np.array([1, 1, 0, -1, -1]), starts, 2)
    assert tag.tolist() == [1, 1, 1, 2, 2]
    np.testing.assert_allclose(share, [2 / 3, 2 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("sessions", "sessions/funnel.json is missing (stage sessions has not been run)"),
        ("tokenize", "tokenize/metrics.json is missing (stage tokenize has not been run)"),
        ("pretrain", "pretrain/metrics.jsonl is missing (stage pretrain has not been run)"),
        ("evaluate", "evaluate/evaluation.json is missing (stage evaluate has not been run)"),
        ("config.yaml", "config.yaml is missing"),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_missing_stage_is_said(whole_run: Path, tmp_path: Path, missing: str, said: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    path = run / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    html = render_report(run, tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert said in Page(html).words
    assert html.count("<svg") >= 3 or missing == "config.yaml"


@pytest.mark.usefixtures("undrawn")
def test_an_empty_directory_gives_a_page(tmp_path: Path) -> None:
    words = Page(render_report(tmp_path).read_text(encoding="utf-8")).words
    assert words.count("has not been run") == 10
    with pytest.raises(DataError, match="no such run directory"):
        render_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sessions/funnel.json", b'{"steps": ['),
        ("sessions/funnel.json", b"[1, 2]"),
        ("sessions/items.parquet", b"PAR1 cut"),
        ("tokenize/catalog.parquet", b""),
        ("tokenize/stage.json", b"not json"),
        ("pretrain/metrics.jsonl", b"{}\n{}\n"),
        ("pretrain/metrics.jsonl", b""),
        ("evaluate/evaluation.json", b'{"format": 1, "protocol": {}}'),
        ("evaluate/evaluation.json", b'{"format": 99}'),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_damaged_file_is_said(whole_run: Path, tmp_path: Path, name: str, content: bytes) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    (run / name).write_bytes(content)
    words = Page(render_report(run).read_text(encoding="utf-8")).words
    assert "The files of this stage cannot be read" in words


@pytest.mark.usefixtures("undrawn")
def test_a_dense_model_has_no_router_plot(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    path = run / "pretrain" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record.pop("router_load", None)
        record.pop("router_load_entropy", None)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    words = Page(render_report(run).read_text(encoding="utf-8")).words
    assert "The model has no experts" in words


def test_a_figure_is_the_same_twice() -> None:
    sizes = np.array([1, 1, 2, 5])
    assert plots.collisions(sizes) == plots.collisions(sizes)
